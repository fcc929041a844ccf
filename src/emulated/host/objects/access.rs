// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access objects: users of an IOAS without an IOMMU.

use std::collections::btree_map::Entry;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::object::{Access, AccessUnmap, Object};
use super::Objects;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::ioas::{range_of, Area, Part, Transfer};
use twostage::iommufd::{Errno, ObjectId, UserMemory};

impl Objects {
    /// Adds an access object, attached to nothing. Its creator holds it.
    pub fn access_create(&mut self, listener: Option<Arc<dyn AccessUnmap>>) -> Outcome<ObjectId> {
        let access = Access { listener, ioas: None, pinned_in: None, pins: BTreeMap::new() };
        let id = self.table.insert(Object::Access(access))?;
        self.table.hold(id);
        Ok(id)
    }

    /// The IOAS that the access object is attached to.
    pub fn access_ioas(&self, access: ObjectId) -> Outcome<Option<ObjectId>> {
        Ok(self.table.access(access)?.ioas)
    }

    /// Those that are attached to an IOAS.
    pub fn attached_accesses(&self) -> Vec<ObjectId> {
        let attached = |(id, object): (ObjectId, &Object)| match object {
            Object::Access(access) => access.ioas.map(|_| id),
            _ => None,
        };
        self.table.iter().filter_map(attached).collect()
    }

    /// The listeners for unmaps of a part of `ioas`.
    pub fn unmap_listeners(&self, ioas: ObjectId) -> Outcome<Vec<Arc<dyn AccessUnmap>>> {
        let listener = |id: &ObjectId| self.table.access(*id).ok()?.listener.clone();
        Ok(self.table.ioas(ioas)?.accesses.iter().filter_map(listener).collect())
    }

    /// Starts to move an access object to the IOAS `new`, or to none. If that is a change, the
    /// listener must then be told to unpin everything, followed by [`Self::access_finish_move`].
    ///
    /// # Errors
    /// `EBUSY` it is being moved; `ENOENT` there is no such IOAS; `EADDRINUSE` a mapping there is
    /// not page-aligned; `ENOMEM`. Nothing has changed then.
    pub fn access_start_move(
        &mut self,
        access: ObjectId,
        new: Option<ObjectId>,
    ) -> Outcome<Option<Option<Arc<dyn AccessUnmap>>>> {
        let object = self.table.access(access)?;
        let old = object.ioas;
        if old != object.pinned_in {
            return refuse(Errno::EBUSY, format!("access object {access} is changing its IOAS"));
        }
        if let Some(new) = new {
            self.table.ioas(new)?;
        }
        if old == new {
            return Ok(None);
        }
        let listener = object.listener.clone().filter(|_| old.is_some());
        if let Some(new) = new {
            allocate("the user of an IOAS")?;
            self.table.ioas_mut(new)?.accesses.push(access);
            if let Err(refusal) = self.align(new) {
                self.table.ioas_mut(new)?.accesses.pop();
                return Err(refusal);
            }
            self.table.hold(new);
        }
        self.table.access_mut(access)?.ioas = None;
        Ok(Some(listener))
    }

    /// Finishes [`Self::access_start_move`]. Remaining pins are removed.
    pub fn access_finish_move(&mut self, access: ObjectId, new: Option<ObjectId>) -> Outcome<()> {
        if let Some(old) = self.table.access(access)?.pinned_in {
            let pins = std::mem::take(&mut self.table.access_mut(access)?.pins);
            for ((first, last), count) in pins {
                for _ in 0..count {
                    self.unpin_range(old, &(first..=last), false)?;
                }
            }
            self.table.ioas_mut(old)?.accesses.retain(|other| *other != access);
            self.align(old)?;
            self.table.release(old);
        }
        let object = self.table.access_mut(access)?;
        (object.ioas, object.pinned_in) = (new, new);
        Ok(())
    }

    /// Destroys an access object that is attached to nothing.
    pub fn access_destroy(&mut self, access: ObjectId) -> Outcome<()> {
        self.table.access(access)?;
        self.table.release(access);
        self.destroy(access)
    }

    /// Pins the pages of `length` bytes at `iova`, and returns their memory.
    ///
    /// # Errors
    /// `EINVAL` no listener, empty, not whole pages, or being unmapped; `EOVERFLOW` past the end;
    /// `ENOENT` not attached, or a hole; `EPERM` the mapping does not allow what is `wanted`; and
    /// as [`crate::ioas::Pages::pin`].
    pub fn access_pin(
        &mut self,
        access: ObjectId,
        iova: u64,
        length: u64,
        wanted: Wanted,
    ) -> Outcome<Vec<UserMemory>> {
        let object = self.table.access(access)?;
        if object.listener.is_none() {
            return refuse(Errno::EINVAL, "there is no callback for unmaps");
        }
        let (ioas, range) = self.attached(access, iova, length)?;
        allocate("the record of a pin")?;
        let places = self.pin_range(ioas, &range, wanted, false)?;
        *self.table.access_mut(access)?.pins.entry(key(&range)).or_default() += 1;
        Ok(places)
    }

    /// Reverts one [`Self::access_pin`] of exactly this range.
    ///
    /// # Errors
    /// `EINVAL` it is not pinned.
    pub fn access_unpin(&mut self, access: ObjectId, iova: u64, length: u64) -> Outcome<()> {
        let object = self.table.access_mut(access)?;
        let range = range_of(iova, length).filter(|range| object.pins.contains_key(&key(range)));
        let (Some(ioas), Some(range)) = (object.pinned_in, range) else {
            return refuse(Errno::EINVAL, format!("{iova:#x}+{length:#x} is not pinned"));
        };
        if let Entry::Occupied(mut count) = object.pins.entry(key(&range)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        self.unpin_range(ioas, &range, false)
    }

    /// Copies to or from memory at `iova`.
    ///
    /// # Errors
    /// As [`Self::access_pin`], but needs neither a listener nor whole pages. What precedes the
    /// failing area has been copied.
    pub fn access_transfer(
        &self,
        access: ObjectId,
        iova: u64,
        mut transfer: Transfer<'_>,
    ) -> Outcome<()> {
        let (ioas, range) = self.attached(access, iova, transfer.len() as u64)?;
        let space = &self.table.ioas(ioas)?.space;
        let (parts, whole) = space.parts(&range);
        let wanted = match transfer {
            Transfer::Read(_) => Wanted::Read,
            Transfer::Write(_) => Wanted::Write,
        };
        for Part { area, iova: at, piece } in parts {
            check_area(space.area(area), at, wanted)?;
            // Within the buffer: a part is within the range.
            let (from, length) = ((at - iova) as usize, piece.length as usize);
            piece.pages.transfer(piece.offset, transfer.part(from, length))?;
        }
        check_whole(whole, &range)
    }

    /// The IOAS of an access object, and a range of IOVAs.
    fn attached(
        &self,
        access: ObjectId,
        iova: u64,
        length: u64,
    ) -> Outcome<(ObjectId, RangeInclusive<u64>)> {
        let object = self.table.access(access)?;
        if length == 0 {
            return refuse(Errno::EINVAL, "length 0");
        }
        let Some(range) = range_of(iova, length) else {
            return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
        };
        match object.ioas {
            Some(ioas) => Ok((ioas, range)),
            None => refuse(Errno::ENOENT, format!("access object {access} has no IOAS")),
        }
    }

    /// Pins pages of an IOAS; `lock` prevents unmapping them.
    pub(super) fn pin_range(
        &mut self,
        ioas: ObjectId,
        range: &RangeInclusive<u64>,
        wanted: Wanted,
        lock: bool,
    ) -> Outcome<Vec<UserMemory>> {
        let space = &mut self.table.ioas_mut(ioas)?.space;
        let (parts, whole) = space.parts(range);
        let mut places = Vec::new();
        let mut pinned = 0;
        let outcome = parts
            .iter()
            .try_for_each(|part| {
                check_pages(space.area(part.area), part, range)?;
                check_area(space.area(part.area), part.iova, wanted)?;
                places.extend(part.piece.pages.pin(part.piece.offset, part.piece.length)?);
                pinned += 1;
                Ok(())
            })
            .and_then(|()| check_whole(whole, range));
        if outcome.is_err() {
            for Part { piece, .. } in parts.iter().take(pinned) {
                piece.pages.unpin(piece.offset, piece.length);
            }
        } else {
            for part in &parts {
                if let Some(area) = space.area_mut(part.area) {
                    area.pins += 1;
                    area.locks += u32::from(lock);
                }
            }
        }
        outcome.map(|()| places)
    }

    /// Reverts [`Self::pin_range`].
    pub(super) fn unpin_range(
        &mut self,
        ioas: ObjectId,
        range: &RangeInclusive<u64>,
        lock: bool,
    ) -> Outcome<()> {
        let space = &mut self.table.ioas_mut(ioas)?.space;
        // Pinned areas are neither unmapped nor split, so the parts are the same.
        for Part { area, piece, .. } in space.parts(range).0 {
            piece.pages.unpin(piece.offset, piece.length);
            if let Some(area) = space.area_mut(area) {
                area.pins = area.pins.saturating_sub(1);
                area.locks = area.locks.saturating_sub(u32::from(lock));
            }
        }
        Ok(())
    }
}

/// The access that an access object needs to an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Read,
    Write,
}

fn key(range: &RangeInclusive<u64>) -> (u64, u64) {
    (*range.start(), *range.end())
}

/// Whether a part consists of whole pages, except at the end of the range.
fn check_pages(area: Option<&Area>, part: &Part, range: &RangeInclusive<u64>) -> Outcome<()> {
    let Part { iova, piece, .. } = part;
    let end = piece.pages.page_offset(piece.offset + piece.length);
    let last = area.is_some_and(|area| *range.end() <= area.last);
    if piece.pages.page_offset(piece.offset) != 0 || (end != 0 && !last) {
        return refuse(
            Errno::EINVAL,
            format!("the mapping at {iova:#x} does not consist of whole pages"),
        );
    }
    Ok(())
}

/// Whether an area allows what is `wanted`.
fn check_area(area: Option<&Area>, iova: u64, wanted: Wanted) -> Outcome<()> {
    let leaving = area.is_none_or(|area| area.leaving);
    if leaving {
        return refuse(Errno::EINVAL, format!("the mapping at {iova:#x} is being unmapped"));
    }
    let allowed = area.is_some_and(|area| match wanted {
        Wanted::Read => area.protection.read,
        Wanted::Write => area.protection.write,
    });
    if !allowed {
        return refuse(Errno::EPERM, format!("the mapping at {iova:#x} allows no {wanted:?}"));
    }
    if area.is_some_and(|area| area.pages.dma_buf().is_some()) {
        return refuse(Errno::EINVAL, format!("{iova:#x} maps device memory"));
    }
    Ok(())
}

fn check_whole(whole: bool, range: &RangeInclusive<u64>) -> Outcome<()> {
    if !whole {
        return refuse(Errno::ENOENT, format!("{range:#x?} is not completely mapped"));
    }
    Ok(())
}

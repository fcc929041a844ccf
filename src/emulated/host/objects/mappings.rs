// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mappings of an IOAS: pinned while there is a HWPT, visible to its IOMMU, and unmapped; and
//! who is charged for them (`IOMMU_OPTION_RLIMIT_MODE`, `IOMMU_IOAS_CHANGE_PROCESS`).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::object::{Ioas, Object};
use super::Objects;
use crate::drivers::PagingDomain;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::host::user_space::Credentials;
use crate::ioas::{range_of, Area, Pages, RlimitMode, Source, Taken};
use crate::units::stage2::Mapping;
use twostage::iommufd::{Errno, ObjectId, Protection};

/// An unmap in progress. It may have to stop and wait for access objects to unpin pages.
#[derive(Debug)]
pub(crate) struct Unmap {
    /// The IOAS.
    pub ioas: ObjectId,
    range: RangeInclusive<u64>,
    /// Number of bytes unmapped so far.
    pub bytes: u64,
}

/// Why an unmap has stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All is unmapped.
    Done,
    /// An access object has pinned pages of the area with this first IOVA and length in bytes.
    Pinned(u64, u64),
}

impl Unmap {
    /// The arguments of `IOMMU_IOAS_UNMAP`.
    ///
    /// # Errors
    /// `EOVERFLOW` the largest number, or past the end of the address space; `EINVAL` empty.
    pub fn of_ioctl(ioas: ObjectId, iova: u64, length: u64) -> Outcome<Self> {
        if (iova, length) == (0, u64::MAX) {
            return Ok(Self::all(ioas));
        }
        // The largest number means "all" in some verbs and is invalid in the others.
        if iova == u64::MAX || length == u64::MAX {
            return refuse(Errno::EOVERFLOW, "the IOVA or the length is 2^64-1");
        }
        Self::of_range(ioas, iova, length)
    }

    /// `length` bytes from `iova` on.
    ///
    /// # Errors
    /// As [`Self::of_ioctl`].
    pub fn of_range(ioas: ObjectId, iova: u64, length: u64) -> Outcome<Self> {
        if length == 0 {
            return refuse(Errno::EINVAL, "length 0");
        }
        match range_of(iova, length) {
            Some(range) => Ok(Self { ioas, range, bytes: 0 }),
            None => refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64")),
        }
    }

    /// Everything.
    pub fn all(ioas: ObjectId) -> Self {
        Self { ioas, range: 0..=u64::MAX, bytes: 0 }
    }
}

impl Objects {
    /// Fills a new HWPT with `domain` with the mappings of `ioas`; the first one pins the pages.
    ///
    /// # Errors
    /// As [`crate::ioas::Pages::pin`]; `EINVAL` the HWPT does not support a mapping. Nothing is
    /// left of it then.
    pub(super) fn fill(&self, ioas: ObjectId, domain: &dyn PagingDomain) -> Outcome<()> {
        let ioas = self.table.ioas(ioas)?;
        let first = ioas.hwpts.is_empty();
        let mut filled = Vec::new();
        for (start, area) in ioas.space.areas() {
            let done = pin_if(first, start, area).and_then(|mappings| {
                filled.push((start, area));
                make_room(domain, start, area.protection)?;
                mappings.into_iter().for_each(|mapping| ioas.stage2.insert(mapping));
                Ok(())
            });
            if done.is_err() {
                if first {
                    filled.iter().for_each(|(start, area)| take_back(ioas, *start, area));
                }
                return done;
            }
        }
        Ok(())
    }

    /// Reverts [`Self::fill`], after the last HWPT.
    pub(super) fn unfill(&self, ioas: ObjectId) -> Outcome<()> {
        let ioas = self.table.ioas(ioas)?;
        for (start, area) in ioas.space.areas() {
            take_back(ioas, start, area);
        }
        Ok(())
    }

    /// Adds areas that fit, each with its first IOVA.
    ///
    /// # Errors
    /// As [`Self::fill`]. No area is added then.
    pub(super) fn add_areas(&mut self, ioas: ObjectId, areas: Vec<(u64, Area)>) -> Outcome<()> {
        let object = self.table.ioas(ioas)?;
        let filled = !object.hwpts.is_empty();
        let mut mappings = Vec::new();
        let mut pinned = 0;
        let done = areas.iter().try_for_each(|(start, area)| {
            mappings.extend(pin_if(filled, *start, area)?);
            pinned += 1;
            object.hwpts.iter().try_for_each(|hwpt| {
                make_room(&*self.table.hwpt_paging(*hwpt)?.domain, *start, area.protection)
            })
        });
        if done.is_err() {
            if filled {
                areas.iter().take(pinned).for_each(|(start, area)| unpin(*start, area));
            }
            return done;
        }
        mappings.into_iter().for_each(|mapping| object.stage2.insert(mapping));
        let space = &mut self.table.ioas_mut(ioas)?.space;
        areas.into_iter().for_each(|(start, area)| space.insert(start, area));
        Ok(())
    }

    /// Finishes the unmapping of areas already removed from the IOAS. When it returns no DMA uses
    /// them.
    fn drop_areas(&self, ioas: ObjectId, areas: &[(u64, Area)]) -> Outcome<()> {
        let object = self.table.ioas(ioas)?;
        if object.hwpts.is_empty() || areas.is_empty() {
            return Ok(());
        }
        for (start, area) in areas {
            object.stage2.remove_in(*start..=area.last);
        }
        self.stage2_changed(ioas)?;
        for (start, area) in areas {
            self.forget_dirty(ioas, &(*start..=area.last))?;
            unpin(*start, area);
        }
        Ok(())
    }

    /// Makes every IOMMU drop what it caches of the mappings of `ioas`.
    pub(super) fn stage2_changed(&self, ioas: ObjectId) -> Outcome<()> {
        let stage2 = &self.table.ioas(ioas)?.stage2;
        self.machine.drivers().iter().for_each(|driver| driver.stage2_changed(stage2));
        Ok(())
    }

    /// Continues an unmap until it has to stop.
    ///
    /// # Errors
    /// `ENOENT` there is no such IOAS, or an area would be split; `EBUSY` an area is locked. Whole
    /// areas below it are unmapped nevertheless, as in Linux.
    pub fn unmap(&mut self, unmap: &mut Unmap) -> Outcome<Stop> {
        let space = &mut self.table.ioas_mut(unmap.ioas)?.space;
        let mut areas = Vec::new();
        let stop = loop {
            match space.take_next(&unmap.range) {
                Ok(Taken::Area(start, area)) => {
                    // Only the whole address space does not fit, which no IOAS maps.
                    unmap.bytes = unmap.bytes.saturating_add(area.length(start));
                    areas.push((start, area));
                }
                Ok(Taken::Pinned(start, length)) => break Ok(Stop::Pinned(start, length)),
                Ok(Taken::Nothing) => break Ok(Stop::Done),
                Err(refusal) => break Err(refusal),
            }
        };
        if let Ok(Stop::Pinned(start, _)) = stop {
            // What another thread maps below before the unmap continues is not affected.
            unmap.range = start..=*unmap.range.end();
        }
        self.drop_areas(unmap.ioas, &areas)?;
        stop
    }

    /// `IOMMU_OPTION_RLIMIT_MODE`, read.
    pub fn rlimit_mode(&self) -> RlimitMode {
        self.rlimit_mode
    }

    /// `IOMMU_OPTION_RLIMIT_MODE`, set; only before there are objects.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_RESOURCE`; `EBUSY` there are objects; `EINVAL` no such mode.
    pub fn set_rlimit_mode(&mut self, who: &Credentials, mode: u64) -> Outcome<()> {
        if !who.sys_resource {
            return refuse(Errno::EPERM, "the process lacks CAP_SYS_RESOURCE");
        }
        if self.table.len() > 0 {
            return refuse(Errno::EBUSY, "there are objects already");
        }
        self.rlimit_mode = match mode {
            0 => RlimitMode::User,
            1 => RlimitMode::Process,
            _ => return refuse(Errno::EINVAL, format!("there is no mode {mode}")),
        };
        Ok(())
    }

    /// `IOMMU_IOAS_CHANGE_PROCESS`: charges `who` for pinned pages of files from now on.
    ///
    /// # Errors
    /// `EINVAL` something other than files is mapped; `ENOMEM` the memory-lock limit of `who`.
    pub fn ioas_change_process(&mut self, who: &Credentials) -> Outcome<()> {
        let mut files: BTreeMap<*const Pages, &Arc<Pages>> = BTreeMap::new();
        for (id, object) in self.table.iter() {
            let Object::Ioas(ioas) = object else { continue };
            for (start, area) in ioas.space.areas() {
                if !matches!(area.pages.source(), Source::File(..)) {
                    return refuse(
                        Errno::EINVAL,
                        format!("IOAS {id} maps memory of a process at {start:#x}"),
                    );
                }
                files.insert(Arc::as_ptr(&area.pages), &area.pages);
            }
        }
        let mut payers = Vec::new();
        for pages in files.values() {
            match pages.charge_also(who) {
                Ok(payer) => payers.extend(payer.map(|payer| (*pages, payer))),
                Err(refusal) => {
                    payers.iter().for_each(|(pages, payer)| pages.discharge(payer));
                    return Err(refusal);
                }
            }
        }
        payers.into_iter().for_each(|(pages, payer)| pages.settle(payer));
        Ok(())
    }
}

/// Pins `area` if it is `wanted`, and returns its memory.
fn pin_if(wanted: bool, start: u64, area: &Area) -> Outcome<Vec<Mapping>> {
    if !wanted {
        return Ok(Vec::new());
    }
    let mut at = start;
    let places = area.pages.pin(area.offset, area.length(start))?;
    let mapping = |memory: twostage::iommufd::UserMemory| {
        let (start, last) = (at, at + (memory.length() - 1));
        // Past 2^64 only after the last one.
        at = last.wrapping_add(1);
        Mapping { start, last, memory, protection: area.protection }
    };
    Ok(places.into_iter().map(mapping).collect())
}

fn unpin(start: u64, area: &Area) {
    area.pages.unpin(area.offset, area.length(start));
}

fn take_back(ioas: &Ioas, start: u64, area: &Area) {
    ioas.stage2.remove_in(start..=area.last);
    unpin(start, area);
}

/// Prepares a HWPT with `domain` for a mapping with `protection`.
///
/// # Errors
/// `EINVAL` not supported; `ENOMEM` no memory for its tables.
fn make_room(domain: &dyn PagingDomain, start: u64, protection: Protection) -> Outcome<()> {
    // Only VFIO's ioctl makes such a mapping.
    if !protection.read && !protection.write {
        return refuse(Errno::EINVAL, format!("the mapping at {start:#x} allows no access"));
    }
    if domain.only_writable() && !protection.write {
        return refuse(
            Errno::EINVAL,
            format!("a nesting parent cannot hold the read-only mapping at {start:#x}"),
        );
    }
    allocate("tables of a HWPT")
}

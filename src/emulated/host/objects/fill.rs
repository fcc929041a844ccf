// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The mappings of HWPTs: pinned while there is a HWPT, and visible to its IOMMU.

use super::object::Ioas;
use super::Objects;
use crate::drivers::PagingDomain;
use crate::host::fault_injection::allocate;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::Area;
use crate::units::stage2::Mapping;
use twostage::iommufd::{Errno, ObjectId, Protection};

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
    pub(super) fn drop_areas(&self, ioas: ObjectId, areas: &[(u64, Area)]) -> Outcome<()> {
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

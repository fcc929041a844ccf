// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty tracking: `IOMMU_HWPT_SET_DIRTY_TRACKING`, `IOMMU_HWPT_GET_DIRTY_BITMAP`.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::Objects;
use crate::emulated::dirty::DirtyLog;
use crate::emulated::fault_injection::allocate;
use crate::emulated::ioas::range_of;
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{DirtyRange, Errno, ObjectId};

impl Objects {
    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`. What was dirty before is forgotten when it starts.
    pub fn hwpt_set_dirty_tracking(&mut self, hwpt: ObjectId, enable: bool) -> Outcome<()> {
        let log = self.dirty_log(hwpt)?;
        if enable {
            log.clear();
        }
        log.enable(enable);
        if enable {
            self.stage2_changed(self.table.hwpt_paging(hwpt)?.ioas)?;
        }
        Ok(())
    }

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`, without the bitmap: the runs of dirty IOVAs, ascending, up
    /// to the first hole in what is mapped; a hole is no error, as in Linux. `clear` makes them
    /// clean. Nothing is dirty while tracking is off.
    pub fn hwpt_dirty(
        &mut self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
    ) -> Outcome<Vec<RangeInclusive<u64>>> {
        let ioas = self.table.hwpt_paging(hwpt)?.ioas;
        let object = self.table.ioas(ioas)?;
        let iovas = check_range(range, object.alignment)?;
        let log = self.dirty_log(hwpt)?;
        if !log.is_enabled() {
            return Ok(Vec::new());
        }
        allocate("a bitmap")?;
        let mut runs = Vec::new();
        for part in object.space.parts(&iovas).0 {
            runs.extend(log.read(&(part.iova..=part.iova + (part.piece.length - 1)), clear));
        }
        if clear && !runs.is_empty() {
            self.stage2_changed(ioas)?;
        }
        Ok(runs)
    }

    /// Forgets what is dirty in `iovas`, which is no longer mapped.
    pub(super) fn forget_dirty(&self, ioas: ObjectId, iovas: &RangeInclusive<u64>) -> Outcome<()> {
        for hwpt in &self.table.ioas(ioas)?.hwpts {
            if let Some(log) = self.table.hwpt_paging(*hwpt)?.domain.dirty_log() {
                log.read(iovas, true);
            }
        }
        Ok(())
    }

    fn dirty_log(&self, hwpt: ObjectId) -> Outcome<Arc<DirtyLog>> {
        match self.table.hwpt_paging(hwpt)?.domain.dirty_log() {
            Some(log) => Ok(log.clone()),
            None => refuse(
                Errno::EOPNOTSUPP,
                format!("HWPT_PAGING {hwpt} was allocated without DIRTY_TRACKING"),
            ),
        }
    }
}

/// The IOVAs of `range`, if they are of whole pages of the IOAS and of the bitmap.
fn check_range(range: &DirtyRange, alignment: u64) -> Outcome<RangeInclusive<u64>> {
    let DirtyRange { iova, length, page_size } = *range;
    // To Linux, no byte from 0 on is all of the address space.
    let last = match (iova, length) {
        (0, 0) => Some(u64::MAX),
        _ => range_of(iova, length).map(|iovas| *iovas.end()),
    };
    let Some(last) = last else {
        return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
    };
    // As masks, whether or not they are powers of two.
    let aligned = |size: u64| (iova | last.wrapping_add(1)) & (size - 1) == 0;
    if !aligned(alignment) || page_size == 0 || !aligned(page_size) {
        return refuse(
            Errno::EINVAL,
            format!("{iova:#x}+{length:#x} is not of pages of {alignment:#x} and {page_size:#x}"),
        );
    }
    Ok(iova..=last)
}

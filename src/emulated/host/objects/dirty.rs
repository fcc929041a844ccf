// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty tracking: `IOMMU_HWPT_SET_DIRTY_TRACKING`, `IOMMU_HWPT_GET_DIRTY_BITMAP`.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::Objects;
use crate::host::fault_injection::allocate;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::range_of;
use crate::units::stage2::DirtyLog;
use twostage::iommufd::{DirtyRange, Errno, ObjectId};

/// The dirty pages of one page table.
#[derive(Debug)]
pub struct DirtyPages {
    ioas: ObjectId,
    log: Arc<DirtyLog>,
    /// Runs of dirty IOVAs, ascending.
    pub runs: Vec<RangeInclusive<u64>>,
}

impl Objects {
    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`. Starting clears old marks.
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

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`, without the bitmap: the dirty IOVAs up to the first hole in
    /// the mappings; a hole is no error, as in Linux. They stay dirty until [`Self::hwpt_clean`],
    /// after the caller got them. Nothing is dirty while tracking is off.
    pub fn hwpt_dirty(&self, hwpt: ObjectId, range: &DirtyRange) -> Outcome<DirtyPages> {
        let ioas = self.table.hwpt_paging(hwpt)?.ioas;
        let object = self.table.ioas(ioas)?;
        let iovas = check_range(range, object.alignment)?;
        let log = self.dirty_log(hwpt)?;
        let mut runs = Vec::new();
        if log.is_enabled() {
            allocate("a bitmap")?;
            for part in object.space.parts(&iovas).0 {
                runs.extend(log.read(&(part.iova..=part.iova + (part.piece.length - 1)), false));
            }
        }
        Ok(DirtyPages { ioas, log, runs })
    }

    /// Clears the marks of `pages`, after the caller got them. A page that was written again
    /// meanwhile is included: it is read afterwards.
    pub fn hwpt_clean(&mut self, pages: &DirtyPages) {
        pages.runs.iter().for_each(|run| drop(pages.log.read(run, true)));
        if !pages.runs.is_empty() {
            // Fails only if the IOAS and its page tables were destroyed.
            let _ = self.stage2_changed(pages.ioas);
        }
    }

    /// Clears the marks in `iovas`, which are no longer mapped.
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

/// The IOVAs of `range`, if they are whole pages of the IOAS and of the bitmap.
///
/// Linux 7.2 accepts two invalid ranges, and later kernels the second: an empty one, which it takes
/// for the whole address space, or for nothing; and one with a page size that is no power of two,
/// for which it sets more bits than the range has pages. Both write past the end of the bitmap.
fn check_range(range: &DirtyRange, alignment: u64) -> Outcome<RangeInclusive<u64>> {
    let DirtyRange { iova, length, page_size } = *range;
    if length == 0 {
        return refuse(Errno::EINVAL, "an empty range");
    }
    let Some(iovas) = range_of(iova, length) else {
        return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
    };
    let aligned = |size: u64| (iova | iovas.end().wrapping_add(1)) & (size - 1) == 0;
    if !aligned(alignment) || !page_size.is_power_of_two() || !aligned(page_size) {
        return refuse(
            Errno::EINVAL,
            format!(
                "{iova:#x}+{length:#x} is not aligned to {alignment:#x} and pages of \
                     {page_size:#x}"
            ),
        );
    }
    Ok(iovas)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hardware page tables: `IOMMU_HWPT_ALLOC`, `IOMMU_HWPT_INVALIDATE`, and dirty tracking
//! (`IOMMU_HWPT_SET_DIRTY_TRACKING`, `IOMMU_HWPT_GET_DIRTY_BITMAP`).

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::object::{HwptNested, HwptPaging, Object};
use super::Objects;
use crate::drivers::{Domain, NestedDomain, PagingDomain, Partial, UserArray, UserData};
use crate::host::machine::Part;
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::ioas::{range_of, PAGE_SIZE};
use crate::units::stage2::DirtyLog;
use twostage::iommufd::{DirtyRange, Errno, HwptFlags, ObjectId};

/// Linux's maximum number of entries of an `IOMMU_HWPT_INVALIDATE`.
pub(crate) const MAX_INVALIDATE_ENTRIES: usize = 1 << 19;

/// Arguments of `IOMMU_HWPT_ALLOC`.
#[derive(Clone, Copy)]
pub(crate) struct HwptRequest<'a> {
    pub flags: HwptFlags,
    pub dev: ObjectId,
    pub pt: ObjectId,
    pub fault: Option<ObjectId>,
    /// `None` for data of length zero. Read after everything else has been checked.
    pub data: Option<&'a dyn UserData>,
}

impl fmt::Debug for HwptRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HwptRequest")
            .field("flags", &self.flags)
            .field("dev", &self.dev)
            .field("pt", &self.pt)
            .finish_non_exhaustive()
    }
}

/// The dirty pages of one page table.
#[derive(Debug)]
pub struct DirtyPages {
    ioas: ObjectId,
    log: Arc<DirtyLog>,
    /// Runs of dirty IOVAs, ascending.
    pub runs: Vec<RangeInclusive<u64>>,
}

impl Objects {
    /// `IOMMU_HWPT_ALLOC`.
    pub fn hwpt_alloc(&mut self, request: &HwptRequest<'_>) -> Outcome<ObjectId> {
        let part = self.table.device(request.dev)?.part.clone();
        match self.table.get(request.pt) {
            Some(Object::Ioas(_)) => {
                let domain = self.paging_domain(&part, request.flags, request.data)?;
                self.check_room(request.pt, &*domain)?;
                let fault = self.fault_queue(request)?;
                self.add_paging(request.pt, domain, request.flags, fault, false)
            }
            Some(Object::HwptPaging(_)) => {
                let domain = self.nested_on_parent(&part, request)?;
                let fault = self.fault_queue(request)?;
                self.add_nested(request.pt, None, request.flags, fault, domain)
            }
            Some(Object::Viommu(viommu)) => {
                if viommu.unit != part.unit {
                    return refuse(
                        Errno::EINVAL,
                        format!(
                            "device {} is not behind the IOMMU of vIOMMU {}",
                            request.dev, request.pt
                        ),
                    );
                }
                let (flags, data) = nested_arguments(request)?;
                let parent = viommu.parent;
                allocate("a nested page table")?;
                let domain = viommu.driver.alloc_nested(flags, data)?;
                let fault = self.fault_queue(request)?;
                self.add_nested(parent, Some(request.pt), request.flags, fault, domain)
            }
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("no HWPT can be allocated on {kind} {}", request.pt))
            }
            // Linux does not return ENOENT for the page table.
            None => refuse(Errno::EINVAL, format!("there is no object {}", request.pt)),
        }
    }

    /// An automatic HWPT for `dev` on `ioas`.
    pub(super) fn add_automatic(&mut self, ioas: ObjectId, dev: ObjectId) -> Outcome<ObjectId> {
        let part = self.table.device(dev)?.part.clone();
        let domain = self.paging_domain(&part, HwptFlags::new(), None)?;
        self.check_room(ioas, &*domain)?;
        self.add_paging(ioas, domain, HwptFlags::new(), None, true)
    }

    /// The driver's page table for a device and `flags`.
    fn paging_domain(
        &self,
        part: &Part,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        if flags.unknown() != 0 {
            return refuse(Errno::EOPNOTSUPP, format!("flags {:#x}", flags.into_bits()));
        }
        if flags.dirty_tracking() && !part.driver.dirty_tracking(&part.requester) {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU cannot track dirty pages");
        }
        if flags.fault_id_valid() && flags.nest_parent() {
            return refuse(Errno::EOPNOTSUPP, "a nesting parent has no fault queue");
        }
        allocate("a page table")?;
        part.driver.alloc_paging(&part.requester, flags.with_fault_id_valid(false), data)
    }

    /// Whether `domain` can hold the current mappings of `ioas`.
    fn check_room(&self, ioas: ObjectId, domain: &dyn PagingDomain) -> Outcome<()> {
        let space = &self.table.ioas(ioas)?.space;
        if domain.page_size() > PAGE_SIZE {
            return refuse(Errno::EINVAL, "the IOMMU's pages are larger than the host's");
        }
        space.check_alignment(domain.page_size())?;
        space.check_reservable(&outside(&domain.aperture()))
    }

    /// Adds a HWPT_PAGING that [`Self::check_room`] accepted.
    fn add_paging(
        &mut self,
        ioas: ObjectId,
        domain: Arc<dyn PagingDomain>,
        flags: HwptFlags,
        fault: Option<ObjectId>,
        automatic: bool,
    ) -> Outcome<ObjectId> {
        let reserved = outside(&domain.aperture());
        let hwpt = HwptPaging { ioas, domain: domain.clone(), flags, automatic, fault };
        let id = self.table.insert(Object::HwptPaging(hwpt))?;
        if let Err(refusal) = self.fill(ioas, &*domain) {
            self.table.remove(id);
            return Err(refusal);
        }
        let object = self.table.ioas_mut(ioas)?;
        object.hwpts.push(id);
        object.space.reserve(id, &reserved);
        self.table.hold(ioas);
        fault.into_iter().for_each(|fault| self.table.hold(fault));
        self.align(ioas)?;
        Ok(id)
    }

    /// The driver's half of a HWPT_NESTED directly on a HWPT_PAGING.
    fn nested_on_parent(
        &self,
        part: &Part,
        request: &HwptRequest<'_>,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        let parent = self.table.hwpt_paging(request.pt)?;
        let (flags, data) = nested_arguments(request)?;
        if !part.driver.nests_without_viommu() {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU nests page tables on a vIOMMU only");
        }
        if parent.automatic || !parent.flags.nest_parent() {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_PAGING {} was not allocated with NEST_PARENT", request.pt),
            );
        }
        allocate("a nested page table")?;
        part.driver.alloc_nested(&part.requester, &parent.domain, flags, data)
    }

    fn add_nested(
        &mut self,
        parent: ObjectId,
        viommu: Option<ObjectId>,
        flags: HwptFlags,
        fault: Option<ObjectId>,
        domain: Arc<dyn NestedDomain>,
    ) -> Outcome<ObjectId> {
        let hwpt = HwptNested { parent, viommu, domain, flags, fault };
        let id = self.table.insert(Object::HwptNested(hwpt))?;
        self.table.hold(viommu.unwrap_or(parent));
        fault.into_iter().for_each(|fault| self.table.hold(fault));
        Ok(id)
    }

    /// The fault queue for a HWPT.
    fn fault_queue(&self, request: &HwptRequest<'_>) -> Outcome<Option<ObjectId>> {
        let fault = request.fault.filter(|_| request.flags.fault_id_valid());
        match fault {
            None if request.flags.fault_id_valid() => {
                refuse(Errno::ENOENT, "no fault queue is given")
            }
            None => Ok(None),
            Some(fault) => self.table.fault(fault).map(|_| Some(fault)),
        }
    }

    /// The HWPT_PAGING whose IOAS `hwpt` translates to: itself, or its parent.
    pub(super) fn stage2_of(&self, hwpt: ObjectId) -> Outcome<&HwptPaging> {
        match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => self.table.hwpt_paging(nested.parent),
            _ => self.table.hwpt_paging(hwpt),
        }
    }

    /// The flags `hwpt` was allocated with.
    pub(super) fn hwpt_flags(&self, hwpt: ObjectId) -> Outcome<HwptFlags> {
        match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => Ok(nested.flags),
            _ => self.table.hwpt_paging(hwpt).map(|paging| paging.flags),
        }
    }

    /// `hwpt`, for a driver.
    pub(super) fn domain(&self, hwpt: ObjectId) -> Outcome<Domain> {
        let paging = self.stage2_of(hwpt)?;
        let nested = match self.table.get(hwpt) {
            Some(Object::HwptNested(nested)) => Some(nested.domain.clone()),
            _ => None,
        };
        Ok(Domain {
            paging: paging.domain.clone(),
            nested,
            stage2: self.table.ioas(paging.ioas)?.stage2.clone(),
            page_requests: self.hwpt_flags(hwpt)?.fault_id_valid(),
        })
    }

    /// `IOMMU_HWPT_INVALIDATE`. Errors have the number of completed entries.
    pub fn hwpt_invalidate(&self, hwpt: ObjectId, entries: &dyn UserArray) -> Result<(), Partial> {
        let out_of_memory = allocate("the entries");
        let refused: Outcome<()> = match self.table.get(hwpt) {
            _ if entries.count() > MAX_INVALIDATE_ENTRIES => {
                refuse(Errno::EINVAL, format!("{} entries", entries.count()))
            }
            _ if out_of_memory.is_err() => out_of_memory,
            Some(Object::HwptNested(nested)) => return nested.domain.invalidate(entries),
            Some(Object::Viommu(viommu)) => return viommu.driver.invalidate(entries),
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("{kind} {hwpt} has no user-owned tables"))
            }
            None => refuse(Errno::ENOENT, format!("there is no object {hwpt}")),
        };
        refused.map_err(Partial::from)
    }

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
    /// after the caller got them, or until tracking starts again. While it is off, nothing gets
    /// dirty, except on an SMMU, which marks what it writes whether or not anybody asks.
    pub fn hwpt_dirty(&self, hwpt: ObjectId, range: &DirtyRange) -> Outcome<DirtyPages> {
        let ioas = self.table.hwpt_paging(hwpt)?.ioas;
        let object = self.table.ioas(ioas)?;
        let iovas = check_range(range, object.alignment)?;
        let log = self.dirty_log(hwpt)?;
        allocate("a bitmap")?;
        let mut runs = Vec::new();
        for part in object.space.parts(&iovas).0 {
            runs.extend(log.read(&(part.iova..=part.iova + (part.piece.length - 1)), false));
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

/// The IOVAs that are not in `aperture`.
fn outside(aperture: &RangeInclusive<u64>) -> Vec<RangeInclusive<u64>> {
    let before = aperture.start().checked_sub(1).map(|last| 0..=last);
    let after = aperture.end().checked_add(1).map(|first| first..=u64::MAX);
    before.into_iter().chain(after).collect()
}

/// Checks the request for a HWPT_NESTED; returns the driver's part.
fn nested_arguments<'a>(request: &HwptRequest<'a>) -> Outcome<(HwptFlags, &'a dyn UserData)> {
    let flags = request.flags.with_fault_id_valid(false);
    let other = flags.with_pasid(false).into_bits();
    if other != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("a HWPT_NESTED cannot have flags {other:#x}"));
    }
    match request.data {
        Some(data) => Ok((flags, data)),
        None => refuse(Errno::EOPNOTSUPP, "a HWPT_NESTED needs data"),
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver of a VT-d unit, like Linux's: page tables filled from an IOAS take no data, the
//! user's first-stage tables are nested on a second stage, and there are no vIOMMUs.

use std::cell::Cell;
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use super::user_data::{
    first_stage, nested, second_stage, split, VTD_NESTED, VTD_S1, VTD_S1_INVALIDATE,
};
use super::vtd_tables::{DomainIds, Features, Tables};
use super::{
    own_nested, own_paging, CacheTags, Domain, Driver, DriverInfo, NestedDomain, OwnedTag,
    PagingDomain, Partial, UserArray, UserData, VTD_SECOND_STAGE, VTD_SECOND_STAGE_INVALIDATE,
};
use crate::host::device::{Requester, Slot};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use crate::units::hardware::{CacheRange, CacheTag, Hardware, Translation, UserTables};
use crate::units::page_requests::PageRequests;
use crate::units::stage2::{DirtyLog, Stage2};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1_invalidate, Errno, Extensions, FaultSink, HwptFlags, HwptVtdNested, ObjectId,
    VTD_INV_FLAGS_LEAF,
};
use twostage::spec::vtd::interrupt::INTERRUPT_RANGE;
use twostage::spec::vtd::PageRange;

/// Tables that a unit fills from an IOAS.
#[derive(Debug)]
struct VtdPaging {
    tables: Tables,
    tag: OwnedTag,
    dirty: Option<Arc<DirtyLog>>,
}

impl PagingDomain for VtdPaging {
    fn aperture(&self) -> RangeInclusive<u64> {
        self.tables.aperture()
    }

    fn page_size(&self) -> u64 {
        PAGE_SIZE
    }

    fn page_sizes(&self) -> u64 {
        self.tables.page_sizes
    }

    fn only_writable(&self) -> bool {
        self.tables.only_writable
    }

    fn enforces_coherency(&self) -> bool {
        self.tables.enforces_coherency
    }

    fn dirty_log(&self) -> Option<&Arc<DirtyLog>> {
        self.dirty.as_ref()
    }
}

/// The user's tables.
#[derive(Debug)]
struct VtdNested {
    tables: UserTables,
    tag: OwnedTag,
    attached: Mutex<Attached>,
}

/// Number of attachments of tables behind each unit; no count is 0. Units are few, and tables many.
type Attached = Vec<(Arc<dyn Hardware>, u32)>;

/// The memory that a thread keeps for ranges, in entries: what a caller merges into one call.
const MAX_KEPT: usize = 1024;

thread_local! {
    /// Memory for the ranges of one call, so that one takes no allocation.
    static RANGES: Cell<Vec<CacheRange>> = const { Cell::new(Vec::new()) };
}

/// Drops what a unit has cached.
type Invalidate = fn(&dyn Hardware, CacheTag, &[CacheRange]);

impl VtdNested {
    fn attached(&self) -> MutexGuard<'_, Attached> {
        self.attached.lock()
    }

    /// `count` more attachments behind `hardware`, which may cache something of the tables.
    fn attach(&self, hardware: &Arc<dyn Hardware>, count: u32) {
        let mut attached = self.attached();
        match attached.iter_mut().find(|(unit, _)| Arc::ptr_eq(unit, hardware)) {
            Some((_, attachments)) => *attachments += count,
            None => {
                attached.reserve_exact(1);
                attached.push((hardware.clone(), count));
            }
        }
    }

    /// `count` fewer attachments.
    fn detach(&self, hardware: &Arc<dyn Hardware>, count: u32) {
        let mut attached = self.attached();
        if let Some((_, left)) = attached.iter_mut().find(|(unit, _)| Arc::ptr_eq(unit, hardware)) {
            *left = left.saturating_sub(count);
        }
        attached.retain(|(_, left)| *left != 0);
    }

    /// What does invalidations of `data_type`, if it takes them.
    fn invalidation(&self, data_type: u64) -> Option<Invalidate> {
        match (self.tables, data_type) {
            (UserTables::FirstStage(_) | UserTables::Nested(_), VTD_S1_INVALIDATE)
            | (UserTables::SecondStage(_), VTD_SECOND_STAGE_INVALIDATE) => {
                Some(|hardware, tag, ranges| hardware.invalidate(tag, ranges))
            }
            (UserTables::Nested(_), VTD_SECOND_STAGE_INVALIDATE) => {
                Some(|hardware, tag, ranges| hardware.invalidate_second_stage(tag, ranges))
            }
            _ => None,
        }
    }
}

impl NestedDomain for VtdNested {
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial> {
        let data_type = entries.data_type();
        let Some(invalidate) = self.invalidation(data_type) else {
            let detail = format!("the page table has no invalidations of type {data_type:#x}");
            return refuse(Errno::EINVAL, detail).map_err(Partial::from);
        };
        // One call for all entries: each call stops DMA.
        let mut ranges = RANGES.take();
        ranges.clear();
        let own = entries.vtd_entries();
        let mut read = |index| {
            let entry = match own.and_then(|own| own.get(index)) {
                Some(entry) => *entry,
                None => invalidation(&entries.read_entry(data_type, index, 24)?),
            };
            ranges.push(cache_range(&entry, index)?);
            Ok(())
        };
        let refused = (0..entries.count()).find_map(|index| read(index).err());
        if !ranges.is_empty() {
            for (hardware, _) in self.attached().iter() {
                invalidate(&**hardware, self.tag.tag(), &ranges);
            }
        }
        let done = ranges.len();
        if ranges.capacity() <= MAX_KEPT {
            RANGES.set(ranges);
        }
        refused.map_or(Ok(()), |refusal| Err(Partial { done, refusal }))
    }

    fn describe(&self) -> String {
        match self.tables {
            UserTables::FirstStage(tables) => {
                format!("VTD_S1 at {:#x}, {} bits", tables.pgtbl_addr, tables.addr_width)
            }
            UserTables::SecondStage(tables) => {
                format!("VTD_SECOND_STAGE at {:#x}, {} bits", tables.pgtbl_addr, tables.addr_width)
            }
            UserTables::Nested(HwptVtdNested { first, second }) => format!(
                "VTD_S1 at {:#x}, {} bits, over VTD_SECOND_STAGE at {:#x}, {} bits",
                first.pgtbl_addr, first.addr_width, second.pgtbl_addr, second.addr_width
            ),
        }
    }
}

/// The driver of one unit.
#[derive(Debug)]
pub(crate) struct VtdDriver {
    hardware: Arc<dyn Hardware>,
    features: Features,
    tags: Arc<CacheTags>,
    domains: Mutex<DomainIds>,
}

impl VtdDriver {
    /// The driver of `hardware`, whose page tables get their tags from `tags`, which all units of
    /// the machine share.
    pub fn new(hardware: Arc<dyn Hardware>, tags: Arc<CacheTags>) -> Self {
        let features = Features::new(&hardware.info());
        Self { hardware, features, tags, domains: Mutex::default() }
    }

    /// The user's tables, checked as far as at allocation: Linux checks values only when a device
    /// is attached.
    fn user_tables(&self, data: &dyn UserData) -> Outcome<UserTables> {
        match data.data_type() {
            VTD_S1 if self.features.nest() => {
                Ok(UserTables::FirstStage(first_stage(&data.read_struct(VTD_S1, 24)?)))
            }
            VTD_SECOND_STAGE if self.hardware.extensions().guest_second_stage => {
                let tables = second_stage(&data.read_struct(VTD_SECOND_STAGE, 24)?);
                Ok(UserTables::SecondStage(tables))
            }
            VTD_NESTED if self.hardware.extensions().guest_second_stage => {
                Ok(UserTables::Nested(nested(&data.read_struct(VTD_NESTED, 48)?)))
            }
            other => refuse(Errno::EOPNOTSUPP, format!("tables of type {other:#x}")),
        }
    }

    /// The translation for `domain`, if the hardware can use it for `devices`.
    fn translation(&self, devices: &[&Requester], domain: &Domain) -> Outcome<Translation> {
        let paging = own_paging::<VtdPaging>(&*domain.paging)?;
        self.features.compatible(&paging.tables)?;
        if domain.page_requests && devices.iter().any(|it| self.page_requests(it).is_none()) {
            return refuse(Errno::ENODEV, "the device, or its IOMMU, has no page requests");
        }
        let Some(nested) = &domain.nested else {
            return Ok(Translation {
                tag: paging.tag.tag(),
                tables: None,
                stage2: domain.stage2.clone(),
                dirty: paging.dirty.clone(),
            });
        };
        let nested = own_nested::<VtdNested>(&**nested)?;
        if !self.hardware.walks(&nested.tables) {
            return refuse(
                Errno::EINVAL,
                format!("the device's IOMMU cannot walk {:x?}", nested.tables),
            );
        }
        Ok(Translation {
            tag: nested.tag.tag(),
            tables: Some(nested.tables),
            stage2: domain.stage2.clone(),
            dirty: paging.dirty.clone(),
        })
    }

    /// `count` devices no longer use `domain`.
    fn forget(&self, domain: &Domain, count: u32) {
        self.count(domain, |nested| nested.detach(&self.hardware, count));
        if let Some(tag) = Self::tag(domain) {
            self.domains().give_back(tag, count);
        }
    }

    fn domains(&self) -> MutexGuard<'_, DomainIds> {
        self.domains.lock()
    }

    /// The tag of the page table of `domain`.
    fn tag(domain: &Domain) -> Option<CacheTag> {
        match &domain.nested {
            Some(nested) => Some(own_nested::<VtdNested>(&**nested).ok()?.tag.tag()),
            None => Some(own_paging::<VtdPaging>(&*domain.paging).ok()?.tag.tag()),
        }
    }

    /// Counts attachments of the user's tables of `domain`, if it has any.
    fn count(&self, domain: &Domain, change: impl FnOnce(&VtdNested)) {
        if let Some(Ok(nested)) = domain.nested.as_deref().map(own_nested::<VtdNested>) {
            change(nested);
        }
    }
}

impl Driver for VtdDriver {
    fn info(&self) -> DriverInfo {
        DriverInfo::Vtd(self.hardware.info())
    }

    fn extensions(&self) -> Extensions {
        self.hardware.extensions()
    }

    fn pasid_bits(&self) -> u8 {
        self.hardware.pasid_bits()
    }

    fn reserved_regions(&self, device: &Requester) -> Vec<RangeInclusive<u64>> {
        device.config.reserved.iter().cloned().chain([INTERRUPT_RANGE]).collect()
    }

    fn dirty_tracking(&self, _: &Requester) -> bool {
        self.features.dirty_tracking()
    }

    fn alloc_paging(
        &self,
        _: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>> {
        if data.is_some() {
            return refuse(Errno::EOPNOTSUPP, "a HWPT_PAGING takes no data");
        }
        let tables = self.features.tables(flags)?;
        let dirty = tables.dirty_tracking.then(|| Arc::new(DirtyLog::new(PAGE_SIZE)));
        Ok(Arc::new(VtdPaging { tables, tag: self.tags.next(), dirty }))
    }

    fn alloc_nested(
        &self,
        _: &Requester,
        parent: &Arc<dyn PagingDomain>,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        if !self.features.nest() || flags.with_pasid(false) != HwptFlags::new() {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU has no nested translation");
        }
        own_paging::<VtdPaging>(&**parent)?;
        let tables = self.user_tables(data)?;
        Ok(Arc::new(VtdNested { tables, tag: self.tags.next(), attached: Mutex::default() }))
    }

    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        old: Option<&Domain>,
    ) -> Outcome<()> {
        let translation = self.translation(devices, new)?;
        // A group has fewer devices than there are Requester IDs.
        let count = devices.len() as u32;
        self.domains().take(translation.tag, count, self.features.domains())?;
        self.count(new, |nested| nested.attach(&self.hardware, count));
        for device in devices {
            self.hardware.install(device.rid.raw(), slot, translation.clone());
        }
        if let Some(old) = old {
            self.forget(old, count);
        }
        Ok(())
    }

    fn detach(&self, devices: &[&Requester], slot: Slot, old: &Domain) {
        for device in devices {
            self.hardware.remove(device.rid.raw(), slot);
        }
        self.forget(old, devices.len() as u32);
    }

    fn block(&self, device: &Requester) {
        self.hardware.remove(device.rid.raw(), None);
    }

    fn page_requests(&self, device: &Requester) -> Option<&PageRequests> {
        self.hardware.page_requests().filter(|_| device.config.pri)
    }

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.hardware.stage2_changed(stage2);
    }

    fn invalidate_device_tlb(
        &self,
        device: &Requester,
        pasid: Option<u32>,
        range: CacheRange,
    ) -> Outcome<bool> {
        Ok(self.hardware.invalidate_device_tlb(device.rid.raw(), pasid, range))
    }

    fn set_fault_sink(&self, device: &Requester, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.hardware.set_fault_sink(device.rid.raw(), sink);
    }
}

fn invalidation(bytes: &[u8; 24]) -> iommu_hwpt_vtd_s1_invalidate {
    let (addr, npages, flags, __reserved) = split(bytes);
    iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved }
}

/// The addresses of an entry.
fn cache_range(entry: &iommu_hwpt_vtd_s1_invalidate, number: usize) -> Outcome<CacheRange> {
    let iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved } = *entry;
    if flags & !VTD_INV_FLAGS_LEAF != 0 || __reserved != 0 {
        return refuse(
            Errno::EOPNOTSUPP,
            format!("entry {number} has flags {flags:#x}, reserved {__reserved:#x}"),
        );
    }
    if addr % PAGE_SIZE != 0 || (npages == u64::MAX && addr != 0) {
        return refuse(
            Errno::EINVAL,
            format!("entry {number} is {npages:#x} pages from {addr:#x}"),
        );
    }
    // The number of bytes is computed modulo 2^64, as in Linux: a count that overflows covers fewer
    // pages than intended, and a range that wraps (or is empty) covers everything.
    let bytes = npages.wrapping_mul(PAGE_SIZE);
    let wraps = bytes != 0 && addr.checked_add(bytes - 1).is_none();
    if npages == u64::MAX || bytes == 0 || wraps {
        return Ok(CacheRange::All);
    }
    let leaf = flags & VTD_INV_FLAGS_LEAF != 0;
    Ok(CacheRange::Pages(PageRange::new(addr, bytes / PAGE_SIZE, leaf)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(addr: u64, npages: u64, flags: u32) -> Outcome<CacheRange> {
        cache_range(&iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved: 0 }, 0)
    }

    #[test]
    fn an_entry_names_pages_or_everything() {
        let pages = |address, pages, leaf| CacheRange::Pages(PageRange::new(address, pages, leaf));
        assert_eq!(range(0x1000, 3, 0).unwrap(), pages(0x1000, 3, false));
        assert_eq!(range(0x1000, 3, VTD_INV_FLAGS_LEAF).unwrap(), pages(0x1000, 3, true));
        assert_eq!(range(0, u64::MAX, 0).unwrap(), CacheRange::All);
        let top = u64::MAX - 0xfff;
        assert_eq!(range(top, 1, 0).unwrap(), pages(top, 1, false));
    }

    #[test]
    fn a_count_that_does_not_fit_is_taken_as_linux_takes_it() {
        assert_eq!(range(u64::MAX - 0xfff, 2, 0).unwrap(), CacheRange::All);
        assert_eq!(range(0, 1 << 52, 0).unwrap(), CacheRange::All);
        assert_eq!(range(0x5000, 0, 0).unwrap(), CacheRange::All);
        let one = CacheRange::Pages(PageRange::new(0, 1, false));
        assert_eq!(range(0, (1 << 52) + 1, 0).unwrap(), one);
    }

    #[test]
    fn unknown_flags_and_unaligned_addresses_are_refused() {
        assert_eq!(range(0, 1, 2).unwrap_err().errno, Errno::EOPNOTSUPP);
        assert_eq!(range(0x1001, 1, 0).unwrap_err().errno, Errno::EINVAL);
        assert_eq!(range(0x1000, u64::MAX, 0).unwrap_err().errno, Errno::EINVAL);
        let reserved = iommu_hwpt_vtd_s1_invalidate { addr: 1, npages: 1, flags: 0, __reserved: 1 };
        assert_eq!(cache_range(&reserved, 0).unwrap_err().errno, Errno::EOPNOTSUPP);
    }
}

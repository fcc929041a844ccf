// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver of a physical IOMMU, like Linux's `iommu_ops`.
//!
//! The objects of an iommufd are independent of the architecture. Page tables, the formats of user
//! data, the meaning of invalidations and the contents of `GET_HW_INFO` belong to a driver. Data
//! that only a driver understands is passed to it as bytes and a type ([`UserData`],
//! [`UserArray`]).
//!
//! A driver is called with the lock of one iommufd held, by several iommufds concurrently: it has
//! its own locks and never calls an iommufd. A failed call has no effect.

mod smmuv3;
mod user_data;
mod vtd;
mod vtd_tables;

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

pub(crate) use smmuv3::SmmuDriver;
pub(crate) use user_data::{
    OwnArray, OwnData, UserArray, UserData, VTD_SECOND_STAGE, VTD_SECOND_STAGE_INVALIDATE,
};
pub(crate) use vtd::VtdDriver;

use crate::host::device::{Requester, Slot};
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome, Refusal};
use crate::units::hardware::{CacheRange, CacheTag};
use crate::units::page_requests::{PageRequestSink, PageRequests, Waits};
use crate::units::stage2::{DirtyLog, Stage2};
use twostage::iommufd::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, Errno, Extensions, FaultSink, HwptFlags, ObjectId,
    PageRequest, PageResponseCode, UserMemory,
};

/// The contents of `GET_HW_INFO`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DriverInfo {
    /// `IOMMU_HW_INFO_TYPE_INTEL_VTD`.
    Vtd(iommu_hw_info_vtd),
    /// `IOMMU_HW_INFO_TYPE_ARM_SMMUV3`.
    ArmSmmuV3(iommu_hw_info_arm_smmuv3),
    /// Another type, as its structure's bytes.
    #[cfg_attr(not(feature = "selftest"), expect(dead_code, reason = "the mock driver's"))]
    Other { data_type: u32, bytes: Vec<u8> },
}

/// A page table filled from an IOAS: a driver's half of a HWPT_PAGING.
pub(crate) trait PagingDomain: Any + Debug + Send + Sync {
    /// The IOVAs, in bytes, that it can map.
    fn aperture(&self) -> RangeInclusive<u64>;

    /// The size of its smallest page, in bytes: a power of two.
    fn page_size(&self) -> u64;

    /// The sizes of all its pages: a bit for each.
    fn page_sizes(&self) -> u64 {
        self.page_size()
    }

    /// It only supports writable mappings.
    fn only_writable(&self) -> bool;

    /// It makes DMA coherent with caches whatever a device requests.
    fn enforces_coherency(&self) -> bool {
        false
    }

    /// Its dirty flags; none without `DIRTY_TRACKING`.
    fn dirty_log(&self) -> Option<&Arc<DirtyLog>> {
        None
    }
}

/// User-owned tables: a driver's half of a HWPT_NESTED.
pub(crate) trait NestedDomain: Any + Debug + Send + Sync {
    /// `IOMMU_HWPT_INVALIDATE`: drops what is cached of the tables.
    ///
    /// # Errors
    /// Has the number of completed entries; the one after them was refused.
    fn invalidate(&self, entries: &dyn UserArray) -> Result<(), Partial>;

    /// Describes the tables, for reports.
    fn describe(&self) -> String;
}

/// A user's array that was processed only in part.
#[derive(Debug)]
pub(crate) struct Partial {
    /// Number of completed entries.
    pub done: usize,
    /// Why it stopped.
    pub refusal: Refusal,
}

impl From<Refusal> for Partial {
    /// Refused before the first entry.
    fn from(refusal: Refusal) -> Self {
        Self { done: 0, refusal }
    }
}

/// What a requester is attached to.
#[derive(Debug, Clone)]
pub(crate) struct Domain {
    /// The HWPT_PAGING: itself, or the parent.
    pub paging: Arc<dyn PagingDomain>,
    /// The user's tables on top of it, for a HWPT_NESTED.
    pub nested: Option<Arc<dyn NestedDomain>>,
    /// The mappings of the HWPT_PAGING's IOAS.
    pub stage2: Arc<Stage2>,
    /// Page requests are to be reported: the HWPT has a fault queue.
    pub page_requests: bool,
}

/// A driver's half of a vIOMMU. Linux's drivers choose which of these they implement; the defaults
/// mean that it is not supported.
pub(crate) trait ViommuDriver: Any + Debug + Send + Sync {
    /// `IOMMU_HWPT_ALLOC` on the vIOMMU. `flags` are without `FAULT_ID_VALID`.
    fn alloc_nested(
        &self,
        _flags: HwptFlags,
        _data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>> {
        refuse(Errno::EOPNOTSUPP, "the vIOMMU has no nested page tables")
    }

    /// `IOMMU_HWPT_INVALIDATE` on the vIOMMU.
    ///
    /// # Errors
    /// As [`NestedDomain::invalidate`], but the number of completed entries may be wrong.
    fn invalidate(&self, _entries: &dyn UserArray) -> Result<(), Partial> {
        refuse(Errno::EOPNOTSUPP, "the vIOMMU does not support invalidations")
            .map_err(Partial::from)
    }

    /// The guest knows `device` as `virt_id` from now on.
    fn vdevice_init(&self, _device: &Requester, _virt_id: u64) -> Outcome<()> {
        Ok(())
    }

    /// The guest no longer knows a device as `virt_id`.
    fn vdevice_destroy(&self, _virt_id: u64) {}

    /// Whether it has hardware queues of this type.
    fn has_hw_queue(&self, _kind: u32) -> bool {
        false
    }

    /// Starts a hardware queue of a supported type. Returns the queue that this one depends on,
    /// which then cannot be destroyed before it.
    ///
    /// # Errors
    /// Driver-specific.
    fn hw_queue_init(&self, _queue: &HwQueueRequest<'_>) -> Outcome<Option<ObjectId>> {
        refuse(Errno::EOPNOTSUPP, "the vIOMMU has no hardware queues")
    }

    /// Stops the hardware queue `id`.
    fn hw_queue_destroy(&self, _id: ObjectId) {}
}

/// Driver-specific arguments of `IOMMU_HW_QUEUE_ALLOC`.
#[derive(Debug)]
#[cfg_attr(not(test), expect(dead_code, reason = "no driver of an IOMMU here looks at all of it"))]
pub(crate) struct HwQueueRequest<'a> {
    /// The object.
    pub id: ObjectId,
    /// The type, as the uAPI's number.
    pub kind: u32,
    /// The number of the queue within its vIOMMU.
    pub index: u32,
    /// Its guest address, in bytes.
    pub base: u64,
    /// Its memory, which is pinned; contiguous.
    pub memory: &'a UserMemory,
}

/// Driver-specific arguments of `IOMMU_VIOMMU_ALLOC`.
#[cfg_attr(not(test), expect(dead_code, reason = "no driver of an IOMMU here looks at all of it"))]
pub(crate) struct ViommuRequest<'a> {
    /// The device whose IOMMU it is a slice of.
    pub device: &'a Requester,
    /// The nesting parent.
    pub parent: &'a Arc<dyn PagingDomain>,
    /// The driver's structure, if the user gave one.
    pub data: Option<&'a dyn UserData>,
    /// Where the vIOMMU reports events, at any time.
    pub events: &'a Arc<ViommuEvents>,
    /// Lets the user mmap pages of the vIOMMU: from the start of a file, with their length in
    /// bytes. Returns the mmap offset.
    pub mmap: &'a dyn Fn(Arc<File>, u64) -> Outcome<u64>,
}

/// The driver of one physical IOMMU.
pub(crate) trait Driver: Any + Debug + Send + Sync {
    /// Identifies the IOMMU.
    fn info(&self) -> DriverInfo;

    /// Abilities beyond those of hardware.
    fn extensions(&self) -> Extensions {
        Extensions::default()
    }

    /// Width of the PASIDs it translates, in bits; 0 for none.
    fn pasid_bits(&self) -> u8;

    /// Whether dirty pages can be tracked for `device` (`IOMMU_CAP_DIRTY_TRACKING`).
    fn dirty_tracking(&self, device: &Requester) -> bool;

    /// The IOVAs, in bytes, that no IOAS can map while `device` is attached to it: those reserved
    /// for the device, and for the IOMMU.
    fn reserved_regions(&self, device: &Requester) -> Vec<RangeInclusive<u64>> {
        device.config.reserved.clone()
    }

    /// Creates a page table for an IOAS. `flags` are valid, and without `FAULT_ID_VALID`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unsupported flags or data.
    fn alloc_paging(
        &self,
        device: &Requester,
        flags: HwptFlags,
        data: Option<&dyn UserData>,
    ) -> Outcome<Arc<dyn PagingDomain>>;

    /// Whether it supports nested page tables on a nesting parent without a vIOMMU.
    fn nests_without_viommu(&self) -> bool {
        true
    }

    /// Creates a nested page table on `parent`, a nesting parent, which may be another driver's.
    /// `flags` are `PASID` or nothing.
    ///
    /// # Errors
    /// `EOPNOTSUPP` unsupported flags or data type; `EINVAL` another driver's parent, or data of a
    /// wrong size.
    fn alloc_nested(
        &self,
        device: &Requester,
        parent: &Arc<dyn PagingDomain>,
        flags: HwptFlags,
        data: &dyn UserData,
    ) -> Outcome<Arc<dyn NestedDomain>>;

    /// Whether it supports vIOMMUs of this type.
    fn has_viommu(&self, _kind: u32) -> bool {
        false
    }

    /// Creates a vIOMMU of a supported type.
    ///
    /// # Errors
    /// Driver-specific.
    fn alloc_viommu(&self, _request: &ViommuRequest<'_>) -> Outcome<Arc<dyn ViommuDriver>> {
        refuse(Errno::EOPNOTSUPP, "the IOMMU has no vIOMMUs")
    }

    /// Sends DMA of all `devices`, one IOMMU group, to `new`, replacing `old`, if any, without a
    /// gap. All of them or none.
    ///
    /// # Errors
    /// `EINVAL` the IOMMU cannot use the page table; `ENODEV` it does not support page requests.
    fn attach(
        &self,
        devices: &[&Requester],
        slot: Slot,
        new: &Domain,
        old: Option<&Domain>,
    ) -> Outcome<()>;

    /// Blocks DMA of all `devices`, which were attached to `old`.
    fn detach(&self, devices: &[&Requester], slot: Slot, old: &Domain);

    /// Blocks all DMA of `device`, before anything is attached to it.
    fn block(&self, device: &Requester);

    /// `device` was removed from the machine, and its Requester ID is free.
    fn removed(&self, _device: &Requester) {}

    /// Whether the user's tables determine the page table of each PASID of a device that is
    /// attached to a nested one: page requests of PASIDs then go to the nested one's fault queue.
    fn user_pasid_table(&self) -> bool {
        false
    }

    /// The page requests of the devices of the IOMMU, if `device` makes any, or is stalled.
    fn page_requests(&self, _device: &Requester) -> Option<&PageRequests> {
        None
    }

    /// From now on `sink` serves the page requests of `device`, if it makes any, or nobody does.
    fn set_page_request_sink(&self, device: &Requester, sink: Option<Arc<dyn PageRequestSink>>) {
        if let Some(requests) = self.page_requests(device) {
            let waits = if device.config.stalls { Waits::InStalls } else { Waits::ForPages };
            requests.set_sink(device.rid.raw(), waits, sink);
        }
    }

    /// Responds to a group of page requests of `device`, the last of which was `request`. Called
    /// with a fault queue locked.
    fn page_response(&self, device: &Requester, request: &PageRequest, code: PageResponseCode) {
        if let Some(requests) = self.page_requests(device) {
            requests.answer(device.rid.raw(), request.group, code);
        }
    }

    /// Something was unmapped from `stage2`, or its pages now count as clean: drops everything
    /// cached through it. When it returns no DMA uses what was unmapped, and none writes a page
    /// without marking it.
    fn stage2_changed(&self, stage2: &Arc<Stage2>);

    /// Tells `device` to forget the translations in `range` that it has for `pasid`, or for all of
    /// its requests. Returns whether it has answered.
    ///
    /// # Errors
    /// `EOPNOTSUPP` the driver does this otherwise.
    fn invalidate_device_tlb(
        &self,
        _device: &Requester,
        _pasid: Option<u32>,
        _range: CacheRange,
    ) -> Outcome<bool> {
        refuse(Errno::EOPNOTSUPP, "the IOMMU has other invalidations of device TLBs")
    }

    /// Where faults of `device` go, and under which device object; `None`: nowhere.
    fn set_fault_sink(&self, _device: &Requester, _sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {}
}

/// `domain`, as the `T` of the driver that asks.
///
/// # Errors
/// `EINVAL` it is another driver's.
fn own_paging<T: PagingDomain>(domain: &dyn PagingDomain) -> Outcome<&T> {
    match (domain as &dyn Any).downcast_ref() {
        Some(own) => Ok(own),
        None => refuse(Errno::EINVAL, "the page table is another driver's"),
    }
}

/// As [`own_paging`], for the user's tables.
fn own_nested<T: NestedDomain>(domain: &dyn NestedDomain) -> Outcome<&T> {
    match (domain as &dyn Any).downcast_ref() {
        Some(own) => Ok(own),
        None => refuse(Errno::EINVAL, "the nested page table is another driver's"),
    }
}

/// The tags of all page tables of a machine.
#[derive(Debug, Default)]
pub(crate) struct CacheTags(Mutex<Tags>);

#[derive(Debug, Default)]
struct Tags {
    /// The last one assigned.
    last: u32,
    living: BTreeSet<u32>,
}

/// A tag that no other existing page table has.
#[derive(Debug)]
struct OwnedTag {
    tag: CacheTag,
    tags: Arc<CacheTags>,
}

impl OwnedTag {
    /// The tag.
    fn tag(&self) -> CacheTag {
        self.tag
    }
}

impl CacheTags {
    fn lock(&self) -> MutexGuard<'_, Tags> {
        self.0.lock()
    }

    /// A tag for one more page table.
    fn next(self: &Arc<Self>) -> OwnedTag {
        let mut tags = self.lock();
        // After 2^32 page tables tags wrap around; those still in use are skipped.
        loop {
            let tag = tags.last.wrapping_add(1);
            tags.last = tag;
            if tags.living.insert(tag) {
                return OwnedTag { tag: CacheTag(tag), tags: self.clone() };
            }
        }
    }
}

impl Drop for OwnedTag {
    fn drop(&mut self) {
        self.tags.lock().living.remove(&self.tag.0);
    }
}

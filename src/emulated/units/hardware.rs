// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One VT-d unit: the interface between its driver and the hardware half.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use crate::units::page_requests::PageRequests;
use crate::units::stage2::{DirtyLog, Stage2};
use twostage::iommufd::{
    iommu_hw_info_vtd, iommu_hwpt_vtd_s1, Extensions, FaultSink, HwptVtdNested, HwptVtdSecondStage,
    ObjectId,
};
use twostage::spec::vtd::PageRange;

/// The tag of what an IOMMU caches for one HWPT: the domain ID that a host driver would choose.
/// Unique among the HWPTs of the emulated host, and not reused soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CacheTag(pub u32);

/// Tables that the user owns, by format.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum UserTables {
    /// VT-d first-stage, nested on stage 2.
    FirstStage(iommu_hwpt_vtd_s1),
    /// VT-d second-stage, walked on top of the host's stage 2.
    SecondStage(HwptVtdSecondStage),
    /// VT-d first-stage, nested on the user's own second stage, which is walked on top of the
    /// host's stage 2.
    Nested(HwptVtdNested),
}

/// What an attachment writes to the host-side PASID table: where a requester's DMA goes.
#[derive(Debug, Clone)]
pub(crate) struct Translation {
    /// Tag of the HWPT.
    pub tag: CacheTag,
    /// The user's tables for a HWPT_NESTED; none for a HWPT_PAGING (stage 2 only).
    pub tables: Option<UserTables>,
    /// Stage 2: the mappings of the IOAS.
    pub stage2: Arc<Stage2>,
    /// The log of written stage-2 pages; none if they cannot be tracked.
    pub dirty: Option<Arc<DirtyLog>>,
}

/// The cached addresses of one tag to drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheRange {
    /// All of them, including the paging-structure caches.
    All,
    /// These.
    Pages(PageRange),
}

/// One VT-d unit. All calls may come from any thread, concurrently with DMA; a call returns only
/// when no DMA uses, or will use, what it removed.
pub(crate) trait Hardware: Debug + Send + Sync {
    /// The contents of its registers.
    fn info(&self) -> iommu_hw_info_vtd;

    /// Whether it can walk `tables`.
    fn walks(&self, tables: &UserTables) -> bool;

    /// Width of its PASIDs in bits; 0 for none.
    fn pasid_bits(&self) -> u8;

    /// Abilities beyond those of hardware.
    fn extensions(&self) -> Extensions {
        Extensions::default().with_guest_second_stage(true).with_fault_reports(true)
    }

    /// Sends DMA of `rid` (or its `pasid`) to `translation`, replacing the old one.
    fn install(&self, rid: u16, pasid: Option<u32>, translation: Translation);

    /// Blocks DMA of `rid` (or its `pasid`).
    fn remove(&self, rid: u16, pasid: Option<u32>);

    /// Drops what is cached of one HWPT's user tables in all of `ranges` at once.
    fn invalidate(&self, tag: CacheTag, ranges: &[CacheRange]);

    /// The same for [`UserTables::Nested`] and addresses of its second stage: drops what is
    /// cached of that stage in all of `ranges`, and everything that was translated by both.
    fn invalidate_second_stage(&self, tag: CacheTag, ranges: &[CacheRange]);

    /// Tells the device `rid` to forget the translations in `range` that it has for `pasid`, or
    /// for all requests. Returns whether it has answered.
    fn invalidate_device_tlb(&self, _rid: u16, _pasid: Option<u32>, _range: CacheRange) -> bool {
        true
    }

    /// Something was unmapped from `stage2`, or its pages now count as clean: drops everything
    /// cached through it.
    fn stage2_changed(&self, stage2: &Arc<Stage2>);

    /// The page requests of its devices; none if it takes none.
    fn page_requests(&self) -> Option<&PageRequests> {
        None
    }

    /// Where faults of `rid` go, and under which device object; `None`: nowhere.
    fn set_fault_sink(&self, rid: u16, sink: Option<(ObjectId, Weak<dyn FaultSink>)>);
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One VT-d unit, as its driver programs it and the hardware half plays it.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use crate::units::dirty::DirtyLog;
use crate::units::page_requests::PageRequests;
use crate::units::stage2::Stage2;
use twostage::iommufd::{
    iommu_hw_info_vtd, iommu_hwpt_vtd_s1, Extensions, FaultSink, HwptVtdSecondStage, ObjectId,
};

/// How an IOMMU tags what it caches of one HWPT: the domain id that a host driver would choose.
/// Unique among the living HWPTs of the emulated host, and not used again soon after one is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CacheTag(pub u32);

/// Tables that the user owns, by format.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum UserTables {
    /// VT-d first-stage, nested on stage 2.
    VtdFirstStage(iommu_hwpt_vtd_s1),
    /// VT-d second-stage, walked on top of the host's stage 2.
    VtdSecondStage(HwptVtdSecondStage),
}

/// What an attachment puts into the host-side PASID table: where a requester's DMA goes.
#[derive(Debug, Clone)]
pub(crate) struct Translation {
    /// Tag of the HWPT.
    pub tag: CacheTag,
    /// The user's tables for a HWPT_NESTED; none for a HWPT_PAGING (stage 2 only).
    pub tables: Option<UserTables>,
    /// Stage 2: what the IOAS maps.
    pub stage2: Arc<Stage2>,
    /// Where pages of stage 2 are marked when they are written; none when they cannot be tracked.
    pub dirty: Option<Arc<DirtyLog>>,
}

/// Which cached addresses of one tag to drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheRange {
    /// All of them, with the paging-structure caches.
    All,
    /// `pages` 4 KiB pages from `address` (bytes, 4 KiB aligned) on; `address + pages * 4096` is
    /// at most 2^64. `leaf`: paging-structure caches may stay.
    Pages { address: u64, pages: u64, leaf: bool },
}

/// One VT-d unit. All calls may come from any thread, together with DMA; a call returns only
/// when no DMA uses, and none will use, what it took away.
pub(crate) trait Hardware: Debug + Send + Sync {
    /// What its registers say.
    fn info(&self) -> iommu_hw_info_vtd;

    /// Whether it can walk `tables`.
    fn walks(&self, tables: &UserTables) -> bool;

    /// Width of the PASIDs it translates, in bits; 0 for none.
    fn pasid_bits(&self) -> u8;

    /// What it can do that no hardware can.
    fn extensions(&self) -> Extensions {
        Extensions { guest_second_stage: true, fault_reports: true }
    }

    /// Sends DMA of `rid` (or its `pasid`) to `translation`, in place of what was there.
    fn install(&self, rid: u16, pasid: Option<u32>, translation: Translation);

    /// Blocks DMA of `rid` (or its `pasid`).
    fn remove(&self, rid: u16, pasid: Option<u32>);

    /// Drops what is cached of one HWPT's user tables, in all of `ranges` at once.
    fn invalidate(&self, tag: CacheTag, ranges: &[CacheRange]);

    /// Something was unmapped from `stage2`, or its pages count as clean from now on: drops all
    /// that was cached through it.
    fn stage2_changed(&self, stage2: &Arc<Stage2>);

    /// The page requests of its devices; none when it takes none.
    fn page_requests(&self) -> Option<&PageRequests> {
        None
    }

    /// Where faults of `rid` go, and under which device object; `None` to report them to nobody.
    fn set_fault_sink(&self, rid: u16, sink: Option<(ObjectId, Weak<dyn FaultSink>)>);
}

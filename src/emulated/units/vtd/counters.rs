// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of a unit.

use crate::units::engine::Totals;

/// Counters of an emulated VT-d unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct VtdCounters {
    /// Requests that the IOTLB served.
    pub iotlb_hits: u64,
    /// Requests that missed the IOTLB.
    pub iotlb_misses: u64,
    /// IOTLB entries evicted.
    pub iotlb_evictions: u64,
    /// Requests whose PASID-table entry was cached.
    pub pasid_cache_hits: u64,
    /// Requests whose PASID-table entry was not.
    pub pasid_cache_misses: u64,
    /// PASID-cache entries evicted.
    pub pasid_cache_evictions: u64,
    /// Walks of user-owned tables, finished or not.
    pub walks: u64,
    /// Walks that started below the top table.
    pub paging_structure_hits: u64,
    /// Walks that started at the top table.
    pub paging_structure_misses: u64,
    /// Paging-structure entries evicted.
    pub paging_structure_evictions: u64,
    /// Stage-2 translations that were cached.
    pub stage2_hits: u64,
    /// Stage-2 translations that were not.
    pub stage2_misses: u64,
    /// Cached stage-2 translations evicted.
    pub stage2_evictions: u64,
    /// Requests that used a translation which the guest's tables no longer had; counted by the
    /// sanitizer only.
    pub stale_uses: u64,
    /// Requests that were blocked.
    pub faults: u64,
    /// Invalidations, including those implied by changes of attachments and of stage 2.
    pub invalidations: u64,
    /// Entries that invalidations dropped.
    pub invalidated_entries: u64,
}

impl From<Totals> for VtdCounters {
    fn from(totals: Totals) -> Self {
        Self {
            iotlb_hits: totals.iotlb_hits,
            iotlb_misses: totals.iotlb_misses,
            iotlb_evictions: totals.iotlb_evictions,
            pasid_cache_hits: totals.config_hits,
            pasid_cache_misses: totals.config_misses,
            pasid_cache_evictions: totals.config_evictions,
            walks: totals.walks,
            paging_structure_hits: totals.paging_structure_hits,
            paging_structure_misses: totals.paging_structure_misses,
            paging_structure_evictions: totals.paging_structure_evictions,
            stage2_hits: totals.stage2_hits,
            stage2_misses: totals.stage2_misses,
            stage2_evictions: totals.stage2_evictions,
            stale_uses: totals.stale_uses,
            faults: totals.faults,
            invalidations: totals.invalidations,
            invalidated_entries: totals.invalidated_entries,
        }
    }
}

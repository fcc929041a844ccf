// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of a unit.

use crate::units::engine::Totals;

twostage::counters! {
    /// Counters of an emulated VT-d unit.
    #[cfg_attr(feature = "serde", derive(serde::Serialize))]
    pub struct VtdCounters from Totals {
        /// Requests that the IOTLB served.
        iotlb_hits,
        /// Requests that missed the IOTLB.
        iotlb_misses,
        /// IOTLB entries evicted.
        iotlb_evictions,
        /// Requests whose PASID-table entry was cached.
        pasid_cache_hits = config_hits,
        /// Requests whose PASID-table entry was not.
        pasid_cache_misses = config_misses,
        /// PASID-cache entries evicted.
        pasid_cache_evictions = config_evictions,
        /// Walks of user-owned tables, finished or not.
        walks,
        /// Walks that started below the top table.
        paging_structure_hits,
        /// Walks that started at the top table.
        paging_structure_misses,
        /// Paging-structure entries evicted.
        paging_structure_evictions,
        /// Stage-2 translations that were cached.
        stage2_hits,
        /// Stage-2 translations that were not.
        stage2_misses,
        /// Cached stage-2 translations evicted.
        stage2_evictions,
        /// Requests that used a translation which the guest's tables no longer had; counted by the
        /// sanitizer only.
        stale_uses,
        /// Requests that were blocked.
        faults,
        /// Invalidations, including those implied by changes of attachments and of stage 2.
        invalidations,
        /// Entries that invalidations dropped.
        invalidated_entries,
    }
}

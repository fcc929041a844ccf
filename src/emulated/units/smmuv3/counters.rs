// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Counters of a unit.

use crate::units::engine::Totals;

twostage::counters! {
    /// Counters of an emulated SMMUv3.
    #[cfg_attr(feature = "serde", derive(serde::Serialize))]
    pub struct SmmuV3Counters from Totals {
        /// Requests that the IOTLB served.
        iotlb_hits,
        /// Requests that missed the IOTLB.
        iotlb_misses,
        /// IOTLB entries evicted.
        iotlb_evictions,
        /// Requests whose configuration (stream table entry and context descriptor) was cached.
        configuration_cache_hits = config_hits,
        /// Requests whose configuration was not.
        configuration_cache_misses = config_misses,
        /// Configurations evicted from ports.
        configuration_cache_evictions = config_evictions,
        /// Walks of user-owned tables, finished or not.
        walks,
        /// Walks that started below the top table.
        table_hits = paging_structure_hits,
        /// Walks that started at the top table.
        table_misses = paging_structure_misses,
        /// Cached table descriptors evicted.
        table_evictions = paging_structure_evictions,
        /// Stage-2 translations that were cached.
        stage2_hits,
        /// Stage-2 translations that were not.
        stage2_misses,
        /// Cached stage-2 translations evicted.
        stage2_evictions,
        /// Requests that used a stale translation or context descriptor; counted by the sanitizer
        /// only.
        stale_uses,
        /// Requests that were terminated.
        faults,
        /// Invalidations, including those implied by changes of attachments and of stage 2.
        invalidations,
        /// Entries that invalidations dropped.
        invalidated_entries,
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An emulated VT-d unit in scalable mode, for devices of this process.
//!
//! A request is translated from (requester ID, PASID) through the PASID table, which the host's
//! attachments fill, through the user's tables if its HWPT is nested, each of whose pointers is
//! translated by stage 2, and by stage 2. The caches are those of hardware: a PASID cache,
//! paging-structure caches and an IOTLB, whose entries stay until they are invalidated. A guest
//! that forgets an invalidation sees the same here as on hardware.

mod config;
mod context;
mod engine;
mod fault;
mod nested;
mod sanitizer;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use crate::dma::DmaPort;
use crate::units::engine::{ContextTables, Counters, Engine, SanitizerReport, Totals};
use crate::units::gate::Gate;
use crate::units::hardware::{CacheRange, CacheTag, Hardware, Translation, UserTables};
use crate::units::page_requests::PageRequests;
use crate::units::stage2::Stage2;
use engine::Vtd;
use fault::{SinkOfDevice, Sinks};
use sanitizer::Sanitizer;
use twostage::iommufd::{iommu_hw_info_vtd, Extensions};
use twostage::spec::vtd::interrupt::INTERRUPT_RANGE;

pub use config::{AddressWidth, VtdUnitConfig};

/// An emulated VT-d unit in scalable mode, for devices of this process.
///
/// Attachments come from the [`EmulatedHost`](crate::EmulatedHost) that it is added to; devices
/// access it by a [`DmaPort`](crate::DmaPort). Until something is attached it blocks all DMA.
/// Cached entries stay until the host invalidates them: a guest that forgets an invalidation sees
/// the old translation, as on hardware.
#[derive(Debug)]
pub struct VtdUnit {
    config: VtdUnitConfig,
    gate: Arc<Gate<Engine<Vtd>>>,
    counters: Arc<Counters>,
    sanitizer: Option<Arc<Sanitizer>>,
    page_requests: Arc<PageRequests>,
    sinks: Arc<Sinks>,
}

impl VtdUnit {
    /// A unit with nothing attached: it blocks all DMA.
    pub fn new(config: VtdUnitConfig) -> Arc<Self> {
        let (counters, sinks) = (Arc::<Counters>::default(), Arc::<Sinks>::default());
        let sanitizer = config.sanitize.then(Arc::<Sanitizer>::default);
        let engine =
            Engine::new(config.clone(), counters.share(), sanitizer.clone(), Arc::clone(&sinks));
        let (gate, page_requests) = (Gate::new(engine), Arc::default());
        Arc::new(Self { config, gate, counters, sanitizer, page_requests, sinks })
    }

    /// A port for DMA by requester id `rid`.
    pub fn port(&self, rid: u16) -> DmaPort {
        let (counters, page_requests) = (self.counters.clone(), self.page_requests.clone());
        // §3.14.
        DmaPort::new(rid, self.gate.clone(), counters, page_requests, Some(INTERRUPT_RANGE))
    }

    /// Its counters so far. Requests in progress may or may not be counted.
    pub fn counters(&self) -> VtdCounters {
        self.counters.read().into()
    }

    /// The stale translations used so far; `None` for a unit without the sanitizer
    /// ([`VtdUnitConfig::sanitize`]).
    pub fn sanitizer_report(&self) -> Option<SanitizerReport> {
        self.sanitizer.as_ref().map(|sanitizer| sanitizer.common.report())
    }

    /// Makes the sanitizer, if there is one, compare each requester's translation with `tables`.
    /// Only the first call counts.
    pub fn set_context_tables(&self, tables: Weak<dyn ContextTables>) {
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.set_context_tables(tables);
        }
    }
}

impl Hardware for VtdUnit {
    fn info(&self) -> iommu_hw_info_vtd {
        self.config.info()
    }

    fn walks(&self, tables: &UserTables) -> bool {
        self.config.walks(tables)
    }

    fn pasid_bits(&self) -> u8 {
        self.config.pasid_bits()
    }

    fn extensions(&self) -> Extensions {
        Extensions::default()
            .with_guest_second_stage(self.config.guest_second_stage)
            .with_fault_reports(true)
            .with_device_tlbs(self.config.device_tlb)
    }

    fn install(&self, rid: u16, pasid: Option<u32>, translation: Translation) {
        self.gate.write(|engine| engine.install(rid, pasid, translation));
    }

    fn remove(&self, rid: u16, pasid: Option<u32>) {
        self.gate.write(|engine| engine.remove(rid, pasid));
    }

    fn invalidate(&self, tag: CacheTag, ranges: &[CacheRange]) {
        self.gate.write(|engine| engine.invalidate(tag, ranges));
    }

    fn invalidate_second_stage(&self, tag: CacheTag, ranges: &[CacheRange]) {
        self.gate.write(|engine| engine.invalidate_second_stage(tag, ranges));
    }

    fn invalidate_device_tlb(&self, rid: u16, pasid: Option<u32>, range: CacheRange) -> bool {
        self.gate.write(|engine| engine.invalidate_device_tlb(rid, pasid, range))
    }

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.gate.write(|engine| engine.common.stage2_changed(stage2));
    }

    fn page_requests(&self) -> Option<&PageRequests> {
        self.config.page_requests().then_some(&self.page_requests)
    }

    fn set_fault_sink(&self, rid: u16, sink: Option<SinkOfDevice>) {
        self.sinks.set(rid, sink);
    }
}

twostage::counters! {
    /// Counters of an emulated VT-d unit.
    #[cfg_attr(feature = "serde", derive(serde::Serialize))]
    #[non_exhaustive]
    pub struct VtdCounters from Totals {
        /// Requests that the IOTLB served.
        iotlb_hits,
        /// Requests that missed the IOTLB.
        iotlb_misses,
        /// IOTLB entries evicted.
        iotlb_evictions,
        /// Requests that a device TLB served.
        device_tlb_hits,
        /// Requests that missed their device's TLB.
        device_tlb_misses,
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

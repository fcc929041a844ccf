// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An emulated SMMUv3, for devices of this process.
//!
//! A request is translated by its StreamID through the stream table, which the host's driver fills;
//! if stage 1 is the user's, by its SubstreamID through the user's context descriptors to the
//! tables of an address space, each of whose pointers is translated by stage 2; and by stage 2. The
//! caches are those of hardware: of context descriptors, of table descriptors, and an IOTLB tagged
//! by VMID and ASID, whose entries stay until a command drops them. A guest that forgets one sees
//! the same here as on hardware.

mod config;
mod context;
mod engine;
mod fault;
mod invalidation;
mod sanitizer;
mod streams;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::dma::DmaPort;
use crate::units::engine::{Counters, Engine, Sanitizer, SanitizerReport, Totals};
use crate::units::gate::Gate;
use crate::units::page_requests::PageRequests;
use crate::units::stage2::Stage2;
use engine::SmmuV3;
use fault::Sinks;

pub use config::SmmuV3UnitConfig;
pub(crate) use fault::EventSink;
pub(crate) use invalidation::Invalidation;
pub(crate) use streams::StreamEntry;

/// An emulated SMMUv3, for devices of this process.
///
/// Attachments come from the [`EmulatedHost`](crate::EmulatedHost) that it is added to; devices
/// access it by a [`DmaPort`](crate::DmaPort), with the requester ID as StreamID. Until something
/// is attached it aborts all DMA. Cached entries stay until the host invalidates them: a guest that
/// forgets an invalidation sees the old translation, as on hardware.
#[derive(Debug)]
pub struct SmmuV3Unit {
    config: SmmuV3UnitConfig,
    gate: Arc<Gate<Engine<SmmuV3>>>,
    counters: Arc<Counters>,
    sanitizer: Option<Arc<Sanitizer>>,
    page_requests: Arc<PageRequests>,
    sinks: Arc<Sinks>,
}

impl SmmuV3Unit {
    /// A unit with nothing attached: it aborts all DMA.
    pub fn new(config: SmmuV3UnitConfig) -> Arc<Self> {
        let (counters, sinks) = (Arc::<Counters>::default(), Arc::<Sinks>::default());
        let sanitizer = config.sanitize.then(Arc::<Sanitizer>::default);
        let engine =
            Engine::new(config.clone(), counters.share(), sanitizer.clone(), Arc::clone(&sinks));
        let (gate, page_requests) = (Gate::new(engine), Arc::default());
        Arc::new(Self { config, gate, counters, sanitizer, page_requests, sinks })
    }

    /// A port for DMA of the stream `sid`.
    pub fn port(&self, sid: u16) -> DmaPort {
        let (counters, page_requests) = (self.counters.clone(), self.page_requests.clone());
        // Whether a request is an interrupt message depends on where the tables send it.
        DmaPort::new(sid, self.gate.clone(), counters, page_requests, None)
    }

    /// Its counters so far. Requests in progress may or may not be counted.
    pub fn counters(&self) -> SmmuV3Counters {
        self.counters.read().into()
    }

    /// The page requests of its devices; none if it takes none.
    pub(crate) fn page_requests(&self) -> Option<&PageRequests> {
        self.config.page_requests().then_some(&self.page_requests)
    }

    /// Its stalled transactions; none if it stalls none.
    pub(crate) fn stalled(&self) -> Option<&PageRequests> {
        self.config.stalls.then_some(&self.page_requests)
    }

    /// The stale translations used so far; `None` for a unit without the sanitizer
    /// ([`SmmuV3UnitConfig::sanitize`]).
    pub fn sanitizer_report(&self) -> Option<SanitizerReport> {
        self.sanitizer.as_ref().map(|sanitizer| sanitizer.report())
    }

    /// What it can do.
    pub(crate) fn config(&self) -> &SmmuV3UnitConfig {
        &self.config
    }

    /// Writes the entry of `sid` (or of the host's substream `pasid` of it), replacing the old one:
    /// no request is aborted in between.
    pub(crate) fn install(&self, sid: u16, pasid: Option<u32>, entry: StreamEntry) {
        self.gate.write(|engine| engine.install(sid, pasid, entry));
    }

    /// Makes `sid` (or the host's substream `pasid` of it) abort.
    pub(crate) fn remove(&self, sid: u16, pasid: Option<u32>) {
        self.gate.write(|engine| engine.remove(sid, pasid));
    }

    /// Executes `invalidations`: when this returns, no request uses what they drop. Returns whether
    /// every device has answered those of its TLB.
    pub(crate) fn invalidate(&self, invalidations: &[Invalidation]) -> bool {
        self.gate.write(|engine| engine.invalidate(invalidations))
    }

    /// Something was unmapped from `stage2`, or its pages now count as clean: drops everything
    /// cached through it.
    pub(crate) fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.gate.write(|engine| engine.common.stage2_changed(stage2));
    }

    /// Sets the sink for events of `sid`.
    pub(crate) fn set_event_sink(&self, sid: u16, sink: Arc<dyn EventSink>) {
        self.sinks.set(sid, sink);
    }
}

twostage::counters! {
    /// Counters of an emulated SMMUv3.
    #[cfg_attr(feature = "serde", derive(serde::Serialize))]
    #[non_exhaustive]
    pub struct SmmuV3Counters from Totals {
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

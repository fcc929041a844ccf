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

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use crate::dma::error::DmaFaultReason;
use crate::units::engine::{
    Counters, LocalCounters, Request, RequestKind, Sanitizer, SanitizerReport, Totals, Unit,
};
use crate::units::gate::Gate;
use crate::units::page_requests::PageRequests;
use crate::units::stage2::Stage2;
use engine::Engine;
use fault::Fault;
use twostage::spec::smmuv3::event::EventRecord;

pub use config::SmmuV3UnitConfig;
pub(crate) use invalidation::Invalidation;
pub(crate) use streams::StreamEntry;

/// Destination of the events of one stream: what its driver does with the event queue.
pub(crate) trait EventSink: Debug + Send + Sync {
    /// A transaction was terminated; `record` has the reason and the physical StreamID.
    fn event(&self, record: &EventRecord);
}

/// An emulated SMMUv3, for devices of this process.
///
/// Attachments come from the [`EmulatedHost`](crate::EmulatedHost) that it is added to; devices
/// access it by a [`DmaPort`](crate::DmaPort), with the requester ID as StreamID. Until something
/// is attached it aborts all DMA. Cached entries stay until the host invalidates them: a guest that
/// forgets an invalidation sees the old translation, as on hardware.
#[derive(Debug)]
pub struct SmmuV3Unit {
    config: SmmuV3UnitConfig,
    gate: Arc<Gate<Engine>>,
    counters: Counters,
    page_requests: PageRequests,
    sanitizer: Option<Arc<Sanitizer>>,
    /// Where the events of a stream go. Never held together with the gate.
    sinks: Mutex<BTreeMap<u16, Arc<dyn EventSink>>>,
}

impl SmmuV3Unit {
    /// A unit with nothing attached: it aborts all DMA.
    pub fn new(config: SmmuV3UnitConfig) -> Arc<Self> {
        let counters = Counters::default();
        let sanitizer = config.sanitize.then(Arc::<Sanitizer>::default);
        let engine = Engine::new(config.clone(), counters.share(), sanitizer.clone());
        let gate = Gate::new(engine);
        let page_requests = PageRequests::default();
        Arc::new(Self { config, gate, counters, sanitizer, page_requests, sinks: Mutex::default() })
    }

    /// Its counters so far. Requests in progress may or may not be counted.
    pub fn counters(&self) -> SmmuV3Counters {
        self.counters.read().into()
    }

    /// The page requests of its devices; none if it takes none.
    pub(crate) fn page_requests(&self) -> Option<&PageRequests> {
        self.config.page_requests().then_some(&self.page_requests)
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

    /// Executes `invalidations`: when this returns, no request uses what they drop.
    pub(crate) fn invalidate(&self, invalidations: &[Invalidation]) {
        self.gate.write(|engine| engine.invalidate(invalidations));
    }

    /// Something was unmapped from `stage2`, or its pages now count as clean: drops everything
    /// cached through it.
    pub(crate) fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.gate.write(|engine| engine.stage2_changed(stage2));
    }

    /// Sets the sink for events of `sid`.
    pub(crate) fn set_event_sink(&self, sid: u16, sink: Arc<dyn EventSink>) {
        self.sinks().insert(sid, sink);
    }

    fn sinks(&self) -> MutexGuard<'_, BTreeMap<u16, Arc<dyn EventSink>>> {
        self.sinks.lock()
    }
}

impl Unit for SmmuV3Unit {
    type Engine = Engine;

    fn gate(&self) -> &Arc<Gate<Engine>> {
        &self.gate
    }

    fn counters_share(&self) -> Arc<LocalCounters> {
        self.counters.share()
    }

    fn report(&self, request: &Request, fault: Fault) {
        let Some(record) = fault.record(request) else { return };
        let sink = self.sinks().get(&request.rid).cloned();
        if let Some(sink) = sink {
            sink.event(&record);
        }
    }

    /// Never: any structure may be cached, valid or not (§3.21.3), so software must announce each
    /// that becomes valid.
    fn nothing_attached(_: Fault) -> bool {
        false
    }

    fn attached_late(&self, _: &Request) -> bool {
        false
    }

    fn page_requests(&self) -> &PageRequests {
        &self.page_requests
    }

    fn asks_for_page(fault: Fault, _: RequestKind) -> bool {
        fault.asks_for_page()
    }

    fn reason(fault: Fault) -> (DmaFaultReason, bool) {
        match fault {
            Fault::Abort => (DmaFaultReason::SmmuV3Abort, false),
            Fault::Event { id, stage2, .. } => (DmaFaultReason::SmmuV3(id), stage2),
        }
    }
}

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

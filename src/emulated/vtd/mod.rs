// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An emulated VT-d unit in scalable mode, for devices of this process.
//!
//! A request goes from (requester id, PASID) through the PASID table that the host's attachments
//! fill, through the user's own tables if its HWPT is nested, each of whose pointers goes through
//! stage 2, and through stage 2. On its way it meets the caches that hardware has: a PASID cache,
//! paging-structure caches and an IOTLB, whose entries stay until they are invalidated. A guest
//! that forgets an invalidation sees it here as it would on hardware.
#![forbid(unsafe_code)]

mod cache;
mod caches;
mod config;
mod context;
mod counters;
mod engine;
mod first_stage;
mod format;
mod memories;
mod origins;
mod pasid_table;
mod rights;
mod sanitizer;
mod second_stage;
mod sharing;
#[cfg(test)]
mod tests;
mod trail;
mod walk;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::gate::Gate;
use super::hardware::{CacheRange, CacheTag, Hardware, Translation, UserTables};
use super::stage2::Stage2;
use crate::iommufd::{iommu_hw_info_vtd, Extensions, FaultSink, HostFault, ObjectId};
use counters::Counters;
use sanitizer::Sanitizer;

pub use config::{AddressWidth, VtdUnitConfig};
pub use counters::VtdCounters;
pub use sanitizer::{
    ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext, StaleUse,
};

pub(super) use caches::Target;
pub(super) use counters::LocalCounters;
pub(super) use engine::Engine;
pub(super) use pasid_table::PasidCache;
pub(super) use rights::{Fault, Request, RequestKind};

/// An emulated VT-d unit in scalable mode, for devices of this process.
///
/// Attachments come from the [`EmulatedHost`](super::EmulatedHost) that it is added to; devices
/// reach it by a [`DmaPort`](super::DmaPort). Until something is attached it blocks all DMA. What
/// it caches stays until the host invalidates it: a guest that forgets an invalidation sees the old
/// translation, as on hardware.
#[derive(Debug)]
pub struct VtdUnit {
    config: VtdUnitConfig,
    gate: Arc<Gate<Engine>>,
    counters: Counters,
    sanitizer: Option<Arc<Sanitizer>>,
    /// Where the faults of a requester id go. Never held together with the gate.
    sinks: Mutex<BTreeMap<u16, SinkOfDevice>>,
}

/// The device object that a fault names, and who is told.
type SinkOfDevice = (ObjectId, Weak<dyn FaultSink>);

impl VtdUnit {
    /// A unit with nothing attached: it blocks all DMA.
    pub fn new(config: VtdUnitConfig) -> Arc<Self> {
        let counters = Counters::default();
        let sanitizer = config.sanitize.then(Arc::<Sanitizer>::default);
        let engine = Engine::new(config.clone(), counters.share(), sanitizer.clone());
        Arc::new(Self {
            config,
            gate: Gate::new(engine),
            counters,
            sanitizer,
            sinks: Mutex::new(BTreeMap::new()),
        })
    }

    /// What the unit has done so far. Requests under way may or may not be counted.
    pub fn counters(&self) -> VtdCounters {
        self.counters.read()
    }

    /// Which stale translations were used so far; `None` for a unit that does not look
    /// ([`VtdUnitConfig::sanitize`]).
    pub fn sanitizer_report(&self) -> Option<SanitizerReport> {
        self.sanitizer.as_ref().map(|sanitizer| sanitizer.report())
    }

    /// From now on the sanitizer, if there is one, compares what the unit was given for each
    /// requester with `tables`. Only the first call counts.
    pub fn set_context_tables(&self, tables: Weak<dyn ContextTables>) {
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.set_context_tables(tables);
        }
    }

    /// The gate that translations are read through.
    pub(super) fn gate(&self) -> &Arc<Gate<Engine>> {
        &self.gate
    }

    /// A share of the counters.
    pub(super) fn counters_share(&self) -> Arc<LocalCounters> {
        self.counters.share()
    }

    /// Tells who wants to know that `request` was blocked. Not to be called with the gate entered:
    /// the sink may invalidate.
    pub(super) fn report(&self, request: &Request, fault: Fault) {
        let sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        let sink = sinks.get(&request.rid).and_then(|(dev, sink)| Some((*dev, sink.upgrade()?)));
        drop(sinks);
        if let Some((dev, sink)) = sink {
            sink.dma_fault(&HostFault {
                dev,
                pasid: request.pasid,
                address: request.address,
                write: request.kind.write(),
                execute: request.kind.execute(),
                privileged: request.kind.privileged(),
                reason: fault.reason.code(),
                stage2: fault.stage2,
            });
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
        Extensions { guest_second_stage: self.config.guest_second_stage, fault_reports: true }
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

    fn stage2_changed(&self, stage2: &Arc<Stage2>) {
        self.gate.write(|engine| engine.stage2_changed(stage2));
    }

    fn set_fault_sink(&self, rid: u16, sink: Option<SinkOfDevice>) {
        let mut sinks = self.sinks.lock().unwrap_or_else(PoisonError::into_inner);
        match sink {
            Some(sink) => sinks.insert(rid, sink),
            None => sinks.remove(&rid),
        };
    }
}

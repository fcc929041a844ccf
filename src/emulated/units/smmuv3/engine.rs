// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The translations of an SMMU: stream table, configuration cache, and the translation of requests.
//!
//! Readers translate, with shared access; a writer changes streams and drops cached entries, with
//! exclusive access. The gate in front ensures this.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::config::SmmuV3UnitConfig;
use super::context::{choose, AddressSpace, Choice, ContextTable};
use super::fault::Fault;
use super::invalidation::{
    drop_range, drop_spaces, known_range, Invalidation, GLOBAL, STAGE2_ONLY,
};
use super::sanitizer;
use super::streams::{Configuration, Configurations, Stream, StreamEntry, StreamTable, UserStage1};
use crate::units::engine::{
    Blocked, Caches, ConfigCache, Gone, LocalCounters, Request, RequestKind, Rights, Sanitizer,
    Sharing, Source, Spaces, Target, Walk,
};
use crate::units::stage2::Stage2;
use twostage::spec::smmuv3::event::{EventClass, EventId};

/// Page sizes in the IOTLB without stage 1, as powers of two.
const STAGE2_SHIFTS: &[u8] = &[30, 21, 12];

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Engine {
    config: SmmuV3UnitConfig,
    streams: StreamTable,
    configurations: Configurations,
    sharing: Sharing,
    caches: Caches,
    /// Some translation in the IOTLB is global.
    globals: AtomicBool,
    sanitizer: Option<Arc<Sanitizer>>,
    /// Of what happens with exclusive access.
    counters: Arc<LocalCounters>,
}

impl Engine {
    /// An engine whose every stream aborts; `sanitizer` checks translations and invalidations.
    pub(super) fn new(
        config: SmmuV3UnitConfig,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
    ) -> Self {
        let origins = sanitizer.as_ref().map(|sanitizer| sanitizer.origins());
        let caches = Caches::new(config.cache_sizes(), config.output_bits(), origins);
        Self {
            config,
            streams: StreamTable::default(),
            configurations: Configurations::default(),
            sharing: Sharing::default(),
            caches,
            globals: AtomicBool::new(false),
            sanitizer,
            counters,
        }
    }

    /// The IOTLB's translation for a request with `configuration`.
    #[inline]
    fn lookup(
        &self,
        configuration: &Configuration,
        address: u64,
        kind: RequestKind,
    ) -> Option<Target> {
        let tag = configuration.tag;
        let Some(space) = &configuration.space else {
            let source = Source::new(tag, STAGE2_ONLY);
            return self.caches.translation(STAGE2_SHIFTS, source, address, kind);
        };
        let (address, tables) = space.half(address);
        let shifts = tables?.shifts();
        let of = |space| self.caches.translation(shifts, Source::new(tag, space), address, kind);
        of(space.asid.into()).or_else(|| match self.globals.load(Ordering::Relaxed) {
            true => of(GLOBAL),
            false => None,
        })
    }

    /// The configuration of requests of `sid` (with `pasid`) according to the stream table and the
    /// context descriptors now.
    fn resolve(
        &self,
        counters: &LocalCounters,
        sid: u16,
        pasid: Option<u32>,
    ) -> Result<Configuration, Fault> {
        let host_only = |stream: &Stream| Configuration {
            tag: stream.tag,
            space: None,
            host: stream.host.clone(),
        };
        if let Some(substream) = pasid.and_then(|_| self.streams.get(sid, pasid)) {
            return Ok(host_only(substream));
        }
        let host_substreams = self.streams.has_substreams(sid);
        let Some(stream) = self.streams.get(sid, None) else {
            return Err(match (host_substreams, pasid) {
                (false, _) => Fault::Abort,
                (true, None) => Fault::config(EventId::StreamDisabled),
                (true, Some(_)) => Fault::config(EventId::BadCd),
            });
        };
        let ste = match stream.stage1 {
            Some(UserStage1::Contexts(ste)) => ste,
            Some(UserStage1::Illegal) => return Err(Fault::config(EventId::BadSte)),
            None if pasid.is_none() => return Ok(host_only(stream)),
            None if host_substreams => return Err(Fault::config(EventId::BadCd)),
            None => return Err(Fault::config(EventId::BadSubstreamId)),
        };
        let number = match choose(&ste, pasid)? {
            Choice::Bypass => return Ok(host_only(stream)),
            Choice::Context(number) => number,
        };
        let table = ContextTable {
            caches: &self.caches,
            host: &stream.host,
            counters,
            address_bits: self.config.output_bits(),
        };
        let cd = table.fetch(&ste, number)?;
        let space = AddressSpace::new(&cd, &self.config);
        let space = space.ok_or(Fault::config(EventId::BadCd))?;
        Ok(Configuration { tag: stream.tag, space: Some(space), host: stream.host.clone() })
    }

    /// Translates by the tables and caches the result.
    fn walk(
        &self,
        configuration: &Configuration,
        counters: &LocalCounters,
        address: u64,
        kind: RequestKind,
    ) -> Result<Target, Fault> {
        let Configuration { tag, host, .. } = configuration;
        let source = |space| Source::new(*tag, space);
        let walk = |space| Walk {
            caches: &self.caches,
            source: source(space),
            global: source(GLOBAL),
            host,
            counters,
            dirty: host.tracking(),
        };
        let (address, output) = match &configuration.space {
            None => {
                if address >> self.config.output_bits() != 0 {
                    return Err(Fault::stage1(EventId::AddressSize, true));
                }
                let output = walk(STAGE2_ONLY).stage2_only(address, kind, Rights::ALL);
                let refused = |why| Fault::stage2(why, EventClass::Input, address);
                (address, output.map_err(refused)?)
            }
            Some(space) => {
                let (address, tables) = space.half(address);
                let off = || Fault::stage1(EventId::Translation, space.recorded);
                let walk = walk(space.asid.into());
                (address, walk.walk(tables.ok_or_else(off)?, address, kind)?)
            }
        };
        if let Some(page) = output.cached() {
            if output.source.space() == GLOBAL {
                self.globals.store(true, Ordering::Relaxed);
            }
            self.caches.add_translation(output.source, address, &page, counters);
        }
        Ok(Target { place: output.page.place, length: output.length })
    }

    /// Caches in the port the index of the configuration of requests with `pasid`; not with a
    /// sanitizer, which must see every request.
    fn note(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        pasid: Option<u32>,
        index: usize,
    ) {
        if self.sanitizer.is_none() {
            let evicted = config.fill(self.configurations.generation(), pasid, index);
            counters.config_evictions.add(evicted.into());
        }
    }

    /// Compares what `request` is about to use with what is in memory now. Returns the part of
    /// `target` that was compared.
    fn compare(
        &self,
        sanitizer: &Sanitizer,
        configuration: &Configuration,
        counters: &LocalCounters,
        request: &Request,
        target: Target,
    ) -> Target {
        if !self.compare_context(sanitizer, configuration, counters, request) {
            // The current state of tables that are no longer in use is irrelevant.
            return target;
        }
        sanitizer::check(sanitizer, &self.caches, configuration, counters, request, target)
    }

    /// Compares `configuration`, by which `request` is translated, with the context descriptors in
    /// memory now. Returns whether they are the same.
    fn compare_context(
        &self,
        sanitizer: &Sanitizer,
        configuration: &Configuration,
        counters: &LocalCounters,
        request: &Request,
    ) -> bool {
        // No device requested this, so it is not counted.
        let now = self.resolve(&LocalCounters::default(), request.rid, request.pasid);
        let now = now.as_ref().map_err(|fault| *fault);
        let stale = sanitizer::stale_context(request, configuration, now);
        if let Some(stale) = stale {
            sanitizer.context_used(counters, stale);
        }
        stale.is_none()
    }

    /// The address of the interrupt message, if the write that `fault` stopped is one. Stage 2 does
    /// not map it, so such a translation is not cached: each message is translated by the tables.
    /// An SMMU may cache it, but need not.
    fn doorbell(&self, fault: &Fault, kind: RequestKind) -> Option<u64> {
        let Fault::Event { stage2: true, class: EventClass::Input, second_address, .. } = *fault
        else {
            return None;
        };
        let doorbell = self.config.msi_doorbell.as_ref()?;
        (kind.write() && doorbell.contains(&second_address)).then_some(second_address)
    }

    /// Writes the entry of `sid` (or of the host's substream `pasid` of it); hitless.
    pub(super) fn install(&mut self, sid: u16, pasid: Option<u32>, entry: StreamEntry) {
        let gone = self.sharing.reuse(entry.tag.0);
        self.forget(gone);
        // Add the new one before removing the old one: a tag that both use stays in use.
        let stage2_tag = self.sharing.add(entry.tag.0, &entry.stage2);
        let old = self.streams.insert(sid, pasid, entry, stage2_tag, &self.config);
        self.changed(sid, old);
    }

    /// Makes `sid` (or the host's substream `pasid` of it) abort.
    pub(super) fn remove(&mut self, sid: u16, pasid: Option<u32>) {
        let old = self.streams.remove(sid, pasid);
        self.changed(sid, old);
    }

    /// An entry of `sid` has replaced `old`.
    fn changed(&mut self, sid: u16, old: Option<Stream>) {
        self.configurations.drop_where(|(of, _)| of == sid);
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.contexts_changed(sid, |_| true);
        }
        if let Some(old) = old {
            let gone = self.sharing.remove(old.tag, &old.host.stage2);
            self.forget(gone);
        }
    }

    /// Executes `invalidations` in order.
    pub(super) fn invalidate(&mut self, invalidations: &[Invalidation]) {
        let ranges = self.config.range_invalidation;
        for invalidation in invalidations {
            let caches = &mut self.caches;
            let dropped = match *invalidation {
                Invalidation::All { tag } => drop_spaces(caches, tag, Spaces::UpTo(GLOBAL)),
                Invalidation::Asid { tag, asid } => {
                    drop_spaces(caches, tag, Spaces::One(asid.into()))
                }
                Invalidation::Va { tag, asid, range } => {
                    let range = known_range(range, ranges);
                    drop_range(caches, tag, Spaces::Two(asid.into(), GLOBAL), range)
                }
                Invalidation::Vaa { tag, range } => {
                    let range = known_range(range, ranges);
                    drop_range(caches, tag, Spaces::UpTo(GLOBAL), range)
                }
                Invalidation::Context { sid, substream } => {
                    // Requests without SubstreamID use number 0, if any.
                    let number = |pasid: Option<u32>| pasid.unwrap_or(0);
                    self.configurations
                        .drop_where(|(of, pasid)| of == sid && number(pasid) == substream)
                }
                Invalidation::Contexts { sid } => {
                    self.configurations.drop_where(|(of, _)| of == sid)
                }
                Invalidation::DeviceTlb => 0,
            };
            self.count_invalidation(dropped);
            if let Some(sanitizer) = &self.sanitizer {
                sanitizer::invalidated(sanitizer, invalidation, ranges);
            }
        }
    }

    /// Drops what is cached through `stage2`, including the knowledge that pages are dirty.
    pub(super) fn stage2_changed(&mut self, stage2: &Arc<Stage2>) {
        let gone = self.sharing.through(stage2);
        self.forget(gone);
    }

    /// Drops what is cached of `gone`.
    fn forget(&mut self, gone: Option<Gone>) {
        if let Some(gone) = gone {
            let dropped = self.caches.drop_gone(&gone);
            self.count_invalidation(dropped);
            if let Some(sanitizer) = &self.sanitizer {
                sanitizer.forget(&gone);
            }
        }
    }

    fn count_invalidation(&self, dropped: u64) {
        self.counters.invalidations.count();
        self.counters.invalidated_entries.add(dropped);
    }
}

impl crate::units::engine::Engine for Engine {
    type Fault = Fault;

    /// Whether it is a message depends on where the tables send it.
    const INTERRUPTS: Option<RangeInclusive<u64>> = None;

    #[inline]
    fn cached(
        &self,
        config: &ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        let index = config.get(self.configurations.generation(), request.pasid)?;
        let configuration = self.configurations.get(index)?;
        let target = self.lookup(configuration, request.address, request.kind)?;
        counters.config_hits.count();
        counters.iotlb_hits.count();
        Some(target)
    }

    #[cold]
    fn translate(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Blocked<Fault>> {
        let Request { rid, pasid, address, kind } = *request;
        let generation = self.configurations.generation();
        let known = match config.get(generation, pasid) {
            Some(index) => {
                counters.config_hits.count();
                Some(index)
            }
            None => {
                let known = self.configurations.find((rid, pasid));
                if let Some(index) = known {
                    counters.config_hits.count();
                    self.note(config, counters, pasid, index);
                }
                known
            }
        };
        let uncached;
        let configuration = match known.and_then(|index| self.configurations.get(index)) {
            Some(configuration) => configuration,
            None => {
                counters.config_misses.count();
                let resolved = self.resolve(counters, rid, pasid)?;
                match self.configurations.add((rid, pasid), resolved) {
                    Ok(index) => {
                        self.note(config, counters, pasid, index);
                        self.configurations.get(index).ok_or(Fault::Abort)?
                    }
                    Err(resolved) => {
                        uncached = resolved;
                        &uncached
                    }
                }
            }
        };
        let target = match self.lookup(configuration, address, kind) {
            Some(target) => {
                counters.iotlb_hits.count();
                target
            }
            None => {
                counters.iotlb_misses.count();
                self.walk(configuration, counters, address, kind).map_err(|fault| {
                    let Some(message) = self.doorbell(&fault, kind) else {
                        return Blocked::Fault(fault);
                    };
                    // Its tables have just been read, but perhaps not its context.
                    if let Some(sanitizer) = &self.sanitizer {
                        self.compare_context(sanitizer, configuration, counters, request);
                    }
                    Blocked::Interrupt(message)
                })?
            }
        };
        Ok(match &self.sanitizer {
            Some(sanitizer) => self.compare(sanitizer, configuration, counters, request, target),
            None => target,
        })
    }

    fn caches(&self) -> &Caches {
        &self.caches
    }
}

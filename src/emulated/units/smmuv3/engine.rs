// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An SMMU's part of the engine: stream table, configuration cache, translation of requests.

use std::borrow::Cow;
use std::sync::Arc;

use super::config::SmmuV3UnitConfig;
use super::context::{choose, AddressSpace, Choice, ContextTable};
use super::fault::{Fault, Sinks};
use super::invalidation::{drop_range, drop_spaces, known_range, Invalidation, GLOBAL};
use super::sanitizer;
use super::streams::{
    Configuration, Configurations, Requester, Stream, StreamEntry, StreamTable, UserStage1,
};
use crate::units::engine::{
    device_space, Architecture, Blocked, Common, ConfigCache, Engine, IovaRange, Known,
    LocalCounters, Lookup, Missed, OverHost, Request, RequestKind, Rights, Sanitizer, Spaces,
    Target, Walk,
};
use twostage::spec::smmuv3::event::{EventClass, EventId};

/// See the [module's documentation](self).
#[derive(Debug)]
pub(super) struct SmmuV3 {
    config: SmmuV3UnitConfig,
    streams: StreamTable,
    configurations: Configurations,
    sinks: Arc<Sinks>,
}

impl SmmuV3 {
    /// The configuration of requests of `sid` (with `pasid`) according to the stream table and the
    /// context descriptors now.
    fn resolve(
        &self,
        common: &Common,
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
            caches: &common.caches,
            host: &stream.host,
            counters,
            address_bits: self.config.output_bits(),
        };
        let cd = table.fetch(&ste, number)?;
        let space = AddressSpace::new(&cd, &self.config, !ste.qw1.s1stalld());
        let space = space.ok_or(Fault::config(EventId::BadCd))?;
        Ok(Configuration { tag: stream.tag, space: Some(space), host: stream.host.clone() })
    }

    /// Translates by the tables.
    fn walk(
        &self,
        common: &Common,
        configuration: &Configuration,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Fault> {
        let Request { address, kind, .. } = *request;
        let (at, caches) = (configuration.lookup(), &common.caches);
        let lower = OverHost::new(caches, &configuration.host, counters);
        let walk = Walk { caches, source: at.source, global: at.global, counters, lower };
        let Some(space) = &configuration.space else {
            if address >> self.config.output_bits() != 0 {
                return Err(Fault::too_large());
            }
            let refused = |why| Fault::stage2(why, EventClass::Input, address);
            return walk.stage2_only(address, kind, Rights::ALL).map_err(refused);
        };
        let (address, tables) = space.half(address);
        let tables = tables.ok_or(Fault::stage1(EventId::Translation, space.faults))?;
        walk.walk(tables, address, kind).or_else(|fault| {
            if self.doorbell(&fault, kind).is_some() {
                walk.mark(tables, address, kind)?;
            }
            Err(fault)
        })
    }

    /// The configuration of `request`: cached in the port, cached here, or from the tables.
    fn configuration(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Cow<'_, Configuration>, Fault> {
        let requester @ (rid, pasid) = (request.rid, request.pasid);
        let in_port = common.known(config, pasid);
        let number = match in_port.or_else(|| self.configurations.find(requester)) {
            Some(number) => {
                counters.config_hits.count();
                number
            }
            None => {
                counters.config_misses.count();
                let resolved = self.resolve(common, counters, rid, pasid)?;
                match self.configurations.add(requester, resolved) {
                    Ok(number) => number,
                    Err(uncached) => return Ok(Cow::Owned(*uncached)),
                }
            }
        };
        let configuration = self.configurations.get(number).ok_or(Fault::Abort)?;
        if in_port.is_none() {
            let known = Known { number, lookup: configuration.lookup() };
            common.note(config, counters, pasid, known);
        }
        Ok(Cow::Borrowed(configuration))
    }

    /// Compares `configuration`, by which `request` is translated, with the context descriptors in
    /// memory now. Returns whether they are the same.
    fn compare_context(
        &self,
        common: &Common,
        sanitizer: &Sanitizer,
        configuration: &Configuration,
        counters: &LocalCounters,
        request: &Request,
    ) -> bool {
        // No device requested this, so it is not counted.
        let now = self.resolve(common, &LocalCounters::default(), request.rid, request.pasid);
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
}

impl Architecture for SmmuV3 {
    fn would_send(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        let sanitizer = common.sanitizer.as_ref()?;
        let configuration = self.configuration(common, config, counters, request).ok()?;
        let configuration = &*configuration;
        let caches = &common.caches;
        let same = self.compare_context(common, sanitizer, configuration, counters, request);
        match caches.translation(&configuration.lookup(), request.address, request.kind) {
            Some(target) if same => {
                Some(sanitizer::check(sanitizer, caches, configuration, counters, request, target))
            }
            Some(target) => Some(target),
            None => sanitizer::now(sanitizer, caches, configuration, request),
        }
    }

    fn lookup(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Lookup, Blocked> {
        let configuration = self.configuration(common, config, counters, request);
        let configuration =
            configuration.map_err(|fault| Blocked::Fault(fault.of(request, &self.sinks)))?;
        Ok(configuration.lookup())
    }

    /// By STE.EATS (§5.2), which is of the whole stream. Linux disables ATS of the device where
    /// that is clear, so there is neither an F_BAD_ATS_TREQ nor an F_TRANSL_FORBIDDEN.
    fn answers_translation_requests(&self, sid: u16) -> bool {
        self.streams.get(sid, None).is_none_or(|stream| stream.ats)
    }

    fn translate(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
        missed: Missed,
    ) -> Result<Target, Blocked> {
        let blocked = |fault: Fault| Blocked::Fault(fault.of(request, &self.sinks));
        let configuration = self.configuration(common, config, counters, request);
        let configuration = &*configuration.map_err(blocked)?;
        let compare_context = |sanitizer: &Sanitizer| {
            self.compare_context(common, sanitizer, configuration, counters, request)
        };
        let lookup = || configuration.lookup();
        let target = match common.hit(lookup, counters, request, missed) {
            Some(target) => target,
            None => self.walk(common, configuration, counters, request).map_err(|fault| {
                let Some(message) = self.doorbell(&fault, request.kind) else {
                    return blocked(fault);
                };
                // Its tables have just been read, but perhaps not its context.
                if let Some(sanitizer) = &common.sanitizer {
                    compare_context(sanitizer);
                }
                Blocked::Interrupt(message)
            })?,
        };
        Ok(match &common.sanitizer {
            Some(sanitizer) if compare_context(sanitizer) => {
                let caches = &common.caches;
                sanitizer::check(sanitizer, caches, configuration, counters, request, target)
            }
            // The current state of tables that are no longer in use is irrelevant.
            _ => target,
        })
    }
}

impl Engine<SmmuV3> {
    /// An engine whose every stream aborts, which reports to `sinks`; `sanitizer` checks
    /// translations and invalidations.
    pub(super) fn new(
        config: SmmuV3UnitConfig,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
        sinks: Arc<Sinks>,
    ) -> Self {
        let common = Common::new(config.cache_sizes(), config.output_bits(), counters, sanitizer);
        let (streams, configurations) = (StreamTable::default(), Configurations::default());
        Self { common, own: SmmuV3 { config, streams, configurations, sinks } }
    }

    /// Writes the entry of `sid` (or of the host's substream `pasid` of it); hitless.
    pub(super) fn install(&mut self, sid: u16, pasid: Option<u32>, entry: StreamEntry) {
        let Self { common, own } = self;
        let gone = common.sharing.reuse(entry.tag.0);
        common.forget(gone);
        // Add the new one before removing the old one: a tag that both use stays in use.
        let stage2_tag = common.sharing.add(entry.tag.0, &entry.stage2);
        let old = own.streams.insert(sid, pasid, entry, stage2_tag, &own.config);
        self.changed(sid, old);
    }

    /// Makes `sid` (or the host's substream `pasid` of it) abort.
    pub(super) fn remove(&mut self, sid: u16, pasid: Option<u32>) {
        let old = self.own.streams.remove(sid, pasid);
        self.changed(sid, old);
    }

    /// An entry of `sid` has replaced `old`. The device forgets what it has, as Linux's driver
    /// tells it to (`arm_smmu_attach_commit`).
    fn changed(&mut self, sid: u16, old: Option<Stream>) {
        self.drop_configurations(|(of, _)| of == sid);
        let common = &mut self.common;
        let dropped = common.caches.device_tlbs.drop_device(sid, None, IovaRange::ALL);
        common.counters.invalidated_entries.add(dropped);
        if let Some(sanitizer) = &common.sanitizer {
            sanitizer.contexts_changed(sid, |_| true);
            sanitizer.device_told(sid, None, IovaRange::ALL);
        }
        if let Some(old) = old {
            let gone = common.sharing.remove(old.tag, &old.host.stage2);
            common.forget(gone);
        }
    }

    /// Drops the cached configurations for which `condemned` holds; returns their number.
    fn drop_configurations(&mut self, condemned: impl Fn(Requester) -> bool) -> u64 {
        let dropped = self.own.configurations.drop_where(condemned);
        if dropped != 0 {
            self.common.configurations_changed();
        }
        dropped
    }

    /// Executes `invalidations` in order. Returns whether every device has answered those of its
    /// TLB.
    pub(super) fn invalidate(&mut self, invalidations: &[Invalidation]) -> bool {
        let mut answered = true;
        let ranges = self.own.config.range_invalidation;
        for invalidation in invalidations {
            let caches = &mut self.common.caches;
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
                    self.drop_configurations(|(of, pasid)| of == sid && number(pasid) == substream)
                }
                Invalidation::Contexts { sid } => self.drop_configurations(|(of, _)| of == sid),
                Invalidation::DeviceTlb { sid, substream, range } => {
                    let space = substream.map(|substream| device_space(Some(substream)));
                    answered &= caches.device_tlbs.answers(sid);
                    caches.device_tlbs.drop_device(sid, space, range)
                }
            };
            self.common.count_invalidations(1, dropped);
            if let Some(sanitizer) = &self.common.sanitizer {
                sanitizer::invalidated(sanitizer, invalidation, ranges);
            }
        }
        answered
    }
}

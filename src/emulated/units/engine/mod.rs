// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What emulated IOMMUs of all architectures have in common: caches, page walks and the engine that
//! DMA is translated by.
//!
//! A unit has an [`Engine`] behind a gate: readers translate, with shared access; a writer changes
//! the configuration and drops cached entries, with exclusive access. The IOTLB, the
//! paging-structure cache and the cache of stage-2 translations are common, and so is a hit. The
//! rest of a translation is the [`Architecture`]'s: which configuration serves a request, the
//! format of its tables and its faults. Ports know that part of an engine as a trait object.

mod cache;
mod caches;
mod counters;
mod device_tlb;
mod entries;
mod format;
mod host_stage2;
mod key;
mod lower;
mod memories;
mod origins;
mod quick_walk;
mod sanitizer;
mod stage2_cache;
#[cfg(test)]
pub(crate) mod testing;
mod walk;

use std::fmt::Debug;
use std::sync::Arc;

use crate::dma::error::DmaFaultReason;
use crate::units::stage2::Stage2;

pub(crate) use caches::{CacheSizes, Caches};
pub(crate) use counters::{Counters, LocalCounters, Totals};
pub(crate) use device_tlb::device_space;
pub(crate) use entries::{Stage2Page, Target};
pub(crate) use format::{
    At, Entry, Path, PathRights, Request, RequestKind, Rights, Stage2Refusal, TableFormat,
};
pub(crate) use host_stage2::{Gone, HostStage2, Sharing};
pub(crate) use key::{
    ascending, ascending_in, half, size, without_top_byte, Half, IovaRange, Lookup, Scope, Source,
    Spaces,
};
pub(crate) use lower::{own, LowerStage, OverHost};
pub(crate) use origins::{Origins, Trail, Words, PAGE};
pub(crate) use sanitizer::{Lower, Sanitizer, Used};
pub(crate) use walk::Walk;

pub use sanitizer::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};

/// The translations of one unit: what all have, and what its architecture adds.
#[derive(Debug)]
pub(crate) struct Engine<A: ?Sized = dyn Architecture> {
    pub common: Common,
    /// Last, so that ports can have it as a trait object.
    pub own: A,
}

/// An architecture's part of an engine.
pub(crate) trait Architecture: Debug + Send + Sync {
    /// The device of `request` is about to request its page: drops from `caches` what the
    /// architecture says.
    fn page_requested(&self, caches: &mut Caches, request: &Request) {
        let _ = (caches, request);
    }

    /// Translates `request` and caches what it used, also in `config`, the port's; `missed` is
    /// what [`Common::cached`] has just found.
    fn translate(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
        missed: Missed,
    ) -> Result<Target, Blocked>;

    /// For the sanitizer: where the unit would send `request`, if anywhere, by its caches or by the
    /// tables as they are now. Nobody requests that, so no flag in a table is set, and no
    /// translation is cached.
    fn would_send(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target>;

    /// Where the caches have the translation of `request`, by its configuration.
    fn lookup(
        &self,
        common: &Common,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Lookup, Blocked>;

    /// Whether `rid` gets translations to keep (PCI ATS). Where not, its translation requests are
    /// answered by Unsupported Request.
    fn answers_translation_requests(&self, rid: u16) -> bool;
}

/// What a request was not found in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The IOTLB: the port has the configuration.
    Iotlb,
    /// The port's configurations: the IOTLB may have it.
    Config,
}

/// Why a request does not reach memory.
#[derive(Debug)]
pub(crate) enum Blocked {
    /// It is a fault.
    Fault(Fault),
    /// It is an interrupt message, to this GPA (bytes).
    Interrupt(u64),
}

/// A fault: what a port needs to know of it.
#[derive(Debug)]
pub(crate) struct Fault {
    /// The reason, for the requester.
    pub reason: DmaFaultReason,
    /// The host's stage 2 refused.
    pub stage2: bool,
    /// A device with PRI requests the page, as software can fix the translation.
    pub asks_for_page: bool,
    /// The transaction stalls, of a device that may be stalled.
    pub stalls: bool,
    /// Nothing is attached for the requester: whoever gets the report may attach something.
    pub nothing_attached: bool,
    /// The report; none if there is to be none.
    pub report: Option<Box<dyn Report>>,
}

/// The report of a fault. Not to be used inside the gate, as whoever gets it may invalidate.
pub(crate) trait Report: Debug + Send {
    /// Delivers it.
    fn deliver(&self);

    /// Asks whoever would get it to attach something for the requester, on demand; returns whether
    /// they did.
    fn attached_late(&self) -> bool {
        false
    }
}

/// What the engines of all architectures have.
#[derive(Debug)]
pub(crate) struct Common {
    pub caches: Caches,
    pub sharing: Sharing,
    /// Of what happens with exclusive access.
    pub counters: Arc<LocalCounters>,
    /// Checks translations and invalidations.
    pub sanitizer: Option<Arc<Sanitizer>>,
    /// Counts changes of the configurations that ports may have cached.
    generation: u64,
    /// Memory for the ranges of an invalidation, so that one takes no allocation.
    pub ranges: [Vec<IovaRange>; 2],
}

impl Engine {
    /// The target of `request`, of a device whose ATS is enabled, if the device has it cached.
    pub fn device_translation(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        // A request that has no configuration is blocked with its reason by a translation.
        let at = self.own.lookup(&self.common, config, counters, request).ok()?;
        let Some(target) = self.common.caches.device_translation(&at, request) else {
            counters.device_tlb_misses.count();
            return None;
        };
        counters.device_tlb_hits.count();
        if let Some(sanitizer) = &self.common.sanitizer {
            // By the unit, which compares its own caches with the tables.
            let now = self.own.would_send(&self.common, config, counters, request);
            match now {
                // What follows may be elsewhere by now: it is another request.
                Some(now) if now.place == target.place => {
                    return Some(Target { length: target.length.min(now.length), ..target });
                }
                _ => sanitizer.device_tlb_used(counters, &at, request),
            }
        }
        Some(target)
    }

    /// The device of `request` keeps its translation, which was just made.
    pub fn fill_device_tlb(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) {
        if let Ok(at) = self.own.lookup(&self.common, config, counters, request) {
            self.common.caches.fill_device_tlb(&at, request, counters);
        }
    }
}

impl Common {
    /// Empty caches of these sizes, for guest addresses of so many bits.
    pub fn new(
        sizes: CacheSizes,
        guest_address_width: u8,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
    ) -> Self {
        let origins = sanitizer.as_ref().map(|sanitizer| sanitizer.origins());
        let caches = Caches::new(sizes, guest_address_width, origins);
        let (sharing, ranges) = (Sharing::default(), Default::default());
        Self { caches, sharing, counters, sanitizer, generation: 0, ranges }
    }

    /// Translates a request with `pasid` of `kind` for `address` if everything needed is cached.
    #[inline(always)]
    pub fn cached(
        &self,
        config: &ConfigCache,
        counters: &LocalCounters,
        // Not a `Request`: one that hits need not be in memory.
        (pasid, address, kind): (Option<u32>, u64, RequestKind),
    ) -> Result<Target, Missed> {
        let known = config.get(self.generation, pasid).ok_or(Missed::Config)?;
        let target = self.caches.translation(&known.lookup, address, kind);
        let target = target.ok_or(Missed::Iotlb)?;
        counters.config_hits.count();
        counters.iotlb_hits.count();
        Ok(target)
    }

    /// The number of the configuration of requests with `pasid`, if the port has it.
    #[inline]
    pub fn known(&self, config: &ConfigCache, pasid: Option<u32>) -> Option<usize> {
        Some(config.get(self.generation, pasid)?.number)
    }

    /// Caches in the port which configuration requests with `pasid` have; not with a sanitizer,
    /// which must see every request.
    pub fn note(
        &self,
        config: &mut ConfigCache,
        counters: &LocalCounters,
        pasid: Option<u32>,
        known: Known,
    ) {
        if self.sanitizer.is_none() {
            let evicted = config.fill(self.generation, pasid, known);
            counters.config_evictions.add(evicted.into());
        }
    }

    /// Some configuration has changed or is no longer cached: what ports have of them is invalid.
    pub fn configurations_changed(&mut self) {
        self.generation += 1;
    }

    /// The IOTLB's translation of `request`, whose configuration is that of `at`, unless it
    /// `missed`.
    #[inline(always)]
    pub fn hit(
        &self,
        at: impl Fn() -> Lookup,
        counters: &LocalCounters,
        request: &Request,
        missed: Missed,
    ) -> Option<Target> {
        let found = match missed {
            Missed::Iotlb => None,
            Missed::Config => self.caches.translation(&at(), request.address, request.kind),
        };
        match found {
            Some(_) => counters.iotlb_hits.count(),
            None => counters.iotlb_misses.count(),
        }
        found
    }

    /// Counts `invalidations`, which dropped so many entries.
    pub fn count_invalidations(&self, invalidations: u64, dropped: u64) {
        self.counters.invalidations.add(invalidations);
        self.counters.invalidated_entries.add(dropped);
    }

    /// Drops what is cached through `stage2`, including the knowledge that pages are dirty.
    pub fn stage2_changed(&mut self, stage2: &Arc<Stage2>) {
        let gone = self.sharing.through(stage2);
        self.forget(gone);
    }

    /// Drops what is cached of `gone`.
    pub fn forget(&mut self, gone: Option<Gone>) {
        let Some(gone) = gone else { return };
        let dropped = self.caches.drop_gone(&gone);
        self.count_invalidations(1, dropped);
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.forget(&gone);
        }
    }
}

/// Lines of a [`ConfigCache`], each for the PASIDs of one remainder.
const CONFIG_LINES: usize = 8;

/// What a port caches of a configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    /// Its number in a table of the engine.
    pub number: usize,
    /// Where the IOTLB has its translations.
    pub lookup: Lookup,
}

/// Per-thread cache: the configurations of one requester by PASID. Invalid as soon as some
/// configuration of the engine has changed, which makes another *generation*.
#[derive(Debug, Default, Clone)]
pub(crate) struct ConfigCache {
    generation: u64,
    /// The PASID and its configuration.
    lines: [Option<(Option<u32>, Known)>; CONFIG_LINES],
}

impl ConfigCache {
    /// The configuration for requests with `pasid`, if cached in this `generation`.
    #[inline]
    fn get(&self, generation: u64, pasid: Option<u32>) -> Option<&Known> {
        // In bounds: a remainder of a division by the length.
        let (held, known) = self.lines[config_line(pasid)].as_ref()?;
        (self.generation == generation && *held == pasid).then_some(known)
    }

    /// Caches `known` for requests with `pasid`; returns whether another one was evicted.
    fn fill(&mut self, generation: u64, pasid: Option<u32>, known: Known) -> bool {
        if self.generation != generation {
            *self = Self { generation, ..Self::default() };
        }
        // In bounds: a remainder of a division by the length.
        self.lines[config_line(pasid)].replace((pasid, known)).is_some()
    }
}

/// The line for requests with `pasid`.
#[inline]
fn config_line(pasid: Option<u32>) -> usize {
    pasid.unwrap_or(0) as usize % CONFIG_LINES
}

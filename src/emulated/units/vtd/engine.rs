// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The remapping engine: PASID table, caches, and the translation of requests.
//!
//! Readers translate, with shared access; a writer changes attachments and drops cached entries,
//! with exclusive access. The gate in front ensures this.

use std::ops::RangeInclusive;
use std::sync::Arc;

use super::config::VtdUnitConfig;
use super::context::{Context, PasidTable};
use super::fault::{page_refused, Fault};
use super::sanitizer::Sanitizer;
use super::tables::{Tables, PAGE_SHIFTS};
use crate::units::engine::{
    ascending, Blocked, Caches, ConfigCache, Gone, IovaRange, LocalCounters, Request, Rights,
    Scope, Sharing, Target, Walk,
};
use crate::units::hardware::{CacheRange, CacheTag, Translation};
use crate::units::stage2::Stage2;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::interrupt::INTERRUPT_RANGE;

/// Sizes of what one paging-structure entry spans: 2 MiB to 256 TiB.
const STRUCTURE_SHIFTS: [u8; 4] = [21, 30, 39, 48];

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Engine {
    config: VtdUnitConfig,
    pasid_table: PasidTable,
    sharing: Sharing,
    caches: Caches,
    /// Of what happens with exclusive access.
    counters: Arc<LocalCounters>,
    sanitizer: Option<Arc<Sanitizer>>,
}

impl Engine {
    /// An engine that blocks all DMA; `sanitizer` checks translations and invalidations.
    pub(super) fn new(
        config: VtdUnitConfig,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
    ) -> Self {
        let origins = sanitizer.as_ref().map(|sanitizer| sanitizer.common.origins());
        let width = config.address_width.bits();
        let caches = Caches::new(config.cache_sizes(), width, origins);
        let (pasid_table, sharing) = (PasidTable::default(), Sharing::default());
        Self { config, pasid_table, sharing, caches, counters, sanitizer }
    }

    fn context(
        &self,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<&Context, Fault> {
        if let Some(context) = self.pasid_table.cached(pasid_cache, request.pasid) {
            counters.config_hits.count();
            return Ok(context);
        }
        counters.config_misses.count();
        if self.sanitizer.is_some() {
            // Nothing is cached, so `cached` finds nothing and every request gets here.
            let context = self.pasid_table.get(request.rid, request.pasid);
            return context.ok_or_else(|| Fault::stage1(self.not_present(request.pasid)));
        }
        match self.pasid_table.fill(pasid_cache, request.rid, request.pasid) {
            Some((context, evicted)) => {
                counters.config_evictions.add(evicted.into());
                Ok(context)
            }
            None => Err(Fault::stage1(self.not_present(request.pasid))),
        }
    }

    /// Why a requester without a context is blocked.
    fn not_present(&self, pasid: Option<u32>) -> FaultReason {
        match (pasid, self.config.pasid_bits()) {
            (Some(_), 0) => FaultReason::PasidDisabled,
            // No shift overflows: PASIDs have at most 20 bits.
            (Some(pasid), bits) if pasid >> bits != 0 => FaultReason::PasidBeyondDirectory,
            _ => FaultReason::PasidEntryNotPresent,
        }
    }

    fn walk(
        &self,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Fault> {
        let Request { pasid, address: iova, kind, .. } = *request;
        let (source, host) = (context.source(pasid), &context.host);
        let walk = Walk {
            caches: &self.caches,
            source,
            // Global pages are cached by PASID, like all others.
            global: source,
            host,
            counters,
            dirty: host.tracking(),
        };
        let output = match &context.tables {
            Tables::None if kind.execute() => {
                return Err(Fault::stage1(FaultReason::ExecuteDisabled));
            }
            Tables::None => walk
                .stage2_only(iova, kind, Rights::of(|kind| !kind.execute()))
                .map_err(page_refused)?,
            Tables::FirstStage(tables) => walk.walk(tables, iova, kind)?,
            Tables::SecondStage(tables) => walk.walk(tables, iova, kind)?,
            Tables::Unsupported => return Err(Fault::stage1(FaultReason::PasidEntryInvalid)),
        };
        if let Some(page) = output.cached() {
            self.caches.add_translation(output.source, iova, &page, counters);
        }
        Ok(Target { place: output.page.place, length: output.length })
    }

    /// Sends DMA of `rid` (or its `pasid`) to `translation`.
    pub fn install(&mut self, rid: u16, pasid: Option<u32>, translation: Translation) {
        self.remove(rid, pasid);
        let tag = translation.tag.0;
        let gone = self.sharing.reuse(tag);
        self.forget(gone);
        let stage2_tag = self.sharing.add(tag, &translation.stage2);
        self.pasid_table.insert(rid, pasid, translation.tag, || {
            Context::new(translation, stage2_tag, &self.config)
        });
    }

    /// Blocks DMA of `rid` (or its `pasid`).
    pub fn remove(&mut self, rid: u16, pasid: Option<u32>) {
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.common.contexts_changed(rid, |of| of == pasid);
        }
        let mut gone = None;
        self.pasid_table.remove(rid, pasid, |old| {
            gone = self.sharing.remove(old.tag.0, &old.host.stage2);
        });
        self.forget(gone);
    }

    /// Drops what is cached of the tables of `tag` in all of `ranges`: in one pass over each cache,
    /// as DMA waits.
    pub fn invalidate(&mut self, tag: CacheTag, ranges: &[CacheRange]) {
        let scope = Scope::of_tag(tag.0);
        let pages = ascending(ranges.iter().map(|range| addresses(*range)));
        let without_leaves = ranges.iter().filter(|range| !is_leaf(**range));
        let tables = ascending(without_leaves.map(|range| addresses(*range)));
        let dropped = self.caches.drop_pages(scope, &pages, &PAGE_SHIFTS)
            + self.caches.drop_tables(scope, &tables, &STRUCTURE_SHIFTS);
        self.counters.invalidations.add(ranges.len() as u64);
        self.counters.invalidated_entries.add(dropped);
        if let Some(sanitizer) = &self.sanitizer {
            ranges.iter().for_each(|range| sanitizer.common.invalidated(scope, *range));
        }
    }

    #[cfg(test)]
    pub(super) fn caches(&self) -> &Caches {
        &self.caches
    }

    /// Drops what is cached through `stage2`, including the knowledge that pages are dirty.
    pub fn stage2_changed(&mut self, stage2: &Arc<Stage2>) {
        let gone = self.sharing.through(stage2);
        self.forget(gone);
    }

    /// Drops what is cached of `gone`.
    fn forget(&mut self, gone: Option<Gone>) {
        if let Some(gone) = gone {
            let dropped = self.caches.drop_gone(&gone);
            self.counters.invalidations.count();
            self.counters.invalidated_entries.add(dropped);
            if let Some(sanitizer) = &self.sanitizer {
                sanitizer.common.forget(&gone);
            }
        }
    }
}

/// The addresses of `range`, if there are any.
fn addresses(range: CacheRange) -> IovaRange {
    match range {
        CacheRange::All => IovaRange::ALL,
        CacheRange::Pages(range) => IovaRange { first: range.address(), last: range.last() },
    }
}

/// Whether the paging-structure caches may stay.
fn is_leaf(range: CacheRange) -> bool {
    matches!(range, CacheRange::Pages(range) if range.leaf())
}

impl crate::units::engine::Engine for Engine {
    type Fault = Fault;

    /// §3.14.
    const INTERRUPTS: Option<RangeInclusive<u64>> = Some(INTERRUPT_RANGE);

    #[inline]
    fn cached(
        &self,
        pasid_cache: &ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        let context = self.pasid_table.cached(pasid_cache, request.pasid)?;
        let Request { address, kind, .. } = *request;
        let target =
            self.caches.translation(&PAGE_SHIFTS, context.source(request.pasid), address, kind)?;
        counters.config_hits.count();
        counters.iotlb_hits.count();
        Some(target)
    }

    #[cold]
    fn translate(
        &self,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Blocked<Fault>> {
        let context = self.context(pasid_cache, counters, request)?;
        let Request { address, kind, .. } = *request;
        let cached =
            self.caches.translation(&PAGE_SHIFTS, context.source(request.pasid), address, kind);
        let target = match cached {
            Some(target) => {
                counters.iotlb_hits.count();
                target
            }
            None => {
                counters.iotlb_misses.count();
                self.walk(context, counters, request)?
            }
        };
        Ok(match &self.sanitizer {
            Some(sanitizer) => sanitizer.check(&self.caches, context, counters, request, target),
            None => target,
        })
    }

    fn caches(&self) -> &Caches {
        &self.caches
    }
}

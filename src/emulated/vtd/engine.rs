// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The remapping engine: PASID table, caches, and the way of a request through them.
//!
//! Readers translate, with shared access; a writer changes attachments and drops what is cached,
//! with exclusive access. The gate in front sees to it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_memory::{Address, GuestAddress, VolatileSlice};

use super::caches::{Caches, Target};
use super::config::VtdUnitConfig;
use super::context::{Context, Tables};
use super::counters::LocalCounters;
use super::pasid_table::{PasidCache, PasidTable};
use super::rights::{Fault, Request, RequestKind};
use super::sanitizer::Sanitizer;
use super::sharing::{Gone, Sharing};
use super::walk::Walk;
use crate::emulated::hardware::{CacheRange, CacheTag, Translation};
use crate::emulated::stage2::Stage2;
use crate::spec::vtd::fault::FaultReason;

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Engine {
    config: VtdUnitConfig,
    pasid_table: PasidTable,
    sharing: Sharing,
    caches: Caches,
    /// Of what is done with exclusive access.
    counters: Arc<LocalCounters>,
    sanitizer: Option<Arc<Sanitizer>>,
}

impl Engine {
    /// An engine that blocks everybody; `sanitizer` is told of translations and invalidations.
    pub(super) fn new(
        config: VtdUnitConfig,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
    ) -> Self {
        let caches = Caches::new(&config, sanitizer.as_ref().map(|sanitizer| sanitizer.origins()));
        let (pasid_table, sharing) = (PasidTable::default(), Sharing::default());
        Self { config, pasid_table, sharing, caches, counters, sanitizer }
    }

    /// Where `request` goes, when all that takes is cached.
    #[inline]
    pub fn cached(
        &self,
        pasid_cache: &PasidCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        let context = pasid_cache.get(&self.pasid_table, request.pasid)?;
        let target = self.caches.translation(context.source, request.address, request.kind)?;
        counters.pasid_cache_hits.count();
        counters.iotlb_hits.count();
        Some(target)
    }

    /// Where `request` goes. What it takes is cached from then on.
    #[cold]
    pub fn translate(
        &self,
        pasid_cache: &mut PasidCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Fault> {
        let context = self.context(pasid_cache, counters, request)?;
        let Request { address, kind, .. } = *request;
        let target = match self.caches.translation(context.source, address, kind) {
            Some(target) => {
                counters.iotlb_hits.count();
                target
            }
            None => {
                counters.iotlb_misses.count();
                self.walk(context, counters, address, kind)?
            }
        };
        Ok(match &self.sanitizer {
            Some(sanitizer) => sanitizer.check(&self.caches, context, counters, request, target),
            None => target,
        })
    }

    /// `length` bytes at `target`; none when its memory is shorter.
    #[inline]
    pub fn slice(&self, target: &Target, length: usize) -> Option<VolatileSlice<'_>> {
        self.caches.slice(target.place, length)
    }

    /// Where the region that `target` lies in says that it is.
    pub fn guest_address(&self, target: &Target) -> Option<GuestAddress> {
        let base = self.caches.memory(target.place)?.base;
        base.checked_add(target.place.offset)
    }

    fn context(
        &self,
        pasid_cache: &mut PasidCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<&Context, Fault> {
        if let Some(context) = pasid_cache.get(&self.pasid_table, request.pasid) {
            counters.pasid_cache_hits.count();
            return Ok(context);
        }
        counters.pasid_cache_misses.count();
        if self.sanitizer.is_some() {
            // Nothing is cached, so that `cached` finds nothing and every request comes by here.
            let context = self.pasid_table.get(request.rid, request.pasid);
            return context.ok_or_else(|| Fault::stage1(self.not_present(request.pasid)));
        }
        match pasid_cache.fill(&self.pasid_table, request.rid, request.pasid) {
            Some((context, evicted)) => {
                counters.pasid_cache_evictions.add(evicted.into());
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
        iova: u64,
        kind: RequestKind,
    ) -> Result<Target, Fault> {
        let walk = Walk { caches: &self.caches, context, counters, dirty: context.tracking() };
        let output = match &context.tables {
            Tables::None => walk.stage2_only(iova, kind)?,
            Tables::FirstStage(tables) => walk.walk(tables, iova, kind)?,
            Tables::SecondStage(tables) => walk.walk(tables, iova, kind)?,
            Tables::Unsupported => return Err(Fault::stage1(FaultReason::PasidEntryInvalid)),
        };
        let place = output.page.place;
        if let Some(level) = output.level {
            let source = context.source;
            self.caches.add_translation(source, iova, level, place, output.rights, counters);
        }
        Ok(Target { place, length: output.length })
    }

    /// Sends DMA of `rid` (or its `pasid`) to `translation`.
    pub fn install(&mut self, rid: u16, pasid: Option<u32>, translation: Translation) {
        self.remove(rid, pasid);
        let tag = translation.tag.0;
        let gone = self.sharing.reuse(tag);
        self.forget(gone);
        let stage2_tag = self.sharing.add(tag, &translation.stage2);
        let context = Context::new(pasid, translation, stage2_tag, &self.config);
        self.pasid_table.insert(rid, pasid, context);
    }

    /// Blocks DMA of `rid` (or its `pasid`).
    pub fn remove(&mut self, rid: u16, pasid: Option<u32>) {
        if let Some(sanitizer) = &self.sanitizer {
            sanitizer.context_changed(rid, pasid);
        }
        if let Some(old) = self.pasid_table.remove(rid, pasid) {
            let gone = self.sharing.remove(old.tag.0, &old.stage2);
            self.forget(gone);
        }
    }

    /// Drops what is cached of the tables of `tag`, in all of `ranges`.
    pub fn invalidate(&mut self, tag: CacheTag, ranges: &[CacheRange]) {
        for range in ranges {
            let dropped = self.caches.invalidate(tag.0, *range);
            self.count_invalidation(dropped);
            if let Some(sanitizer) = &self.sanitizer {
                sanitizer.invalidated(tag.0, *range);
            }
        }
    }

    /// Drops what is cached through `stage2`, the marks that pages are dirty among it.
    pub fn stage2_changed(&mut self, stage2: &Arc<Stage2>) {
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VT-d's part of the engine: PASID table, and the translation of requests.

use std::sync::Arc;

use super::config::VtdUnitConfig;
use super::context::{Context, PasidTable, LAST_PASID, SECOND_STAGE};
use super::fault::{page_refused, Fault, Sinks};
use super::nested::OverSecondStage;
use super::sanitizer::Sanitizer;
use super::tables::{Nested, Tables, PAGE_SHIFTS};
use crate::units::engine::{
    ascending, ascending_in, device_space, Architecture, Blocked, Caches, Common, ConfigCache,
    Engine, IovaRange, Known, LocalCounters, Lookup, Missed, OverHost, Request, Rights, Scope,
    Spaces, Target, Walk,
};
use crate::units::hardware::{CacheRange, CacheTag, Translation};
use twostage::spec::vtd::fault::FaultReason;

/// Sizes of what one paging-structure entry spans: 2 MiB to 256 TiB.
const STRUCTURE_SHIFTS: [u8; 4] = [21, 30, 39, 48];

/// See the [module's documentation](self).
#[derive(Debug)]
pub(super) struct Vtd {
    config: VtdUnitConfig,
    pasid_table: PasidTable,
    sanitizer: Option<Arc<Sanitizer>>,
    sinks: Arc<Sinks>,
}

impl Vtd {
    #[inline(always)]
    fn context(
        &self,
        common: &Common,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<&Context, Fault> {
        let Request { rid, pasid, .. } = *request;
        let known = common.known(pasid_cache, pasid);
        if let Some(context) = known.and_then(|number| self.pasid_table.get(number)) {
            counters.config_hits.count();
            return Ok(context);
        }
        counters.config_misses.count();
        let found = self.pasid_table.find(rid, pasid);
        let (number, context) = found.ok_or_else(|| Fault::stage1(self.not_present(pasid)))?;
        let lookup = context.lookup(pasid);
        common.note(pasid_cache, counters, pasid, Known { number, lookup });
        Ok(context)
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
        common: &Common,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Target, Fault> {
        let Request { pasid, address: iova, kind, .. } = *request;
        let (source, caches) = (context.source(pasid), &common.caches);
        let lower = OverHost::new(caches, &context.host, counters);
        // Global pages are cached by PASID, like all others.
        let walk = Walk { caches, source, global: source, counters, lower };
        match &context.tables {
            Tables::None if kind.execute() => Err(Fault::stage1(FaultReason::ExecuteDisabled)),
            Tables::None => walk
                .stage2_only(iova, kind, Rights::of(|kind| !kind.execute()))
                .map_err(page_refused),
            Tables::FirstStage(tables) => walk.walk(tables, iova, kind),
            Tables::SecondStage(tables) => walk.walk(tables, iova, kind),
            Tables::Nested(Nested { first, second }) => {
                let below = context.second_stage_source();
                let below = Walk { source: below, global: below, ..walk };
                let lower = OverSecondStage { tables: second, walk: below };
                Walk { caches, source, global: source, counters, lower }.walk(first, iova, kind)
            }
            Tables::Unsupported => Err(Fault::stage1(FaultReason::PasidEntryInvalid)),
        }
    }
}

impl Architecture for Vtd {
    /// The page, and the way to it: software that adds permissions need not invalidate, so the
    /// device would be refused what its request has got it.
    fn page_requested(&self, caches: &mut Caches, request: &Request) {
        let found = self.pasid_table.find(request.rid, request.pasid);
        let Some((_, context)) = found else { return };
        let source = context.source(request.pasid);
        let scope = Scope { tag: source.tag(), spaces: Spaces::One(source.space()) };
        let page = [IovaRange { first: request.address & !0xfff, last: request.address | 0xfff }];
        caches.drop_pages(scope, &page, &PAGE_SHIFTS);
        caches.drop_tables(scope, &page, &STRUCTURE_SHIFTS);
    }

    fn would_send(
        &self,
        common: &Common,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        let sanitizer = self.sanitizer.as_ref()?;
        let context = self.context(common, pasid_cache, counters, request).ok()?;
        let (caches, at) = (&common.caches, context.lookup(request.pasid));
        match caches.translation(&at, request.address, request.kind) {
            Some(target) => Some(sanitizer.check(caches, context, counters, request, target)),
            None => sanitizer.now(caches, context, counters, request),
        }
    }

    fn lookup(
        &self,
        common: &Common,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
    ) -> Result<Lookup, Blocked> {
        let context = self.context(common, pasid_cache, counters, request);
        let context = context.map_err(|fault| Blocked::Fault(fault.of(request, &self.sinks)))?;
        Ok(context.lookup(request.pasid))
    }

    /// Context entries are the host's, which sets DTE wherever there are device TLBs (as Linux
    /// does): the uAPI does not say what the guest's have. It flushes device TLBs with the IOTLB,
    /// so they follow a guest that has DTE clear, too.
    fn answers_translation_requests(&self, _: u16) -> bool {
        true
    }

    fn translate(
        &self,
        common: &Common,
        pasid_cache: &mut ConfigCache,
        counters: &LocalCounters,
        request: &Request,
        missed: Missed,
    ) -> Result<Target, Blocked> {
        let blocked = |fault: Fault| Blocked::Fault(fault.of(request, &self.sinks));
        let context = self.context(common, pasid_cache, counters, request).map_err(blocked)?;
        let lookup = || context.lookup(request.pasid);
        let target = match common.hit(lookup, counters, request, missed) {
            Some(target) => target,
            None => self.walk(common, context, counters, request).map_err(blocked)?,
        };
        Ok(match &self.sanitizer {
            Some(sanitizer) => sanitizer.check(&common.caches, context, counters, request, target),
            None => target,
        })
    }
}

impl Engine<Vtd> {
    /// An engine that blocks all DMA and reports to `sinks`; `sanitizer` checks translations and
    /// invalidations.
    pub(super) fn new(
        config: VtdUnitConfig,
        counters: Arc<LocalCounters>,
        sanitizer: Option<Arc<Sanitizer>>,
        sinks: Arc<Sinks>,
    ) -> Self {
        let checks = sanitizer.as_ref().map(|sanitizer| Arc::clone(&sanitizer.common));
        let width = config.address_width.bits();
        let common = Common::new(config.cache_sizes(), width, counters, checks);
        let pasid_table = PasidTable::default();
        Self { common, own: Vtd { config, pasid_table, sanitizer, sinks } }
    }

    /// Sends DMA of `rid` (or its `pasid`) to `translation`.
    pub(super) fn install(&mut self, rid: u16, pasid: Option<u32>, translation: Translation) {
        self.remove(rid, pasid);
        let tag = translation.tag.0;
        let gone = self.common.sharing.reuse(tag);
        self.common.forget(gone);
        let stage2_tag = self.common.sharing.add(tag, &translation.stage2);
        let Vtd { config, pasid_table, .. } = &mut self.own;
        pasid_table
            .insert(rid, pasid, translation.tag, || Context::new(translation, stage2_tag, config));
    }

    /// Blocks DMA of `rid` (or its `pasid`).
    pub(super) fn remove(&mut self, rid: u16, pasid: Option<u32>) {
        let Self { common, own } = self;
        common.configurations_changed();
        if let Some(sanitizer) = &common.sanitizer {
            sanitizer.contexts_changed(rid, |of| of == pasid);
        }
        let mut gone = None;
        own.pasid_table.remove(rid, pasid, |old| {
            gone = common.sharing.remove(old.tag.0, &old.host.stage2);
        });
        common.forget(gone);
    }

    /// Drops what is cached of the tables of `tag` in all of `ranges`: in one pass over each cache,
    /// as DMA waits.
    pub(super) fn invalidate(&mut self, tag: CacheTag, ranges: &[CacheRange]) {
        let dropped = self.drop_ranges(tag, Spaces::UpTo(LAST_PASID), ranges)
            + self.drop_of_devices(tag, ranges);
        self.common.count_invalidations(ranges.len() as u64, dropped);
    }

    /// The same for a second stage below a first one. With it goes everything that was translated
    /// by both (§6.5.2.4), as nothing tells where in the second stage that came by.
    pub(super) fn invalidate_second_stage(&mut self, tag: CacheTag, ranges: &[CacheRange]) {
        let dropped = self.drop_ranges(tag, Spaces::One(SECOND_STAGE), ranges)
            + self.drop_ranges(tag, Spaces::UpTo(LAST_PASID), &[CacheRange::All])
            + self.drop_of_devices(tag, &[CacheRange::All]);
        self.common.count_invalidations(ranges.len() as u64, dropped);
    }

    /// Tells `rid` to forget what it has of `range` for `pasid`, or for all requests. Returns
    /// whether it has answered.
    pub(super) fn invalidate_device_tlb(
        &mut self,
        rid: u16,
        pasid: Option<u32>,
        range: CacheRange,
    ) -> bool {
        let space = pasid.map(|pasid| device_space(Some(pasid)));
        let Common { caches, sanitizer, .. } = &mut self.common;
        let dropped = caches.device_tlbs.drop_device(rid, space, addresses(range));
        let answers = caches.device_tlbs.answers(rid);
        if let Some(sanitizer) = sanitizer {
            sanitizer.device_told(rid, pasid, addresses(range));
        }
        self.common.count_invalidations(1, dropped);
        answers
    }

    /// Drops what devices have cached of `tag` in all of `ranges`: as Linux's driver, which flushes
    /// device TLBs together with the IOTLB (`cache_tag_flush_range`). Returns the number of
    /// entries.
    fn drop_of_devices(&mut self, tag: CacheTag, ranges: &[CacheRange]) -> u64 {
        if self.common.caches.device_tlbs.is_empty() {
            return 0;
        }
        let ranges = ascending(ranges.iter().map(|range| addresses(*range)));
        self.common.caches.device_tlbs.drop_tag(tag.0, &ranges)
    }

    /// Drops what is cached of `tag` for `spaces` in all of `ranges`; returns the number of
    /// entries.
    fn drop_ranges(&mut self, tag: CacheTag, spaces: Spaces, ranges: &[CacheRange]) -> u64 {
        let Common { caches, sanitizer, ranges: [pages, tables], .. } = &mut self.common;
        let scope = Scope { tag: tag.0, spaces };
        let all = ranges.iter().map(|range| addresses(*range));
        *pages = ascending_in(std::mem::take(pages), all);
        let without_leaves = ranges.iter().filter(|range| !is_leaf(**range));
        let without_leaves = without_leaves.map(|range| addresses(*range));
        *tables = ascending_in(std::mem::take(tables), without_leaves);
        if let Some(sanitizer) = sanitizer {
            ranges.iter().for_each(|range| sanitizer.invalidated(scope, *range));
        }
        caches.drop_pages(scope, pages, &PAGE_SHIFTS)
            + caches.drop_tables(scope, tables, &STRUCTURE_SHIFTS)
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sanitizer: reports every use of a stale translation.
//!
//! Every translated request is compared with the guest's tables at that moment. It is a finding if
//! the request succeeds, but by the tables would go elsewhere or be blocked. It is none if
//! * the tables allow more than what is cached: such a change needs no invalidation;
//! * only flags, ignored bits or the page size differ: the byte is at the same place;
//! * the removed permission is not one that this request needs: a device may keep reading a page
//!   that is becoming read-only;
//! * the host changed stage 2, which does not concern the guest.
//!
//! If a second stage of the guest's is below the tables, it is compared as well.
//!
//! The unit of each architecture also compares which tables serve a requester, a separate kind of
//! finding ([`Sanitizer::context_used`]).
//!
//! A sanitizing unit does not cache configurations in ports, so that no request takes the fast
//! path, which compares nothing; without the sanitizer there is no cost.

mod report;
mod tables;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::{
    own, size, Caches, Gone, IovaRange, LocalCounters, Lookup, Origins, Request, Scope, Source,
    Spaces, TableFormat, Target, Words, PAGE,
};
use crate::units::hardware::CacheRange;
pub use report::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};
use tables::{read_tables, Differs, Now};
pub(crate) use tables::{Lower, Used};
use twostage::spec::pci::Bdf;

/// Number of pages, and of requesters, that are recorded; further uses of stale translations are
/// only counted.
const MAX_PAGES: usize = 64;

/// Number of tags and address spaces whose last invalidation is recorded: guests can have any
/// number.
const MAX_INVALIDATED: usize = 1024;

/// Pages are counted in units of this, as a power of two.
const UNIT_SHIFT: u8 = 12;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Sanitizer {
    origins: Arc<Origins>,
    findings: Mutex<Findings>,
}

impl Sanitizer {
    /// The record of what cache entries are made from, to be filled by the caches.
    pub fn origins(&self) -> Arc<Origins> {
        Arc::clone(&self.origins)
    }

    /// DMA used a context that differs from the guest's tables.
    pub fn context_used(&self, counters: &LocalCounters, stale: StaleContext) {
        counters.stale_uses.count();
        if let Some(first) = self.findings().add_context(stale) {
            log::warn!("sanitizer: stale context used: {first}");
        }
    }

    /// Compares `target`, which `request` is about to use, with the tables. Returns the part of it
    /// that was compared: the tables may now have several pages for one that is cached.
    pub fn check<F: TableFormat>(
        &self,
        caches: &Caches,
        used: &Used<'_, F>,
        counters: &LocalCounters,
        request: &Request,
        target: Target,
    ) -> Target {
        let Compared { shift, stale } = self.compare(caches, used, request, &target);
        if let Some(stale) = stale {
            counters.stale_uses.count();
            self.add(request, stale);
        }
        let page = size(shift);
        let to_end = page - (request.address & (page - 1));
        Target { length: target.length.min(to_end), ..target }
    }

    /// Where the tables send `request` now, if anywhere.
    pub fn now<F: TableFormat>(
        &self,
        caches: &Caches,
        used: &Used<'_, F>,
        request: &Request,
    ) -> Option<Target> {
        let Request { address, kind, .. } = *request;
        let Now { shift, page, .. } = read_tables(caches, used, address, kind);
        let page = page.filter(|page| page.allows(kind))?;
        let to_end = size(shift) - (address & (size(shift) - 1));
        Some(Target { place: page.place, length: page.length.min(to_end) })
    }

    fn compare<F: TableFormat>(
        &self,
        caches: &Caches,
        used: &Used<'_, F>,
        request: &Request,
        target: &Target,
    ) -> Compared {
        let Request { address, kind, .. } = *request;
        let tables = used.tables;
        let cached = [Some(used.source), used.others].into_iter().flatten();
        let cached = cached
            .filter_map(|source| {
                let shift = caches.translation_shift(used.shifts, source, address, kind)?;
                Some((source, shift))
            })
            .next();
        let then = cached.and_then(|(source, shift)| self.origins.page(source, address, shift));
        let now = read_tables(caches, used, address, kind);
        let difference = match &then {
            Some(then) => now.difference(then, used),
            // The origin is no longer known; assume the lowest entry.
            None => Some(Differs::Tables(now.level)),
        };
        let as_now = now.page.is_some_and(|page| page.place == target.place);
        let (source, page_shift) = cached.unwrap_or((used.source, tables.shift(now.level)));
        let then = then.unwrap_or_default();
        let stale = difference.filter(|_| !as_now).and_then(|differs| match differs {
            Differs::Tables(level) => Some(Stale {
                level,
                address,
                second_stage: None,
                shift: tables.shift(level),
                then: then.own,
                now: now.trail.own,
                source,
                page_shift,
                invalidation: used.invalidation,
            }),
            Differs::Below { at, level } => {
                let lower = used.lower?;
                let (second_stage, now) = *now.trail.below(at)?;
                // Tables are read, whatever the request is.
                let kind = own(at == PAGE && kind.write());
                let cached =
                    caches.translation_shift(used.shifts, lower.source, second_stage, kind);
                Some(Stale {
                    level,
                    address: second_stage,
                    second_stage: Some(second_stage),
                    shift: lower.tables.span(level),
                    then: then.below(at)?.1,
                    now,
                    source: lower.source,
                    page_shift: cached.unwrap_or(UNIT_SHIFT),
                    invalidation: lower.invalidation,
                })
            }
        });
        Compared { shift: now.shift, stale }
    }

    fn add(&self, request: &Request, stale: Stale) {
        let Stale { level, address, second_stage, shift, then, now, .. } = stale;
        let page = size(shift);
        let needed = InvalidatedPages::Range {
            address: address & !(page - 1),
            pages: page >> UNIT_SHIFT,
            leaf: then.ends_at(level),
        };
        let mut findings = self.findings();
        let finding = StaleUse {
            rid: Bdf::from_raw(request.rid),
            pasid: request.pasid,
            iova: request.address & !(size(UNIT_SHIFT) - 1),
            write: request.kind.write(),
            second_stage,
            level,
            old: then.word(level),
            new: now.word(level),
            invalidation: stale.invalidation,
            needed,
            last: findings.last_invalidation(stale.source),
            uses: 1,
            invalidated_since: false,
        };
        let first = address & !(size(stale.page_shift) - 1);
        let last = first | (size(stale.page_shift) - 1);
        // Their number is bounded, so the log needs no rate limit.
        if let Some(first) = findings.add(finding, stale.source, first..=last) {
            log::warn!("sanitizer: stale translation used: {first}");
        }
    }

    /// `request` used what its device had cached, which differs from what the unit would have
    /// answered by the configuration of `at`.
    pub fn device_tlb_used(&self, counters: &LocalCounters, at: &Lookup, request: &Request) {
        counters.stale_uses.count();
        let page = request.address & !(size(UNIT_SHIFT) - 1);
        let finding = StaleUse {
            rid: Bdf::from_raw(request.rid),
            pasid: request.pasid,
            iova: page,
            write: request.kind.write(),
            second_stage: None,
            level: 1,
            old: None,
            new: None,
            invalidation: TlbInvalidation::DeviceTlb,
            needed: InvalidatedPages::Range { address: page, pages: 1, leaf: true },
            last: None,
            uses: 1,
            invalidated_since: false,
        };
        let span = page..=page | (size(UNIT_SHIFT) - 1);
        if let Some(first) = self.findings().add(finding, at.source, span) {
            log::warn!("sanitizer: stale translation used: {first}");
        }
    }

    /// The guest told the device `rid` to forget what it has in `range`, for one PASID or for all.
    pub fn device_told(&self, rid: u16, pasid: Option<u32>, range: IovaRange) {
        self.findings().device_told(Bdf::from_raw(rid), pasid, range);
    }

    /// The guest invalidated `range` of `scope`.
    pub fn invalidated(&self, scope: Scope, range: CacheRange) {
        self.findings().invalidated(scope, range);
    }

    /// The contexts of `rid` and its PASIDs for which `changed` holds were replaced.
    pub fn contexts_changed(&self, rid: u16, changed: impl Fn(Option<u32>) -> bool) {
        self.findings().contexts_changed(Bdf::from_raw(rid), changed);
    }

    /// What was cached of `gone` was dropped.
    pub fn forget(&self, gone: &Gone) {
        let mut findings = self.findings();
        gone.tags.iter().for_each(|tag| findings.forget(*tag));
    }

    /// What was found so far.
    pub fn report(&self) -> SanitizerReport {
        self.findings().report()
    }

    fn findings(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock()
    }
}

/// Result of a comparison.
struct Compared {
    /// Size of the page that was compared, as a power of two.
    shift: u8,
    stale: Option<Stale>,
}

/// A stale translation.
struct Stale {
    /// Level of the highest entry that differs.
    level: u8,
    /// What that entry translates: the IOVA, or an address of the second stage below.
    address: u64,
    /// That address of the second stage.
    second_stage: Option<u64>,
    /// Size of what the entry spans, as a power of two.
    shift: u8,
    /// The entries of its stage that the translation was made from, as far as known.
    then: Words,
    now: Words,
    /// Source of what is cached of the address.
    source: Source,
    /// Size of the page that is cached of it, as a power of two.
    page_shift: u8,
    /// The invalidation that the change needs.
    invalidation: TlbInvalidation,
}

/// A use, with what is needed to notice that its translation is dropped.
#[derive(Debug)]
struct Finding {
    stale: StaleUse,
    /// Source of the stale entry.
    source: Source,
    /// The addresses of the page that was cached.
    span: RangeInclusive<u64>,
}

/// The findings so far: the first [`MAX_PAGES`] pages, and requesters, each once.
#[derive(Debug, Default)]
struct Findings {
    contexts: BTreeMap<(Bdf, Option<u32>), StaleContext>,
    pages: BTreeMap<(Bdf, Option<u32>, u64), Finding>,
    /// Further uses.
    others: u64,
    /// The last invalidation of each tag, or of one of its address spaces, with its sequence
    /// number: the [`MAX_INVALIDATED`] most recent. Those of tags without attachments are removed.
    last: BTreeMap<(u32, Option<u32>), (u64, Scope, InvalidatedPages)>,
    /// Number of invalidations.
    invalidations: u64,
}

impl Findings {
    /// The last invalidation of translations of `source`.
    pub fn last_invalidation(&self, source: Source) -> Option<InvalidatedPages> {
        let spaces = [None, Some(source.space())];
        let last = spaces.iter().filter_map(|space| self.last.get(&(source.tag(), *space)));
        let last = last.filter(|(_, scope, _)| scope.has(source));
        last.max_by_key(|(number, ..)| *number).map(|(.., pages)| *pages)
    }

    /// Adds a use of what is cached for `source` of a page with the addresses `span`. Returns it if
    /// it is the first of its page and is recorded.
    pub fn add(
        &mut self,
        stale: StaleUse,
        source: Source,
        span: RangeInclusive<u64>,
    ) -> Option<StaleUse> {
        let key = (stale.rid, stale.pasid, stale.iova);
        if let Some(known) = self.pages.get_mut(&key) {
            known.stale.uses += 1;
            return None;
        }
        if self.pages.len() >= MAX_PAGES {
            self.others += 1;
            return None;
        }
        self.pages.insert(key, Finding { stale, source, span });
        Some(stale)
    }

    /// Adds a use of a stale context. Returns it if it is the requester's first and is recorded.
    pub fn add_context(&mut self, stale: StaleContext) -> Option<StaleContext> {
        let key = (stale.rid, stale.pasid);
        if let Some(known) = self.contexts.get_mut(&key) {
            known.uses += 1;
            return None;
        }
        if self.contexts.len() >= MAX_PAGES {
            self.others += 1;
            return None;
        }
        self.contexts.insert(key, stale);
        Some(stale)
    }

    /// The contexts of `rid` and its PASIDs for which `changed` holds were replaced.
    pub fn contexts_changed(&mut self, rid: Bdf, changed: impl Fn(Option<u32>) -> bool) {
        let of_rid = self.contexts.range_mut((rid, None)..=(rid, Some(u32::MAX)));
        for ((_, pasid), stale) in of_rid {
            stale.invalidated_since |= changed(*pasid);
        }
    }

    /// The guest invalidated `range` of `scope`.
    pub fn invalidated(&mut self, scope: Scope, range: CacheRange) {
        self.invalidations += 1;
        let space = match scope.spaces {
            Spaces::UpTo(_) => None,
            // The other one is that of global pages, which is never queried.
            Spaces::One(space) | Spaces::Two(space, _) => Some(space),
        };
        self.last.insert((scope.tag, space), (self.invalidations, scope, range.into()));
        if self.last.len() > MAX_INVALIDATED {
            let oldest = self.last.iter().min_by_key(|(_, (number, ..))| *number);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.last.remove(&oldest);
            }
        }
        for finding in self.pages.values_mut().filter(|finding| scope.has(finding.source)) {
            let covered = covers(range, *finding.span.start(), *finding.span.end());
            // If a table pointer changed, an invalidation of leaf entries only leaves it cached.
            if covered && (!is_of_leaves(range.into()) || is_of_leaves(finding.stale.needed)) {
                finding.stale.invalidated_since = true;
            }
        }
    }

    /// The device `rid` was told to forget what it has in `range`, for one PASID or for all.
    pub fn device_told(&mut self, rid: Bdf, pasid: Option<u32>, range: IovaRange) {
        for Finding { stale, .. } in self.pages.values_mut() {
            let named = stale.rid == rid && (pasid.is_none() || stale.pasid == pasid);
            let inside = (range.first..=range.last).contains(&stale.iova);
            let of_device = stale.invalidation == TlbInvalidation::DeviceTlb;
            stale.invalidated_since |= of_device && named && inside;
        }
    }

    /// Everything cached of `tag` was dropped for other reasons: its attachments ended, or stage 2
    /// changed.
    pub fn forget(&mut self, tag: u32) {
        self.last.retain(|(of, _), _| *of != tag);
        for finding in self.pages.values_mut().filter(|finding| finding.source.tag() == tag) {
            finding.stale.invalidated_since = true;
        }
    }

    /// What was found so far.
    pub fn report(&self) -> SanitizerReport {
        let stale = self.pages.values().map(|finding| finding.stale).collect();
        let contexts = self.contexts.values().copied().collect();
        SanitizerReport { contexts, stale, others: self.others }
    }
}

/// Whether `pages` are leaf entries alone.
fn is_of_leaves(pages: InvalidatedPages) -> bool {
    matches!(pages, InvalidatedPages::Range { leaf: true, .. })
}

/// Whether `range` has an address in `first..=last`.
fn covers(range: CacheRange, first: u64, last: u64) -> bool {
    match range {
        CacheRange::All => true,
        CacheRange::Pages(range) => range.address() <= last && range.last() >= first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_recent_invalidations_are_kept() {
        let mut findings = Findings::default();
        let spaces = MAX_INVALIDATED as u32;
        let mut invalidate = |space| {
            let scope = Scope { tag: 1, spaces: Spaces::One(space) };
            findings.invalidated(scope, CacheRange::All);
        };
        (0..spaces).for_each(&mut invalidate);
        // The first is now the most recent, so the second is evicted.
        [0, spaces].into_iter().for_each(invalidate);
        let last = |space| findings.last_invalidation(Source::new(1, space));
        assert_eq!(findings.last.len(), MAX_INVALIDATED);
        assert_eq!(last(1), None);
        for space in [0, 2, spaces] {
            assert_eq!(last(space), Some(InvalidatedPages::All), "{space}");
        }
    }
}

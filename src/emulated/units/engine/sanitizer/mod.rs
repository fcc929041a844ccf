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
//! The unit of each architecture also compares which tables serve a requester, a separate kind of
//! finding ([`Sanitizer::context_used`]).
//!
//! A sanitizing unit does not cache configurations in ports, so that no request takes the fast
//! path, which compares nothing; without the sanitizer there is no cost.

mod report;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::{
    size, Caches, Gone, HostStage2, LocalCounters, Origins, Path, Request, Scope, Source, Spaces,
    TableFormat, Target, Trail,
};
use crate::units::hardware::CacheRange;
pub use report::{
    ContextInvalidation, ContextTables, DmaWay, InvalidatedPages, SanitizerReport, StaleContext,
    StaleUse, TlbInvalidation,
};
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

/// The tables that a request used.
#[derive(Debug)]
pub(crate) struct Used<'a, F> {
    pub tables: &'a F,
    pub host: &'a HostStage2,
    /// The source of cached translations; others may also serve requests, such as global ones.
    pub source: Source,
    pub others: Option<Source>,
    /// Sizes of cached pages, as powers of two.
    pub shifts: &'a [u8],
    /// The invalidation that changes of the tables need.
    pub invalidation: TlbInvalidation,
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
        let Compared { level, stale } = self.compare(caches, used, request, &target);
        if let Some(stale) = stale {
            counters.stale_uses.count();
            self.add(used, request, stale);
        }
        let page = size(used.tables.shift(level));
        let to_end = page - (request.address & (page - 1));
        Target { length: target.length.min(to_end), ..target }
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
        let (now, end) = read_tables(caches, used.host, tables, address);
        let level = match end {
            End::Page { level, .. } => level,
            End::Nowhere => 1,
        };
        let difference = match then {
            Some(then) => then.difference(&now, tables),
            // The origin is no longer known; assume the lowest entry.
            None => Some(level),
        };
        let as_now = match end {
            End::Page { gpa, path, .. } => {
                let page = caches.stage2_now(used.host, gpa);
                tables.check_path(path, kind).is_ok()
                    && page.is_some_and(|page| page.place == target.place)
            }
            End::Nowhere => false,
        };
        let stale = difference.filter(|_| !as_now).map(|at| Stale {
            level: at,
            then: then.unwrap_or_default(),
            now,
            source: cached.map_or(used.source, |(source, _)| source),
            page_shift: cached.map_or(tables.shift(level), |(_, shift)| shift),
        });
        Compared { level, stale }
    }

    fn add<F: TableFormat>(&self, used: &Used<'_, F>, request: &Request, stale: Stale) {
        let Stale { level, then, now, source, page_shift } = stale;
        let page = size(used.tables.shift(level));
        let needed = InvalidatedPages::Range {
            address: request.address & !(page - 1),
            pages: page >> UNIT_SHIFT,
            leaf: then.ends_at(level),
        };
        let mut findings = self.findings();
        let stale = StaleUse {
            rid: Bdf::from_raw(request.rid),
            pasid: request.pasid,
            iova: request.address & !(size(UNIT_SHIFT) - 1),
            write: request.kind.write(),
            level,
            old: then.word(level),
            new: now.word(level),
            invalidation: used.invalidation,
            needed,
            last: findings.last_invalidation(used.source),
            uses: 1,
            invalidated_since: false,
        };
        // Their number is bounded, so the log needs no rate limit.
        if let Some(first) = findings.add(stale, source, page_shift) {
            log::warn!("sanitizer: stale translation used: {first}");
        }
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
    /// Level of the page that was compared.
    level: u8,
    stale: Option<Stale>,
}

/// A stale translation.
struct Stale {
    /// Level of the highest entry that differs.
    level: u8,
    /// The entries that it was made from, as far as known.
    then: Trail,
    now: Trail,
    /// Source of the cached translation.
    source: Source,
    /// Size of the page that was cached, as a power of two.
    page_shift: u8,
}

/// Where the tables send an IOVA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// To `gpa`, in a page of `level`, with what the entries allow together.
    Page { gpa: u64, level: u8, path: Path },
    /// Nowhere: an entry is not present or malformed, or a table is not in memory.
    Nowhere,
}

/// Translates `iova` by `tables` on `host` as they are now: from memory, bypassing all caches,
/// without setting flags.
fn read_tables<F: TableFormat>(
    caches: &Caches,
    host: &HostStage2,
    tables: &F,
    iova: u64,
) -> (Trail, End) {
    let (mut trail, mut path, mut gpa) = (Trail::default(), Path::UNLIMITED, tables.table());
    for level in (1..=tables.levels()).rev() {
        // Only the entry, as a table may be discontiguous.
        let at = gpa + tables.index(iova, level) * 8;
        let found = caches.stage2_now(host, at);
        let Some(page) = found.filter(|page| page.read && page.length >= 8) else { break };
        let Some(entry) = caches.word(page.place) else { break };
        let word = u64::from_le(entry.load(Ordering::Acquire));
        trail.set(level, word);
        let Ok(decoded) = tables.decode(word, level) else { break };
        path = path & decoded.path;
        if decoded.leaf {
            let gpa = decoded.address | iova & (size(tables.shift(level)) - 1);
            return (trail, End::Page { gpa, level, path });
        }
        gpa = decoded.address;
    }
    (trail, End::Nowhere)
}

/// A use, with what is needed to notice that its translation is dropped.
#[derive(Debug)]
struct Finding {
    stale: StaleUse,
    /// Source of the cached translation.
    source: Source,
    /// Size of the page that was cached, as a power of two.
    page_shift: u8,
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
    last: BTreeMap<(u32, Option<u32>), (u64, InvalidatedPages)>,
    /// Number of invalidations.
    invalidations: u64,
}

impl Findings {
    /// The last invalidation of translations of `source`.
    pub fn last_invalidation(&self, source: Source) -> Option<InvalidatedPages> {
        let spaces = [None, Some(source.space())];
        let last = spaces.iter().filter_map(|space| self.last.get(&(source.tag(), *space)));
        last.max_by_key(|(number, _)| *number).map(|(_, pages)| *pages)
    }

    /// Adds a use of a translation cached for `source` as a page of `page_shift`. Returns it if it
    /// is the first of its page and is recorded.
    pub fn add(&mut self, stale: StaleUse, source: Source, page_shift: u8) -> Option<StaleUse> {
        let key = (stale.rid, stale.pasid, stale.iova);
        if let Some(known) = self.pages.get_mut(&key) {
            known.stale.uses += 1;
            return None;
        }
        if self.pages.len() >= MAX_PAGES {
            self.others += 1;
            return None;
        }
        self.pages.insert(key, Finding { stale, source, page_shift });
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
        self.last.insert((scope.tag, space), (self.invalidations, range.into()));
        if self.last.len() > MAX_INVALIDATED {
            let oldest = self.last.iter().min_by_key(|(_, (number, _))| *number);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.last.remove(&oldest);
            }
        }
        for finding in self.pages.values_mut().filter(|finding| scope.has(finding.source)) {
            let size = size(finding.page_shift);
            let first = finding.stale.iova & !(size - 1);
            let covered = covers(range, first, first | (size - 1));
            // If a table pointer changed, an invalidation of leaf entries only leaves it cached.
            if covered && (!is_of_leaves(range.into()) || is_of_leaves(finding.stale.needed)) {
                finding.stale.invalidated_since = true;
            }
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

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

mod contexts;
mod findings;
mod tables;

use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use super::{
    size, Caches, Gone, HostStage2, LocalCounters, Origins, Request, Scope, Source, TableFormat,
    Target, Trail,
};
use crate::units::hardware::CacheRange;
pub use contexts::{ContextInvalidation, ContextTables, DmaWay, StaleContext};
use findings::{Findings, UNIT_SHIFT};
pub use findings::{InvalidatedPages, SanitizerReport, StaleUse, TlbInvalidation};
use tables::{read_tables, End};
use twostage::spec::pci::Bdf;

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The sanitizer: no stale translation is used without its being said.
//!
//! Every request that is translated is compared with what the guest's tables say at that moment.
//! There is a finding when the request goes somewhere, and by the tables it would go elsewhere or
//! be blocked. There is none when
//! * the tables allow more than what is cached: such a change needs no invalidation;
//! * only flags, ignored bits or the size of the page differ: the byte is where it was;
//! * what was taken away is not what this request needs: a device may go on reading a page that is
//!   being made read-only;
//! * the host changed stage 2: that is no matter of the guest's.
//!
//! Which tables serve a requester is compared by the unit of each architecture, and is a finding of
//! its own ([`Sanitizer::context_used`]).
//!
//! A sanitizing unit does not cache configurations in ports, so that no request takes the short way
//! that looks at nothing; one that does not sanitize pays nothing for it.

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

/// The tables that a request went through.
#[derive(Debug)]
pub(crate) struct Used<'a, F> {
    pub tables: &'a F,
    pub host: &'a HostStage2,
    /// Whose the cached translations are; requests may be served by those of another one, too, such
    /// as global ones.
    pub source: Source,
    pub others: Option<Source>,
    /// Sizes of what is cached, as powers of two.
    pub shifts: &'a [u8],
    /// What changes of the tables need.
    pub invalidation: TlbInvalidation,
}

impl Sanitizer {
    /// What entries of the caches are made from, for who makes them.
    pub fn origins(&self) -> Arc<Origins> {
        Arc::clone(&self.origins)
    }

    /// DMA went by a context that is not what the guest's tables have now.
    pub fn context_used(&self, counters: &LocalCounters, stale: StaleContext) {
        counters.stale_uses.count();
        if let Some(first) = self.findings().add_context(stale) {
            log::warn!("sanitizer: stale context used: {first}");
        }
    }

    /// Compares `target`, which `request` is about to use, with the tables. Gives the part of it
    /// that has been compared: the tables may have several pages now where one is cached.
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
            // It was made from entries that are not known any more: the lowest is as good a guess
            // as any.
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
        // So few are kept that the log needs no other limit.
        if let Some(first) = findings.add(stale, source, page_shift) {
            log::warn!("sanitizer: stale translation used: {first}");
        }
    }

    /// The guest invalidated `range` of `scope`.
    pub fn invalidated(&self, scope: Scope, range: CacheRange) {
        self.findings().invalidated(scope, range);
    }

    /// The contexts of `rid` and its PASIDs for which `changed` holds are others from now on.
    pub fn contexts_changed(&self, rid: u16, changed: impl Fn(Option<u32>) -> bool) {
        self.findings().contexts_changed(Bdf::from_raw(rid), changed);
    }

    /// What was cached of `gone` is gone.
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

/// What came of a comparison.
struct Compared {
    /// Level of the page that was compared.
    level: u8,
    stale: Option<Stale>,
}

/// A stale translation.
struct Stale {
    /// Level of the highest entry that differs.
    level: u8,
    /// The entries that it was made from, as far as they are known.
    then: Trail,
    now: Trail,
    /// Whose translation was cached.
    source: Source,
    /// Size of the page that was cached, as a power of two.
    page_shift: u8,
}

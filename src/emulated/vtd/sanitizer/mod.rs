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
//! The guest's context and PASID tables are not the host's to read. Where a VMM lends them
//! ([`ContextTables`]), a request that goes another way than they say is a finding, too.
//!
//! A sanitizing unit has no PASID cache, so that no request takes the short way that looks at
//! nothing; one that does not sanitize pays nothing for it.
#![forbid(unsafe_code)]

mod contexts;
mod findings;
mod tables;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::context::{Context, Tables};
use super::engine::PAGE_SHIFTS;
use super::fault::Fault;
use crate::emulated::engine::{
    Caches, Gone, LocalCounters, Origins, Request, TableFormat, Target, Trail,
};
use crate::emulated::hardware::CacheRange;
use crate::spec::pci::Bdf;
use crate::spec::vtd::first_stage::page_size;
pub use contexts::{ContextTables, DmaWay, StaleContext};
use findings::Findings;
pub use findings::{InvalidatedPages, SanitizerReport, StaleUse};
use tables::{read_tables, End};

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(super) struct Sanitizer {
    origins: Arc<Origins>,
    findings: Mutex<Findings>,
    contexts: OnceLock<Weak<dyn ContextTables>>,
}

impl Sanitizer {
    /// From now on contexts are compared with `tables`; only the first ones count.
    pub fn set_context_tables(&self, tables: Weak<dyn ContextTables>) {
        // Who comes later is told nothing: it is for the VMM to be of one mind.
        let _ = self.contexts.set(tables);
    }

    /// What entries of the caches are made from, for who makes them.
    pub fn origins(&self) -> Arc<Origins> {
        Arc::clone(&self.origins)
    }

    /// Compares `target`, which `request` is about to use, with the tables. Gives the part of it
    /// that has been compared: the tables may have several pages now where one is cached.
    pub fn check(
        &self,
        caches: &Caches,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
        target: Target,
    ) -> Target {
        if let Some(stale) = self.stale_context(context, request) {
            counters.stale_uses.count();
            if let Some(first) = self.findings().add_context(stale) {
                log::warn!("sanitizer: stale context used: {first}");
            }
            // What has become of tables that are not in use any more says nothing.
            return target;
        }
        let compared = match &context.tables {
            // Stage 2 is the host's, which drops what it changes.
            Tables::None | Tables::Unsupported => return target,
            Tables::FirstStage(tables) => self.compare(caches, context, tables, request, &target),
            Tables::SecondStage(tables) => self.compare(caches, context, tables, request, &target),
        };
        if let Some(stale) = compared.stale {
            counters.stale_uses.count();
            let second_stage = matches!(context.tables, Tables::SecondStage(_));
            self.add(context, request, stale, second_stage);
        }
        let to_end =
            page_size(compared.level) - (request.address & (page_size(compared.level) - 1));
        Target { length: target.length.min(to_end), ..target }
    }

    /// What there is to say if the guest's tables send `request` another way than `context`.
    fn stale_context(&self, context: &Context, request: &Request) -> Option<StaleContext> {
        let (rid, pasid) = (Bdf::from_raw(request.rid), request.pasid);
        let new = self.contexts.get()?.upgrade()?.way(rid, pasid)?;
        let old = DmaWay::of(&context.tables);
        let stale = StaleContext { rid, pasid, old, new, uses: 1, invalidated_since: false };
        (old != new).then_some(stale)
    }

    fn compare<F: TableFormat<Fault = Fault>>(
        &self,
        caches: &Caches,
        context: &Context,
        tables: &F,
        request: &Request,
        target: &Target,
    ) -> Compared {
        let Request { address, kind, .. } = *request;
        let cached = caches.translation_shift(&PAGE_SHIFTS, context.source, address, kind);
        let then = cached.and_then(|shift| self.origins.page(context.source, address, shift));
        let (now, end) = read_tables(caches, context, tables, address);
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
                let page = caches.stage2_now(&context.host, gpa);
                tables.check_path(path, kind).is_ok()
                    && page.is_some_and(|page| page.place == target.place)
            }
            End::Nowhere => false,
        };
        let stale = difference.filter(|_| !as_now).map(|at| Stale {
            level: at,
            then: then.unwrap_or_default(),
            now,
            page_shift: cached.unwrap_or(tables.shift(level)),
        });
        Compared { level, stale }
    }

    fn add(&self, context: &Context, request: &Request, stale: Stale, second_stage: bool) {
        let Stale { level, then, now, page_shift } = stale;
        let tag = context.source.tag();
        let needed = InvalidatedPages::Range {
            address: request.address & !(page_size(level) - 1),
            pages: page_size(level) / page_size(1),
            leaf: then.ends_at(level),
        };
        let mut findings = self.findings();
        let stale = StaleUse {
            rid: Bdf::from_raw(request.rid),
            pasid: request.pasid,
            iova: request.address & !(page_size(1) - 1),
            write: request.kind.write(),
            second_stage,
            level,
            old: then.word(level),
            new: now.word(level),
            needed,
            last: findings.last_invalidation(tag),
            uses: 1,
            invalidated_since: false,
        };
        // So few are kept that the log needs no other limit.
        if let Some(first) = findings.add(stale, tag, page_shift) {
            log::warn!("sanitizer: stale translation used: {first}");
        }
    }

    /// The guest invalidated `range` of `tag`.
    pub fn invalidated(&self, tag: u32, range: CacheRange) {
        self.findings().invalidated(tag, range);
    }

    /// The context of `rid` (or its `pasid`) is another from now on.
    pub fn context_changed(&self, rid: u16, pasid: Option<u32>) {
        self.findings().context_changed(Bdf::from_raw(rid), pasid);
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
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Size of the page that was cached, as a power of two.
    page_shift: u8,
}

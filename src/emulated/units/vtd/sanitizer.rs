// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What VT-d's sanitizer compares: a requester's context, then its tables.
//!
//! The host cannot read the guest's context and PASID tables. If a VMM provides them
//! ([`ContextTables`]), a request that is translated differently is a finding, too.

use std::sync::{Arc, OnceLock, Weak};

use super::context::Context;
use super::tables::{FirstStage, Nested, SecondStage, Tables, PAGE_SHIFTS};
use crate::units::engine::{
    self, Caches, ContextInvalidation, ContextTables, DmaWay, LocalCounters, Lower, Request,
    StaleContext, TableFormat, Target, TlbInvalidation, Used,
};
use twostage::spec::pci::Bdf;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(super) struct Sanitizer {
    /// Compares tables and records findings.
    pub common: Arc<engine::Sanitizer>,
    contexts: OnceLock<Weak<dyn ContextTables>>,
}

impl Sanitizer {
    /// Compares contexts with `tables` from now on; only the first call counts.
    pub fn set_context_tables(&self, tables: Weak<dyn ContextTables>) {
        // Later calls are ignored: the VMM should make only one.
        let _ = self.contexts.set(tables);
    }

    /// Compares what `request` is about to use. Returns the part of `target` that was compared.
    pub fn check(
        &self,
        caches: &Caches,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
        target: Target,
    ) -> Target {
        if self.compare_context(context, counters, request) {
            // The current state of tables that are no longer in use is irrelevant.
            return target;
        }
        let pasid = request.pasid;
        let check_first = |used: &Used<'_, FirstStage>| {
            self.common.check(caches, used, counters, request, target)
        };
        match &context.tables {
            // Stage 2 is the host's, which drops what it changes.
            Tables::None | Tables::Unsupported => target,
            Tables::FirstStage(tables) => check_first(&first_stage(context, pasid, tables)),
            Tables::SecondStage(tables) => {
                let used = second_stage(context, pasid, tables);
                self.common.check(caches, &used, counters, request, target)
            }
            Tables::Nested(tables) => check_first(&nested(context, pasid, tables)),
        }
    }

    /// Where the tables of `context` send `request` now, if anywhere.
    pub fn now(
        &self,
        caches: &Caches,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
    ) -> Option<Target> {
        self.compare_context(context, counters, request);
        let Request { pasid, address, kind, .. } = *request;
        match &context.tables {
            Tables::None => {
                let page = caches.stage2_now(&context.host, address)?;
                let served = page.allows(kind) && !kind.execute();
                served.then_some(Target { place: page.place, length: page.length })
            }
            Tables::FirstStage(tables) => {
                self.common.now(caches, &first_stage(context, pasid, tables), request)
            }
            Tables::SecondStage(tables) => {
                self.common.now(caches, &second_stage(context, pasid, tables), request)
            }
            Tables::Nested(tables) => {
                self.common.now(caches, &nested(context, pasid, tables), request)
            }
            Tables::Unsupported => None,
        }
    }

    /// Compares `context`, by which `request` is translated, with the guest's tables. Returns
    /// whether they differ.
    fn compare_context(
        &self,
        context: &Context,
        counters: &LocalCounters,
        request: &Request,
    ) -> bool {
        let stale = self.stale_context(context, request);
        if let Some(stale) = stale {
            self.common.context_used(counters, stale);
        }
        stale.is_some()
    }

    /// The finding, if any, that the guest's tables translate `request` differently from `context`.
    fn stale_context(&self, context: &Context, request: &Request) -> Option<StaleContext> {
        let (rid, pasid) = (Bdf::from_raw(request.rid), request.pasid);
        let new = self.contexts.get()?.upgrade()?.way(rid, pasid)?;
        let old = way(&context.tables);
        let needed = ContextInvalidation::Vtd;
        let stale =
            StaleContext { rid, pasid, old, new, needed, uses: 1, invalidated_since: false };
        (old != new).then_some(stale)
    }
}

fn first_stage<'a>(
    context: &'a Context,
    pasid: Option<u32>,
    tables: &'a FirstStage,
) -> Used<'a, FirstStage> {
    used(context, pasid, tables, TlbInvalidation::VtdPasidIotlb)
}

fn second_stage<'a>(
    context: &'a Context,
    pasid: Option<u32>,
    tables: &'a SecondStage,
) -> Used<'a, SecondStage> {
    used(context, pasid, tables, TlbInvalidation::VtdIotlb)
}

fn nested<'a>(
    context: &'a Context,
    pasid: Option<u32>,
    tables: &'a Nested,
) -> Used<'a, FirstStage> {
    let source = context.second_stage_source();
    let lower = Lower { tables: &tables.second, source, invalidation: TlbInvalidation::VtdIotlb };
    Used { lower: Some(lower), ..first_stage(context, pasid, &tables.first) }
}

fn used<'a, F: TableFormat>(
    context: &'a Context,
    pasid: Option<u32>,
    tables: &'a F,
    invalidation: TlbInvalidation,
) -> Used<'a, F> {
    let (source, host) = (context.source(pasid), &context.host);
    Used { tables, lower: None, host, source, others: None, shifts: &PAGE_SHIFTS, invalidation }
}

/// Where `tables` lead.
fn way(tables: &Tables) -> DmaWay {
    match tables {
        Tables::None => DmaWay::Bypass,
        Tables::FirstStage(tables) => DmaWay::FirstStage(tables.table),
        Tables::SecondStage(tables) => DmaWay::SecondStage(tables.table),
        Tables::Nested(Nested { first, second }) => {
            DmaWay::Nested { first: first.table, second: second.table }
        }
        Tables::Unsupported => DmaWay::Blocked,
    }
}

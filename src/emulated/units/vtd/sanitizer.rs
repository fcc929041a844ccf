// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What VT-d's sanitizer compares: a requester's context, then its tables.
//!
//! The host cannot read the guest's context and PASID tables. If a VMM provides them
//! ([`ContextTables`]), a request that is translated differently is a finding, too.

use std::sync::{Arc, OnceLock, Weak};

use super::context::Context;
use super::tables::{Nested, Tables, PAGE_SHIFTS};
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
        if let Some(stale) = self.stale_context(context, request) {
            self.common.context_used(counters, stale);
            // The current state of tables that are no longer in use is irrelevant.
            return target;
        }
        match &context.tables {
            // Stage 2 is the host's, which drops what it changes.
            Tables::None | Tables::Unsupported => target,
            Tables::FirstStage(tables) => {
                let used = used(context, request.pasid, tables, TlbInvalidation::VtdPasidIotlb);
                self.common.check(caches, &used, counters, request, target)
            }
            Tables::SecondStage(tables) => {
                let used = used(context, request.pasid, tables, TlbInvalidation::VtdIotlb);
                self.common.check(caches, &used, counters, request, target)
            }
            Tables::Nested(Nested { first, second }) => {
                let source = context.second_stage_source();
                let invalidation = TlbInvalidation::VtdIotlb;
                let lower = Some(Lower { tables: second, source, invalidation });
                let used = used(context, request.pasid, first, TlbInvalidation::VtdPasidIotlb);
                self.common.check(caches, &Used { lower, ..used }, counters, request, target)
            }
        }
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

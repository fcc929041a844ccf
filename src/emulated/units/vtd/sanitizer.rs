// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What VT-d's sanitizer compares: the way of a requester, then its tables.
//!
//! The guest's context and PASID tables are not the host's to read. Where a VMM lends them
//! ([`ContextTables`]), a request that goes another way than they say is a finding, too.

use std::sync::{OnceLock, Weak};

use super::context::{Context, Tables};
use super::first_stage::PAGE_SHIFTS;
use crate::units::engine::{
    self, Caches, ContextInvalidation, ContextTables, DmaWay, LocalCounters, Request, StaleContext,
    TableFormat, Target, TlbInvalidation, Used,
};
use twostage::spec::pci::Bdf;

/// See the [module's documentation](self).
#[derive(Debug, Default)]
pub(super) struct Sanitizer {
    /// What compares tables and keeps the findings.
    pub common: engine::Sanitizer,
    contexts: OnceLock<Weak<dyn ContextTables>>,
}

impl Sanitizer {
    /// From now on contexts are compared with `tables`; only the first ones count.
    pub fn set_context_tables(&self, tables: Weak<dyn ContextTables>) {
        // Who comes later is told nothing: it is for the VMM to be of one mind.
        let _ = self.contexts.set(tables);
    }

    /// Compares what `request` is about to use. Gives the part of `target` that has been compared.
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
            // What has become of tables that are not in use any more says nothing.
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
        }
    }

    /// What there is to say if the guest's tables send `request` another way than `context`.
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
    Used { tables, host, source, others: None, shifts: &PAGE_SHIFTS, invalidation }
}

/// The way through `tables`.
fn way(tables: &Tables) -> DmaWay {
    match tables {
        Tables::None => DmaWay::Bypass,
        Tables::FirstStage(tables) => DmaWay::FirstStage(tables.table),
        Tables::SecondStage(tables) => DmaWay::SecondStage(tables.table),
        Tables::Unsupported => DmaWay::Blocked,
    }
}

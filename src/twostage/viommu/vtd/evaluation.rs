// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading tables again for many requesters, a slice at a time.
//!
//! A function may have 2^20 PASIDs, and a guest may name all of them with one descriptor or one
//! register write. So an [`Evaluation`] continues where its last slice ended, on any thread that
//! has the registers then; they are unlocked in between. The cause is acknowledged only when all of
//! it is done: by then each requester has what the tables said at some moment after the guest's
//! request.

use super::apply::{refused_reason, Scope};
use super::host_side::{DomainTag, Policy, RequesterConfig};
use super::policy::{Blocked, PasidConfig};
use super::VtdIommu;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::TABLE_ENTRIES;
use crate::spec::vtd::regs::Rtaddr;
use crate::viommu::ledger::{Applied, Given, NotApplied};
use crate::viommu::Requester;

/// The work of one slice. Reading a table entry costs 1, and so does a directory entry without a
/// table.
#[derive(Debug)]
pub(super) struct Budget(u32);

impl Budget {
    /// A fraction of a millisecond, even if each change is a system call that waits for hardware.
    const SLICE: u32 = 1024;
    /// The cost of a requester whose configuration changes.
    const CHANGE: u32 = 32;

    fn spend(&mut self, cost: u32) {
        self.0 = self.0.saturating_sub(cost);
    }

    fn is_spent(&self) -> bool {
        self.0 == 0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self(Self::SLICE)
    }
}

/// The configuration of requests without PASID while translation is disabled.
pub(super) const PASSING: RequesterConfig = RequesterConfig {
    policy: Policy::Bypass,
    tag: DomainTag { domain: 0, pasid: 0 },
    fault_disabled: false,
};
/// What PASIDs are withdrawn with.
pub(super) const PASID_GONE: Blocked = Blocked::recorded(FaultReason::PasidEntryNotPresent);

/// What the configuration of requesters is derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    /// The guest's tables.
    Tables,
    /// Nothing, as translation is disabled: requests without PASID pass, those with PASID are
    /// blocked.
    Nothing,
}

/// The rest of reading the tables again.
#[derive(Debug)]
pub(super) struct Evaluation {
    scope: Scope,
    by: By,
    /// The next function: its requests without PASID, or those from a PASID on. `None` at the end.
    next: Option<(Bdf, Option<u32>)>,
    applied: Applied,
    /// What the host had lost at the first slice.
    losses: Option<u64>,
}

impl Evaluation {
    /// For everything that `scope` names.
    pub fn new(scope: Scope, by: By) -> Self {
        Self { scope, by, next: Some((Bdf::from_raw(0), None)), applied: Ok(()), losses: None }
    }

    /// For one function.
    pub fn of_function(rid: Bdf, by: By) -> Self {
        let next = Some((rid, None));
        Self { next, ..Self::new(Scope::Functions { source: rid, ignored: 0 }, by) }
    }

    /// What configurations are derived from.
    pub fn by(&self) -> By {
        self.by
    }

    /// Whether `requester` has been processed.
    pub fn has_passed(&self, requester: Requester) -> bool {
        // Requests without PASID come before those with one.
        let turn = (requester.rid, requester.pasid.map(Pasid::raw));
        self.next.is_none_or(|next| turn < next)
    }
}

impl VtdIommu {
    /// Continues `evaluation` with the tables at `root`, for one slice. Returns the outcome when
    /// nothing is left.
    pub(super) fn evaluate(
        &self,
        evaluation: &mut Evaluation,
        root: Option<Rtaddr>,
        budget: &mut Budget,
    ) -> Option<Applied> {
        let losses = *evaluation.losses.get_or_insert_with(|| self.requesters.losses());
        while let Some((from, pasid)) = evaluation.next {
            if self.is_halted() {
                return Some(Err(NotApplied::Halted));
            }
            if budget.is_spent() {
                return None;
            }
            let Some(rid) = self.requesters.function_from(from) else { break };
            let after = rid.raw().checked_add(1).map(|raw| (Bdf::from_raw(raw), None));
            evaluation.next = if !evaluation.scope.names_function(rid) {
                budget.spend(1);
                after
            } else {
                // The next one may be gone by now.
                match pasid.filter(|_| rid == from) {
                    None if !self.evaluate_rid(evaluation, rid, root, budget) => return None,
                    None => Some((rid, Some(0))),
                    Some(pasid) => self
                        .evaluate_pasids(evaluation, (rid, pasid), root, budget)
                        .map_or(after, |pasid| Some((rid, Some(pasid)))),
                }
            };
        }
        let applied = evaluation.applied;
        if evaluation.scope == Scope::Unapplied && applied.is_ok() {
            self.requesters.set_reapplied(losses);
        }
        Some(applied)
    }

    /// The configuration of requests of `rid` without PASID, and what the guest is told of them if
    /// the host refuses it.
    pub(super) fn config_of(
        &self,
        rid: Bdf,
        by: By,
        root: Option<Rtaddr>,
    ) -> (RequesterConfig, FaultReason) {
        match by {
            By::Tables => (self.tables(root).config(Requester::rid(rid)), refused_reason(root)),
            By::Nothing => (PASSING, FaultReason::RootTableAddressInvalid),
        }
    }

    /// Requests of `rid` without PASID. Whether that is done.
    fn evaluate_rid(
        &self,
        evaluation: &mut Evaluation,
        rid: Bdf,
        root: Option<Rtaddr>,
        budget: &mut Budget,
    ) -> bool {
        let requester = Requester::rid(rid);
        let (config, refused) = self.config_of(rid, evaluation.by, root);
        self.evaluate_requester(evaluation, requester, config, budget, |unit| {
            unit.give(requester, config, refused)
        })
    }

    /// PASIDs of a function, from one on. Returns the next one when the budget is spent.
    fn evaluate_pasids(
        &self,
        evaluation: &mut Evaluation,
        (rid, from): (Bdf, u32),
        root: Option<Rtaddr>,
        budget: &mut Budget,
    ) -> Option<u32> {
        let tables = self.tables(root);
        let refused = refused_reason(root);
        match (evaluation.by, evaluation.scope) {
            (By::Tables, Scope::Pasid(pasid)) => {
                let requester = Requester { rid, pasid: Some(pasid) };
                if !self.host.prepare(requester, &tables.config(requester)) {
                    budget.spend(Budget::SLICE);
                    return Some(from);
                }
                let applied = self.reevaluate_requester(requester, root);
                evaluation.applied = evaluation.applied.and(applied);
                budget.spend(Budget::CHANGE);
                return None;
            }
            (By::Tables, Scope::Unapplied) => {
                return self.each_given((rid, from), u32::MAX, budget, |requester, budget| {
                    if self.requesters.given(requester).is_none_or(|given| given.applied) {
                        return true;
                    }
                    if !self.host.prepare(requester, &tables.config(requester)) {
                        return false;
                    }
                    budget.spend(Budget::CHANGE);
                    let applied = self.reevaluate_requester(requester, root);
                    evaluation.applied = evaluation.applied.and(applied);
                    true
                });
            }
            _ => {}
        }
        // A configured PASID without an entry is withdrawn.
        let by_tables = evaluation.by == By::Tables;
        let withdraw = |evaluation: &mut Evaluation, requester, budget: &mut Budget| {
            let read = match by_tables {
                true => tables.pasid_config(requester),
                false => PasidConfig::without_entry(requester, PASID_GONE),
            };
            let give = |unit: &Self| unit.give(requester, read.config, refused);
            let done = self.evaluate_requester(evaluation, requester, read.config, budget, give);
            self.forget_without_entry(requester, read);
            done
        };
        let reached = if by_tables { tables.pasid_tables(rid) } else { None };
        let end = reached.as_ref().map_or(0, |reached| reached.pasids());
        let mut next = from;
        while let Some(reached) = reached.as_ref().filter(|_| next < end) {
            if budget.is_spent() || self.is_halted() {
                return Some(next);
            }
            let table_end = (next - next % TABLE_ENTRIES + TABLE_ENTRIES).min(end);
            let Some(table) = reached.table(next) else {
                budget.spend(1);
                let left = self.each_given((rid, next), table_end, budget, |requester, budget| {
                    withdraw(evaluation, requester, budget)
                });
                next = left.unwrap_or(table_end);
                continue;
            };
            // PASID 0 is skipped: see `Tables::pasid_tables`.
            while next < table_end && !budget.is_spent() && !self.is_halted() {
                let pasid = Pasid::new(next).filter(|pasid| pasid.raw() != 0);
                next += 1;
                let Some(pasid) = pasid else { continue };
                let requester = Requester { rid, pasid: Some(pasid) };
                match table.config(requester) {
                    Some(config) => {
                        let give = |unit: &Self| unit.give(requester, config, refused);
                        if !self.evaluate_requester(evaluation, requester, config, budget, give) {
                            return Some(pasid.raw());
                        }
                    }
                    None if self.requesters.given(requester).is_none() => budget.spend(1),
                    None if withdraw(evaluation, requester, budget) => {}
                    // It came back, or the host has something to do first.
                    None => return Some(pasid.raw()),
                }
            }
        }
        self.each_given((rid, next), u32::MAX, budget, |requester, budget| {
            withdraw(evaluation, requester, budget)
        })
    }

    /// Makes `change`, unless `requester` has its `config` or is not named. Whether that is done;
    /// if not, the slice is over.
    fn evaluate_requester(
        &self,
        evaluation: &mut Evaluation,
        requester: Requester,
        config: RequesterConfig,
        budget: &mut Budget,
        change: impl FnOnce(&Self) -> Applied,
    ) -> bool {
        let before = self.requesters.given(requester);
        if before == Some(Given::applied(config)) || !evaluation.scope.names(before, &config) {
            budget.spend(1);
            return true;
        }
        if !self.host.prepare(requester, &config) {
            budget.spend(Budget::SLICE);
            return false;
        }
        budget.spend(Budget::CHANGE);
        evaluation.applied = evaluation.applied.and(change(self));
        true
    }

    /// Calls `visit` for each configured PASID of a function, from one up to `end`. Returns the
    /// next one when the budget is spent, or one that is not done: then the slice is over.
    fn each_given(
        &self,
        (rid, from): (Bdf, u32),
        end: u32,
        budget: &mut Budget,
        mut visit: impl FnMut(Requester, &mut Budget) -> bool,
    ) -> Option<u32> {
        let mut next = from;
        while let Some(pasid) = self.requesters.pasid_from(rid, next) {
            if pasid.raw() >= end {
                break;
            }
            if budget.is_spent() || self.is_halted() {
                return Some(pasid.raw());
            }
            budget.spend(1);
            if !visit(Requester { rid, pasid: Some(pasid) }, budget) {
                budget.spend(Budget::SLICE);
                return Some(pasid.raw());
            }
            next = pasid.raw() + 1;
        }
        None
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Policies, from the guest's tables to the host, and invalidations.
//!
//! Everything here runs under the model's lock, and is short: operations on many requesters are an
//! [`Evaluation`](super::evaluation::Evaluation), which processes them in slices.

use super::host_side::{Invalidation, Progress, RequesterConfig};
use super::policy::{blocked_config, Blocked, PasidConfig, Tables};
use super::requesters::{Functions, Given};
use super::state::Registers;
use super::VtdIommu;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::qi::ContextScope;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::viommu::ledger::{host_refused, Applied, Entries};
use crate::viommu::{HostSideError, Requester};

/// The requesters that an invalidation of the context or PASID cache names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// All.
    Global,
    /// Those tagged with the domain, in their applied configuration or in the current tables.
    Domain(u16),
    /// Functions: all that equal `source` except in the bits `ignored`.
    Functions { source: Bdf, ignored: u16 },
    /// Those that a PASID table entry serves: the PASID of each function, and requests without
    /// PASID if it is RID_PASID.
    Pasid(Pasid),
    /// Not an invalidation: those whose configuration the host has not applied.
    Unapplied,
}

impl Scope {
    /// The scope of a context cache invalidation in the translation table mode `mode`.
    pub fn of_contexts(scope: ContextScope, mode: Option<TranslationTableMode>) -> Self {
        match scope {
            ContextScope::Global => Self::Global,
            // Context entries of scalable mode have no domain id that could tell them apart.
            ContextScope::Domain(_) if mode == Some(TranslationTableMode::Scalable) => Self::Global,
            ContextScope::Domain(domain) => Self::Domain(domain),
            ContextScope::Device { source, function_mask, .. } => {
                let ignored = match function_mask {
                    0 => 0b000,
                    1 => 0b100,
                    2 => 0b110,
                    _ => 0b111,
                };
                Self::Functions { source, ignored }
            }
        }
    }

    pub fn names_function(self, rid: Bdf) -> bool {
        match self {
            Self::Functions { source, ignored } => (rid.raw() ^ source.raw()) & !ignored == 0,
            Self::Global | Self::Domain(_) | Self::Pasid(_) | Self::Unapplied => true,
        }
    }

    /// Whether the old or the new configuration of a requester is named. A requester without
    /// configuration, or blocked, had no tag that the guest knows.
    pub fn names(self, before: Option<Given>, after: &RequesterConfig) -> bool {
        if self == Self::Unapplied {
            return before.is_some_and(|given| !given.applied);
        }
        let Some(before) = before.filter(|given| !is_blocked(&given.decision)) else { return true };
        let tags = [before.decision.tag, after.tag];
        match self {
            Self::Global | Self::Functions { .. } | Self::Unapplied => true,
            Self::Domain(domain) => tags.iter().any(|tag| tag.domain == domain),
            Self::Pasid(pasid) => tags.iter().any(|tag| tag.pasid == pasid.raw()),
        }
    }
}

/// The union of several invalidations of the context or PASID cache.
#[derive(Debug, Default)]
pub(super) struct Scopes(Vec<Scope>);

impl Scopes {
    /// Beyond this number, one that names everything is cheaper.
    const MAX: usize = 8;

    /// Adds `scope`, unless it is covered already.
    pub fn add(&mut self, scope: Scope) {
        if self.0.contains(&Scope::Global) || self.0.contains(&scope) {
            return;
        }
        if scope == Scope::Global || self.0.len() == Self::MAX {
            self.0 = vec![Scope::Global];
        } else {
            self.0.push(scope);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes the next one to process.
    pub fn take(&mut self) -> Option<Scope> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }
}

pub(super) fn is_blocked(config: &RequesterConfig) -> bool {
    Functions::is_block(config)
}

impl VtdIommu {
    /// The tables at `root`.
    pub(super) fn tables(&self, root: Option<Rtaddr>) -> Tables<'_> {
        Tables { memory: &*self.memory, caps: &self.caps, root }
    }

    /// Reads the tables again for one PASID of one function.
    fn reevaluate_pasid(
        &self,
        tables: &Tables<'_>,
        requester: Requester,
        refused: FaultReason,
    ) -> Applied {
        // PASID 0 is never configured apart from its requester; see `Tables::pasid_tables`.
        if requester.pasid.is_none_or(|pasid| pasid.raw() == 0) {
            return Ok(());
        }
        let read = tables.pasid_config(requester);
        if !read.has_entry && self.requesters.given(requester).is_none() {
            return Ok(());
        }
        let applied = self.give(requester, read.config, refused);
        self.forget_without_entry(requester, read);
        applied
    }

    /// Reads the tables again for one requester.
    pub(super) fn reevaluate_requester(
        &self,
        requester: Requester,
        root: Option<Rtaddr>,
    ) -> Applied {
        let (tables, refused) = (self.tables(root), refused_reason(root));
        match requester.pasid {
            Some(_) => self.reevaluate_pasid(&tables, requester, refused),
            None => self.give(requester, tables.config(requester), refused),
        }
    }

    /// Forgets a PASID that was given what was `read` of it, if it has no entry, once the host has
    /// applied that.
    ///
    /// This is decided from `read` alone: the caller may have found the entry gone in a read of its
    /// own, and the guest may have written the tables since.
    pub(super) fn forget_without_entry(&self, requester: Requester, read: PasidConfig) {
        let done = self.requesters.has(requester, read.config);
        if let (Some(pasid), true, false) = (requester.pasid, done, read.has_entry) {
            self.requesters.forget_pasid(requester.rid, pasid);
        }
    }

    /// Gives `config` to the host unless it has it. If the host refuses, the requester is blocked,
    /// and the guest is told `refused` for each of its requests.
    pub(super) fn give(
        &self,
        requester: Requester,
        config: RequesterConfig,
        refused: FaultReason,
    ) -> Applied {
        self.try_give(requester, config, refused).or_else(|error| self.host_failed(&error))
    }

    /// The same, with the host's error, which is not logged yet.
    pub(super) fn try_give(
        &self,
        requester: Requester,
        config: RequesterConfig,
        refused: FaultReason,
    ) -> Result<(), HostSideError> {
        let fault_disabled = config.fault_disabled;
        let refused = blocked_config(requester, Blocked { reason: refused, fault_disabled });
        let configure = || self.host.configure(requester, &config);
        let given = self.requesters.give(requester, config, refused, configure);
        let Some(result) = given else { return Ok(()) };
        self.host.configured();
        self.policy_given(requester, &config, &result);
        result
    }

    /// Counts and shows what the host was given.
    pub(super) fn policy_given(
        &self,
        requester: Requester,
        config: &RequesterConfig,
        result: &Result<(), HostSideError>,
    ) {
        self.counters.policies.count();
        if let Some(observer) = &self.observer {
            observer.policy(requester, config, result.is_ok());
        }
    }

    /// Gives a batch to the host, starting at `progress`: as much of it as one slice may do.
    pub(super) fn invalidate_host(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        if !progress.has_started() {
            self.counters.batches.count();
            self.counters.invalidations.add(batch.len() as u64);
        }
        self.host.invalidate_some(batch, progress).inspect_err(|error| {
            // What the host blocked because of it is given again at the next occasion.
            self.requesters.unapply_all();
            // A failed invalidation is never acknowledged, whatever happened to its requesters.
            let _ = self.host_failed(error);
        })
    }

    /// Whether decisions that the host lost because an invalidation failed must be given again
    /// ([`Scope::Unapplied`]). A guest that only invalidates does not ask for the lost policies.
    pub(super) fn must_reapply(&self, registers: &Registers) -> bool {
        if !self.requesters.has_unapplied() {
            return false;
        }
        if !registers.gsts.tes() {
            self.requesters.set_reapplied(self.requesters.losses());
        }
        registers.gsts.tes()
    }

    /// See [`host_refused`].
    pub(super) fn host_failed(&self, error: &HostSideError) -> Applied {
        host_refused("VT-d", &self.counters.host_errors, &self.log, error)
    }
}

/// The reason that the guest sees for a requester that the host refused: the entry is programmed
/// wrongly.
pub(super) fn refused_reason(root: Option<Rtaddr>) -> FaultReason {
    match root.map(Rtaddr::mode) {
        Some(TranslationTableMode::Scalable) => FaultReason::PasidEntryInvalid,
        _ => FaultReason::LegacyContextInvalid,
    }
}

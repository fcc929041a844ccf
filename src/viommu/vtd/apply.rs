// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Policies, from the guest's tables to the host.
//!
//! Everything here runs under the model's lock. A policy is published for faults so that the
//! reason a blocked requester is given is never older than its blocking: a block is published
//! before the host has it, anything else after.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::policy::blocked_config;
use super::requesters::Given;
use super::state::Registers;
use super::tables::{Blocked, Tables};
use super::VtdIommu;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::qi::ContextScope;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::viommu::{DomainTag, HostSideError, Policy, Requester, RequesterConfig};

/// Why what the guest asks for may not be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotApplied {
    /// The host let a requester keep what the guest has taken back.
    StillReachable,
    /// The unit was halted on the way.
    Halted,
}

/// Whether every requester has its policy, or is blocked where the host refused it.
pub(super) type Applied = Result<(), NotApplied>;

/// Which requesters an invalidation of context or PASID cache names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// All.
    Global,
    /// Those tagged with the domain, by what they were given or by what the tables say now.
    Domain(u16),
    /// Functions: all that equal `source` but for the bits `ignored`.
    Functions { source: Bdf, ignored: u16 },
    /// Those that a PASID table entry serves: the PASID of each function, and requests without
    /// PASID where RID_PASID is it.
    Pasid(Pasid),
}

impl Scope {
    /// What an invalidation of the context cache names in the translation table mode `mode`.
    pub fn of_contexts(scope: ContextScope, mode: Option<TranslationTableMode>) -> Self {
        match scope {
            ContextScope::Global => Self::Global,
            // The context entries of scalable mode have no domain id that could tell them apart.
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

    fn names_function(self, rid: Bdf) -> bool {
        match self {
            Self::Functions { source, ignored } => (rid.raw() ^ source.raw()) & !ignored == 0,
            Self::Global | Self::Domain(_) | Self::Pasid(_) => true,
        }
    }

    /// Whether what was given to a requester, or what it is to be given, is named. One that was
    /// given nothing, or is blocked, was tagged by nothing that the guest knows.
    fn names(self, before: Option<Given>, after: &RequesterConfig) -> bool {
        let Some(before) = before.filter(|given| !is_blocked(&given.config)) else { return true };
        let tags = [before.config.tag, after.tag];
        match self {
            Self::Global | Self::Functions { .. } => true,
            Self::Domain(domain) => tags.iter().any(|tag| tag.domain == domain),
            Self::Pasid(pasid) => tags.iter().any(|tag| tag.pasid == pasid.raw()),
        }
    }
}

/// What several invalidations of context or PASID cache name together.
#[derive(Debug, Default)]
pub(super) struct Scopes(Vec<Scope>);

impl Scopes {
    /// More than so many are cheaper done as one that names all.
    const MAX: usize = 8;

    /// Adds `scope`, unless it is named already.
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

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// What is to be done, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = Scope> + '_ {
        self.0.iter().copied()
    }
}

pub(super) fn is_blocked(config: &RequesterConfig) -> bool {
    matches!(config.policy, Policy::Blocked { .. })
}

impl VtdIommu {
    /// The tables at `root`, to decide by.
    pub(super) fn tables(&self, root: Option<Rtaddr>) -> Tables<'_> {
        Tables { memory: &*self.memory, caps: &self.caps, root }
    }

    /// Enables translation: every requester has its policy when this returns.
    pub(super) fn enable_translation(&self, root: Option<Rtaddr>) -> Applied {
        self.requesters.set_translating(true, root);
        self.reevaluate(Scope::Global, root)
    }

    /// Disables translation: requests without PASID pass, those with PASID are blocked.
    pub(super) fn disable_translation(&self) -> Applied {
        let mut applied = Ok(());
        for rid in self.requesters.functions() {
            applied = applied.and(self.bypass(rid));
        }
        applied?;
        self.requesters.set_translating(false, None);
        Ok(())
    }

    /// What a function is given while translation is disabled.
    pub(super) fn bypass(&self, rid: Bdf) -> Applied {
        let tag = DomainTag { domain: 0, pasid: 0 };
        let config = RequesterConfig { policy: Policy::Bypass, tag, fault_disabled: false };
        let applied = self.give(Requester::rid(rid), config, FaultReason::RootTableAddressInvalid);
        applied.and(self.forget_pasids(rid))
    }

    /// Reads the tables anew for the requesters that `scope` names and gives the host what changed.
    pub(super) fn reevaluate(&self, scope: Scope, root: Option<Rtaddr>) -> Applied {
        self.counters.evaluations.fetch_add(1, Ordering::Relaxed);
        let mut applied = Ok(());
        for rid in self.requesters.functions() {
            self.check_halted()?;
            if scope.names_function(rid) {
                applied = applied.and(self.reevaluate_function(rid, scope, root));
            }
        }
        applied
    }

    /// [`VtdIommu::reevaluate`] for one function.
    pub(super) fn reevaluate_function(
        &self,
        rid: Bdf,
        scope: Scope,
        root: Option<Rtaddr>,
    ) -> Applied {
        let tables = self.tables(root);
        let refused = refused_reason(root);
        let requester = Requester::rid(rid);
        let config = tables.config(requester);
        let mut applied = Ok(());
        if scope.names(self.requesters.given(requester), &config) {
            applied = self.give(requester, config, refused);
        }
        if let Scope::Pasid(pasid) = scope {
            let requester = Requester { rid, pasid: Some(pasid) };
            return applied.and(self.reevaluate_pasid(&tables, requester, refused));
        }
        applied.and(self.reevaluate_pasids(&tables, rid, scope, refused))
    }

    /// Reads the tables anew for all PASIDs of one function.
    fn reevaluate_pasids(
        &self,
        tables: &Tables<'_>,
        rid: Bdf,
        scope: Scope,
        refused: FaultReason,
    ) -> Applied {
        let mut present = BTreeMap::new();
        let visited = tables.for_each_pasid(
            rid,
            || self.check_halted().is_ok(),
            |pasid, config| {
                present.insert(pasid, config);
            },
        );
        if visited.is_break() {
            return Err(NotApplied::Halted);
        }
        if present.is_empty() {
            // One call for a PASID table that is gone, however many PASIDs it had.
            return if self.requesters.pasids(rid).is_empty() {
                Ok(())
            } else {
                self.forget_pasids(rid)
            };
        }
        let mut applied = Ok(());
        for (&pasid, &config) in &present {
            self.check_halted()?;
            let requester = Requester { rid, pasid: Some(pasid) };
            if scope.names(self.requesters.given(requester), &config) {
                applied = applied.and(self.give(requester, config, refused));
            }
        }
        for pasid in self.requesters.pasids(rid) {
            self.check_halted()?;
            let requester = Requester { rid, pasid: Some(pasid) };
            if !present.contains_key(&pasid) {
                let config = tables.config(requester);
                if scope.names(self.requesters.given(requester), &config) {
                    applied = applied.and(self.withdraw_pasid(requester, config, refused));
                }
            }
        }
        applied
    }

    /// Reads the tables anew for one PASID of one function.
    fn reevaluate_pasid(
        &self,
        tables: &Tables<'_>,
        requester: Requester,
        refused: FaultReason,
    ) -> Applied {
        // PASID 0 is never given apart from its requester; see `Tables::for_each_pasid`.
        if requester.pasid.is_none_or(|pasid| pasid.raw() == 0) {
            return Ok(());
        }
        let config = tables.config(requester);
        if !is_blocked(&config) {
            self.give(requester, config, refused)
        } else if self.requesters.given(requester).is_some() {
            self.withdraw_pasid(requester, config, refused)
        } else {
            Ok(())
        }
    }

    /// Reads the tables anew for one requester.
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

    /// Gives anew what the host has lost because it could not invalidate it. Whoever asks for
    /// invalidations alone does not ask for the policies that were lost with them.
    pub(super) fn regain(&self, registers: &Registers) -> Applied {
        if !self.requesters.distrusts_host() {
            return Ok(());
        }
        let mut applied = Ok(());
        if registers.gsts.tes() {
            for requester in self.requesters.unapplied() {
                self.check_halted()?;
                applied = applied.and(self.reevaluate_requester(requester, registers.root));
            }
        }
        applied?;
        self.requesters.trust_host();
        Ok(())
    }

    /// Blocks a PASID that the tables no longer serve, and forgets it when the host has done so:
    /// faults are then explained by the tables themselves.
    fn withdraw_pasid(
        &self,
        requester: Requester,
        config: RequesterConfig,
        refused: FaultReason,
    ) -> Applied {
        let applied = self.give(requester, config, refused);
        let given = self.requesters.given(requester);
        if let (Some(pasid), Some(Given { applied: true, .. })) = (requester.pasid, given) {
            self.requesters.forget_pasid(requester.rid, pasid);
        }
        applied
    }

    /// Gives `config` to the host unless it has it. When the host refuses, the requester is
    /// blocked, and the guest is told `refused` of each of its requests.
    pub(super) fn give(
        &self,
        requester: Requester,
        config: RequesterConfig,
        refused: FaultReason,
    ) -> Applied {
        if self.requesters.given(requester) == Some(Given { config, applied: true }) {
            return Ok(());
        }
        let given = Given { config, applied: true };
        if is_blocked(&config) {
            self.requesters.give(requester, given);
        }
        let result = self.host.configure(requester, &config);
        let applied = match &result {
            Ok(()) => {
                self.requesters.give(requester, given);
                Ok(())
            }
            Err(error) => {
                let config = if is_blocked(&config) {
                    config
                } else {
                    let fault_disabled = config.fault_disabled;
                    blocked_config(requester, Blocked { reason: refused, fault_disabled })
                };
                self.requesters.give(requester, Given { config, applied: false });
                self.host_failed(error)
            }
        };
        self.counters.policies.fetch_add(1, Ordering::Relaxed);
        if let Some(observer) = &self.observer {
            observer.policy(requester, &config, result.is_ok());
        }
        applied
    }

    /// Blocks every PASID of `rid`, and forgets them when the host has done so.
    pub(super) fn forget_pasids(&self, rid: Bdf) -> Applied {
        let gone = Blocked::recorded(FaultReason::PasidEntryNotPresent);
        self.requesters.give_pasids(rid, |requester| {
            // Until it is done, and kept to be asked again if it is not.
            Given { config: blocked_config(requester, gone), applied: false }
        });
        match self.host.forget_pasids(rid) {
            Ok(()) => {
                self.requesters.forget_pasids(rid);
                Ok(())
            }
            Err(error) => self.host_failed(&error),
        }
    }

    /// Counts and logs what the host refused. A mere refusal has its effect, for the requester is
    /// blocked; what cannot be blocked has none.
    pub(super) fn host_failed(&self, error: &HostSideError) -> Applied {
        self.counters.host_errors.fetch_add(1, Ordering::Relaxed);
        self.log.warn(format_args!("VT-d: the host refused: {error}"));
        if error.still_reachable {
            self.log.warn(format_args!("VT-d: and what it was to block is reachable still"));
            return Err(NotApplied::StillReachable);
        }
        Ok(())
    }

    /// Ends what is long when the unit is halted.
    fn check_halted(&self) -> Applied {
        if self.is_halted() {
            return Err(NotApplied::Halted);
        }
        Ok(())
    }
}

/// What the guest is told of a requester that the host refused to serve: the entry that asked for
/// it is programmed wrongly.
fn refused_reason(root: Option<Rtaddr>) -> FaultReason {
    match root.map(Rtaddr::mode) {
        Some(TranslationTableMode::Scalable) => FaultReason::PasidEntryInvalid,
        _ => FaultReason::LegacyContextInvalid,
    }
}

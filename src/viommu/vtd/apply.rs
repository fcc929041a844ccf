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
use super::tables::{Blocked, Tables};
use super::VtdIommu;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::qi::ContextScope;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::viommu::{DomainTag, HostSideError, Policy, Requester, RequesterConfig};

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

impl From<ContextScope> for Scope {
    fn from(scope: ContextScope) -> Self {
        match scope {
            ContextScope::Global => Self::Global,
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
}

impl Scope {
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

fn is_blocked(config: &RequesterConfig) -> bool {
    matches!(config.policy, Policy::Blocked { .. })
}

impl VtdIommu {
    /// The tables at `root`, to decide by.
    pub(super) fn tables(&self, root: Option<Rtaddr>) -> Tables<'_> {
        Tables { memory: &*self.memory, caps: &self.caps, root }
    }

    /// Enables translation: every requester has its policy when this returns.
    pub(super) fn enable_translation(&self, root: Option<Rtaddr>) {
        self.requesters.set_translating(true, root);
        self.reevaluate(Scope::Global, root);
    }

    /// Disables translation: requests without PASID pass, those with PASID are blocked.
    pub(super) fn disable_translation(&self) {
        for rid in self.requesters.functions() {
            self.bypass(rid);
        }
        self.requesters.set_translating(false, None);
    }

    /// What a function is given while translation is disabled.
    pub(super) fn bypass(&self, rid: Bdf) {
        let tag = DomainTag { domain: 0, pasid: 0 };
        let config = RequesterConfig { policy: Policy::Bypass, tag, fault_disabled: false };
        self.give(Requester::rid(rid), config, FaultReason::RootTableAddressInvalid);
        self.forget_pasids(rid);
    }

    /// Reads the tables anew for the requesters that `scope` names and gives the host what changed.
    pub(super) fn reevaluate(&self, scope: Scope, root: Option<Rtaddr>) {
        for rid in self.requesters.functions() {
            if scope.names_function(rid) {
                self.reevaluate_function(rid, scope, root);
            }
        }
    }

    /// [`VtdIommu::reevaluate`] for one function.
    pub(super) fn reevaluate_function(&self, rid: Bdf, scope: Scope, root: Option<Rtaddr>) {
        let tables = self.tables(root);
        let refused = refused_reason(root);
        let requester = Requester::rid(rid);
        let config = tables.config(requester);
        if scope.names(self.requesters.given(requester), &config) {
            self.give(requester, config, refused);
        }
        if let Scope::Pasid(pasid) = scope {
            self.reevaluate_pasid(&tables, Requester { rid, pasid: Some(pasid) }, refused);
            return;
        }
        let mut present = BTreeMap::new();
        tables.for_each_pasid(rid, |pasid, config| {
            present.insert(pasid, config);
        });
        if present.is_empty() {
            // One call for a PASID table that is gone, however many PASIDs it had.
            if !self.requesters.pasids(rid).is_empty() {
                self.forget_pasids(rid);
            }
            return;
        }
        for (&pasid, &config) in &present {
            let requester = Requester { rid, pasid: Some(pasid) };
            if scope.names(self.requesters.given(requester), &config) {
                self.give(requester, config, refused);
            }
        }
        for pasid in self.requesters.pasids(rid) {
            let requester = Requester { rid, pasid: Some(pasid) };
            if !present.contains_key(&pasid) {
                let config = tables.config(requester);
                if scope.names(self.requesters.given(requester), &config) {
                    self.withdraw_pasid(requester, config, refused);
                }
            }
        }
    }

    /// Reads the tables anew for one PASID of one function.
    fn reevaluate_pasid(&self, tables: &Tables<'_>, requester: Requester, refused: FaultReason) {
        let Some(pasid) = requester.pasid else { return };
        // PASID 0 is never given apart from its requester; see `Tables::for_each_pasid`.
        if pasid.raw() == 0 {
            return;
        }
        let config = tables.config(requester);
        if !is_blocked(&config) {
            self.give(requester, config, refused);
        } else if self.requesters.given(requester).is_some() {
            self.withdraw_pasid(requester, config, refused);
        }
    }

    /// Blocks a PASID that the tables no longer serve, and forgets it: faults are then explained
    /// by the tables themselves.
    fn withdraw_pasid(&self, requester: Requester, config: RequesterConfig, refused: FaultReason) {
        self.give(requester, config, refused);
        if let Some(pasid) = requester.pasid {
            self.requesters.forget_pasid(requester.rid, pasid);
        }
    }

    /// Gives `config` to the host unless it has it. When the host refuses, the requester is
    /// blocked, and the guest is told `refused` of each of its requests.
    pub(super) fn give(&self, requester: Requester, config: RequesterConfig, refused: FaultReason) {
        if self.requesters.given(requester) == Some(Given { config, applied: true }) {
            return;
        }
        let given = Given { config, applied: true };
        if is_blocked(&config) {
            self.requesters.give(requester, given);
        }
        let result = self.host.configure(requester, &config);
        match &result {
            Ok(()) => self.requesters.give(requester, given),
            Err(error) => {
                let config = if is_blocked(&config) {
                    config
                } else {
                    let fault_disabled = config.fault_disabled;
                    blocked_config(requester, Blocked { reason: refused, fault_disabled })
                };
                self.requesters.give(requester, Given { config, applied: false });
                self.host_failed(error);
            }
        }
        self.counters.policies.fetch_add(1, Ordering::Relaxed);
        if let Some(observer) = &self.observer {
            observer.policy(requester, &config, result.is_ok());
        }
    }

    /// Blocks every PASID of `rid`.
    pub(super) fn forget_pasids(&self, rid: Bdf) {
        self.requesters.forget_pasids(rid);
        if let Err(error) = self.host.forget_pasids(rid) {
            self.host_failed(&error);
        }
    }

    /// Counts and logs what the host refused.
    pub(super) fn host_failed(&self, error: &HostSideError) {
        self.counters.host_errors.fetch_add(1, Ordering::Relaxed);
        self.log.warn(format_args!("VT-d: the host refused: {error}"));
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

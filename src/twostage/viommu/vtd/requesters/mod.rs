// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of every requester ([`Ledger`]), and by which tables.

mod pasids;

use std::collections::BTreeMap;

use super::host_side::{Policy, RequesterConfig};
use super::state::{FunctionState, PasidState, Translating};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::regs::Rtaddr;
use crate::viommu::ledger::{Entries, Ledger};
use crate::viommu::Requester;
pub(super) use pasids::can_keep;
use pasids::Pasids;

/// The configuration of a requester.
pub(super) type Given = crate::viommu::ledger::Given<RequesterConfig>;

/// All requesters and their configurations.
pub(super) type Requesters = Ledger<Functions>;

/// The requesters of one function.
#[derive(Debug, Clone, Default)]
struct Function {
    /// Requests without PASID; `None` before the first configuration.
    rid: Option<Given>,
    pasids: Pasids,
}

/// The published state.
#[derive(Debug, Clone, Default)]
pub(super) struct Functions {
    translating: bool,
    root: Option<Rtaddr>,
    functions: BTreeMap<Bdf, Function>,
}

impl Entries for Functions {
    type Requester = Requester;
    type Decision = RequesterConfig;

    fn is_block(config: &RequesterConfig) -> bool {
        matches!(config.policy, Policy::Blocked(_))
    }

    fn get(&self, requester: Requester) -> Option<Given> {
        let function = self.functions.get(&requester.rid)?;
        match requester.pasid {
            None => function.rid,
            Some(pasid) => function.pasids.get(pasid),
        }
    }

    fn set(&mut self, requester: Requester, given: Given) {
        let Some(function) = self.functions.get_mut(&requester.rid) else { return };
        match requester.pasid {
            None => function.rid = Some(given),
            Some(pasid) => function.pasids.set(pasid, Some(given)),
        }
    }

    fn unapply_all(&mut self) {
        for function in self.functions.values_mut() {
            function.rid.iter_mut().for_each(|given| given.applied = false);
            function.pasids.unapply_all();
        }
    }
}

/// The state needed to explain a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// Translation is enabled, or is being enabled.
    pub translating: bool,
    /// The root table in use.
    pub root: Option<Rtaddr>,
    /// The configuration of the requester; `None` for a PASID whose table entry was not present,
    /// and had no FPD, when it was last read, or that had none.
    pub given: Option<Given>,
}

impl Requesters {
    /// Adds a function without configuration; `false` if it exists already.
    pub fn add(&self, rid: Bdf) -> bool {
        let mut published = self.write();
        let absent = !published.functions.contains_key(&rid);
        published.functions.entry(rid).or_default();
        absent
    }

    /// Removes a function, and returns its configured PASIDs; `None` if it does not exist.
    pub fn remove(&self, rid: Bdf) -> Option<GivenPasids> {
        let function = self.write().functions.remove(&rid)?;
        Some(GivenPasids { rid, pasids: function.pasids })
    }

    /// Every function, in ascending order.
    pub fn functions(&self) -> Vec<Bdf> {
        self.read().functions.keys().copied().collect()
    }

    /// Their part of a snapshot.
    pub fn snapshot(&self) -> (Translating, Vec<FunctionState>) {
        let published = self.read();
        let pasids = |function: &Function| -> Vec<_> {
            let runs = function.pasids.ranges().map(|(pasids, given)| {
                let (first, last) = pasids.into_inner();
                PasidState { first, last, decision: given.into() }
            });
            runs.collect()
        };
        let functions = published.functions.iter().map(|(&rid, function)| FunctionState {
            rid,
            decision: function.rid.map(Into::into),
            pasids: pasids(function),
        });
        let Functions { translating: enabled, root, .. } = *published;
        (Translating { enabled, root }, functions.collect())
    }

    /// Whether `rid` is a function of this unit.
    pub fn contains(&self, rid: Bdf) -> bool {
        self.read().functions.contains_key(&rid)
    }

    /// The first function from `rid`.
    pub fn function_from(&self, rid: Bdf) -> Option<Bdf> {
        self.read().functions.range(rid..).next().map(|(rid, _)| *rid)
    }

    /// The first configured PASID of `rid` from `pasid`.
    pub fn pasid_from(&self, rid: Bdf, pasid: u32) -> Option<Pasid> {
        self.read().functions.get(&rid)?.pasids.next(pasid)
    }

    /// The number of entries stored for the PASIDs of `rid`.
    #[cfg(test)]
    pub(crate) fn kept(&self, rid: Bdf) -> usize {
        self.read().functions.get(&rid).map_or(0, |function| function.pasids.kept())
    }

    /// From now on faults are explained by the tables at `root`, or not at all.
    pub fn set_translating(&self, translating: bool, root: Option<Rtaddr>) {
        let mut published = self.write();
        published.translating = translating;
        published.root = root;
    }

    /// The state needed to explain a fault of `requester`; `None` if it is not a function of this
    /// unit.
    pub fn standing(&self, requester: Requester) -> Option<Standing> {
        let published = self.read();
        published.functions.get(&requester.rid)?;
        Some(Standing {
            translating: published.translating,
            root: published.root,
            given: published.get(requester),
        })
    }

    /// Removes the configuration of one PASID.
    pub fn forget_pasid(&self, rid: Bdf, pasid: Pasid) {
        if let Some(function) = self.write().functions.get_mut(&rid) {
            function.pasids.set(pasid, None);
        }
    }

    /// Whether translation is enabled, or a failed attempt to enable it was not undone.
    pub fn is_translating(&self) -> bool {
        self.read().translating
    }
}

/// Configured PASIDs of a removed function.
#[derive(Debug)]
pub(super) struct GivenPasids {
    rid: Bdf,
    pasids: Pasids,
}

impl GivenPasids {
    /// The first of them from `pasid`.
    pub fn from(&self, pasid: u32) -> Option<Requester> {
        Some(Requester { rid: self.rid, pasid: Some(self.pasids.next(pasid)?) })
    }
}

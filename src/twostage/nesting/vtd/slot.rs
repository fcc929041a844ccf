// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The attachment of each requester.

use std::collections::BTreeMap;

use crate::iommufd::ObjectId;
use crate::runs::Runs;
use crate::spec::pci::{Bdf, Pasid};
use crate::viommu::vtd::DomainTag;
use crate::viommu::Requester;

/// What a requester is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Attached {
    /// Nothing: it is blocked.
    #[default]
    Nothing,
    /// The nesting parent: untranslated.
    Parent,
    /// This `HWPT_NESTED`.
    Nested(ObjectId),
}

/// What the host was last told about a requester. Small, and mostly equal for the PASIDs of a
/// function, of which there may be 2^20.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Slot {
    /// Its attachment.
    pub attached: Attached,
    /// The domain id under which the guest names the cached translations of a `HWPT_NESTED`; 0
    /// otherwise.
    pub domain: u16,
    /// An attach or a detach has failed since, so that the host's bookkeeping and its hardware may
    /// disagree until the next detach.
    pub unsettled: bool,
}

impl Slot {
    /// Attached for certain.
    pub fn on(attached: Attached, domain: u16) -> Self {
        Self { attached, domain, unsettled: false }
    }
}

/// The slots of all requesters.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Functions with a non-default slot.
    functions: BTreeMap<Bdf, Function>,
}

/// The slots of one function.
#[derive(Debug, Default)]
struct Function {
    /// For requests without PASID.
    rid: Slot,
    /// The PASID under which the guest names the cached translations of those (RID_PASID).
    rid_pasid: u32,
    pasids: Runs<Slot>,
}

impl Slots {
    /// The slot of a requester; the default if it has none.
    pub fn get(&self, requester: Requester) -> Slot {
        let Some(function) = self.functions.get(&requester.rid) else { return Slot::default() };
        match requester.pasid {
            None => function.rid,
            Some(pasid) => function.pasids.get(pasid.raw()).unwrap_or_default(),
        }
    }

    /// Sets the slot of a requester.
    pub fn set(&mut self, requester: Requester, slot: Slot) {
        let nothing = slot == Slot::default();
        match requester.pasid {
            None => self.functions.entry(requester.rid).or_default().rid = slot,
            Some(pasid) => {
                let pasids = &mut self.functions.entry(requester.rid).or_default().pasids;
                pasids.set(pasid.raw(), (!nothing).then_some(slot));
            }
        }
        if nothing {
            self.functions.retain(|rid, function| {
                *rid != requester.rid
                    || function.rid != Slot::default()
                    || !function.pasids.is_empty()
            });
        }
    }

    /// Sets the PASID under which the guest names the cached translations of `rid`'s requests
    /// without PASID.
    pub fn name_rid(&mut self, rid: Bdf, pasid: u32) {
        if let Some(function) = self.functions.get_mut(&rid) {
            function.rid_pasid = pasid;
        }
    }

    /// The first PASID of `rid` from `pasid` that has a slot.
    pub fn pasid_from(&self, rid: Bdf, pasid: u32) -> Option<Requester> {
        let pasid = Pasid::new(self.functions.get(&rid)?.pasids.next(pasid)?);
        Some(Requester { rid, pasid })
    }

    /// Every `HWPT_NESTED` that the guest names by `pasid`, with the domain id.
    pub fn named(&self, pasid: u32) -> impl Iterator<Item = (ObjectId, u16)> + '_ {
        self.functions.values().flat_map(move |function| {
            let rid = (function.rid_pasid == pasid).then_some(function.rid);
            [rid, function.pasids.get(pasid)].into_iter().flatten().filter_map(|slot| {
                match slot.attached {
                    Attached::Nested(hwpt) => Some((hwpt, slot.domain)),
                    _ => None,
                }
            })
        })
    }

    /// The number of entries stored for the PASIDs of all functions.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.functions.values().map(|function| function.pasids.runs()).sum()
    }

    /// Whether any requester attached to `hwpt` has the tag `tag`.
    pub fn knows(&self, hwpt: ObjectId, tag: DomainTag) -> bool {
        self.named(tag.pasid).any(|named| named == (hwpt, tag.domain))
    }

    /// All requesters attached to `hwpt`. A linear search.
    pub fn users(&self, hwpt: ObjectId) -> Vec<Requester> {
        let on_it = |slot: &Slot| slot.attached == Attached::Nested(hwpt);
        let of_function = |(&rid, function): (&Bdf, &Function)| {
            let own = on_it(&function.rid).then_some(Requester::rid(rid));
            let pasids = function.pasids.iter().filter(|(_, slot)| on_it(slot));
            let pasids = pasids.map(|(raw, _)| Requester { rid, pasid: Pasid::new(raw) });
            own.into_iter().chain(pasids).collect::<Vec<_>>()
        };
        self.functions.iter().flat_map(of_function).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_small() {
        assert_eq!(size_of::<Slot>(), 12);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bookkeeping of the `HWPT_NESTED` objects: their tables, their users, the guest's names for them,
//! and what each requester is attached to.

use std::collections::BTreeMap;

use crate::iommufd::ObjectId;
use crate::nesting::objects::NestedHwpts;
use crate::runs::Runs;
use crate::spec::pci::{Bdf, Pasid};
use crate::viommu::vtd::{DomainTag, Policy, RequesterConfig, Stage1};
use crate::viommu::Requester;

/// The last id.
const LAST: ObjectId = ObjectId(u32::MAX);

/// What a `HWPT_NESTED` stands for: guest tables on a nesting parent, and whether page requests are
/// served.
pub(super) type Tables = (ObjectId, bool, Stage1);

/// All `HWPT_NESTED` objects, and the attachment of each requester. Bookkeeping only: nothing here
/// calls the host.
#[derive(Debug, Default)]
pub(super) struct Nested {
    pub hwpts: NestedHwpts<Tables>,
    slots: Slots,
    /// The number of users of a HWPT in a domain. Ordered by domain first, so that an invalidation
    /// finds its HWPTs without a look at the others.
    by_domain: BTreeMap<(u16, ObjectId), u32>,
    /// The number of users of a HWPT in a function.
    by_function: BTreeMap<(ObjectId, Bdf), u32>,
}

impl Nested {
    /// The tables of a HWPT.
    pub fn stage1(&self, hwpt: ObjectId) -> Option<Stage1> {
        self.hwpts.stage1(hwpt).map(|(_, _, stage1)| stage1)
    }

    /// The attachments of all requesters.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The users of a HWPT.
    pub fn users(&self, hwpt: ObjectId) -> Vec<Requester> {
        self.slots.users_after(hwpt, None).collect()
    }

    /// The next user of a HWPT after this one, or the first.
    pub fn next_user(&self, hwpt: ObjectId, after: Option<Requester>) -> Option<Requester> {
        self.slots.users_after(hwpt, after).next()
    }

    /// Whether any user of `hwpt` has the tag `tag`.
    pub fn knows(&self, hwpt: ObjectId, tag: DomainTag) -> bool {
        self.slots.knows(hwpt, tag)
    }

    /// Sets the slot of `requester`.
    pub fn set(&mut self, requester: Requester, slot: Slot) {
        let before = self.slots.get(requester);
        self.slots.set(requester, slot);
        if let Attached::Nested(hwpt) = slot.attached {
            *self.by_domain.entry((slot.domain, hwpt)).or_default() += 1;
            *self.by_function.entry((hwpt, requester.rid)).or_default() += 1;
            self.hwpts.join(hwpt);
        }
        if let Attached::Nested(hwpt) = before.attached {
            self.leave(hwpt, before.domain, requester.rid);
        }
    }

    /// Whether `rid` or one of its PASIDs is attached to `hwpt`.
    pub fn uses(&self, rid: Bdf, hwpt: ObjectId) -> bool {
        self.by_function.contains_key(&(hwpt, rid))
    }

    /// Sets the tag by which the guest names what `requester` caches; its slot has the domain.
    pub fn name(&mut self, requester: Requester, tag: DomainTag) {
        // A request with PASID is named by that.
        if requester.pasid.is_none() {
            self.slots.name_rid(requester.rid, tag.pasid);
        }
    }

    /// How the guest has configured `requester`, which uses `stage1`.
    pub fn config(&self, requester: Requester, stage1: Stage1) -> RequesterConfig {
        let domain = self.slots.get(requester).domain;
        let pasid = match requester.pasid {
            Some(pasid) => pasid.raw(),
            None => self.slots.rid_pasid(requester.rid),
        };
        let policy = Policy::Stage1(stage1);
        RequesterConfig { policy, tag: DomainTag { domain, pasid }, fault_disabled: false }
    }

    fn leave(&mut self, hwpt: ObjectId, domain: u16, rid: Bdf) {
        self.hwpts.leave(hwpt);
        one_less(&mut self.by_domain, (domain, hwpt));
        one_less(&mut self.by_function, (hwpt, rid));
    }

    /// The first of [`Nested::named`], at most `limit` of them, as the contents of `hwpts`; returns
    /// the next one, if there are more.
    pub fn name_some(
        &self,
        (domain, pasid): (Option<u16>, Option<u32>),
        from: ObjectId,
        limit: usize,
        hwpts: &mut Vec<ObjectId>,
    ) -> Option<ObjectId> {
        hwpts.clear();
        match (domain, pasid) {
            (Some(domain), None) => {
                let named = self.by_domain.range((domain, from)..=(domain, LAST));
                hwpts.extend(named.map(|((_, hwpt), _)| *hwpt).take(limit + 1));
            }
            (domain, Some(pasid)) => {
                let named = |(hwpt, of): &(ObjectId, u16)| {
                    *hwpt >= from && domain.is_none_or(|domain| domain == *of)
                };
                hwpts.extend(self.slots.named(pasid).filter(named).map(|(hwpt, _)| hwpt));
                hwpts.sort_unstable();
                hwpts.dedup();
            }
            (None, None) => hwpts.extend(self.hwpts.used_from(from).take(limit + 1)),
        }
        let next = hwpts.get(limit).copied();
        hwpts.truncate(limit);
        next
    }

    /// Every HWPT from `from` with a user that an invalidation of `domain` and `pasid` names
    /// ([`Invalidation::names`](crate::viommu::vtd::Invalidation::names)); without duplicates,
    /// ascending.
    pub fn named(
        &self,
        domain: Option<u16>,
        pasid: Option<u32>,
        from: ObjectId,
    ) -> Box<dyn Iterator<Item = ObjectId> + '_> {
        match (domain, pasid) {
            (None, None) => Box::new(self.hwpts.used_from(from)),
            (Some(domain), None) => {
                let named = self.by_domain.range((domain, from)..=(domain, LAST));
                Box::new(named.map(|((_, hwpt), _)| *hwpt))
            }
            (domain, Some(pasid)) => {
                let named = |(hwpt, of): &(ObjectId, u16)| {
                    *hwpt >= from && domain.is_none_or(|domain| domain == *of)
                };
                let named = self.slots.named(pasid).filter(named);
                let mut hwpts: Vec<_> = named.map(|(hwpt, _)| hwpt).collect();
                hwpts.sort_unstable();
                hwpts.dedup();
                Box::new(hwpts.into_iter())
            }
        }
    }
}

/// Counts are at least 1: an entry of 0 is removed at once.
fn one_less<K: Ord + Copy>(counts: &mut BTreeMap<K, u32>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

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

    /// The PASID given with [`Slots::name_rid`].
    pub fn rid_pasid(&self, rid: Bdf) -> u32 {
        self.functions.get(&rid).map_or(0, |function| function.rid_pasid)
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
    pub(crate) fn kept(&self) -> usize {
        self.functions.values().map(|function| function.pasids.runs()).sum()
    }

    /// Whether any requester attached to `hwpt` has the tag `tag`.
    pub fn knows(&self, hwpt: ObjectId, tag: DomainTag) -> bool {
        self.named(tag.pasid).any(|named| named == (hwpt, tag.domain))
    }

    /// All requesters attached to `hwpt` that come after this one, ascending. A linear search.
    pub fn users_after(
        &self,
        hwpt: ObjectId,
        after: Option<Requester>,
    ) -> impl Iterator<Item = Requester> + '_ {
        let on_it = move |slot: &Slot| slot.attached == Attached::Nested(hwpt);
        let functions = match after {
            Some(after) => self.functions.range(after.rid..),
            None => self.functions.range(..),
        };
        functions.flat_map(move |(&rid, function)| {
            let own = on_it(&function.rid).then_some(Requester::rid(rid));
            let after = after.filter(|after| after.rid == rid);
            let first = after.and_then(|after| after.pasid).map_or(0, Pasid::raw);
            let pasids = function.pasids.ranges_in(first..=u32::MAX);
            let pasids = pasids.filter(move |(_, slot)| on_it(slot)).flat_map(|(raw, _)| raw);
            let pasids = pasids.map(move |raw| Requester { rid, pasid: Pasid::new(raw) });
            let all = own.into_iter().chain(pasids);
            all.skip_while(move |requester| after.is_some_and(|after| *requester <= after))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::spec::vtd::root::AddressWidth;
    use crate::viommu::vtd::{Invalidation, VtdSecondStage};

    const PARENT: ObjectId = ObjectId(1);

    fn tables(table: u64) -> Stage1 {
        Stage1::VtdSecondStage(VtdSecondStage {
            table,
            address_width: AddressWidth::Bits48,
            accessed_dirty: false,
        })
    }

    fn on(hwpt: ObjectId, domain: u16) -> Slot {
        Slot::on(Attached::Nested(hwpt), domain)
    }

    proptest! {
        /// What an invalidation names, compared with asking each user.
        #[test]
        fn an_invalidation_finds_the_users_it_names(
            users in prop::collection::vec(
                (0u32..4, 0u16..8, 0u16..3, prop::option::of(1u32..3), 0u32..3, any::<bool>()),
                0..40,
            ),
            domain in prop::option::of(0u16..3),
            pasid in prop::option::of(0u32..3),
        ) {
            let mut books = Nested::default();
            for id in 0..4 {
                books.hwpts.insert(ObjectId(10 + id), (PARENT, false, tables(u64::from(id) << 12)));
            }
            let mut naive = BTreeMap::new();
            for (id, rid, domain, own, rid_pasid, joins) in users {
                let hwpt = ObjectId(10 + id);
                let user = Requester { rid: Bdf::from_raw(rid), pasid: own.and_then(Pasid::new) };
                let tag = DomainTag { domain, pasid: own.unwrap_or(rid_pasid) };
                if joins {
                    books.set(user, on(hwpt, domain));
                    books.name(user, tag);
                    naive.insert(user, (hwpt, tag));
                } else {
                    books.set(user, Slot::default());
                    naive.remove(&user);
                }
            }
            let invalidation = Invalidation { domain, pasid, range: None };
            let named = naive.values().filter(|(_, tag)| invalidation.names(*tag));
            let expected: BTreeSet<_> = named.map(|(hwpt, _)| *hwpt).collect();
            for from in [0, 11, 13, 14].map(ObjectId) {
                let named: Vec<_> = books.named(domain, pasid, from).collect();
                let expected = expected.iter().filter(|hwpt| **hwpt >= from).copied();
                prop_assert_eq!(&named, &Vec::from_iter(expected));
                for limit in [1, 2, 4] {
                    let mut some = vec![ObjectId(99)];
                    let next = books.name_some((domain, pasid), from, limit, &mut some);
                    prop_assert_eq!(&some, &named[..limit.min(named.len())]);
                    prop_assert_eq!(next, named.get(limit).copied());
                }
            }
            for id in 10..14 {
                let hwpt = ObjectId(id);
                let users = naive.iter().filter(|(_, (of, _))| *of == hwpt).map(|(user, _)| *user);
                prop_assert_eq!(books.users(hwpt), users.collect::<Vec<_>>());
                for rid in (0..4).map(Bdf::from_raw) {
                    let uses = naive.iter().any(|(user, (of, _))| *of == hwpt && user.rid == rid);
                    prop_assert_eq!(books.uses(rid, hwpt), uses);
                }
                for (domain, pasid) in [(0, 0), (1, 1), (2, 0), (0, 2)] {
                    let tag = DomainTag { domain, pasid };
                    let known = naive.values().any(|named| *named == (hwpt, tag));
                    prop_assert_eq!(books.knows(hwpt, tag), known);
                }
                let unused = naive.values().all(|(of, _)| *of != hwpt);
                prop_assert_eq!(books.hwpts.remove_unused(hwpt), unused);
            }
        }
    }

    #[test]
    fn a_slot_is_small() {
        assert_eq!(size_of::<Slot>(), 12);
    }
}

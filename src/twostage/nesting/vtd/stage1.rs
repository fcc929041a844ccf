// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The books of the `HWPT_NESTED` objects: which tables, who uses each, under which names.

use std::collections::BTreeMap;

use super::slot::{Attached, Slot, Slots};
use crate::iommufd::ObjectId;
use crate::viommu::{DomainTag, Requester, Stage1};

/// One `HWPT_NESTED`.
#[derive(Debug)]
struct Nested {
    parent: ObjectId,
    stage1: Stage1,
    /// How many requesters are attached to it.
    users: usize,
}

/// Every `HWPT_NESTED` there is, and what each requester is attached to. Books only: nothing here
/// calls the host.
#[derive(Debug, Default)]
pub(super) struct NestedHwpts {
    slots: Slots,
    by_id: BTreeMap<ObjectId, Nested>,
    by_tables: BTreeMap<(ObjectId, Stage1), ObjectId>,
    /// How many users of a HWPT are of a domain. Ordered by domain first, so that an invalidation
    /// finds what it names without a look at the rest.
    by_domain: BTreeMap<(u16, ObjectId), u32>,
}

impl NestedHwpts {
    /// The HWPT of `stage1` on `parent`.
    pub fn find(&self, parent: ObjectId, stage1: &Stage1) -> Option<ObjectId> {
        self.by_tables.get(&(parent, *stage1)).copied()
    }

    /// Enters a new HWPT that nobody uses yet.
    pub fn insert(&mut self, hwpt: ObjectId, parent: ObjectId, stage1: Stage1) {
        self.by_id.insert(hwpt, Nested { parent, stage1, users: 0 });
        self.by_tables.insert((parent, stage1), hwpt);
    }

    /// Strikes out a HWPT if nobody uses it. Says whether it did.
    pub fn remove_unused(&mut self, hwpt: ObjectId) -> bool {
        match self.by_id.get(&hwpt) {
            Some(nested) if nested.users == 0 => {
                self.by_tables.remove(&(nested.parent, nested.stage1));
                self.by_id.remove(&hwpt);
                true
            }
            _ => false,
        }
    }

    /// The tables of a HWPT.
    pub fn stage1(&self, hwpt: ObjectId) -> Option<Stage1> {
        self.by_id.get(&hwpt).map(|nested| nested.stage1)
    }

    /// What each requester is attached to.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Who uses a HWPT.
    pub fn users(&self, hwpt: ObjectId) -> Vec<Requester> {
        self.slots.users(hwpt)
    }

    /// Whether any user of `hwpt` is known by `tag`.
    pub fn knows(&self, hwpt: ObjectId, tag: DomainTag) -> bool {
        self.slots.knows(hwpt, tag)
    }

    /// From now on `requester` has this slot.
    pub fn set(&mut self, requester: Requester, slot: Slot) {
        let before = self.slots.get(requester);
        self.slots.set(requester, slot);
        if let Attached::Nested(hwpt) = slot.attached {
            *self.by_domain.entry((slot.domain, hwpt)).or_default() += 1;
            if let Some(nested) = self.by_id.get_mut(&hwpt) {
                nested.users += 1;
            }
        }
        if let Attached::Nested(hwpt) = before.attached {
            self.leave(hwpt, before.domain);
        }
    }

    /// From now on the guest knows what `requester` uses by `tag`, whose domain its slot has.
    pub fn name(&mut self, requester: Requester, tag: DomainTag) {
        // A request with PASID is known by that.
        if requester.pasid.is_none() {
            self.slots.name_rid(requester.rid, tag.pasid);
        }
    }

    fn leave(&mut self, hwpt: ObjectId, domain: u16) {
        // Counts are at least 1: an entry of 0 is removed at once.
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            nested.users -= 1;
        }
        if let Some(count) = self.by_domain.get_mut(&(domain, hwpt)) {
            *count -= 1;
            if *count == 0 {
                self.by_domain.remove(&(domain, hwpt));
            }
        }
    }

    /// Every HWPT from `from` on with a user that an invalidation of `domain` and `pasid` names, as
    /// [`Invalidation::names`](crate::viommu::Invalidation::names) has it; each once, in ascending
    /// order.
    pub fn named(
        &self,
        domain: Option<u16>,
        pasid: Option<u32>,
        from: ObjectId,
    ) -> Box<dyn Iterator<Item = ObjectId> + '_> {
        const LAST: ObjectId = ObjectId(u32::MAX);
        match (domain, pasid) {
            (None, None) => {
                let used = self.by_id.range(from..).filter(|(_, nested)| nested.users != 0);
                Box::new(used.map(|(hwpt, _)| *hwpt))
            }
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

    /// How many HWPTs there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::spec::pci::{Bdf, Pasid};
    use crate::spec::vtd::root::AddressWidth;
    use crate::viommu::{Invalidation, VtdSecondStage};

    const PARENT: ObjectId = ObjectId(1);

    fn tables(table: u64) -> Stage1 {
        Stage1::VtdSecondStage(VtdSecondStage { table, address_width: AddressWidth::Bits48 })
    }

    fn on(hwpt: ObjectId, domain: u16) -> Slot {
        Slot::on(Attached::Nested(hwpt), domain)
    }

    #[test]
    fn a_hwpt_is_found_by_its_tables_until_its_last_user_is_gone() {
        let (hwpt, tag) = (ObjectId(2), DomainTag { domain: 3, pasid: 0 });
        let (one, two) = (Requester::rid(Bdf::from_raw(8)), Requester::rid(Bdf::from_raw(9)));
        let mut books = NestedHwpts::default();
        books.insert(hwpt, PARENT, tables(0x1000));
        books.set(one, on(hwpt, 3));
        books.set(two, on(hwpt, 3));
        assert_eq!(books.find(PARENT, &tables(0x1000)), Some(hwpt));
        assert_eq!(books.find(ObjectId(9), &tables(0x1000)), None);
        assert_eq!(books.users(hwpt), [one, two]);
        books.set(one, Slot::default());
        assert!(books.knows(hwpt, tag));
        assert!(!books.remove_unused(hwpt));
        books.set(two, Slot::default());
        assert!(!books.knows(hwpt, tag));
        assert!(books.remove_unused(hwpt));
        assert_eq!((books.find(PARENT, &tables(0x1000)), books.len()), (None, 0));
    }

    proptest! {
        /// What an invalidation names, against asking each user.
        #[test]
        fn an_invalidation_finds_the_users_it_names(
            users in prop::collection::vec(
                (0u32..4, 0u16..8, 0u16..3, prop::option::of(1u32..3), 0u32..3, any::<bool>()), 0..40),
            domain in prop::option::of(0u16..3),
            pasid in prop::option::of(0u32..3),
        ) {
            let mut books = NestedHwpts::default();
            for id in 0..4 {
                books.insert(ObjectId(10 + id), PARENT, tables(u64::from(id) << 12));
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
                prop_assert_eq!(named, Vec::from_iter(expected));
            }
            for id in 10..14 {
                let hwpt = ObjectId(id);
                let users = naive.iter().filter(|(_, (of, _))| *of == hwpt).map(|(user, _)| *user);
                prop_assert_eq!(books.users(hwpt), users.collect::<Vec<_>>());
                for (domain, pasid) in [(0, 0), (1, 1), (2, 0), (0, 2)] {
                    let tag = DomainTag { domain, pasid };
                    let known = naive.values().any(|named| *named == (hwpt, tag));
                    prop_assert_eq!(books.knows(hwpt, tag), known);
                }
                let unused = naive.values().all(|(of, _)| *of != hwpt);
                prop_assert_eq!(books.remove_unused(hwpt), unused);
            }
        }
    }
}

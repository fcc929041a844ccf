// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The books of the `HWPT_NESTED` objects: which tables, who uses each, under which names.

use std::collections::{BTreeMap, HashMap};

use crate::iommufd::ObjectId;
use crate::viommu::{DomainTag, Invalidation, Requester, Stage1};

/// One `HWPT_NESTED`.
#[derive(Debug)]
struct Nested {
    parent: ObjectId,
    stage1: Stage1,
    users: BTreeMap<Requester, DomainTag>,
}

/// Every `HWPT_NESTED` there is. Books only: nothing here calls the host.
#[derive(Debug, Default)]
pub(super) struct NestedHwpts {
    by_id: BTreeMap<ObjectId, Nested>,
    by_tables: HashMap<(ObjectId, Stage1), ObjectId>,
    /// How many users of a HWPT have a tag. Ordered by domain first, so that an invalidation finds
    /// what it names without a look at the rest.
    by_tag: BTreeMap<(u16, u32, ObjectId), usize>,
}

impl NestedHwpts {
    /// The HWPT of `stage1` on `parent`.
    pub fn find(&self, parent: ObjectId, stage1: &Stage1) -> Option<ObjectId> {
        self.by_tables.get(&(parent, *stage1)).copied()
    }

    /// Enters a new HWPT that nobody uses yet.
    pub fn insert(&mut self, hwpt: ObjectId, parent: ObjectId, stage1: Stage1) {
        self.by_id.insert(hwpt, Nested { parent, stage1, users: BTreeMap::new() });
        self.by_tables.insert((parent, stage1), hwpt);
    }

    /// Strikes out a HWPT if nobody uses it. Says whether it did.
    pub fn remove_unused(&mut self, hwpt: ObjectId) -> bool {
        match self.by_id.get(&hwpt) {
            Some(nested) if nested.users.is_empty() => {
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

    /// Who uses a HWPT.
    pub fn users(&self, hwpt: ObjectId) -> Vec<Requester> {
        self.by_id
            .get(&hwpt)
            .map(|nested| nested.users.keys().copied().collect())
            .unwrap_or_default()
    }

    /// Whether any user of `hwpt` is known by `tag`.
    pub fn knows(&self, hwpt: ObjectId, tag: DomainTag) -> bool {
        self.by_tag.contains_key(&(tag.domain, tag.pasid, hwpt))
    }

    /// From now on `requester` uses `hwpt` and is known by `tag`.
    pub fn join(&mut self, hwpt: ObjectId, requester: Requester, tag: DomainTag) {
        let Some(nested) = self.by_id.get_mut(&hwpt) else { return };
        let before = nested.users.insert(requester, tag);
        *self.by_tag.entry((tag.domain, tag.pasid, hwpt)).or_default() += 1;
        self.forget_tag(hwpt, before);
    }

    /// From now on `requester` does not use `hwpt`.
    pub fn leave(&mut self, hwpt: ObjectId, requester: Requester) {
        let Some(nested) = self.by_id.get_mut(&hwpt) else { return };
        let before = nested.users.remove(&requester);
        self.forget_tag(hwpt, before);
    }

    fn forget_tag(&mut self, hwpt: ObjectId, tag: Option<DomainTag>) {
        let Some(tag) = tag else { return };
        let key = (tag.domain, tag.pasid, hwpt);
        if let Some(count) = self.by_tag.get_mut(&key) {
            *count -= 1; // Entries are at least 1: one of 0 is removed at once.
            if *count == 0 {
                self.by_tag.remove(&key);
            }
        }
    }

    /// Every HWPT with a user that an invalidation of `domain` and `pasid` names, as
    /// [`Invalidation::names`] has it; each once, in ascending order.
    pub fn named(&self, domain: Option<u16>, pasid: Option<u32>) -> Vec<ObjectId> {
        const FIRST: ObjectId = ObjectId(0);
        const LAST: ObjectId = ObjectId(u32::MAX);
        let (first, last) = match (domain, pasid) {
            (Some(domain), Some(pasid)) => ((domain, pasid, FIRST), (domain, pasid, LAST)),
            (Some(domain), None) => ((domain, 0, FIRST), (domain, u32::MAX, LAST)),
            (None, _) => ((0, 0, FIRST), (u16::MAX, u32::MAX, LAST)),
        };
        let selector = Invalidation { domain, pasid, range: None };
        let named = |(domain, pasid, _): &(u16, u32, ObjectId)| {
            selector.names(DomainTag { domain: *domain, pasid: *pasid })
        };
        let tags = self.by_tag.range(first..=last).map(|(tag, _)| tag);
        let mut hwpts: Vec<_> = tags.filter(|tag| named(tag)).map(|(_, _, hwpt)| *hwpt).collect();
        hwpts.sort_unstable();
        hwpts.dedup();
        hwpts
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
    use crate::spec::pci::Bdf;
    use crate::viommu::VtdSecondStage;

    const PARENT: ObjectId = ObjectId(1);

    fn tables(table: u64) -> Stage1 {
        Stage1::VtdSecondStage(VtdSecondStage { table, address_width: 48 })
    }

    #[test]
    fn a_hwpt_is_found_by_its_tables_until_its_last_user_is_gone() {
        let (hwpt, tag) = (ObjectId(2), DomainTag { domain: 3, pasid: 0 });
        let (one, two) = (Requester::rid(Bdf::from_raw(8)), Requester::rid(Bdf::from_raw(9)));
        let mut books = NestedHwpts::default();
        books.insert(hwpt, PARENT, tables(0x1000));
        books.join(hwpt, one, tag);
        books.join(hwpt, two, tag);
        assert_eq!(books.find(PARENT, &tables(0x1000)), Some(hwpt));
        assert_eq!(books.find(ObjectId(9), &tables(0x1000)), None);
        assert_eq!(books.users(hwpt), [one, two]);
        books.leave(hwpt, one);
        assert!(books.knows(hwpt, tag));
        assert!(!books.remove_unused(hwpt));
        books.leave(hwpt, two);
        assert!(!books.knows(hwpt, tag));
        assert!(books.remove_unused(hwpt));
        assert_eq!((books.find(PARENT, &tables(0x1000)), books.len()), (None, 0));
    }

    proptest! {
        /// What an invalidation names, against asking each user.
        #[test]
        fn an_invalidation_finds_the_users_it_names(
            users in prop::collection::vec((0u32..4, 0u16..8, 0u16..3, 0u32..3, any::<bool>()), 0..40),
            domain in prop::option::of(0u16..3),
            pasid in prop::option::of(0u32..3),
        ) {
            let mut books = NestedHwpts::default();
            for id in 0..4 {
                books.insert(ObjectId(10 + id), PARENT, tables(u64::from(id) << 12));
            }
            let mut naive = BTreeMap::new();
            for (id, rid, domain, pasid, joins) in users {
                let (hwpt, user) = (ObjectId(10 + id), Requester::rid(Bdf::from_raw(rid)));
                let tag = DomainTag { domain, pasid };
                if joins {
                    books.join(hwpt, user, tag);
                    naive.insert((hwpt, user), tag);
                } else {
                    books.leave(hwpt, user);
                    naive.remove(&(hwpt, user));
                }
            }
            let invalidation = Invalidation { domain, pasid, range: None };
            let expected: BTreeSet<_> = naive
                .iter()
                .filter(|(_, tag)| invalidation.names(**tag))
                .map(|((hwpt, _), _)| *hwpt)
                .collect();
            prop_assert_eq!(books.named(domain, pasid), Vec::from_iter(expected));
        }
    }
}

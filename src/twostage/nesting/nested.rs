// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bookkeeping of the `HWPT_NESTED` objects: the stage 1 of each, and its number of users.

use std::collections::BTreeMap;

use crate::iommufd::ObjectId;

#[derive(Debug)]
struct Nested<S> {
    stage1: S,
    users: usize,
}

/// All `HWPT_NESTED` objects, one for each stage 1. Bookkeeping only: nothing here calls the host.
#[derive(Debug)]
pub(super) struct NestedHwpts<S> {
    by_id: BTreeMap<ObjectId, Nested<S>>,
    by_stage1: BTreeMap<S, ObjectId>,
}

impl<S> Default for NestedHwpts<S> {
    fn default() -> Self {
        Self { by_id: BTreeMap::new(), by_stage1: BTreeMap::new() }
    }
}

impl<S: Copy + Ord> NestedHwpts<S> {
    /// The HWPT for `stage1`.
    pub fn find(&self, stage1: &S) -> Option<ObjectId> {
        self.by_stage1.get(stage1).copied()
    }

    /// Adds a new HWPT without users.
    pub fn insert(&mut self, hwpt: ObjectId, stage1: S) {
        self.by_id.insert(hwpt, Nested { stage1, users: 0 });
        self.by_stage1.insert(stage1, hwpt);
    }

    /// The stage 1 of a HWPT.
    pub fn stage1(&self, hwpt: ObjectId) -> Option<S> {
        self.by_id.get(&hwpt).map(|nested| nested.stage1)
    }

    /// Adds a user to a HWPT. Does nothing for another object.
    pub fn join(&mut self, hwpt: ObjectId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            nested.users += 1;
        }
    }

    /// Removes a user from a HWPT.
    pub fn leave(&mut self, hwpt: ObjectId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            // A user that leaves has joined.
            nested.users -= 1;
        }
    }

    /// Removes a HWPT without users. Returns whether it did.
    pub fn remove_unused(&mut self, hwpt: ObjectId) -> bool {
        match self.by_id.get(&hwpt) {
            Some(nested) if nested.users == 0 => {
                self.by_stage1.remove(&nested.stage1);
                self.by_id.remove(&hwpt);
                true
            }
            _ => false,
        }
    }

    /// Every HWPT with users, from `from`, ascending.
    pub fn used_from(&self, from: ObjectId) -> impl Iterator<Item = ObjectId> + '_ {
        self.by_id.range(from..).filter(|(_, nested)| nested.users != 0).map(|(hwpt, _)| *hwpt)
    }

    /// Every HWPT with its stage 1, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, S)> + '_ {
        self.by_id.iter().map(|(hwpt, nested)| (*hwpt, nested.stage1))
    }

    /// Removes every HWPT.
    pub fn take_all(&mut self) -> Vec<ObjectId> {
        self.by_stage1.clear();
        std::mem::take(&mut self.by_id).into_keys().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hwpt_is_found_by_its_stage_1_until_its_last_user_is_gone() {
        let hwpt = ObjectId(2);
        let mut books = NestedHwpts::default();
        books.insert(hwpt, 'a');
        assert_eq!((books.find(&'a'), books.find(&'b')), (Some(hwpt), None));
        assert_eq!(books.used_from(ObjectId(0)).count(), 0);
        books.join(hwpt);
        books.join(hwpt);
        books.join(ObjectId(3));
        books.leave(hwpt);
        assert!(!books.remove_unused(hwpt));
        assert!(books.used_from(hwpt).eq([hwpt]) && books.used_from(ObjectId(3)).next().is_none());
        books.leave(hwpt);
        assert!(books.remove_unused(hwpt) && !books.remove_unused(hwpt));
        assert_eq!((books.find(&'a'), books.stage1(hwpt)), (None, None));
        books.insert(hwpt, 'a');
        assert_eq!((books.take_all(), books.find(&'a')), (vec![hwpt], None));
    }
}

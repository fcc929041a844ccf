// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of one iommufd by ID, with user counts.

use std::collections::{BTreeMap, BTreeSet};

use super::object::{
    Access, Device, Fault, HwptPaging, Ioas, Object, ObjectKind, Selftest, Vdevice, Viommu,
};
use crate::host::refusal::{allocate, refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// Linux's highest ID.
const MAX_ID: u32 = i32::MAX as u32;

#[derive(Debug)]
struct Entry {
    object: Object,
    /// Number of references to it.
    users: u32,
}

/// All objects. One with users is never removed, so an ID held by an object stays valid.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: BTreeMap<ObjectId, Entry>,
    /// Free IDs below the highest.
    free: BTreeSet<u32>,
    /// The highest ID ever assigned.
    highest: u32,
}

impl Table {
    /// Adds an unused object, with the lowest free ID.
    ///
    /// # Errors
    /// `ENOMEM` no ID or no memory is left.
    pub fn insert(&mut self, object: Object) -> Outcome<ObjectId> {
        allocate("an object")?;
        let id = self.next_id()?;
        self.free.remove(&id.0);
        self.highest = self.highest.max(id.0);
        self.entries.insert(id, Entry { object, users: 0 });
        Ok(id)
    }

    /// The ID of the next object.
    ///
    /// # Errors
    /// `ENOMEM` no ID is left.
    pub fn next_id(&self) -> Outcome<ObjectId> {
        match self.free.first() {
            Some(id) => Ok(ObjectId(*id)),
            None if self.highest < MAX_ID => Ok(ObjectId(self.highest + 1)),
            None => refuse(Errno::ENOMEM, "every object id is taken"),
        }
    }

    /// Removes an object. Its ID is free again.
    pub fn remove(&mut self, id: ObjectId) -> Option<Object> {
        let entry = self.entries.remove(&id)?;
        self.free.insert(id.0);
        Some(entry.object)
    }

    /// Removes an object without its user's knowledge. Its ID stays reserved, so that the user
    /// cannot reach another object with it.
    pub fn remove_leaving_tombstone(&mut self, id: ObjectId) -> Option<Object> {
        self.entries.remove(&id).map(|entry| entry.object)
    }

    /// The object `id`.
    pub fn get(&self, id: ObjectId) -> Option<&Object> {
        self.entries.get(&id).map(|entry| &entry.object)
    }

    /// The object `id`, to change it.
    pub fn get_mut(&mut self, id: ObjectId) -> Option<&mut Object> {
        self.entries.get_mut(&id).map(|entry| &mut entry.object)
    }

    /// Number of users of `id`.
    pub fn users(&self, id: ObjectId) -> u32 {
        self.entries.get(&id).map_or(0, |entry| entry.users)
    }

    /// Adds a user.
    pub fn hold(&mut self, id: ObjectId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.users += 1;
        }
    }

    /// Removes a user, after [`Self::hold`].
    pub fn release(&mut self, id: ObjectId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            debug_assert!(entry.users > 0, "{id:?} is released more often than held");
            entry.users = entry.users.saturating_sub(1);
        }
    }

    /// All objects, by ascending id.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (ObjectId, &Object)> {
        self.entries.iter().map(|(id, entry)| (*id, &entry.object))
    }

    /// How many objects there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}

fn no_such<T>(kind: ObjectKind, id: ObjectId) -> Outcome<T> {
    refuse(Errno::ENOENT, format!("there is no {kind} {id}"))
}

macro_rules! typed {
    ($($get:ident => $variant:ident;)*) => {
        impl Table {$(
            #[doc = concat!("The ", stringify!($variant), " `id`; `ENOENT` when it is none.")]
            pub fn $get(&self, id: ObjectId) -> Outcome<&$variant> {
                match self.get(id) {
                    Some(Object::$variant(object)) => Ok(object),
                    _ => no_such(ObjectKind::$variant, id),
                }
            }
        )*}
    };
}

macro_rules! typed_mut {
    ($($get:ident => $variant:ident;)*) => {
        impl Table {$(
            #[doc = concat!("The ", stringify!($variant), " `id`, to change it.")]
            pub fn $get(&mut self, id: ObjectId) -> Outcome<&mut $variant> {
                match self.entries.get_mut(&id).map(|entry| &mut entry.object) {
                    Some(Object::$variant(object)) => Ok(object),
                    _ => no_such(ObjectKind::$variant, id),
                }
            }
        )*}
    };
}

typed! {
    ioas => Ioas;
    hwpt_paging => HwptPaging;
    device => Device;
    viommu => Viommu;
    vdevice => Vdevice;
    access => Access;
    fault => Fault;
    selftest => Selftest;
}

typed_mut! {
    ioas_mut => Ioas;
    device_mut => Device;
    access_mut => Access;
}

#[cfg(feature = "selftest")]
typed_mut! {
    selftest_mut => Selftest;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ioas() -> Object {
        Object::Ioas(Ioas::default())
    }

    #[test]
    fn the_lowest_free_id_is_given_out_and_never_zero() {
        let mut table = Table::default();
        let ids: Vec<_> = (0..3).map(|_| table.insert(ioas()).unwrap().0).collect();
        assert_eq!(ids, [1, 2, 3]);
        table.remove(ObjectId(3));
        table.remove(ObjectId(1));
        assert_eq!(table.insert(ioas()).unwrap(), ObjectId(1));
        assert_eq!(table.insert(ioas()).unwrap(), ObjectId(3));
        assert_eq!(table.insert(ioas()).unwrap(), ObjectId(4));
    }

    #[test]
    fn a_tombstone_keeps_its_id() {
        let mut table = Table::default();
        table.insert(ioas()).unwrap();
        table.remove_leaving_tombstone(ObjectId(1));
        assert!(table.get(ObjectId(1)).is_none());
        assert_eq!(table.insert(ioas()).unwrap(), ObjectId(2));
    }

    #[test]
    fn a_lookup_of_another_kind_finds_nothing() {
        let mut table = Table::default();
        let id = table.insert(ioas()).unwrap();
        table.ioas(id).unwrap();
        assert_eq!(table.device(id).unwrap_err().errno, Errno::ENOENT);
        assert_eq!(table.ioas(ObjectId(0)).unwrap_err().errno, Errno::ENOENT);
    }
}

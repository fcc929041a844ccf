// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of one iommufd by id, and how many users each has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::access::Access;
use super::device::Device;
use super::events::{Fault, Veventq};
use super::hw_queue::HwQueue;
use super::hwpt::{HwptNested, HwptPaging};
use super::ioas::Ioas;
#[cfg(feature = "selftest")]
use super::selftest::Selftest;
use super::viommu::{Vdevice, Viommu};
use crate::host::fault_injection::allocate;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// The highest id Linux gives out.
const MAX_ID: u32 = i32::MAX as u32;

/// Kinds of objects, by the names Linux's documentation has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub enum ObjectKind {
    /// An I/O address space.
    #[cfg_attr(feature = "serde", serde(rename = "IOAS"))]
    Ioas,
    /// A page table filled from an IOAS.
    #[cfg_attr(feature = "serde", serde(rename = "HWPT_PAGING"))]
    HwptPaging,
    /// A page table that the user owns, on top of a nesting parent.
    #[cfg_attr(feature = "serde", serde(rename = "HWPT_NESTED"))]
    HwptNested,
    /// A bound device.
    #[cfg_attr(feature = "serde", serde(rename = "DEVICE"))]
    Device,
    /// A slice of a physical IOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "VIOMMU"))]
    Viommu,
    /// A device as a vIOMMU knows it.
    #[cfg_attr(feature = "serde", serde(rename = "VDEVICE"))]
    Vdevice,
    /// A user of an IOAS without an IOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "ACCESS"))]
    Access,
    /// A queue of page requests.
    #[cfg_attr(feature = "serde", serde(rename = "FAULT"))]
    Fault,
    /// A queue of events of a vIOMMU.
    #[cfg_attr(feature = "serde", serde(rename = "VEVENTQ"))]
    Veventq,
    /// A queue that a vIOMMU's hardware reads by itself.
    #[cfg_attr(feature = "serde", serde(rename = "HW_QUEUE"))]
    HwQueue,
    /// What keeps a mock device bound.
    #[cfg(feature = "selftest")]
    #[cfg_attr(feature = "serde", serde(rename = "SELFTEST"))]
    Selftest,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ioas => "IOAS",
            Self::HwptPaging => "HWPT_PAGING",
            Self::HwptNested => "HWPT_NESTED",
            Self::Device => "DEVICE",
            Self::Viommu => "VIOMMU",
            Self::Vdevice => "VDEVICE",
            Self::Access => "ACCESS",
            Self::Fault => "FAULT",
            Self::Veventq => "VEVENTQ",
            Self::HwQueue => "HW_QUEUE",
            #[cfg(feature = "selftest")]
            Self::Selftest => "SELFTEST",
        })
    }
}

/// One object.
#[derive(Debug)]
pub(crate) enum Object {
    Ioas(Ioas),
    HwptPaging(HwptPaging),
    HwptNested(HwptNested),
    Device(Device),
    Viommu(Viommu),
    Vdevice(Vdevice),
    Access(Access),
    Fault(Fault),
    Veventq(Veventq),
    HwQueue(HwQueue),
    #[cfg(feature = "selftest")]
    Selftest(Selftest),
}

impl Object {
    pub fn kind(&self) -> ObjectKind {
        match self {
            Self::Ioas(_) => ObjectKind::Ioas,
            Self::HwptPaging(_) => ObjectKind::HwptPaging,
            Self::HwptNested(_) => ObjectKind::HwptNested,
            Self::Device(_) => ObjectKind::Device,
            Self::Viommu(_) => ObjectKind::Viommu,
            Self::Vdevice(_) => ObjectKind::Vdevice,
            Self::Access(_) => ObjectKind::Access,
            Self::Fault(_) => ObjectKind::Fault,
            Self::Veventq(_) => ObjectKind::Veventq,
            Self::HwQueue(_) => ObjectKind::HwQueue,
            #[cfg(feature = "selftest")]
            Self::Selftest(_) => ObjectKind::Selftest,
        }
    }
}

#[derive(Debug)]
struct Entry {
    object: Object,
    /// Objects that lead here, once for each way they do.
    users: u32,
}

/// All objects. One that has users is never removed, so an id held by an object stays valid.
#[derive(Debug, Default)]
pub(crate) struct Table {
    entries: BTreeMap<ObjectId, Entry>,
    /// Ids below the highest that are free.
    free: BTreeSet<u32>,
    /// The highest id ever given out.
    highest: u32,
}

impl Table {
    /// Adds an object that nothing uses, under the lowest free id.
    ///
    /// # Errors
    /// `ENOMEM` every id is taken, or there is no memory.
    pub fn insert(&mut self, object: Object) -> Outcome<ObjectId> {
        allocate("an object")?;
        let id = self.next_id()?;
        self.free.remove(&id.0);
        self.highest = self.highest.max(id.0);
        self.entries.insert(id, Entry { object, users: 0 });
        Ok(id)
    }

    /// The id that the next object gets.
    ///
    /// # Errors
    /// `ENOMEM` every id is taken.
    pub fn next_id(&self) -> Outcome<ObjectId> {
        match self.free.first() {
            Some(id) => Ok(ObjectId(*id)),
            None if self.highest < MAX_ID => Ok(ObjectId(self.highest + 1)),
            None => refuse(Errno::ENOMEM, "every object id is taken"),
        }
    }

    /// Removes an object. Its id is free again.
    pub fn remove(&mut self, id: ObjectId) -> Option<Object> {
        let entry = self.entries.remove(&id)?;
        self.free.insert(id.0);
        Some(entry.object)
    }

    /// Removes an object whose user has not been told. Its id stays taken, so that the user cannot
    /// hit another object with it.
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

    /// How many users `id` has.
    pub fn users(&self, id: ObjectId) -> u32 {
        self.entries.get(&id).map_or(0, |entry| entry.users)
    }

    /// Counts one user more.
    pub fn hold(&mut self, id: ObjectId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.users += 1;
        }
    }

    /// Counts one user less, after [`Self::hold`].
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
}

#[cfg(feature = "selftest")]
typed! {
    selftest => Selftest;
}

#[cfg(feature = "selftest")]
typed_mut! {
    selftest_mut => Selftest;
}

typed_mut! {
    ioas_mut => Ioas;
    device_mut => Device;
    access_mut => Access;
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The IOAS that holds a guest's memory map, for every virtual IOMMU of the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error::{NestingError, Result};
use super::hw_flags;
use crate::iommufd::{HwInfo, ObjectId};
use crate::spec::pci::Bdf;

/// The IOAS, and what devices and mappings forbid each other. Its lock is taken after that of the
/// state of a virtual IOMMU's nesting.
#[derive(Debug)]
pub(super) struct SharedIoas {
    id: ObjectId,
    users: Mutex<Users>,
}

/// An IOMMU with erratum 772415 may write through a read-only stage 2 when it nests.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// Where read-only mappings start, in bytes.
    read_only: BTreeSet<u64>,
    /// The devices behind an IOMMU with the erratum.
    erratum: BTreeMap<ObjectId, Bdf>,
}

impl SharedIoas {
    /// `id` is empty, and has no users.
    pub fn new(id: ObjectId) -> Self {
        Self { id, users: Mutex::default() }
    }

    /// The object.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Its users, locked: mapping and adding devices take turns.
    pub fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Users {
    /// Whether memory may be mapped read-only, at `gpa`.
    pub fn check_read_only(&self, gpa: u64) -> Result<()> {
        match self.erratum.values().next() {
            Some(rid) => Err(NestingError::ReadOnlyErratum { gpa, rid: *rid }),
            None => Ok(()),
        }
    }

    /// Memory is mapped read-only from `gpa` on.
    pub fn mapped_read_only(&mut self, gpa: u64) {
        self.read_only.insert(gpa);
    }

    /// Nothing is mapped at `gpa`, for `length` bytes.
    pub fn unmapped(&mut self, gpa: u64, length: u64) {
        let last = gpa.saturating_add(length.saturating_sub(1));
        self.read_only.retain(|start| !(gpa..=last).contains(start));
    }

    /// `dev`, the guest's `rid`, is to use the IOAS, if it may.
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId, info: &HwInfo) -> Result<()> {
        if !hw_flags::writes_through_read_only(info) {
            return Ok(());
        }
        if let Some(gpa) = self.read_only.first() {
            return Err(NestingError::ReadOnlyErratum { gpa: *gpa, rid });
        }
        self.erratum.insert(dev, rid);
        Ok(())
    }

    /// `dev` does not use the IOAS.
    pub fn remove_device(&mut self, dev: ObjectId) {
        self.erratum.remove(&dev);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of one iommufd, the devices and the IOMMUs: the rules, with Linux's errno.
//!
//! All of it is protected by the iommufd's lock. A rule first checks everything, in Linux's order,
//! and only then changes anything; a failed call has no effect.

mod access;
mod accounting;
mod destroy;
mod device;
mod dirty;
mod events;
mod fill;
mod group;
mod hw_queue;
mod hwpt;
mod invalidate;
mod ioas;
mod object;
mod selftest;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod unmap;
mod vfio_compat;
mod viommu;

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use access::Wanted;
pub(crate) use device::Change;
pub(crate) use hw_queue::HwQueueArguments;
pub(crate) use hwpt::HwptRequest;
pub(crate) use invalidate::MAX_INVALIDATE_ENTRIES;
pub(crate) use ioas::MapRequest;
pub(crate) use object::Object;
pub use object::{AccessUnmap, ObjectKind};
pub(crate) use unmap::{Stop, Unmap};

use crate::host::machine::{ContextId, GroupId, Machine};
use crate::host::mmaps::Mmaps;
use crate::ioas::{PinAccount, RlimitMode};
use group::Group;
use table::Table;
use twostage::iommufd::ObjectId;
use vfio_compat::VfioCompat;

/// Everything that one lock protects.
#[derive(Debug)]
pub(crate) struct Objects {
    /// The iommufd's machine.
    machine: Arc<Machine>,
    /// The iommufd's ID there.
    context: ContextId,
    /// The user's objects.
    table: Table,
    /// The attachments of the groups of bound devices; only groups with attachments.
    groups: BTreeMap<GroupId, Group>,
    account: Arc<PinAccount>,
    /// Who is charged for new mappings.
    rlimit_mode: RlimitMode,
    /// The iommufd as a VFIO container.
    vfio: VfioCompat,
    /// Number of times the iommufd was closed: older object IDs are invalid.
    closed: u64,
    last_attachment: u64,
    /// The drivers' mmap offers.
    mmaps: Mmaps,
    /// How often the user has mapped pages of an object; no count is 0.
    mapped: BTreeMap<ObjectId, u32>,
}

impl Objects {
    /// An iommufd without objects on `machine`.
    pub fn new(machine: Arc<Machine>) -> Self {
        Self {
            context: machine.next_context(),
            machine,
            table: Table::default(),
            groups: BTreeMap::new(),
            account: Arc::default(),
            rlimit_mode: RlimitMode::default(),
            vfio: VfioCompat::default(),
            closed: 0,
            last_attachment: 0,
            mmaps: Mmaps::default(),
            mapped: BTreeMap::new(),
        }
    }

    /// The objects.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// What the user can map.
    pub fn mmaps(&self) -> &Mmaps {
        &self.mmaps
    }

    /// The user has mapped pages of `owner` once more.
    pub fn map_pages(&mut self, epoch: u64, owner: ObjectId) {
        if epoch == self.closed {
            *self.mapped.entry(owner).or_default() += 1;
            self.table.hold(owner);
        }
    }

    /// The user has unmapped pages of `owner`.
    pub fn unmap_pages(&mut self, epoch: u64, owner: ObjectId) {
        match self.mapped.get_mut(&owner) {
            Some(count) if epoch == self.closed => {
                *count -= 1;
                if *count == 0 {
                    self.mapped.remove(&owner);
                }
                self.table.release(owner);
            }
            _ => {}
        }
    }

    /// Changes when the iommufd is closed, which invalidates all object IDs.
    pub fn epoch(&self) -> u64 {
        self.closed
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> u64 {
        self.account.bytes()
    }
}

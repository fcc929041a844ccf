// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of one iommufd, the devices and the IOMMUs: the rules, with Linux's errno; here
//! `IOMMU_DESTROY`, and closing the iommufd.
//!
//! All of it is protected by the iommufd's lock. A rule first checks everything, in Linux's order,
//! and only then changes anything; a failed call has no effect.

mod access;
mod device;
mod events;
mod group;
mod hwpt;
mod ioas;
mod mappings;
mod object;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod viommu;

use std::collections::BTreeMap;
use std::iter;
use std::sync::Arc;

pub(crate) use access::Wanted;
pub(crate) use device::Change;
pub(crate) use hwpt::{HwptRequest, MAX_INVALIDATE_ENTRIES};
pub(crate) use ioas::MapRequest;
pub(crate) use mappings::{Stop, Unmap};
pub(crate) use object::Object;
pub use object::{AccessUnmap, ObjectKind};
pub(crate) use viommu::HwQueueArguments;

use crate::host::machine::{ContextId, GroupId, Machine};
use crate::host::mmaps::Mmaps;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::{PinAccount, RlimitMode};
use group::Group;
use ioas::VfioCompat;
use table::Table;
use twostage::iommufd::{Errno, ObjectId};

/// Maximum number of users named in an `EBUSY` error.
const NAMED_USERS: usize = 8;

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
    /// The objects that `id` holds, once for each reference.
    pub fn holds(&self, id: ObjectId) -> Vec<ObjectId> {
        match self.table.get(id) {
            None | Some(Object::Ioas(_) | Object::Fault(_) | Object::Selftest(_)) => Vec::new(),
            Some(Object::HwptPaging(hwpt)) => iter::once(hwpt.ioas).chain(hwpt.fault).collect(),
            Some(Object::HwptNested(hwpt)) => {
                iter::once(hwpt.viommu.unwrap_or(hwpt.parent)).chain(hwpt.fault).collect()
            }
            Some(Object::Device(_)) => {
                self.slots_of(id).into_iter().map(|(_, hwpt)| hwpt).collect()
            }
            Some(Object::Viommu(viommu)) => vec![viommu.parent],
            Some(Object::Vdevice(vdevice)) => vec![vdevice.viommu, vdevice.dev],
            Some(Object::Veventq(veventq)) => vec![veventq.viommu],
            Some(Object::HwQueue(queue)) => iter::once(queue.viommu).chain(queue.needs).collect(),
            Some(Object::Access(access)) => access.pinned_in.into_iter().collect(),
        }
    }

    /// `IOMMU_DESTROY`.
    pub fn destroy(&mut self, id: ObjectId) -> Outcome<()> {
        let Some(object) = self.table.get(id) else {
            return refuse(Errno::ENOENT, format!("there is no object {id}"));
        };
        if self.table.users(id) != 0 {
            return refuse(Errno::EBUSY, self.in_use(id));
        }
        let holds = self.holds(id);
        match object {
            // No HWPT and no access object is left, so no hardware has seen the mappings and
            // nothing is pinned.
            Object::Ioas(_) => self.forget_vfio_ioas(id),
            Object::HwptPaging(hwpt) => {
                let ioas = hwpt.ioas;
                let object = self.table.ioas_mut(ioas)?;
                object.hwpts.retain(|hwpt| *hwpt != id);
                object.space.unreserve(id);
                if object.hwpts.is_empty() {
                    self.unfill(ioas)?;
                }
                self.align(ioas)?;
            }
            Object::HwptNested(_) => {}
            Object::Viommu(_) => self.mmaps.remove(id),
            Object::Vdevice(_) => self.forget_vdevice(id)?,
            // No attachment is left with pending page requests.
            Object::Fault(_) => {}
            Object::Veventq(veventq) => {
                self.table.viommu(veventq.viommu)?.events.remove(veventq.kind);
            }
            Object::HwQueue(_) => self.stop_hw_queue(id)?,
            // Held by its creator until it is attached to nothing.
            Object::Access(_) => {}
            Object::Selftest(_) => self.end_mock_device(id)?,
            // Always held by its driver, so this is never reached.
            Object::Device(_) => return refuse(Errno::EBUSY, "a device is ended by closing it"),
        }
        self.release_all(holds);
        self.table.remove(id);
        Ok(())
    }

    /// Removes one user of each.
    fn release_all(&mut self, ids: Vec<ObjectId>) {
        ids.into_iter().for_each(|id| self.table.release(id));
    }

    /// Closing `/dev/iommu`: devices are detached and unbound first, so that the hardware stops
    /// using objects before they are destroyed; queues are closed and pages unmapped; then unused
    /// objects are destroyed, until none is left.
    pub fn close(&mut self) {
        let devices = |(id, object): (ObjectId, &Object)| match object {
            Object::Device(_) => Some(id),
            _ => None,
        };
        for dev in self.table.iter().filter_map(devices).collect::<Vec<_>>() {
            // Cannot fail for a device.
            let _ = self.device_unbind(dev);
        }
        for id in self.table.iter().map(|(id, _)| id).collect::<Vec<_>>() {
            self.close_queue(id);
        }
        for (id, count) in std::mem::take(&mut self.mapped) {
            (0..count).for_each(|_| self.table.release(id));
        }
        // Objects are younger than those they hold unless IDs were reused; each pass destroys at
        // least the unused ones.
        loop {
            let before = self.table.len();
            let ids: Vec<_> = self.table.iter().rev().map(|(id, _)| id).collect();
            for id in ids {
                // EBUSY until a later pass.
                let _ = self.destroy(id);
            }
            if self.table.len() == before {
                break;
            }
        }
        // Tombstones are removed with the descriptor.
        self.table = Table::default();
        self.vfio = VfioCompat::default();
        self.rlimit_mode = RlimitMode::default();
        self.closed += 1;
    }

    /// Describes the users of `id`: only some, as there may be many.
    fn in_use(&self, id: ObjectId) -> String {
        let mut users: Vec<_> = self
            .table
            .iter()
            .filter(|(user, object)| match object {
                // Perhaps many PASIDs.
                Object::Device(_) => self.attachments_of(*user).any(|(.., hwpt)| hwpt == id),
                _ => self.holds(*user).contains(&id),
            })
            .map(|(user, object)| format!("{} {user}", object.kind()))
            .take(NAMED_USERS + 1)
            .collect();
        if users.is_empty() {
            return "its driver uses it until it is closed".to_owned();
        }
        if let Some(last) = users.get_mut(NAMED_USERS) {
            *last = "others".to_owned();
        }
        format!("used by {}", users.join(", "))
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_DESTROY`, and closing the whole iommufd.

use super::table::Table;
use super::{Object, Objects};
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, ObjectId};

/// Users of an object that a refusal to destroy it names at most.
const NAMED_USERS: usize = 8;

impl Object {
    /// The objects that this one holds, once for each way it does.
    pub fn holds(&self) -> Vec<ObjectId> {
        match self {
            Self::Ioas(_) => Vec::new(),
            Self::HwptPaging(hwpt) => vec![hwpt.ioas],
            Self::HwptNested(hwpt) => vec![hwpt.viommu.unwrap_or(hwpt.parent)],
            Self::Device(device) => device.attachments.values().copied().collect(),
            Self::Viommu(viommu) => vec![viommu.parent],
            Self::Vdevice(vdevice) => vec![vdevice.viommu, vdevice.dev],
        }
    }
}

impl Objects {
    /// `IOMMU_DESTROY`.
    pub fn destroy(&mut self, id: ObjectId) -> Outcome<()> {
        let Some(object) = self.table.get(id) else {
            return refuse(Errno::ENOENT, format!("there is no object {id}"));
        };
        if self.table.users(id) != 0 {
            return refuse(Errno::EBUSY, self.in_use(id));
        }
        match object {
            // No HWPT and no access object is left, so no hardware has seen the mappings and
            // nothing is pinned.
            Object::Ioas(_) => {}
            Object::HwptPaging(hwpt) => {
                let (ioas, tag) = (hwpt.ioas, hwpt.tag);
                let object = self.table.ioas_mut(ioas)?;
                object.hwpts.retain(|hwpt| *hwpt != id);
                object.space.unreserve(id);
                if object.hwpts.is_empty() {
                    self.unfill(ioas)?;
                }
                self.align(ioas)?;
                self.table.release(ioas);
                self.tags.remove(&tag.0);
            }
            Object::HwptNested(hwpt) => {
                let (holds, tag) = (hwpt.viommu.unwrap_or(hwpt.parent), hwpt.tag);
                self.table.release(holds);
                self.tags.remove(&tag.0);
            }
            Object::Viommu(viommu) => {
                let parent = viommu.parent;
                self.table.release(parent);
            }
            Object::Vdevice(_) => self.forget_vdevice(id)?,
            // Always held by its driver, so never here.
            Object::Device(_) => return refuse(Errno::EBUSY, "a device is ended by closing it"),
        }
        self.table.remove(id);
        Ok(())
    }

    /// Closing `/dev/iommu`: devices are detached and unbound first, so that the hardware is told
    /// before anything it uses goes; then every object that nothing uses, until none is left.
    pub fn close(&mut self) {
        let devices = |(id, object): (ObjectId, &Object)| match object {
            Object::Device(_) => Some(id),
            _ => None,
        };
        for dev in self.table.iter().filter_map(devices).collect::<Vec<_>>() {
            // Fails only for an id that is no device.
            let _ = self.device_unbind(dev);
        }
        // What holds is younger than what it holds unless ids were reused; each pass ends at least
        // the objects that nothing holds.
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
        // Tombstones end with the descriptor.
        self.table = Table::default();
        self.closed += 1;
    }

    /// Who uses `id`, in words: only some, as there may be very many.
    fn in_use(&self, id: ObjectId) -> String {
        let mut users: Vec<_> = self
            .table
            .iter()
            .filter(|(_, object)| object.holds().contains(&id))
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOMMU groups: devices that an IOMMU cannot tell apart share what they are attached to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Objects;
use crate::emulated::device::Slot;
use crate::emulated::events::AttachmentId;
use crate::emulated::machine::{GroupId, Part};
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, ObjectId};

/// What the devices of one group are attached to, by slot. No entry is without devices.
#[derive(Debug, Default)]
pub(crate) struct Group {
    pub slots: BTreeMap<Slot, Attachment>,
}

/// One HWPT in one slot of a group.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Its page requests are answered when it ends.
    pub id: AttachmentId,
    pub hwpt: ObjectId,
    /// The device that was told to come here: page requests of the slot are told under its id.
    pub by: ObjectId,
    /// The devices that are attached: each holds the HWPT once.
    pub devices: BTreeSet<ObjectId>,
}

impl Objects {
    /// What the group has in `slot`.
    pub(super) fn attachment(&self, group: GroupId, slot: Slot) -> Option<&Attachment> {
        self.groups.get(&group)?.slots.get(&slot)
    }

    /// What `dev` is attached to: PASIDs after the device itself, ascending.
    pub fn attachments_of(&self, dev: ObjectId) -> Vec<(Slot, ObjectId)> {
        let Ok(device) = self.table.device(dev) else { return Vec::new() };
        let Some(group) = self.groups.get(&device.part.group) else { return Vec::new() };
        let of_dev = group.slots.iter().filter(|(_, attachment)| attachment.devices.contains(&dev));
        of_dev.map(|(slot, attachment)| (*slot, attachment.hwpt)).collect()
    }

    /// Whether a HWPT that has the PASID flag or not may come into `slot`: all of a group's
    /// HWPTs must have it once there is one on a PASID.
    pub(super) fn check_pasid_flag(&self, group: GroupId, slot: Slot, flag: bool) -> Outcome<()> {
        let slots = self.groups.get(&group).map(|group| &group.slots);
        if !flag {
            let with_pasid = slots.is_some_and(|slots| slots.keys().any(Option::is_some));
            if slot.is_some() || with_pasid {
                return refuse(
                    Errno::EINVAL,
                    "a HWPT without the PASID flag serves no PASID and no device with PASIDs \
                     attached",
                );
            }
        }
        if slot.is_some() {
            if let Some(own) = self.attachment(group, None) {
                if !self.hwpt_flags(own.hwpt)?.pasid() {
                    return refuse(
                        Errno::EINVAL,
                        format!(
                            "the device is attached to HWPT {}, which lacks the PASID flag",
                            own.hwpt
                        ),
                    );
                }
            }
        }
        Ok(())
    }

    /// The devices of a group that a change of `slot` concerns: those without PASIDs take no part
    /// in one of a PASID.
    ///
    /// # Errors
    /// `EINVAL` one of them has PASIDs, but not this one.
    pub(super) fn members(&self, group: GroupId, slot: Slot) -> Outcome<Vec<Arc<Part>>> {
        let mut parts = self.machine.group(group);
        if let Some(pasid) = slot {
            parts.retain(|part| part.pasid_bits() > 0);
            if let Some(part) = parts.iter().find(|part| pasid >> part.pasid_bits() != 0) {
                return refuse(
                    Errno::EINVAL,
                    format!("'{}' has PASIDs of {} bits", part.name, part.pasid_bits()),
                );
            }
        }
        Ok(parts)
    }
}

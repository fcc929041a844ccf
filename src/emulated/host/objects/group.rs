// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOMMU groups: devices that an IOMMU cannot distinguish share their attachments.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Objects;
use crate::host::device::Slot;
use crate::host::events::AttachmentId;
use crate::host::machine::{GroupId, Part};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};
use twostage::runs::Runs;

/// One HWPT in one slot of a group. Small, as a device has up to 2^20 slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub hwpt: ObjectId,
    /// The device that requested the attachment: page requests of the slot are reported under its
    /// ID.
    pub by: ObjectId,
}

/// The attachments of one group's devices, by slot. No slot with an attachment is without devices.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// Of requests without PASID.
    own: Option<Attachment>,
    pasids: Runs<Attachment>,
    /// The devices in each slot: each holds the HWPT once.
    members: BTreeMap<ObjectId, Member>,
    /// The attachments with page requests, which are answered when they end.
    asking: BTreeMap<Slot, AttachmentId>,
}

/// The slots of its group in which a device is attached.
#[derive(Debug, Default)]
struct Member {
    own: bool,
    pasids: Runs<()>,
}

impl Member {
    fn has(&self, slot: Slot) -> bool {
        slot.map_or(self.own, |pasid| self.pasids.get(pasid).is_some())
    }

    fn set(&mut self, slot: Slot, attached: bool) {
        match slot {
            None => self.own = attached,
            Some(pasid) => self.pasids.set(pasid, attached.then_some(())),
        }
    }

    fn is_empty(&self) -> bool {
        !self.own && self.pasids.is_empty()
    }
}

impl Group {
    /// The attachment in `slot`.
    pub fn get(&self, slot: Slot) -> Option<Attachment> {
        slot.map_or(self.own, |pasid| self.pasids.get(pasid))
    }

    /// Puts `attachment` into `slot`, with `id` for its page requests, if it makes any.
    pub fn set(&mut self, slot: Slot, attachment: Option<Attachment>, id: Option<AttachmentId>) {
        match slot {
            None => self.own = attachment,
            Some(pasid) => self.pasids.set(pasid, attachment),
        }
        match id {
            Some(id) => self.asking.insert(slot, id),
            None => self.asking.remove(&slot),
        };
    }

    /// The ID for page requests of `slot`.
    pub fn id(&self, slot: Slot) -> Option<AttachmentId> {
        self.asking.get(&slot).copied()
    }

    /// Whether `dev` is attached in `slot`.
    pub fn has(&self, slot: Slot, dev: ObjectId) -> bool {
        self.members.get(&dev).is_some_and(|member| member.has(slot))
    }

    /// The devices in `slot`, ascending.
    pub fn devices(&self, slot: Slot) -> Vec<ObjectId> {
        let members = self.members.iter().filter(|(_, member)| member.has(slot));
        members.map(|(dev, _)| *dev).collect()
    }

    /// `dev` is attached in `slot`, too.
    pub fn join(&mut self, slot: Slot, dev: ObjectId) {
        self.members.entry(dev).or_default().set(slot, true);
    }

    /// `dev` is not attached in `slot` any more.
    pub fn leave(&mut self, slot: Slot, dev: ObjectId) {
        if let Some(member) = self.members.get_mut(&dev) {
            member.set(slot, false);
            if member.is_empty() {
                self.members.remove(&dev);
            }
        }
    }

    /// Whether nothing is attached.
    pub fn is_empty(&self) -> bool {
        self.own.is_none() && self.pasids.is_empty()
    }

    /// The first PASID from `pasid` on that `dev` is attached in.
    pub fn pasid_from(&self, dev: ObjectId, pasid: u32) -> Option<u32> {
        self.members.get(&dev)?.pasids.next(pasid)
    }

    /// The attachments of `dev`: adjacent PASIDs with the same HWPT together, the device itself
    /// first.
    pub fn of(&self, dev: ObjectId) -> impl Iterator<Item = (Slot, Slot, ObjectId)> + '_ {
        let member = self.members.get(&dev);
        let own = self.own.filter(|_| member.is_some_and(|member| member.own));
        let own = own.map(|own| (None, None, own.hwpt));
        let pasids = member.into_iter().flat_map(|member| member.pasids.ranges());
        let pasids = pasids.flat_map(|(pasids, ())| self.pasids.ranges_in(pasids));
        let pasids =
            pasids.map(|(pasids, it)| (Some(*pasids.start()), Some(*pasids.end()), it.hwpt));
        own.into_iter().chain(pasids)
    }
}

impl Objects {
    /// The group's attachment in `slot`.
    pub(super) fn attachment(&self, group: GroupId, slot: Slot) -> Option<Attachment> {
        self.groups.get(&group)?.get(slot)
    }

    /// Whether `dev` is attached in `slot`.
    pub(super) fn is_attached(&self, group: GroupId, slot: Slot, dev: ObjectId) -> bool {
        self.groups.get(&group).is_some_and(|group| group.has(slot, dev))
    }

    /// The attachment of `dev` in `slot`.
    #[cfg(feature = "selftest")]
    pub fn attached_to(&self, dev: ObjectId, slot: Slot) -> Option<ObjectId> {
        let group = self.table.device(dev).ok()?.part.group;
        let attachment = self.attachment(group, slot)?;
        self.is_attached(group, slot, dev).then_some(attachment.hwpt)
    }

    /// The attachments of `dev`, as in [`Group::of`].
    pub fn attachments_of(
        &self,
        dev: ObjectId,
    ) -> impl Iterator<Item = (Slot, Slot, ObjectId)> + '_ {
        let device = self.table.device(dev).ok();
        let group = device.and_then(|device| self.groups.get(&device.part.group));
        group.into_iter().flat_map(move |group| group.of(dev))
    }

    /// The attachments of `dev`, slot by slot: the device itself, then PASIDs in ascending order.
    pub fn slots_of(&self, dev: ObjectId) -> Vec<(Slot, ObjectId)> {
        let slots = self.attachments_of(dev).flat_map(|(first, last, hwpt)| {
            let own = first.is_none().then_some((None, hwpt));
            let pasids = first.zip(last).into_iter().flat_map(|(first, last)| first..=last);
            own.into_iter().chain(pasids.map(move |pasid| (Some(pasid), hwpt)))
        });
        slots.collect()
    }

    /// The ID for page requests of a new attachment of `hwpt`, if it has a fault queue.
    pub(super) fn attachment_id(&mut self, hwpt: ObjectId) -> Option<AttachmentId> {
        self.fault_of(hwpt).is_some().then(|| self.next_attachment())
    }

    /// Whether a HWPT with or without the PASID flag is allowed in `slot`: all of a group's HWPTs
    /// must have it if one is attached to a PASID.
    pub(super) fn check_pasid_flag(&self, group: GroupId, slot: Slot, flag: bool) -> Outcome<()> {
        if !flag {
            let group = self.groups.get(&group);
            let with_pasid = group.is_some_and(|group| !group.pasids.is_empty());
            if slot.is_some() || with_pasid {
                return refuse(
                    Errno::EINVAL,
                    "a HWPT without the PASID flag can be attached neither to a PASID nor to a \
                     device with PASIDs",
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

    /// The devices of a group affected by a change of `slot`: those without PASIDs are not affected
    /// by one of a PASID.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pasids_that_are_alike_cost_nothing() {
        assert_eq!(size_of::<Attachment>(), 8);
        let (one, two) = (ObjectId(5), ObjectId(6));
        let dev = ObjectId(1);
        let mut group = Group::default();
        let attach = |group: &mut Group, pasid, hwpt| {
            group.set(Some(pasid), Some(Attachment { hwpt, by: dev }), None);
            group.join(Some(pasid), dev);
        };
        (1..1 << 13).for_each(|pasid| attach(&mut group, pasid, one));
        assert_eq!((group.pasids.runs(), group.members[&dev].pasids.runs()), (2, 2));
        assert_eq!(group.of(dev).collect::<Vec<_>>(), [(Some(1), Some(0x1fff), one)]);
        attach(&mut group, 7, two);
        group.leave(Some(9), dev);
        group.set(Some(9), None, None);
        let of = [(1, 6, one), (7, 7, two), (8, 8, one), (10, 0x1fff, one)];
        let of = of.map(|(first, last, hwpt)| (Some(first), Some(last), hwpt));
        assert_eq!(group.of(dev).collect::<Vec<_>>(), of);
        assert_eq!((group.pasid_from(dev, 9), group.devices(Some(9))), (Some(10), vec![]));
    }
}

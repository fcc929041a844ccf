// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices: bind, attach, replace, detach, unbind; and mock devices, each of which belongs to an
//! object that represents the program that has it.

use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use super::group::Attachment;
use super::object::{Device, Object, Selftest};
use super::Objects;
use crate::drivers::DriverInfo;
use crate::host::device::{Requester, Slot};
use crate::host::machine::{GroupId, Part};
use crate::host::refusal::{allocate, refuse, Outcome};
use crate::units::hardware::CacheRange;
use twostage::iommufd::{Errno, FaultSink, HwCapabilities, HwptFlags, ObjectId};
use twostage::spec::vtd::PageRange;

/// How a slot gets a page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// It has none (`iommufd_device_attach`).
    Attach,
    /// It has one (`iommufd_device_replace`).
    Replace,
}

/// The result of `GET_HW_INFO`.
#[derive(Debug)]
pub(crate) struct DeviceInfo {
    pub data: DriverInfo,
    pub capabilities: HwCapabilities,
    /// Width of its PASIDs in bits.
    pub pasid_bits: u8,
}

/// The IDs of a new mock device.
#[cfg(feature = "selftest")]
#[derive(Debug)]
pub(crate) struct MockDeviceIds {
    pub selftest: ObjectId,
    pub dev: ObjectId,
    pub hwpt: ObjectId,
}

impl Objects {
    /// `VFIO_DEVICE_BIND_IOMMUFD`: the device is blocked from now on.
    pub fn device_bind(&mut self, name: &str) -> Outcome<ObjectId> {
        let part = self.machine.claim(name, self.context)?;
        let device = Device { part: part.clone(), vdevice: None, page_requests: Vec::new() };
        let dev = self.table.insert(Object::Device(device)).inspect_err(|_| {
            self.machine.release(name);
        })?;
        // The device's driver holds it until unbind, so DESTROY never destroys it.
        self.table.hold(dev);
        // A new device joins an attached group's attachments.
        if !self.groups.contains_key(&part.group) {
            part.driver.block(&part.requester);
        }
        Ok(dev)
    }

    /// Closing the device: PASIDs are detached first, ascending, then the device itself.
    pub fn device_unbind(&mut self, dev: ObjectId) -> Outcome<()> {
        let device = self.table.device(dev)?;
        let (part, vdevice) = (device.part.clone(), device.vdevice);
        let mut from = 0;
        while let Some(pasid) =
            self.groups.get(&part.group).and_then(|group| group.pasid_from(dev, from))
        {
            self.device_detach(dev, Some(pasid))?;
            from = pasid + 1;
        }
        self.device_detach(dev, None)?;
        if let Some(vdevice) = vdevice {
            self.end_vdevice(vdevice)?;
        }
        part.driver.set_fault_sink(&part.requester, None);
        part.driver.set_page_request_sink(&part.requester, None);
        self.machine.release(&part.name);
        self.table.release(dev);
        self.table.remove(dev);
        Ok(())
    }

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: the first attachment of the slot, or a replacement.
    pub fn device_attach(&mut self, dev: ObjectId, slot: Slot, pt: ObjectId) -> Outcome<ObjectId> {
        let part = &self.table.device(dev)?.part;
        // In Linux 0 means "no PASID", so it cannot be attached.
        if slot == Some(0) {
            return refuse(Errno::EINVAL, "PASID 0 cannot be attached");
        }
        let attached = self.is_attached(part.group, slot, dev);
        let change = if attached { Change::Replace } else { Change::Attach };
        self.device_change(dev, slot, pt, change)
    }

    /// Attaches `slot` to `pt`, an IOAS or a HWPT. Returns the HWPT.
    pub fn device_change(
        &mut self,
        dev: ObjectId,
        slot: Slot,
        pt: ObjectId,
        change: Change,
    ) -> Outcome<ObjectId> {
        self.table.device(dev)?;
        match self.table.get(pt) {
            Some(Object::Ioas(_)) => self.change_automatic(dev, slot, pt, change),
            Some(Object::HwptPaging(_) | Object::HwptNested(_)) => {
                self.change_hwpt(dev, slot, pt, change)?;
                Ok(pt)
            }
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("{kind} {pt} is not a page table"))
            }
            None => refuse(Errno::ENOENT, format!("there is no object {pt}")),
        }
    }

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`. Does nothing if the slot is not attached.
    pub fn device_detach(&mut self, dev: ObjectId, slot: Slot) -> Outcome<()> {
        let part = self.table.device(dev)?.part.clone();
        let Some(group) = self.groups.get_mut(&part.group) else { return Ok(()) };
        let Some(Attachment { hwpt, .. }) = group.get(slot).filter(|_| group.has(slot, dev)) else {
            return Ok(());
        };
        group.leave(slot, dev);
        if group.devices(slot).is_empty() {
            let id = group.id(slot);
            group.set(slot, None, None);
            if group.is_empty() {
                self.groups.remove(&part.group);
            }
            let domain = self.domain(hwpt)?;
            let members = self.members(part.group, slot)?;
            part.driver.detach(&requesters(&members), slot, &domain);
            self.end_page_requests(hwpt, id)?;
        }
        if slot.is_none() {
            let ioas = self.stage2_of(hwpt)?.ioas;
            self.table.ioas_mut(ioas)?.space.unreserve(dev);
        }
        self.leave(hwpt, 1)
    }

    /// `IOMMU_GET_HW_INFO`.
    pub fn get_hw_info(&self, dev: ObjectId) -> Outcome<DeviceInfo> {
        let part = &self.table.device(dev)?.part;
        let (config, pasid_bits) = (&part.requester.config, part.pasid_bits());
        Ok(DeviceInfo {
            data: part.driver.info(),
            capabilities: HwCapabilities::new()
                .with_dirty_tracking(part.driver.dirty_tracking(&part.requester))
                .with_pci_pasid_exec(pasid_bits > 0 && config.pasid_exec)
                .with_pci_pasid_priv(pasid_bits > 0 && config.pasid_priv)
                .with_pci_ats_not_supported(!config.ats),
            pasid_bits,
        })
    }

    /// Delivers faults of `dev` to `sink`.
    pub fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Outcome<()> {
        let part = &self.table.device(dev)?.part;
        if !part.driver.extensions().fault_reports {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU does not report faults to user space");
        }
        part.driver.set_fault_sink(&part.requester, Some((dev, sink)));
        Ok(())
    }

    /// Tells `dev` to forget the translations of `addresses` (bytes) that it has for `pasid`, or
    /// for all of its requests. Returns whether it has answered.
    pub fn invalidate_device_tlb(
        &self,
        dev: ObjectId,
        pasid: Option<u32>,
        addresses: RangeInclusive<u64>,
    ) -> Outcome<bool> {
        let part = &self.table.device(dev)?.part;
        if !part.driver.extensions().device_tlbs {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU has no device TLBs");
        }
        let (first, last) = addresses.into_inner();
        let pages = (last.saturating_sub(first) >> 12).saturating_add(1);
        let range = CacheRange::Pages(PageRange::new(first, pages, true));
        part.driver.invalidate_device_tlb(&part.requester, pasid, range)
    }

    /// Attaches to the first compatible automatic HWPT of `ioas`, or to a new one.
    fn change_automatic(
        &mut self,
        dev: ObjectId,
        slot: Slot,
        ioas: ObjectId,
        change: Change,
    ) -> Outcome<ObjectId> {
        for hwpt in self.table.ioas(ioas)?.hwpts.clone() {
            if !self.table.hwpt_paging(hwpt)?.automatic {
                continue;
            }
            match self.change_hwpt(dev, slot, hwpt, change) {
                Ok(()) => return Ok(hwpt),
                Err(refusal) if refusal.errno == Errno::EINVAL => {}
                Err(refusal) => return Err(refusal),
            }
        }
        // Checks that do not involve the HWPT come first, as in Linux.
        self.check_change(dev, slot, None, ioas, HwptFlags::new(), change)?;
        let hwpt = self.add_automatic(ioas, dev)?;
        if let Err(refusal) = self.change_hwpt(dev, slot, hwpt, change) {
            self.destroy(hwpt)?;
            return Err(refusal);
        }
        Ok(hwpt)
    }

    /// Puts `hwpt` into the slot, replacing what is there.
    ///
    /// Everything that can fail comes first. (When the driver refuses a replacement, Linux leaves a
    /// VT-d device blocked in hardware though its objects still have the old HWPT attached, and may
    /// drop the device's reserved regions; here the old attachment stays, as it should.)
    fn change_hwpt(
        &mut self,
        dev: ObjectId,
        slot: Slot,
        hwpt: ObjectId,
        change: Change,
    ) -> Outcome<()> {
        let (ioas, flags) = (self.stage2_of(hwpt)?.ioas, self.hwpt_flags(hwpt)?);
        self.check_change(dev, slot, Some(hwpt), ioas, flags, change)?;
        let part = self.table.device(dev)?.part.clone();
        let old = self.attachment(part.group, slot).map(|attachment| attachment.hwpt);
        if (old, change) != (Some(hwpt), Change::Replace) {
            allocate("an attachment")?;
        }
        if old != Some(hwpt) {
            let members = self.members(part.group, slot)?;
            let (new, before) = (self.domain(hwpt)?, old.map(|old| self.domain(old)).transpose()?);
            part.driver.attach(&requesters(&members), slot, &new, before.as_ref())?;
        }
        match (old, change) {
            (Some(old), Change::Replace) if old != hwpt => {
                self.move_attachment(dev, &part, slot, hwpt, ioas)
            }
            (_, Change::Replace) => Ok(()),
            (_, Change::Attach) => self.join_attachment(dev, &part, slot, hwpt, ioas),
        }
    }

    /// The checks without the driver. `hwpt` is none if it does not exist yet.
    fn check_change(
        &self,
        dev: ObjectId,
        slot: Slot,
        hwpt: Option<ObjectId>,
        ioas: ObjectId,
        flags: HwptFlags,
        change: Change,
    ) -> Outcome<()> {
        let part = &self.table.device(dev)?.part;
        let attachment = self.attachment(part.group, slot);
        let attached = self.is_attached(part.group, slot, dev);
        let there = attachment.map(|attachment| attachment.hwpt);
        let concerned: Vec<ObjectId> = match (change, attachment) {
            (Change::Attach, _) if attached => {
                return refuse(Errno::EBUSY, format!("device {dev} is attached already"));
            }
            (Change::Attach, Some(_)) if there != hwpt => {
                return refuse(Errno::EINVAL, "the group is attached to another HWPT");
            }
            (Change::Attach, _) => vec![dev],
            (Change::Replace, Some(_)) if attached => {
                if there == hwpt {
                    return Ok(());
                }
                self.devices_in(part.group, slot)
            }
            (Change::Replace, _) => {
                return refuse(Errno::EINVAL, format!("device {dev} is not attached"));
            }
        };
        if slot.is_none() {
            for dev in concerned {
                let regions = self.table.device(dev)?.part.reserved_regions();
                self.table.ioas(ioas)?.space.check_reservable(&regions)?;
            }
        }
        // The first device of a group acts for all of it.
        if there.is_none() || change == Change::Replace {
            self.check_pasid_flag(part.group, slot, flags.pasid())?;
        }
        Ok(())
    }

    /// `dev` joins its group's attachment in `slot`, or is the first there.
    fn join_attachment(
        &mut self,
        dev: ObjectId,
        part: &Part,
        slot: Slot,
        hwpt: ObjectId,
        ioas: ObjectId,
    ) -> Outcome<()> {
        if slot.is_none() {
            self.reserve_regions(dev, ioas)?;
        }
        if self.attachment(part.group, slot).is_none() {
            let id = self.attachment_id(hwpt);
            let attachment = Some(Attachment { hwpt, by: dev });
            self.groups.entry(part.group).or_default().set(slot, attachment, id);
        }
        self.groups.entry(part.group).or_default().join(slot, dev);
        self.table.hold(hwpt);
        Ok(())
    }

    /// Moves the devices of a group to `hwpt` together, as requested by `dev`.
    fn move_attachment(
        &mut self,
        dev: ObjectId,
        part: &Part,
        slot: Slot,
        hwpt: ObjectId,
        ioas: ObjectId,
    ) -> Outcome<()> {
        let id = self.attachment_id(hwpt);
        let devices = self.devices_in(part.group, slot);
        let Some(group) = self.groups.get_mut(&part.group) else { return Ok(()) };
        let Some(Attachment { hwpt: old, .. }) = group.get(slot) else { return Ok(()) };
        let ended = group.id(slot);
        group.set(slot, Some(Attachment { hwpt, by: dev }), id);
        self.end_page_requests(old, ended)?;
        let before = self.stage2_of(old)?.ioas;
        for dev in &devices {
            self.table.hold(hwpt);
            if slot.is_none() && before != ioas {
                self.table.ioas_mut(before)?.space.unreserve(*dev);
                self.reserve_regions(*dev, ioas)?;
            }
        }
        self.leave(old, devices.len())
    }

    /// The devices of a group attached in `slot`.
    fn devices_in(&self, group: GroupId, slot: Slot) -> Vec<ObjectId> {
        self.groups.get(&group).map(|group| group.devices(slot)).unwrap_or_default()
    }

    /// Reserves in `ioas` the regions of `dev`, which were checked before.
    fn reserve_regions(&mut self, dev: ObjectId, ioas: ObjectId) -> Outcome<()> {
        let regions = self.table.device(dev)?.part.reserved_regions();
        self.table.ioas_mut(ioas)?.space.reserve(dev, &regions);
        Ok(())
    }

    /// `count` devices stop using `hwpt`, which is destroyed if it is automatic and unused.
    fn leave(&mut self, hwpt: ObjectId, count: usize) -> Outcome<()> {
        for _ in 0..count {
            self.table.release(hwpt);
        }
        let automatic = self.table.hwpt_paging(hwpt).is_ok_and(|hwpt| hwpt.automatic);
        if automatic && self.table.users(hwpt) == 0 {
            self.destroy(hwpt)?;
        }
        Ok(())
    }

    /// Ends the device of `selftest`, if it still exists.
    pub(super) fn end_mock_device(&mut self, selftest: ObjectId) -> Outcome<()> {
        let Selftest { dev, ref name } = *self.table.selftest(selftest)?;
        let name = name.clone();
        // When the iommufd is closed, all devices are unbound before other objects are destroyed.
        if self.table.device(dev).is_ok() {
            self.device_unbind(dev)?;
        }
        self.remove_mock_device(&name);
        Ok(())
    }

    fn remove_mock_device(&self, name: &str) {
        // Fails if it is already removed.
        let _ = self.machine.remove_device(name);
    }
}

#[cfg(feature = "selftest")]
impl Objects {
    /// Binds the mock device `name`, and attaches it to `pt`. Removes the device from the machine
    /// if that fails.
    pub fn add_mock_device(&mut self, name: &str, pt: ObjectId) -> Outcome<MockDeviceIds> {
        // Linux creates the objects in this order, which determines the IDs. They are not visible
        // before the end.
        let selftest = Selftest { dev: ObjectId(0), name: name.to_owned() };
        let inserted = self.table.insert(Object::Selftest(selftest));
        let selftest = inserted.inspect_err(|_| self.remove_mock_device(name))?;
        let attached = self.device_bind(name).and_then(|dev| {
            if let Ok(object) = self.table.selftest_mut(selftest) {
                object.dev = dev;
            }
            Ok((dev, self.device_change(dev, None, pt, Change::Attach)?))
        });
        match attached {
            Ok((dev, hwpt)) => Ok(MockDeviceIds { selftest, dev, hwpt }),
            Err(refusal) => {
                self.destroy(selftest)?;
                Err(refusal)
            }
        }
    }

    /// Attaches `slot` of the mock device of `selftest` to the page table `pt`.
    pub fn change_mock(
        &mut self,
        selftest: ObjectId,
        slot: Slot,
        pt: ObjectId,
        change: Change,
    ) -> Outcome<ObjectId> {
        let dev = self.table.selftest(selftest)?.dev;
        self.device_change(dev, slot, pt, change)
    }

    /// Reserves IOVAs of `ioas` for its lifetime.
    ///
    /// # Errors
    /// `ENOENT` there is no such IOAS; `EADDRINUSE` something is mapped or allowed there.
    pub fn reserve_iovas(
        &mut self,
        ioas: ObjectId,
        range: std::ops::RangeInclusive<u64>,
    ) -> Outcome<()> {
        let space = &mut self.table.ioas_mut(ioas)?.space;
        let range = [range];
        space.check_reservable(&range)?;
        // Owned by itself, so nothing removes the reservation.
        space.reserve(ioas, &range);
        Ok(())
    }
}

fn requesters(parts: &[Arc<Part>]) -> Vec<&Requester> {
    parts.iter().map(|part| &part.requester).collect()
}

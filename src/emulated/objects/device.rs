// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices: bind, attach, replace, detach, unbind.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::machine::UnitId;
use super::{DeviceConfig, Object, Objects};
use crate::emulated::hardware::Hardware;
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, FaultSink, HwCapabilities, HwInfo, HwptFlags, ObjectId};
use crate::spec::pci::Bdf;

/// What of a device is attached: the device itself (requests without PASID), or one PASID of it.
pub(crate) type Slot = Option<u32>;

/// A bound device.
#[derive(Debug)]
pub(crate) struct Device {
    pub name: String,
    pub unit: UnitId,
    pub rid: Bdf,
    pub config: DeviceConfig,
    /// The HWPT of each attached slot.
    pub attachments: BTreeMap<Slot, ObjectId>,
    pub vdevice: Option<ObjectId>,
}

impl Objects {
    /// `VFIO_DEVICE_BIND_IOMMUFD`: the device is blocked from here on.
    pub fn device_bind(&mut self, name: &str) -> Outcome<ObjectId> {
        let part = self.machine.part(name)?;
        if let Some(dev) = part.bound {
            return refuse(Errno::EBUSY, format!("'{name}' is bound already, as device {dev}"));
        }
        let device = Device {
            name: name.to_owned(),
            unit: part.unit,
            rid: part.rid,
            config: part.config.clone(),
            attachments: BTreeMap::new(),
            vdevice: None,
        };
        let (hardware, rid) = (self.hardware(device.unit)?, device.rid);
        let dev = self.table.insert(Object::Device(device))?;
        // The driver of the device holds it until unbind, so DESTROY never ends it.
        self.table.hold(dev);
        self.machine.set_bound(name, Some(dev));
        hardware.remove(rid.raw(), None);
        Ok(dev)
    }

    /// Closing the device: PASIDs are detached first, ascending, then the device itself.
    pub fn device_unbind(&mut self, dev: ObjectId) -> Outcome<()> {
        let device = self.table.device(dev)?;
        let vdevice = device.vdevice;
        let mut slots: Vec<Slot> = device.attachments.keys().copied().collect();
        slots.sort_by_key(|slot| (slot.is_none(), *slot));
        for slot in slots {
            self.device_detach(dev, slot)?;
        }
        if let Some(vdevice) = vdevice {
            self.end_vdevice(vdevice)?;
        }
        let device = self.table.device(dev)?;
        let (name, rid) = (device.name.clone(), device.rid);
        self.hardware(device.unit)?.set_fault_sink(rid.raw(), None);
        self.machine.set_bound(&name, None);
        self.table.release(dev);
        self.table.remove(dev);
        Ok(())
    }

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`: the first attachment of the slot, or a replacement.
    pub fn device_attach(&mut self, dev: ObjectId, slot: Slot, pt: ObjectId) -> Outcome<ObjectId> {
        self.table.device(dev)?;
        match self.table.get(pt) {
            Some(Object::Ioas(_)) => self.attach_automatic(dev, slot, pt),
            Some(Object::HwptPaging(_) | Object::HwptNested(_)) => {
                self.attach_hwpt(dev, slot, pt)?;
                Ok(pt)
            }
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("{kind} {pt} is no page table"))
            }
            None => refuse(Errno::ENOENT, format!("there is no object {pt}")),
        }
    }

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`. Nothing happens to a slot that is not attached.
    pub fn device_detach(&mut self, dev: ObjectId, slot: Slot) -> Outcome<()> {
        let device = self.table.device(dev)?;
        let Some(hwpt) = device.attachments.get(&slot).copied() else { return Ok(()) };
        let (unit, rid) = (device.unit, device.rid);
        self.hardware(unit)?.remove(rid.raw(), slot);
        self.table.device_mut(dev)?.attachments.remove(&slot);
        self.leave(dev, slot, unit, hwpt, None)
    }

    /// `IOMMU_GET_HW_INFO`.
    pub fn get_hw_info(&self, dev: ObjectId) -> Outcome<HwInfo> {
        let device = self.table.device(dev)?;
        let unit = self.machine.unit(device.unit)?;
        let pasid_bits = self.pasid_bits(device)?;
        Ok(HwInfo {
            data: unit.hardware.info(),
            capabilities: HwCapabilities::new()
                .with_dirty_tracking(unit.driver.dirty_tracking())
                .with_pci_pasid_exec(pasid_bits > 0 && device.config.pasid_exec)
                .with_pci_pasid_priv(pasid_bits > 0 && device.config.pasid_priv)
                .with_pci_ats_not_supported(!device.config.ats),
            max_pasid_log2: pasid_bits,
        })
    }

    /// Delivers faults of `dev` to `sink`.
    pub fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Outcome<()> {
        let device = self.table.device(dev)?;
        let hardware = self.hardware(device.unit)?;
        if !hardware.extensions().fault_reports {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU reports no faults to its user");
        }
        hardware.set_fault_sink(device.rid.raw(), Some((dev, sink)));
        Ok(())
    }

    /// Attaches to the first automatic HWPT of `ioas` that fits, or to a new one.
    fn attach_automatic(&mut self, dev: ObjectId, slot: Slot, ioas: ObjectId) -> Outcome<ObjectId> {
        let unit = self.table.device(dev)?.unit;
        for hwpt in self.table.ioas(ioas)?.hwpts.clone() {
            if !self.table.hwpt_paging(hwpt)?.automatic {
                continue;
            }
            match self.attach_hwpt(dev, slot, hwpt) {
                Ok(()) => return Ok(hwpt),
                Err(refusal) if refusal.errno == Errno::EINVAL => {}
                Err(refusal) => return Err(refusal),
            }
        }
        // What is no matter of the HWPT comes first, as it does in Linux.
        self.check_attach(dev, slot, ioas, HwptFlags::new())?;
        let hwpt = self.add_automatic(ioas, unit)?;
        if let Err(refusal) = self.attach_hwpt(dev, slot, hwpt) {
            self.destroy(hwpt)?;
            return Err(refusal);
        }
        Ok(hwpt)
    }

    /// Puts `hwpt` into the slot, in place of what is there.
    ///
    /// All that can fail comes first. (When the driver refuses a replacement, Linux leaves a VT-d
    /// device blocked in hardware while its objects say that the old HWPT is attached, and may drop
    /// the device's reserved regions; here the old attachment stays, as it should.)
    fn attach_hwpt(&mut self, dev: ObjectId, slot: Slot, hwpt: ObjectId) -> Outcome<()> {
        let device = self.table.device(dev)?;
        let old = device.attachments.get(&slot).copied();
        if old == Some(hwpt) {
            return Ok(());
        }
        let (ioas, flags) = (self.stage2_of(hwpt)?.ioas, self.hwpt_flags(hwpt)?);
        self.check_attach(dev, slot, ioas, flags)?;
        let device = self.table.device(dev)?;
        self.check_pasid(device, slot)?;
        self.check_driver(device, hwpt)?;

        let (unit, rid, reserved) = (device.unit, device.rid, device.config.reserved_regions());
        let (hardware, translation) = (self.hardware(unit)?, self.translation(hwpt)?);
        if slot.is_none() {
            let space = &mut self.table.ioas_mut(ioas)?.space;
            space.unreserve(dev);
            space.reserve(dev, &reserved);
        }
        self.table.hold(hwpt);
        self.attached_mut(hwpt)?.add(unit);
        self.table.device_mut(dev)?.attachments.insert(slot, hwpt);
        hardware.install(rid.raw(), slot, translation);
        match old {
            Some(old) => self.leave(dev, slot, unit, old, Some(ioas)),
            None => Ok(()),
        }
    }

    /// Checks what does not depend on the driver: reserved regions, then PASIDs.
    fn check_attach(
        &self,
        dev: ObjectId,
        slot: Slot,
        ioas: ObjectId,
        flags: HwptFlags,
    ) -> Outcome<()> {
        let device = self.table.device(dev)?;
        if slot.is_none() {
            self.table.ioas(ioas)?.space.check_reservable(&device.config.reserved_regions())?;
        }
        if flags.pasid() {
            return Ok(());
        }
        let with_pasid = device.attachments.keys().any(Option::is_some);
        if slot.is_some() || with_pasid {
            return refuse(
                Errno::EINVAL,
                "a HWPT without the PASID flag serves no PASID and no device with PASIDs attached",
            );
        }
        Ok(())
    }

    /// Whether the device has this PASID, and what serves the device itself lets it be used.
    fn check_pasid(&self, device: &Device, slot: Slot) -> Outcome<()> {
        let Some(pasid) = slot else { return Ok(()) };
        if let Some(hwpt) = device.attachments.get(&None) {
            if !self.hwpt_flags(*hwpt)?.pasid() {
                return refuse(
                    Errno::EINVAL,
                    format!("the device is attached to HWPT {hwpt}, which lacks the PASID flag"),
                );
            }
        }
        let bits = self.pasid_bits(device)?;
        // Linux has 0 stand for "no PASID" and so cannot attach it.
        if pasid == 0 || pasid >> bits != 0 {
            return refuse(
                Errno::EINVAL,
                format!("PASID {pasid:#x} is none of the device's, which have {bits} bits"),
            );
        }
        Ok(())
    }

    fn hardware(&self, unit: UnitId) -> Outcome<Arc<dyn Hardware>> {
        Ok(self.machine.unit(unit)?.hardware.clone())
    }

    /// Width of the PASIDs that both the device and its IOMMU have, in bits.
    fn pasid_bits(&self, device: &Device) -> Outcome<u8> {
        let unit = self.machine.unit(device.unit)?;
        Ok(device.config.pasid_bits.min(unit.hardware.pasid_bits()))
    }

    /// The slot no longer has `hwpt`; `now` is the IOAS it goes on to use.
    fn leave(
        &mut self,
        dev: ObjectId,
        slot: Slot,
        unit: UnitId,
        hwpt: ObjectId,
        now: Option<ObjectId>,
    ) -> Outcome<()> {
        let paging = self.stage2_of(hwpt)?;
        let ioas = paging.ioas;
        if slot.is_none() && now != Some(ioas) {
            self.table.ioas_mut(ioas)?.space.unreserve(dev);
        }
        self.attached_mut(hwpt)?.sub(unit);
        self.table.release(hwpt);
        let automatic = self.table.hwpt_paging(hwpt).is_ok_and(|hwpt| hwpt.automatic);
        if automatic && self.table.users(hwpt) == 0 {
            self.destroy(hwpt)?;
        }
        Ok(())
    }
}

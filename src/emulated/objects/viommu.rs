// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs and vDEVICEs, and the rule that all devices of a vIOMMU are behind one physical IOMMU.

use super::machine::UnitId;
use super::{Object, Objects};
use crate::emulated::refusal::{refuse, Outcome};
use crate::iommufd::{Errno, ObjectId, ViommuKind};

/// A slice of one physical IOMMU. It is bound to the IOMMU, not to the device that named it.
#[derive(Debug)]
pub(crate) struct Viommu {
    pub kind: ViommuKind,
    pub unit: UnitId,
    /// The nesting parent.
    pub parent: ObjectId,
}

/// A device as a vIOMMU knows it.
#[derive(Debug)]
pub(crate) struct Vdevice {
    pub viommu: ObjectId,
    pub dev: ObjectId,
    pub virt_id: u64,
}

impl Objects {
    /// `IOMMU_VIOMMU_ALLOC`.
    pub fn viommu_alloc(
        &mut self,
        kind: ViommuKind,
        dev: ObjectId,
        hwpt: ObjectId,
    ) -> Outcome<ObjectId> {
        if kind == ViommuKind::Default {
            return refuse(Errno::EOPNOTSUPP, "the default kind of vIOMMU is none");
        }
        let id = self.table.device(dev)?.unit;
        let unit = self.machine.unit(id)?;
        if !unit.hardware.viommu_kinds().contains(&kind) {
            return refuse(
                Errno::EOPNOTSUPP,
                format!("the IOMMU of device {dev} has no vIOMMU of kind {kind:?}"),
            );
        }
        let domain = self.table.hwpt_paging(hwpt)?.domain;
        if !domain.nest_parent {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_PAGING {hwpt} was not allocated with NEST_PARENT"),
            );
        }
        unit.driver.compatible(&domain)?;
        let viommu = Viommu { kind, unit: id, parent: hwpt };
        let viommu = self.table.insert(Object::Viommu(viommu))?;
        self.table.hold(hwpt);
        Ok(viommu)
    }

    /// `IOMMU_VDEVICE_ALLOC`.
    pub fn vdevice_alloc(
        &mut self,
        viommu: ObjectId,
        dev: ObjectId,
        virt_id: u64,
    ) -> Outcome<ObjectId> {
        let unit = self.table.viommu(viommu)?.unit;
        let device = self.table.device(dev)?;
        if device.unit != unit {
            return refuse(
                Errno::EINVAL,
                format!("device {dev} is not behind the IOMMU of vIOMMU {viommu}"),
            );
        }
        if let Some(vdevice) = device.vdevice {
            return refuse(Errno::EEXIST, format!("device {dev} has vDEVICE {vdevice} already"));
        }
        let same_id = |object: &Object| match object {
            Object::Vdevice(vdevice) => vdevice.viommu == viommu && vdevice.virt_id == virt_id,
            _ => false,
        };
        if let Some((id, _)) = self.table.iter().find(|(_, object)| same_id(object)) {
            return refuse(Errno::EEXIST, format!("vDEVICE {id} has the id {virt_id:#x} already"));
        }
        let vdevice = self.table.insert(Object::Vdevice(Vdevice { viommu, dev, virt_id }))?;
        self.table.device_mut(dev)?.vdevice = Some(vdevice);
        self.table.hold(viommu);
        self.table.hold(dev);
        Ok(vdevice)
    }

    /// Ends a vDEVICE because its device is gone.
    pub(super) fn end_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        self.forget_vdevice(id)?;
        self.table.remove_leaving_tombstone(id);
        Ok(())
    }

    /// Undoes what a vDEVICE holds.
    pub(super) fn forget_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        let &Vdevice { viommu, dev, .. } = self.table.vdevice(id)?;
        self.table.device_mut(dev)?.vdevice = None;
        self.table.release(viommu);
        self.table.release(dev);
        Ok(())
    }
}

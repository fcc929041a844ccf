// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vIOMMUs and vDEVICEs, and the rule that all devices of a vIOMMU are behind one physical IOMMU.

use std::sync::Arc;

use super::object::{Object, Vdevice, Viommu};
use super::Objects;
use crate::drivers::{UserData, ViommuRequest};
use crate::host::fault_injection::allocate;
use crate::host::mmaps::Mmap;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// The default type of vIOMMU, which is invalid (`IOMMU_VIOMMU_TYPE_DEFAULT`).
const DEFAULT: u32 = iommufd_bindings::iommu_viommu_type_IOMMU_VIOMMU_TYPE_DEFAULT;

impl Objects {
    /// `IOMMU_VIOMMU_ALLOC`.
    pub fn viommu_alloc(
        &mut self,
        kind: u32,
        dev: ObjectId,
        hwpt: ObjectId,
        data: Option<&dyn UserData>,
    ) -> Outcome<ObjectId> {
        if kind == DEFAULT {
            return refuse(Errno::EOPNOTSUPP, "a vIOMMU cannot have the default type");
        }
        let part = self.table.device(dev)?.part.clone();
        if !part.driver.has_viommu(kind) {
            return refuse(
                Errno::EOPNOTSUPP,
                format!("the IOMMU of device {dev} has no vIOMMU of type {kind:#x}"),
            );
        }
        let parent = self.table.hwpt_paging(hwpt)?;
        if !parent.flags.nest_parent() {
            return refuse(
                Errno::EINVAL,
                format!("HWPT_PAGING {hwpt} was not allocated with NEST_PARENT"),
            );
        }
        allocate("a vIOMMU")?;
        let (id, events) = (self.table.next_id()?, Arc::default());
        let mmap = |file, length| self.mmaps.add(Mmap { owner: id, length, file });
        let request = ViommuRequest {
            device: &part.requester,
            parent: &parent.domain,
            data,
            events: &events,
            mmap: &mmap,
        };
        let driver = part.driver.alloc_viommu(&request);
        let driver = driver.inspect_err(|_| self.mmaps.remove(id))?;
        let viommu = Viommu { kind, unit: part.unit, parent: hwpt, driver, events };
        let inserted = self.table.insert(Object::Viommu(viommu));
        let id = inserted.inspect_err(|_| self.mmaps.remove(id))?;
        self.table.hold(hwpt);
        Ok(id)
    }

    /// `IOMMU_VDEVICE_ALLOC`.
    pub fn vdevice_alloc(
        &mut self,
        viommu: ObjectId,
        dev: ObjectId,
        virt_id: u64,
    ) -> Outcome<ObjectId> {
        let object = self.table.viommu(viommu)?;
        let (unit, driver) = (object.unit, object.driver.clone());
        let device = self.table.device(dev)?;
        let part = device.part.clone();
        if part.unit != unit {
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
        allocate("a vDEVICE")?;
        driver.vdevice_init(&part.requester, virt_id)?;
        let vdevice = Object::Vdevice(Vdevice { viommu, dev, virt_id });
        let vdevice =
            self.table.insert(vdevice).inspect_err(|_| driver.vdevice_destroy(virt_id))?;
        self.table.device_mut(dev)?.vdevice = Some(vdevice);
        self.table.hold(viommu);
        self.table.hold(dev);
        Ok(vdevice)
    }

    /// Ends a vDEVICE because its device was unbound.
    pub(super) fn end_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        self.forget_vdevice(id)?;
        self.release_all(self.holds(id));
        self.table.remove_leaving_tombstone(id);
        Ok(())
    }

    /// Removes a vDEVICE from the driver and the device.
    pub(super) fn forget_vdevice(&mut self, id: ObjectId) -> Outcome<()> {
        let &Vdevice { viommu, dev, virt_id } = self.table.vdevice(id)?;
        self.table.viommu(viommu)?.driver.vdevice_destroy(virt_id);
        self.table.device_mut(dev)?.vdevice = None;
        Ok(())
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects and their lives: nesting parents and devices.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::counters::VtdNestingCounters;
use super::faults::FaultRouter;
use super::slot::{Attached, Slot};
use super::stage1::NestedHwpts;
use crate::iommufd::{Errno, FaultSink, HostError, HwInfo, ObjectId};
use crate::nesting::error::{Context, NestingError, Result};
use crate::nesting::hw_flags;
use crate::nesting::objects::Objects;
use crate::spec::pci::Bdf;
use crate::viommu::Requester;

/// A device of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device {
    /// The device object.
    pub dev: ObjectId,
    /// The nesting parent of the physical IOMMU it is behind.
    pub parent: Parent,
    /// What the host says of it.
    pub info: HwInfo,
}

/// What a new device may do until the virtual IOMMU configures it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Blocked,
    Passing,
}

/// A nesting parent: the `HWPT_PAGING` whose tables are stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    /// The HWPT.
    pub hwpt: ObjectId,
    /// Made with `IOMMU_HWPT_ALLOC_PASID`. As every attachment of a device must then have been
    /// (the RID's and each PASID's), so are the nested HWPTs on it.
    pub pasid: bool,
}

/// Everything behind the lock of [`super::VtdNesting`].
#[derive(Debug)]
pub(super) struct State {
    pub objects: Objects,
    faults: Arc<FaultRouter>,
    parents: Vec<Parent>,
    pub devices: BTreeMap<Bdf, Device>,
    pub nested: NestedHwpts,
    /// But for the host calls, which [`Objects`] counts.
    pub counters: VtdNestingCounters,
}

impl State {
    /// Without devices, on `objects`.
    pub fn new(objects: Objects, faults: Arc<FaultRouter>) -> Self {
        Self {
            objects,
            faults,
            parents: Vec::new(),
            devices: BTreeMap::new(),
            nested: NestedHwpts::default(),
            counters: VtdNestingCounters::default(),
        }
    }

    /// What was done so far.
    pub fn counters(&self) -> VtdNestingCounters {
        VtdNestingCounters { host_calls: self.objects.calls(), ..self.counters }
    }

    /// Whether the host walks second-stage tables that the guest owns.
    pub fn nests_second_stage(&self) -> bool {
        self.objects.extensions().guest_second_stage
    }

    /// See [`super::VtdNesting::add_device`].
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId, start: Start) -> Result<()> {
        let ioas = self.objects.ioas()?;
        if self.devices.iter().any(|(taken, device)| *taken == rid || device.dev == dev) {
            return Err(NestingError::DeviceExists(rid));
        }
        let info = self
            .objects
            .host()
            .get_hw_info(dev)
            .context(|| format!("asking which IOMMU {rid} is behind"))?;
        hw_flags::say_unknown(rid, &info);
        ioas.users().add_device(rid, dev, &info)?;
        let result = self.attach_first(rid, dev, info, start);
        if !self.devices.contains_key(&rid) {
            ioas.users().remove_device(dev);
        }
        result
    }

    /// Makes `dev` the device `rid`, on its nesting parent.
    fn attach_first(&mut self, rid: Bdf, dev: ObjectId, info: HwInfo, start: Start) -> Result<()> {
        if self.objects.extensions().fault_reports {
            let sink = Arc::downgrade(&self.faults) as Weak<dyn FaultSink>;
            self.objects
                .host()
                .set_fault_sink(dev, sink)
                .context(|| format!("asking for the faults of {rid}"))?;
        }
        self.faults.add(dev, rid);
        let parent = self.attach_to_parent(rid, dev, &info).inspect_err(|_| {
            self.faults.remove(dev);
        })?;
        self.devices.insert(rid, Device { dev, parent, info });
        self.nested.set(Requester::rid(rid), Slot::on(Attached::Parent, 0));
        if start == Start::Passing {
            return Ok(());
        }
        // The attachment has shown which parent is the device's. Whether the device may use it
        // is for the virtual IOMMU to say.
        if let Err(error) = self.detach(Requester::rid(rid)) {
            if let Err(error) = self.remove_device(rid) {
                log::error!("{rid} could not be blocked, and is still there: {error}");
            }
            return Err(error);
        }
        Ok(())
    }

    /// Attaches `dev` to the nesting parent of its physical IOMMU. The uAPI does not say which
    /// IOMMU that is; the parent of another one is refused with `EINVAL`. So each is tried, and if
    /// none fits this is the first device behind its IOMMU.
    fn attach_to_parent(&mut self, rid: Bdf, dev: ObjectId, info: &HwInfo) -> Result<Parent> {
        let pasid = info.max_pasid_log2 > 0;
        for parent in self.parents.clone() {
            if pasid && !parent.pasid {
                continue;
            }
            match self.objects.host().device_attach(dev, None, parent.hwpt) {
                Ok(_) => return Ok(parent),
                Err(error) if error.errno == Errno::EINVAL => {}
                Err(error) => return self.refuse(rid, dev, error),
            }
        }
        let hwpt = self.objects.alloc_parent(rid, dev, pasid)?;
        if let Err(error) = self.objects.host().device_attach(dev, None, hwpt) {
            let refused = self.refuse(rid, dev, error);
            self.objects.destroy(hwpt);
            return refused;
        }
        let parent = Parent { hwpt, pasid };
        self.parents.push(parent);
        Ok(parent)
    }

    /// After the first attach of a device failed: it stays blocked.
    fn refuse(&mut self, rid: Bdf, dev: ObjectId, source: HostError) -> Result<Parent> {
        self.counters.refused_attaches += 1;
        if let Err(error) = self.objects.detach(dev, None) {
            log::error!("{rid} could not be blocked: {error}");
        }
        Err(NestingError::Host { what: format!("attaching {rid} to its nesting parent"), source })
    }

    /// See [`super::VtdNesting::remove_device`].
    pub fn remove_device(&mut self, rid: Bdf) -> Result<()> {
        let device = *self.devices.get(&rid).ok_or(NestingError::NoDevice(rid))?;
        self.forget_pasids(rid)?;
        self.detach(Requester::rid(rid))?;
        self.devices.remove(&rid);
        self.faults.remove(device.dev);
        if let Ok(ioas) = self.objects.ioas() {
            ioas.users().remove_device(device.dev);
        }
        if self.devices.values().all(|other| other.parent != device.parent) {
            self.parents.retain(|parent| *parent != device.parent);
            self.objects.destroy(device.parent.hwpt);
        }
        Ok(())
    }

    /// See [`super::VtdNesting::shutdown`].
    pub fn shutdown(&mut self) -> Result<()> {
        let rids: Vec<Bdf> = self.devices.keys().copied().collect();
        let mut result = Ok(());
        for rid in rids {
            result = result.and(self.remove_device(rid));
        }
        // What is still attached holds its parent, and that the IOAS: the next call tries again.
        result?;
        self.objects.end()
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects and their lifecycle: physical IOMMUs, devices and their attachments.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::faults::FaultRouter;
use super::nested::{Attached, Nested, Slot};
use super::VtdNestingCounters;
use crate::iommufd::{Errno, FaultSink, HostError, HwInfo, ObjectId};
use crate::nesting::objects::Objects;
use crate::nesting::{hw_info, Context, NestingError, Result};
use crate::spec::pci::Bdf;
use crate::viommu::Requester;

/// A device of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device {
    /// The device object.
    pub dev: ObjectId,
    /// The nesting parent for its physical IOMMU.
    pub parent: Parent,
    /// The host's description of it.
    pub info: HwInfo,
}

/// The state of a new device until the virtual IOMMU configures it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Blocked,
    Passing,
}

/// Everything behind the lock of [`super::VtdNesting`].
#[derive(Debug)]
pub(super) struct State {
    pub objects: Objects,
    faults: Arc<FaultRouter>,
    parents: Parents,
    pub devices: BTreeMap<Bdf, Device>,
    pub nested: Nested,
    /// Except the host calls, which [`Objects`] counts.
    pub counters: VtdNestingCounters,
}

impl State {
    /// Without devices, on `objects`.
    pub fn new(objects: Objects, faults: Arc<FaultRouter>) -> Self {
        Self {
            objects,
            faults,
            parents: Parents::default(),
            devices: BTreeMap::new(),
            nested: Nested::default(),
            counters: VtdNestingCounters::default(),
        }
    }

    /// Statistics.
    pub fn counters(&self) -> VtdNestingCounters {
        VtdNestingCounters { host_calls: self.objects.calls(), ..self.counters }
    }

    /// Whether the host walks second-stage tables owned by the guest.
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
            .context(|| format!("querying the IOMMU of {rid}"))?;
        hw_info::say_unknown(rid, &info);
        ioas.users().add_device(rid, dev, &info)?;
        let result = self.attach_first(rid, dev, info, start);
        if !self.devices.contains_key(&rid) {
            ioas.users().remove_device(dev);
        }
        result
    }

    /// Adds `dev` as `rid`, attached to its nesting parent.
    fn attach_first(&mut self, rid: Bdf, dev: ObjectId, info: HwInfo, start: Start) -> Result<()> {
        if self.objects.extensions().fault_reports {
            let sink = Arc::downgrade(&self.faults) as Weak<dyn FaultSink>;
            self.objects
                .host()
                .set_fault_sink(dev, sink)
                .context(|| format!("subscribing to the faults of {rid}"))?;
        }
        self.faults.add(dev, rid);
        let parent = self
            .parents
            .attach(&mut self.objects, &mut self.counters, (rid, dev), &info)
            .inspect_err(|_| self.faults.remove(dev))?;
        self.devices.insert(rid, Device { dev, parent, info });
        self.nested.set(Requester::rid(rid), Slot::on(Attached::Parent, 0));
        if start == Start::Passing {
            return Ok(());
        }
        // The attach has shown which parent fits. Whether the device may use it is up to the
        // virtual IOMMU.
        if let Err(error) = self.detach(Requester::rid(rid)) {
            if let Err(error) = self.remove_device(rid) {
                log::error!("{rid} could not be blocked, and was not removed: {error}");
            }
            return Err(error);
        }
        Ok(())
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
            self.parents.end(device.parent, &mut self.objects);
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
        // What is still attached keeps its parent, and that the IOAS: the next call retries.
        result?;
        self.objects.end()
    }
}

/// A nesting parent: the `HWPT_PAGING` whose tables are stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    /// The HWPT.
    pub hwpt: ObjectId,
    /// Allocated with `IOMMU_HWPT_ALLOC_PASID`. All attachments of a device (the RID's and each
    /// PASID's) must then have that flag, and so must the nested HWPTs on this one.
    pub pasid: bool,
}

/// The nesting parents of all physical IOMMUs.
#[derive(Debug, Default)]
struct Parents(Vec<Parent>);

impl Parents {
    /// Attaches `dev` to the nesting parent of its physical IOMMU. The uAPI does not say which
    /// IOMMU that is, but refuses the parent of another one with `EINVAL`. So each is tried, and if
    /// none fits, this is the first device behind its IOMMU.
    pub fn attach(
        &mut self,
        objects: &mut Objects,
        counters: &mut VtdNestingCounters,
        (rid, dev): (Bdf, ObjectId),
        info: &HwInfo,
    ) -> Result<Parent> {
        // After the first attach of a device failed, it stays blocked.
        let mut refuse = |objects: &mut Objects, source: HostError| {
            counters.refused_attaches += 1;
            if let Err(error) = objects.detach(dev, None) {
                log::error!("{rid} could not be blocked: {error}");
            }
            let what = format!("attaching {rid} to its nesting parent");
            Err(NestingError::Host { what, source })
        };
        let pasid = info.max_pasid_log2 > 0;
        for parent in self.0.iter().filter(|parent| parent.pasid || !pasid) {
            match objects.host().device_attach(dev, None, parent.hwpt) {
                Ok(_) => return Ok(*parent),
                Err(error) if error.errno == Errno::EINVAL => {}
                Err(error) => return refuse(objects, error),
            }
        }
        let hwpt = objects.alloc_parent(rid, dev, pasid)?;
        if let Err(error) = objects.host().device_attach(dev, None, hwpt) {
            let refused = refuse(objects, error);
            objects.destroy(hwpt);
            return refused;
        }
        let parent = Parent { hwpt, pasid };
        self.0.push(parent);
        Ok(parent)
    }

    /// Destroys a nesting parent that nothing uses any more.
    pub fn end(&mut self, parent: Parent, objects: &mut Objects) {
        self.0.retain(|other| *other != parent);
        objects.destroy(parent.hwpt);
    }
}

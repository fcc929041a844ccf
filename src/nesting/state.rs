// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects and their lives: IOAS, nesting parents, devices, and what is to be destroyed.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::counters::NestingCounters;
use super::error::{Context, NestingError, Result};
use super::faults::FaultRouter;
use super::memory::SharedIoas;
use super::slot::{Attached, Slot};
use super::stage1::NestedHwpts;
use crate::iommufd::{
    Errno, FaultSink, HostError, HostIommu, HwInfo, HwptAlloc, HwptData, HwptFlags, MapTarget,
    ObjectId, Protection, UserMemory,
};
use crate::spec::pci::Bdf;
use crate::viommu::Requester;

/// So many objects may wait for a destroy that failed to succeed; beyond, no HWPT is made, so that
/// a guest cannot pile up host objects that never go.
const MAX_DOOMED: usize = 16;

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

/// A nesting parent: the `HWPT_PAGING` whose tables are stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    /// The HWPT.
    pub hwpt: ObjectId,
    /// Made with `IOMMU_HWPT_ALLOC_PASID`. As every attachment of a device must then have been
    /// (the RID's and each PASID's), so are the nested HWPTs on it.
    pub pasid: bool,
}

/// Everything behind the lock of [`super::Nesting`].
#[derive(Debug)]
pub(super) struct State {
    host: Arc<dyn HostIommu>,
    faults: Arc<FaultRouter>,
    /// Destroyed by the last who shares it.
    ioas: Option<Arc<SharedIoas>>,
    parents: Vec<Parent>,
    pub devices: BTreeMap<Bdf, Device>,
    /// What each requester is attached to; a requester without a slot is detached.
    pub slots: BTreeMap<Requester, Slot>,
    pub nested: NestedHwpts,
    doomed: Vec<ObjectId>,
    pub counters: NestingCounters,
}

impl State {
    /// An empty IOAS on `host`.
    pub fn new(host: Arc<dyn HostIommu>, faults: Arc<FaultRouter>) -> Result<Self> {
        let mut state = Self::without_memory(host, faults);
        let ioas = state.host().ioas_alloc().context(|| "making the IOAS".into())?;
        state.ioas = Some(Arc::new(SharedIoas::new(ioas)));
        Ok(state)
    }

    /// Another one on the same host and the same IOAS.
    pub fn beside(&self, faults: Arc<FaultRouter>) -> Result<Self> {
        let mut state = Self::without_memory(self.host.clone(), faults);
        state.ioas = Some(self.ioas()?);
        Ok(state)
    }

    fn without_memory(host: Arc<dyn HostIommu>, faults: Arc<FaultRouter>) -> Self {
        Self {
            host,
            faults,
            ioas: None,
            parents: Vec::new(),
            devices: BTreeMap::new(),
            slots: BTreeMap::new(),
            nested: NestedHwpts::default(),
            doomed: Vec::new(),
            counters: NestingCounters::default(),
        }
    }

    fn ioas(&self) -> Result<Arc<SharedIoas>> {
        self.ioas.clone().ok_or(NestingError::ShutDown)
    }

    /// The host, for one call, which is counted.
    pub fn host(&mut self) -> &dyn HostIommu {
        self.counters.host_calls += 1;
        &*self.host
    }

    /// Whether the host walks second-stage tables that the guest owns.
    pub fn nests_second_stage(&self) -> bool {
        self.host.extensions().guest_second_stage
    }

    /// See [`super::Nesting::map_memory`].
    pub fn map_memory(&mut self, gpa: u64, memory: &UserMemory, access: Protection) -> Result<()> {
        let ioas = self.ioas()?;
        let mut users = ioas.users();
        if !access.write {
            users.check_read_only(gpa)?;
        }
        self.host()
            .ioas_map(ioas.id(), memory, MapTarget::Fixed(gpa), access)
            .context(|| format!("mapping guest memory at {gpa:#x}"))?;
        if !access.write {
            users.mapped_read_only(gpa);
        }
        Ok(())
    }

    /// See [`super::Nesting::unmap_memory`].
    pub fn unmap_memory(&mut self, gpa: u64, length: u64) -> Result<()> {
        let ioas = self.ioas()?;
        let mut users = ioas.users();
        self.host()
            .ioas_unmap(ioas.id(), gpa, length)
            .context(|| format!("unmapping guest memory at {gpa:#x}"))?;
        users.unmapped(gpa, length);
        Ok(())
    }

    /// See [`super::Nesting::add_device`].
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId) -> Result<()> {
        let ioas = self.ioas()?;
        if self.devices.iter().any(|(taken, device)| *taken == rid || device.dev == dev) {
            return Err(NestingError::DeviceExists(rid));
        }
        let info = self
            .host()
            .get_hw_info(dev)
            .context(|| format!("asking which IOMMU {rid} is behind"))?;
        ioas.users().add_device(rid, dev, &info)?;
        let result = self.attach_blocked(ioas.id(), rid, dev, info);
        if !self.devices.contains_key(&rid) {
            ioas.users().remove_device(dev);
        }
        result
    }

    /// Makes `dev` the device `rid`, on its nesting parent but blocked.
    fn attach_blocked(
        &mut self,
        ioas: ObjectId,
        rid: Bdf,
        dev: ObjectId,
        info: HwInfo,
    ) -> Result<()> {
        if self.host.extensions().fault_reports {
            let sink = Arc::downgrade(&self.faults) as Weak<dyn FaultSink>;
            self.host()
                .set_fault_sink(dev, sink)
                .context(|| format!("asking for the faults of {rid}"))?;
        }
        self.faults.add(dev, rid);
        let parent = self.attach_to_parent(ioas, rid, dev, &info).inspect_err(|_| {
            self.faults.remove(dev);
        })?;
        self.devices.insert(rid, Device { dev, parent, info });
        self.slots.insert(Requester::rid(rid), Slot::on(Attached::Parent));
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
    fn attach_to_parent(
        &mut self,
        ioas: ObjectId,
        rid: Bdf,
        dev: ObjectId,
        info: &HwInfo,
    ) -> Result<Parent> {
        let pasid = info.max_pasid_log2 > 0;
        for parent in self.parents.clone() {
            if pasid && !parent.pasid {
                continue;
            }
            match self.host().device_attach(dev, None, parent.hwpt) {
                Ok(_) => return Ok(parent),
                Err(error) if error.errno == Errno::EINVAL => {}
                Err(error) => return self.refuse(rid, dev, error),
            }
        }
        let args = HwptAlloc {
            flags: HwptFlags::new().with_nest_parent(true).with_pasid(pasid),
            dev,
            pt: ioas,
            data: HwptData::None,
            fault: None,
        };
        let hwpt = self.alloc_hwpt(&args, || format!("making a nesting parent for {rid}"))?;
        if let Err(error) = self.host().device_attach(dev, None, hwpt) {
            let refused = self.refuse(rid, dev, error);
            self.destroy(hwpt);
            return refused;
        }
        let parent = Parent { hwpt, pasid };
        self.parents.push(parent);
        Ok(parent)
    }

    /// After the first attach of a device failed: it stays blocked.
    fn refuse(&mut self, rid: Bdf, dev: ObjectId, source: HostError) -> Result<Parent> {
        self.counters.refused_attaches += 1;
        if let Err(error) = self.detach_on_host(dev, None) {
            log::error!("{rid} could not be blocked: {error}");
        }
        Err(NestingError::Host { what: format!("attaching {rid} to its nesting parent"), source })
    }

    /// See [`super::Nesting::remove_device`].
    pub fn remove_device(&mut self, rid: Bdf) -> Result<()> {
        let device = *self.devices.get(&rid).ok_or(NestingError::NoDevice(rid))?;
        self.forget_pasids(rid)?;
        self.detach(Requester::rid(rid))?;
        self.devices.remove(&rid);
        self.faults.remove(device.dev);
        if let Some(ioas) = &self.ioas {
            ioas.users().remove_device(device.dev);
        }
        if self.devices.values().all(|other| other.parent != device.parent) {
            self.parents.retain(|parent| *parent != device.parent);
            self.destroy(device.parent.hwpt);
        }
        Ok(())
    }

    /// See [`super::Nesting::shutdown`].
    pub fn shutdown(&mut self) -> Result<()> {
        let rids: Vec<Bdf> = self.devices.keys().copied().collect();
        let mut result = Ok(());
        for rid in rids {
            result = result.and(self.remove_device(rid));
        }
        // What is still attached holds its parent, and that the IOAS: the next call tries again.
        result?;
        let last_user = self.ioas.take().and_then(Arc::into_inner);
        self.doomed.extend(last_user.map(|ioas| ioas.id()));
        self.sweep().or_else(|_| self.sweep()).context(|| "destroying the last host objects".into())
    }

    /// Makes a HWPT.
    pub fn alloc_hwpt(&mut self, args: &HwptAlloc, what: impl Fn() -> String) -> Result<ObjectId> {
        if self.doomed.len() >= MAX_DOOMED {
            self.sweep().context(&what)?;
        }
        self.host().hwpt_alloc(args).context(what)
    }

    /// Destroys an object that nothing uses; if the host fails to, later.
    pub fn destroy(&mut self, id: ObjectId) {
        self.doomed.push(id);
        if let Err(error) = self.sweep() {
            log::warn!("left for later: {error}");
        }
    }

    /// Destroys what is to be destroyed, in the order it came: users before what they use.
    fn sweep(&mut self) -> crate::iommufd::Result<()> {
        let mut result = Ok(());
        for id in std::mem::take(&mut self.doomed) {
            match self.host().destroy(id) {
                Err(error) if error.errno != Errno::ENOENT => {
                    self.doomed.push(id);
                    result = Err(error);
                }
                _ => {}
            }
        }
        result
    }
}

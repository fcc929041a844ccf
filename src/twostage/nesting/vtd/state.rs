// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host objects and their lifecycle: physical IOMMUs, devices and their attachments.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::faults::FaultRouter;
use super::flush_set::Scratch;
use super::nested::Nested;
use super::shadow::serving::Serving;
use super::shadow::Shadow;
use super::VtdNestingCounters;
use crate::iommufd::{FaultSink, HwInfo, HwInfoData, ObjectId};
use crate::nesting::guest_ioas::{GuestIoas, Mirrors};
use crate::nesting::objects::Objects;
use crate::nesting::page_route::deliver;
use crate::nesting::reader::QueueThread;
use crate::nesting::{host_vtd, hw_info, Context, NestingError, Result};
use crate::spec::pci::Bdf;
use crate::spec::vtd::PageRange;
use crate::threads::{StdThreads, ThreadStart};
use crate::viommu::vtd::{HostVtd, VtdConfig};
use crate::viommu::Requester;

/// A device of the guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Device {
    /// The device object.
    pub dev: ObjectId,
    /// The nesting parent for its physical IOMMU; `None` until an attach has shown which it is.
    pub parent: Option<Parent>,
    /// The host's description of it.
    pub info: HwInfo,
    /// Width of the IOVAs that the host maps for it, where tables are mirrored.
    pub iova_bits: u8,
    /// Its tables get the fault queue: page requests are offered, and the host has not refused it.
    pub page_requests: bool,
}

/// Everything behind the lock of [`super::VtdNesting`].
#[derive(Debug)]
pub(super) struct State {
    pub objects: Objects,
    faults: Arc<FaultRouter>,
    pub parents: Parents,
    pub devices: BTreeMap<Bdf, Device>,
    pub nested: Nested,
    /// With what the guest's tables are mirrored; without it, the host nests them.
    pub shadow: Option<Shadow>,
    /// How that is decided; `None`: tables are nested.
    pub serving: Option<Serving>,
    /// Reads the fault queue, once there is one.
    pub pages: Option<QueueThread>,
    /// Starts it.
    pub threads: Arc<dyn ThreadStart>,
    /// Who follows the guest's memory map for the mirrors.
    mirrors: Weak<dyn Mirrors>,
    /// Except the host calls, which [`Objects`] counts.
    pub counters: VtdNestingCounters,
    /// Memory of invalidations.
    pub scratch: Scratch,
}

impl State {
    /// Without devices, on `objects`.
    pub fn new(
        objects: Objects,
        faults: Arc<FaultRouter>,
        serving: Option<Serving>,
        mirrors: Weak<dyn Mirrors>,
    ) -> Self {
        Self {
            shadow: None,
            scratch: Scratch::default(),
            pages: None,
            threads: Arc::new(StdThreads),
            serving,
            mirrors,
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
        let mirror_pieces = self.shadow.as_ref().map_or(0, |shadow| shadow.size().1);
        VtdNestingCounters { host_calls: self.objects.calls(), mirror_pieces, ..self.counters }
    }

    /// Whether the host walks second-stage tables owned by the guest.
    pub fn nests_second_stage(&self) -> bool {
        self.objects.extensions().guest_second_stage
    }

    /// See [`super::VtdNesting::add_device`].
    pub fn add_device(&mut self, rid: Bdf, dev: ObjectId) -> Result<()> {
        let ioas = self.objects.ioas()?;
        if self.devices.iter().any(|(taken, device)| *taken == rid || device.dev == dev) {
            return Err(NestingError::DeviceExists(rid));
        }
        let info = self
            .objects
            .host()
            .get_hw_info(dev)
            .context(|| format!("querying the IOMMU of {rid}"))?;
        let added = self.decide(rid, &info, &ioas);
        let added = added.and_then(|()| self.add_as_decided(rid, dev, info, &ioas));
        self.undecide_without_devices();
        added
    }

    fn add_as_decided(
        &mut self,
        rid: Bdf,
        dev: ObjectId,
        info: HwInfo,
        ioas: &GuestIoas,
    ) -> Result<()> {
        if self.shadow.is_some() {
            // Any IOMMU maps an IOAS.
            return self.take_in(rid, dev, info);
        }
        if !matches!(info.data, HwInfoData::Vtd(_)) {
            return Err(NestingError::NoVtd(rid));
        }
        hw_info::say_unknown(rid, &info);
        if self.serving.as_ref().is_some_and(|serving| serving.config.page_requests) {
            self.open_fault_queue(rid)?;
        }
        ioas.users().add_device(rid, dev, &info)?;
        self.take_in(rid, dev, info).inspect_err(|_| ioas.users().remove_device(dev))
    }

    /// Decides, for the first device, whether tables are mirrored.
    fn decide(&mut self, rid: Bdf, info: &HwInfo, ioas: &GuestIoas) -> Result<()> {
        let Some(serving) = self.serving.as_mut().filter(|_| self.shadow.is_none()) else {
            return Ok(());
        };
        let unit = host_vtd(rid.to_string(), info, self.objects.extensions());
        let why = serving.why_mirrored(rid, unit.as_ref()).filter(|_| self.devices.is_empty());
        if let Some(why) = why {
            ioas.add_mirrors(self.mirrors.clone())?;
            log::info!("the guest's tables are mirrored: {why}");
            self.shadow = Some(Shadow::new(serving, why));
            self.faults.set_mirrored(true);
        }
        Ok(())
    }

    /// The next device is the first one, if this was the last.
    fn undecide_without_devices(&mut self) {
        self.drop_prepared();
        if self.devices.is_empty() && self.shadow.take().is_some() {
            self.faults.set_mirrored(false);
        }
    }

    /// See [`crate::viommu::vtd::VtdHostSide::offers`].
    pub fn set_offered(&mut self, config: &VtdConfig) {
        if let Some(serving) = &mut self.serving {
            serving.config = config.clone();
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.set_offered(config);
        }
    }

    /// See [`crate::viommu::vtd::VtdHostSide::invalidate_device_tlb`].
    pub fn invalidate_device_tlb(
        &mut self,
        rid: Bdf,
        pasid: Option<u32>,
        range: PageRange,
    ) -> bool {
        let device = self.devices.get(&rid).map(|device| device.dev);
        let Some(dev) = device.filter(|_| self.objects.extensions().device_tlbs) else {
            return true;
        };
        let (host, addresses) = (self.objects.host(), range.address()..=range.last());
        host.device_tlb_invalidate(dev, pasid, addresses).unwrap_or_else(|error| {
            log::warn!("the device TLB of {rid}: {error}");
            false
        })
    }

    /// See [`super::VtdNesting::mirrors_because`].
    pub fn mirrors_because(&self) -> Option<&str> {
        self.shadow.as_ref().map(Shadow::because)
    }

    /// See [`super::VtdNesting::host_unit`].
    pub fn host_unit(&self, rid: Bdf, name: String) -> Option<HostVtd> {
        let device = self.devices.get(&rid)?;
        let unit = host_vtd(name.clone(), &device.info, self.objects.extensions());
        if self.shadow.is_none() {
            return unit;
        }
        // Only of a VT-d it is known what others behind it may have.
        let own = device.info.max_pasid_log2;
        let pasid_bits = unit.map_or(own, |unit| unit.ecap.pasid_bits());
        Some(HostVtd::mirrored(name, device.iova_bits, pasid_bits))
    }

    /// Adds `dev` as `rid`, attached to nothing.
    fn take_in(&mut self, rid: Bdf, dev: ObjectId, mut info: HwInfo) -> Result<()> {
        if self.objects.extensions().fault_reports {
            let sink = Arc::downgrade(&self.faults) as Weak<dyn FaultSink>;
            self.objects
                .host()
                .set_fault_sink(dev, sink)
                .context(|| format!("subscribing to the faults of {rid}"))?;
        }
        // Is it the first device that can only be behind an IOMMU of its own? Then it is known here
        // whether that can nest.
        let parent = match self.parents.fitting(&info).is_empty() {
            _ if self.shadow.is_some() => Some(self.bypass(rid, dev, &mut info)?),
            true => Some(self.parents.alloc(&mut self.objects, rid, dev, &info)?),
            false => None,
        };
        let iova_bits = match (&self.shadow, parent) {
            (Some(_), Some(Parent { hwpt, pasid })) => {
                self.iova_bits(rid, dev).inspect_err(|_| {
                    if pasid {
                        self.objects.destroy(hwpt)
                    }
                })?
            }
            _ => 0,
        };
        self.faults.add(dev, rid);
        let page_requests = self.pages.is_some() && self.shadow.is_none();
        self.devices.insert(rid, Device { dev, parent, info, iova_bits, page_requests });
        Ok(())
    }

    /// Makes the fault queue of the host, if there is none, for the guest's `rid` and those after
    /// it: before any of them is in use, as it takes a thread.
    fn open_fault_queue(&mut self, rid: Bdf) -> Result<()> {
        if self.pages.is_some() {
            return Ok(());
        }
        let queue = self.objects.host().fault_queue_alloc();
        let queue = queue.context(|| format!("allocating a fault queue for {rid}"))?;
        let object = queue.object();
        let router = Arc::downgrade(&self.faults);
        let bring = move || router.upgrade().map_or(Ok(false), |router| router.bring_pages());
        match deliver(&*self.threads, queue, &self.faults.pages, bring) {
            Ok(pages) => self.pages = Some(pages),
            Err(error) => {
                self.objects.destroy(object);
                return Err(NestingError::NoThread(error.to_string()));
            }
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
        if let Some(shadow) = self.shadow.as_mut() {
            shadow.forget(rid);
        }
        if let Some(parent) = device.parent.filter(|it| self.shadow.is_none() || it.pasid) {
            if self.devices.values().all(|other| other.parent != device.parent) {
                self.parents.end(parent, &mut self.objects);
            }
        }
        self.undecide_without_devices();
        Ok(())
    }

    /// See [`super::VtdNesting::shutdown`].
    ///
    /// `queue` is the fault queue, which nobody reads any more.
    pub fn shutdown(&mut self, queue: Option<ObjectId>) -> Result<()> {
        let rids: Vec<Bdf> = self.devices.keys().copied().collect();
        let mut result = Ok(());
        for rid in rids {
            result = result.and(self.remove_device(rid));
        }
        // After the HWPTs that use it.
        queue.into_iter().for_each(|queue| self.objects.destroy(queue));
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
pub(super) struct Parents(Vec<Parent>);

impl Parents {
    /// Those that the IOMMU of a device may have, which the host describes by `info`. The uAPI does
    /// not say behind which IOMMU a device is, but refuses to attach it to the parent of another
    /// one with `EINVAL`. Allocating on a parent proves nothing: Linux looks at the IOMMU of that
    /// only when a device is attached.
    pub fn fitting(&self, info: &HwInfo) -> Vec<Parent> {
        let pasid = info.max_pasid_log2 > 0;
        self.0.iter().copied().filter(|parent| parent.pasid || !pasid).collect()
    }

    /// Allocates one for the IOMMU of `dev`, the guest's `rid`.
    pub fn alloc(
        &mut self,
        objects: &mut Objects,
        rid: Bdf,
        dev: ObjectId,
        info: &HwInfo,
    ) -> Result<Parent> {
        let pasid = info.max_pasid_log2 > 0;
        let parent = Parent { hwpt: objects.alloc_parent(rid, dev, pasid)?, pasid };
        self.0.push(parent);
        Ok(parent)
    }

    /// Destroys a nesting parent that nothing uses any more.
    pub fn end(&mut self, parent: Parent, objects: &mut Objects) {
        self.0.retain(|other| *other != parent);
        objects.destroy(parent.hwpt);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host: implements the iommufd verbs within this process.

use std::ops::RangeInclusive;
use std::sync::{Arc, MutexGuard, Weak};

use crate::dma::DmaPort;
use crate::drivers::{DriverInfo, OwnArray, OwnData, Partial, UserData};
use crate::host::bitmap;
use crate::host::context::{Context, MappedPages, MmapRequest};
use crate::host::device::DeviceConfig;
use crate::host::event_file::{OpenFaultQueue, OpenVeventq};
use crate::host::graph::ObjectGraph;
use crate::host::machine::{EmulatedUnit, Machine, MachineError, UnitId};
use crate::host::objects::{HwptRequest, MapRequest, Objects, Stop, Unmap};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::{Source, PAGE_SIZE};
use twostage::iommufd::{
    DirtyRange, Errno, EventQueue, Extensions, FaultQueue, FaultSink, HostIommu, HwInfo,
    HwInfoData, HwptAlloc, InvalidateData, InvalidateError, IovaRanges, MapTarget, ObjectId,
    PageRequest, Protection, Result, UserMemory, Verb, ViommuKind,
};
use twostage::spec::pci::Bdf;

/// How often access objects are told to unpin one area before that counts as a deadlock.
const TRIES: u32 = 100;

/// An iommufd on a [`Machine`] of emulated IOMMUs and devices, like an open `/dev/iommu`.
///
/// Its objects follow Linux 7.2: the same rules, checked in the same order, with the same errno.
/// Where Linux contradicts its own documentation (a replacement that fails half-way), the contract
/// of [`HostIommu`] applies instead.
///
/// # Locks
/// One lock covers the objects of one iommufd. With it held, the [`Machine`] is accessed and IOMMU
/// drivers are called, each of which has its own lock and takes no other: iommufds that use the
/// same IOMMU wait for it, and never for each other. Nothing holds the locks of two iommufds. DMA
/// takes none of these, except for page requests, which are made outside of its critical section.
///
/// ```
/// use std::sync::Arc;
/// use twostage_emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
/// use twostage::iommufd::{HostIommu, MapTarget, Protection, UserMemory};
/// use twostage::spec::pci::Bdf;
/// use vm_memory::{GuestAddress, GuestRegionMmap};
///
/// let host = EmulatedHost::new();
/// let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
/// let rid = Bdf::new(0, 4, 0).expect("a PCI address");
/// host.add_device("disk", unit, rid, DeviceConfig::default())?;
///
/// let (dev, ioas) = (host.device_bind("disk")?, host.ioas_alloc()?);
/// let region = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None)?);
/// let memory = UserMemory::whole(region);
/// host.ioas_map(ioas, &memory, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
/// host.device_attach(dev, None, ioas)?;
///
/// let mut port = host.dma_port("disk").expect("the device");
/// port.write(DmaAttributes::default(), 0x8000, b"hello")?;
/// assert!(port.write(DmaAttributes::default(), 0x9000, b"hello").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EmulatedHost {
    context: Arc<Context>,
}

impl Machine {
    /// Opens an iommufd without objects.
    pub fn open(self: &Arc<Self>) -> Arc<EmulatedHost> {
        Arc::new(EmulatedHost { context: Context::new(self.clone()) })
    }
}

impl EmulatedHost {
    /// A host without IOMMUs, devices and objects, on a new machine.
    pub fn new() -> Arc<Self> {
        Machine::new().open()
    }

    /// Its machine, on which more iommufds can be opened.
    pub fn machine(&self) -> &Arc<Machine> {
        self.context.machine()
    }

    /// Adds an IOMMU: [`Machine::add_unit`].
    pub fn add_unit(&self, unit: impl Into<EmulatedUnit>) -> UnitId {
        self.machine().add_unit(unit)
    }

    /// Adds a device: [`Machine::add_device`].
    ///
    /// # Errors
    /// Those of [`Machine::add_device`].
    pub fn add_device(
        &self,
        name: &str,
        unit: UnitId,
        rid: Bdf,
        config: DeviceConfig,
    ) -> Result<(), MachineError> {
        self.machine().add_device(name, unit, rid, config)
    }

    /// The DMA port of a device: [`Machine::dma_port`].
    pub fn dma_port(&self, name: &str) -> Option<DmaPort> {
        self.machine().dma_port(name)
    }

    /// A snapshot of the objects and their relations.
    pub fn graph(&self) -> ObjectGraph {
        ObjectGraph::of(&self.objects())
    }

    /// Number of objects, including automatic ones and devices.
    pub fn live_objects(&self) -> usize {
        self.objects().table().len()
    }

    /// Number of pinned bytes: each page once, however many HWPTs and IOASes share it.
    pub fn pinned_bytes(&self) -> u64 {
        self.objects().pinned_bytes()
    }

    /// The device `dev` sends a page request (PCI PRI). A group of requests is delivered with its
    /// last one, to the fault queue of the HWPT that `dev` or its PASID is attached to.
    ///
    /// # Errors
    /// `ENOENT` there is no such device; `EINVAL` the HWPT has no fault queue.
    pub fn page_request(&self, dev: ObjectId, request: PageRequest) -> Result<()> {
        let outcome = self.objects().page_request(dev, request);
        outcome.map_err(|refusal| refusal.of(Verb::PageRequest, dev))
    }

    /// Reports an event of a vIOMMU, like its driver: `data` in the layout of vEVENTQs of type
    /// `kind`.
    ///
    /// # Errors
    /// `ENOENT` there is no such vIOMMU; `EOPNOTSUPP` it has no vEVENTQ of this type.
    pub fn report_event(&self, viommu: ObjectId, kind: u32, data: &[u8]) -> Result<()> {
        let events = self.objects().table().viommu(viommu).map(|viommu| viommu.events.clone());
        let outcome = events.and_then(|events| events.report(kind, data));
        outcome.map_err(|refusal| refusal.of(Verb::Vevent, viommu))
    }

    /// Closes the iommufd: detaches and unbinds every device, the hardware first, then destroys all
    /// objects. IOMMUs and devices stay, so it can be used again.
    pub fn close(&self) {
        self.context.detach_accesses();
        self.objects().close();
    }

    /// The shared state of the iommufd's files.
    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The objects, locked.
    pub(crate) fn objects(&self) -> MutexGuard<'_, Objects> {
        self.context.objects()
    }

    /// `IOMMU_IOAS_UNMAP`; returns the bytes unmapped.
    pub(crate) fn unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Outcome<u64> {
        self.objects().table().ioas(ioas)?;
        let mut unmap = Unmap::of_ioctl(ioas, iova, length)?;
        self.finish_unmap(&mut unmap)?;
        if unmap.bytes == 0 && length != u64::MAX {
            return refuse(Errno::ENOENT, format!("nothing is mapped at {iova:#x}+{length:#x}"));
        }
        Ok(unmap.bytes)
    }

    /// Continues `unmap` until it is done.
    ///
    /// # Errors
    /// As [`crate::host::objects::Objects::unmap`]; `EDEADLK` an access object does not unpin.
    pub(crate) fn finish_unmap(&self, unmap: &mut Unmap) -> Outcome<()> {
        let mut tries = 0;
        let mut waits_for = None;
        loop {
            let mut objects = self.objects();
            let Stop::Pinned(iova, length) = objects.unmap(unmap)? else { return Ok(()) };
            let listeners = objects.unmap_listeners(unmap.ioas)?;
            drop(objects);
            tries = if waits_for.replace(iova) == Some(iova) { tries + 1 } else { 1 };
            if tries > TRIES {
                return refuse(Errno::EDEADLK, format!("{iova:#x}+{length:#x} stays pinned"));
            }
            listeners.iter().for_each(|listener| listener.unmap(iova, length));
        }
    }

    /// `mmap(2)` on `/dev/iommu`: what to map instead.
    ///
    /// # Errors
    /// `EINVAL` not a whole number of pages, or not shared; `EPERM` executable; `ENXIO` not exactly
    /// what a driver has offered.
    pub fn mmap(&self, request: MmapRequest) -> Result<MappedPages, Errno> {
        let MmapRequest { offset, length, shared, executable } = request;
        if !length.is_multiple_of(PAGE_SIZE) || !shared {
            return Err(Errno::EINVAL);
        }
        if executable {
            return Err(Errno::EPERM);
        }
        self.context().map(offset, length).ok_or(Errno::ENXIO)
    }
}

impl HostIommu for EmulatedHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        self.context
            .device_bind(&mut self.objects(), name)
            .map_err(|refusal| refusal.of(Verb::DeviceBind, None))
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        self.objects().device_unbind(dev).map_err(|refusal| refusal.of(Verb::DeviceUnbind, dev))
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        let mut objects = self.objects();
        check_pasid(&objects, dev, pasid)
            .and_then(|()| objects.device_attach(dev, pasid, pt))
            .map_err(|refusal| refusal.of(Verb::DeviceAttach, dev))
    }

    fn device_detach(&self, dev: ObjectId, pasid: Option<u32>) -> Result<()> {
        self.objects()
            .device_detach(dev, pasid)
            .map_err(|refusal| refusal.of(Verb::DeviceDetach, dev))
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        self.objects().destroy(id).map_err(|refusal| refusal.of(Verb::Destroy, id))
    }

    fn ioas_alloc(&self) -> Result<ObjectId> {
        self.objects().ioas_alloc().map_err(|refusal| refusal.of(Verb::IoasAlloc, None))
    }

    fn ioas_allow_iovas(&self, ioas: ObjectId, ranges: &[RangeInclusive<u64>]) -> Result<()> {
        self.objects()
            .ioas_allow_iovas(ioas, ranges.iter().cloned().map(Ok))
            .map_err(|refusal| refusal.of(Verb::IoasAllowIovas, ioas))
    }

    fn ioas_iova_ranges(&self, ioas: ObjectId) -> Result<IovaRanges> {
        self.objects()
            .ioas_iova_ranges(ioas)
            .map_err(|refusal| refusal.of(Verb::IoasIovaRanges, ioas))
    }

    fn ioas_map(
        &self,
        ioas: ObjectId,
        memory: &UserMemory,
        target: MapTarget,
        protection: Protection,
    ) -> Result<u64> {
        let (source, length) = (Source::Memory(memory.clone()), memory.length());
        MapRequest::check(target, length, protection)
            .and_then(|()| {
                let request = MapRequest { target, source, length, protection };
                self.objects().ioas_map(ioas, request)
            })
            .map_err(|refusal| refusal.of(Verb::IoasMap, ioas))
    }

    fn ioas_copy(
        &self,
        dst: ObjectId,
        target: MapTarget,
        src: ObjectId,
        src_iova: u64,
        length: u64,
        protection: Protection,
    ) -> Result<u64> {
        self.objects()
            .ioas_copy(dst, target, src, src_iova, length, protection)
            .map_err(|refusal| refusal.of(Verb::IoasCopy, dst))
    }

    fn ioas_unmap(&self, ioas: ObjectId, iova: u64, length: u64) -> Result<u64> {
        self.unmap(ioas, iova, length).map_err(|refusal| refusal.of(Verb::IoasUnmap, ioas))
    }

    fn get_hw_info(&self, dev: ObjectId) -> Result<HwInfo> {
        let info = self.objects().get_hw_info(dev);
        let info = info.map_err(|refusal| refusal.of(Verb::GetHwInfo, dev))?;
        let data = match info.data {
            DriverInfo::Vtd(info) => HwInfoData::Vtd(info),
            DriverInfo::ArmSmmuV3(info) => HwInfoData::ArmSmmuV3(info),
            DriverInfo::Other { .. } => HwInfoData::None,
        };
        Ok(HwInfo::new(data)
            .with_capabilities(info.capabilities)
            .with_max_pasid_log2(info.pasid_bits))
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        let HwptAlloc { flags, dev, pt, data, fault } = *args;
        let data = OwnData::of_hwpt(&data);
        let data = data.as_ref().map(|data| data as &dyn UserData);
        let request = HwptRequest { flags, dev, pt, fault, data };
        self.objects().hwpt_alloc(&request).map_err(|refusal| refusal.of(Verb::HwptAlloc, args.pt))
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> Result<(), InvalidateError> {
        let entries = OwnArray::of_invalidations(data);
        self.objects().hwpt_invalidate(hwpt, &entries).map_err(|Partial { done, refusal }| {
            InvalidateError::new(done, refusal.of(Verb::HwptInvalidate, hwpt))
        })
    }

    fn hwpt_set_dirty_tracking(&self, hwpt: ObjectId, enable: bool) -> Result<()> {
        self.objects()
            .hwpt_set_dirty_tracking(hwpt, enable)
            .map_err(|refusal| refusal.of(Verb::HwptSetDirtyTracking, hwpt))
    }

    fn hwpt_get_dirty_bitmap(
        &self,
        hwpt: ObjectId,
        range: &DirtyRange,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        let mut get = || {
            bitmap::check_words(range, bitmap)?;
            let mut objects = self.objects();
            let pages = objects.hwpt_dirty(hwpt, range)?;
            pages.runs.iter().for_each(|run| bitmap::set_words(bitmap, range.bits(run)));
            if clear {
                objects.hwpt_clean(&pages);
            }
            Ok(())
        };
        let outcome: Outcome<()> = get();
        outcome.map_err(|refusal| refusal.of(Verb::HwptGetDirtyBitmap, hwpt))
    }

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        self.objects()
            .viommu_alloc(kind.number(), dev, hwpt, None)
            .map_err(|refusal| refusal.of(Verb::ViommuAlloc, hwpt))
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        self.objects()
            .vdevice_alloc(viommu, dev, virt_id)
            .map_err(|refusal| refusal.of(Verb::VdeviceAlloc, viommu))
    }

    fn fault_queue_alloc(&self) -> Result<Arc<dyn FaultQueue>> {
        match OpenFaultQueue::new(&self.context) {
            Ok(queue) => Ok(Arc::new(queue)),
            Err(refusal) => Err(refusal.of(Verb::FaultQueueAlloc, None)),
        }
    }

    fn veventq_alloc(
        &self,
        viommu: ObjectId,
        kind: u32,
        depth: u32,
    ) -> Result<Arc<dyn EventQueue>> {
        match OpenVeventq::new(&self.context, viommu, kind, depth) {
            Ok(queue) => Ok(Arc::new(queue)),
            Err(refusal) => Err(refusal.of(Verb::VeventqAlloc, viommu)),
        }
    }

    fn extensions(&self) -> Extensions {
        self.machine().extensions()
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        self.objects()
            .set_fault_sink(dev, sink)
            .map_err(|refusal| refusal.of(Verb::DeviceBind, dev))
    }

    fn device_tlb_invalidate(
        &self,
        dev: ObjectId,
        pasid: Option<u32>,
        addresses: RangeInclusive<u64>,
    ) -> Result<bool> {
        self.objects()
            .invalidate_device_tlb(dev, pasid, addresses)
            .map_err(|refusal| refusal.of(Verb::HwptInvalidate, dev))
    }
}

/// Refuses a PASID of a device without PASIDs: Linux returns success and does nothing.
fn check_pasid(objects: &Objects, dev: ObjectId, pasid: Option<u32>) -> Outcome<()> {
    match pasid {
        Some(pasid) if objects.get_hw_info(dev)?.pasid_bits == 0 => {
            refuse(Errno::EINVAL, format!("PASID {pasid}: the device has no PASIDs"))
        }
        _ => Ok(()),
    }
}

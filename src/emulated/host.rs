// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated host: what serves the iommufd verbs inside this process.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::dma::DmaPort;
use super::graph::ObjectGraph;
use super::ioas::Source;
use super::objects::{
    DeviceConfig, Entries, HwptRequest, InvalidateFormat, MachineError, MapRequest, Objects, UnitId,
};
use super::vtd::VtdUnit;
use crate::iommufd::{
    Extensions, FaultSink, HostIommu, HwInfo, HwptAlloc, HwptData, InvalidateData, InvalidateError,
    IovaRanges, MapTarget, ObjectId, Protection, Result, UserMemory, Verb, ViommuKind,
};
use crate::spec::pci::Bdf;

/// An iommufd with its devices and IOMMUs, all of them emulated.
///
/// Its objects follow Linux 7.2: the same rules, checked in the same order, with the same errno.
/// Where Linux does what its own documentation rules out (a replacement that fails half-way), the
/// contract of [`HostIommu`] holds instead.
///
/// One lock covers the objects; the IOMMUs are told under it. DMA does not take it.
///
/// ```
/// use std::sync::Arc;
/// use twostage::emulated::{DeviceConfig, DmaAttributes, EmulatedHost, VtdUnit, VtdUnitConfig};
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
/// let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None)?);
/// let memory = UserMemory::whole(region);
/// host.ioas_map(ioas, &memory, MapTarget::Fixed(0x8000), Protection::READ_WRITE)?;
/// host.device_attach(dev, None, ioas)?;
///
/// let mut port = host.dma_port("disk").expect("the device");
/// port.write(DmaAttributes::default(), 0x8000, b"hello")?;
/// assert!(port.write(DmaAttributes::default(), 0x9000, b"hello").is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct EmulatedHost {
    objects: Mutex<Objects>,
}

impl EmulatedHost {
    /// A host without IOMMUs, devices and objects.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds an IOMMU, which serves this host alone.
    pub fn add_unit(&self, unit: Arc<VtdUnit>) -> UnitId {
        self.objects().machine_mut().add_vtd(unit)
    }

    /// Adds an IOMMU that only listens.
    #[cfg(test)]
    pub(crate) fn add_hardware(&self, hardware: Arc<dyn super::hardware::Hardware>) -> UnitId {
        self.objects().machine_mut().add_hardware(hardware)
    }

    /// Adds a device behind `unit`, to be bound by `name`.
    ///
    /// # Errors
    /// The name or the Requester ID is taken, or `config` is no device's.
    pub fn add_device(
        &self,
        name: &str,
        unit: UnitId,
        rid: Bdf,
        config: DeviceConfig,
    ) -> std::result::Result<(), MachineError> {
        self.objects().machine_mut().add_device(name, unit, rid, config)
    }

    /// Where the DMA of the device `name` enters its IOMMU, bound or not; `None` when there is no
    /// such device.
    pub fn dma_port(&self, name: &str) -> Option<DmaPort> {
        let objects = self.objects();
        let part = objects.machine().part(name).ok()?;
        let unit = objects.machine().unit(part.unit).ok()?;
        unit.vtd.as_ref().map(|unit| unit.port(part.rid.raw()))
    }

    /// The objects and what leads to what, at one moment.
    pub fn graph(&self) -> ObjectGraph {
        ObjectGraph::of(&self.objects())
    }

    /// How many objects there are, automatic ones and devices among them.
    pub fn live_objects(&self) -> usize {
        self.objects().table().len()
    }

    /// How much memory is pinned, in bytes: each page once, however many HWPTs and IOASes share it.
    pub fn pinned_bytes(&self) -> u64 {
        self.objects().pinned_bytes()
    }

    /// Closes the iommufd: detaches and unbinds every device, telling the hardware first, then ends
    /// every object. IOMMUs and devices stay, so that it can be used again.
    pub fn close(&self) {
        self.objects().close();
    }

    /// The objects, locked.
    pub(super) fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EmulatedHost {
    fn drop(&mut self) {
        self.close();
    }
}

impl HostIommu for EmulatedHost {
    fn device_bind(&self, name: &str) -> Result<ObjectId> {
        self.objects().device_bind(name).map_err(|refusal| refusal.of(Verb::DeviceBind, None))
    }

    fn device_unbind(&self, dev: ObjectId) -> Result<()> {
        self.objects().device_unbind(dev).map_err(|refusal| refusal.of(Verb::DeviceUnbind, dev))
    }

    fn device_attach(&self, dev: ObjectId, pasid: Option<u32>, pt: ObjectId) -> Result<ObjectId> {
        self.objects()
            .device_attach(dev, pasid, pt)
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
        self.objects().get_hw_info(dev).map_err(|refusal| refusal.of(Verb::GetHwInfo, dev))
    }

    fn hwpt_alloc(&self, args: &HwptAlloc) -> Result<ObjectId> {
        let HwptAlloc { flags, dev, pt, data, fault } = *args;
        let read = || Ok(data);
        let request = HwptRequest {
            flags,
            dev,
            pt,
            fault,
            data: if data == HwptData::None { None } else { Some(&read) },
        };
        self.objects().hwpt_alloc(&request).map_err(|refusal| refusal.of(Verb::HwptAlloc, args.pt))
    }

    fn hwpt_invalidate(
        &self,
        hwpt: ObjectId,
        data: InvalidateData<'_>,
    ) -> std::result::Result<(), InvalidateError> {
        let (format, list) = match data {
            InvalidateData::VtdS1(list) => (InvalidateFormat::VtdS1, list),
            InvalidateData::VtdSecondStage(list) => (InvalidateFormat::VtdSecondStage, list),
        };
        // Only asked for numbers below the count.
        let read = |number: usize| Ok(list.get(number).copied().unwrap_or_default());
        let entries = Entries { count: list.len(), read: &read };
        self.objects().hwpt_invalidate(hwpt, format, &entries).map_err(|(done, refusal)| {
            InvalidateError { done, error: refusal.of(Verb::HwptInvalidate, hwpt) }
        })
    }

    fn viommu_alloc(&self, kind: ViommuKind, dev: ObjectId, hwpt: ObjectId) -> Result<ObjectId> {
        self.objects()
            .viommu_alloc(kind, dev, hwpt)
            .map_err(|refusal| refusal.of(Verb::ViommuAlloc, hwpt))
    }

    fn vdevice_alloc(&self, viommu: ObjectId, dev: ObjectId, virt_id: u64) -> Result<ObjectId> {
        self.objects()
            .vdevice_alloc(viommu, dev, virt_id)
            .map_err(|refusal| refusal.of(Verb::VdeviceAlloc, viommu))
    }

    fn extensions(&self) -> Extensions {
        self.objects().machine().extensions()
    }

    fn set_fault_sink(&self, dev: ObjectId, sink: Weak<dyn FaultSink>) -> Result<()> {
        self.objects()
            .set_fault_sink(dev, sink)
            .map_err(|refusal| refusal.of(Verb::DeviceBind, dev))
    }
}

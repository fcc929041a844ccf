// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI bus of a machine, as its configuration has it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_allocator::{AddressAllocator, AllocPolicy};

use super::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use super::config::{DeviceConfig, EduConfig, MachineConfig, TapConfig};
use super::devices::edu::{self, Edu};
use super::devices::virtio::{
    self, Backend, Block, DeviceMemory, Disk, Doorbells, MacAddress, Net, Rng, Tap, VirtioPci,
};
use super::devices::{DirectMemory, DmaMaster, MessageWrites};
use super::interrupts::{FunctionInterrupts, Interrupts};
use super::iommu::{AssignedFunction, Iommu};
use super::memory::MachineMemory;
use super::pci::{HostBridge, InterruptVector, IntxRouter, PciBus, PciFunction};
use super::report::DeviceReport;
use super::trace::{Trace, TracedDma};
use super::{Error, Result};
use crate::spec::pci::Bdf;

/// Where the device `number` of a configuration goes, counted from 0: the host bridge is first.
pub(super) fn bdf_of(number: usize) -> Result<Bdf> {
    u8::try_from(number + 1)
        .ok()
        .and_then(|device| Bdf::new(0, device, 0))
        .ok_or_else(|| Error::Pci(format!("bus 0 has no room for {} devices", number + 1)))
}

/// The functions that go behind virtual IOMMUs.
pub(super) fn assigned_functions(config: &MachineConfig) -> Result<Vec<AssignedFunction>> {
    let mut functions = Vec::new();
    for (number, device) in config.devices.iter().enumerate() {
        if let Some(iommu) = config.iommu_of(device.iommu()) {
            let (bdf, pasid) = (bdf_of(number)?, device.pasid());
            functions.push(AssignedFunction { bdf, pasid, iommu });
        }
    }
    Ok(functions)
}

/// How devices reach the vCPUs, and are reached.
pub(super) struct Wiring {
    /// For INTx and messages.
    pub interrupts: Arc<Interrupts>,
    /// For notifications.
    pub doorbells: Arc<dyn Doorbells>,
    pub trace: Option<Arc<Trace>>,
}

/// The bus, and the devices on it.
pub(super) struct PciTopology {
    pub bus: Arc<PciBus>,
    devices: Vec<PlacedDevice>,
}

struct PlacedDevice {
    bdf: Bdf,
    /// What it is behind, by its id.
    iommu: Option<String>,
    device: Device,
}

/// A device, by what reports say of it.
enum Device {
    Edu(Arc<Edu>),
    Virtio(Arc<VirtioPci>),
}

impl PciTopology {
    /// The host bridge at 00:00.0 and the devices of `config` from 00:01.0 up, their BARs placed.
    pub fn new(
        config: &MachineConfig,
        memory: &MachineMemory,
        iommus: &[Iommu],
        wiring: Wiring,
    ) -> Result<Self> {
        let mut devices = Vec::new();
        let mut builder = Builder {
            bus: PciBus::default(),
            window: AddressAllocator::new(PCI_MMIO_START, PCI_MMIO_LAST - PCI_MMIO_START + 1)
                .map_err(|error| Error::Pci(error.to_string()))?,
            intx: {
                let interrupts = wiring.interrupts.clone();
                IntxRouter::new(Arc::new(move |gsi, level| interrupts.set_line(gsi, level)))
            },
            memory,
            wiring,
        };
        builder.bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        for (number, config_of_device) in config.devices.iter().enumerate() {
            let bdf = bdf_of(number)?;
            let iommu = config.iommu_of(config_of_device.iommu()).and_then(|n| iommus.get(n));
            let remapping = config.interrupt_iommu_of(config_of_device);
            let remapping = remapping.and_then(|number| iommus.get(number));
            let interrupts = builder
                .wiring
                .interrupts
                .of_function(bdf, remapping.and_then(Iommu::interrupt_remapper));
            let device = match config_of_device {
                DeviceConfig::Edu(edu) => Device::Edu(builder.edu(bdf, edu, iommu, interrupts)?),
                virtio => {
                    let backend = backend(bdf, virtio)?;
                    Device::Virtio(builder.virtio(bdf, backend, iommu, interrupts)?)
                }
            };
            let iommu = iommu.map(|iommu| iommu.id().to_owned());
            devices.push(PlacedDevice { bdf, iommu, device });
        }
        Ok(Self { bus: Arc::new(builder.bus), devices })
    }

    /// What the devices have done so far.
    pub fn report(&self) -> Vec<DeviceReport> {
        let report = |placed: &PlacedDevice| {
            let (model, dma_done, dma_failed) = match &placed.device {
                Device::Edu(edu) => ("edu", edu.counters().done(), edu.counters().failed()),
                Device::Virtio(virtio) => {
                    let counters = virtio.counters();
                    (virtio.model(), counters.done.get(), counters.unreachable.get())
                }
            };
            let (bdf, iommu) = (placed.bdf, placed.iommu.clone());
            DeviceReport { bdf, model, iommu, dma_done, dma_failed }
        };
        self.devices.iter().map(report).collect()
    }
}

/// Puts devices on the bus.
struct Builder<'a> {
    bus: PciBus,
    window: AddressAllocator,
    intx: IntxRouter,
    memory: &'a MachineMemory,
    wiring: Wiring,
}

impl Builder<'_> {
    /// A place for a BAR.
    fn place(&mut self, size: u32) -> Result<u32> {
        let size = u64::from(size);
        let range = self.window.allocate(size, size, AllocPolicy::FirstMatch);
        // The window lies below 4 GiB.
        range.map(|range| range.start() as u32).map_err(|error| Error::Pci(error.to_string()))
    }

    fn insert<T: PciFunction + 'static>(&mut self, bdf: Bdf, function: T) -> Arc<T> {
        let function = Arc::new(function);
        self.bus.insert(bdf, function.clone());
        function
    }

    fn edu(
        &mut self,
        bdf: Bdf,
        config: &EduConfig,
        iommu: Option<&Iommu>,
        interrupts: FunctionInterrupts,
    ) -> Result<Arc<Edu>> {
        let address = self.place(edu::BAR_SIZE)?;
        let dma: Box<dyn DmaMaster> = match iommu {
            Some(iommu) => iommu.dma_master(bdf),
            None => Box::new(DirectMemory(self.memory.clone())),
        };
        let dma = match self.wiring.trace.clone() {
            Some(trace) => Box::new(TracedDma { inner: dma, trace, name: format!("{bdf} edu") }),
            None => dma,
        };
        let messages = Arc::new(interrupts);
        let dma = Box::new(MessageWrites::new(dma, messages.clone()));
        let edu = Edu::new(config, address, self.intx.pin(bdf), messages, dma)?;
        Ok(self.insert(bdf, edu))
    }

    fn virtio(
        &mut self,
        bdf: Bdf,
        backend: Box<dyn Backend>,
        iommu: Option<&Iommu>,
        interrupts: FunctionInterrupts,
    ) -> Result<Arc<VirtioPci>> {
        let address = self.place(virtio::BAR_SIZE)?;
        let memory = self.memory.map().clone();
        let memory = match iommu {
            Some(iommu) => DeviceMemory::behind_iommu(memory, iommu.dma_port(bdf)),
            None => DeviceMemory::direct(memory),
        };
        let vector = || Ok(interrupts.vector()? as Arc<dyn InterruptVector>);
        let name = format!("{bdf} {}", backend.model().name);
        let doorbells = self.wiring.doorbells.clone();
        let trace = self.wiring.trace.clone();
        let device = VirtioPci::new(name, backend, memory, address, &vector, doorbells, trace)?;
        Ok(self.insert(bdf, device))
    }
}

/// What the virtio device of `config` does, with the files that takes open.
fn backend(bdf: Bdf, config: &DeviceConfig) -> Result<Box<dyn Backend>> {
    Ok(match config {
        DeviceConfig::Disk(disk) => {
            Box::new(Block::new(Disk::open(&disk.path, disk.read_only, disk.direct)?))
        }
        DeviceConfig::Net(net) => {
            let tap = match &net.tap {
                TapConfig::Name(name) => Tap::open(name)?,
                TapConfig::Fd(fd) => Tap::from_fd(*fd)?,
            };
            let mac = net.mac.unwrap_or_else(|| MacAddress::local(bdf.device()));
            Box::new(Net::new(tap, mac))
        }
        DeviceConfig::Rng(rng) => {
            let failed = |source| Error::Rng { path: rng.source.clone(), source };
            Box::new(Rng::open(&rng.source).map_err(failed)?)
        }
        DeviceConfig::Edu(_) => return Err(Error::Pci("edu is no virtio device".into())),
    })
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI bus of a machine, as its configuration has it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use event_manager::MutEventSubscriber;

use super::slots::{Bridges, Room, Slot};
use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use crate::config::{DeviceConfig, EduConfig, MachineConfig, TapConfig, VfioConfig};
use crate::devices::edu::{self, Edu};
use crate::devices::virtio::{
    self, Backend, Block, DeviceMemory, Disk, Doorbells, MacAddress, Net, QueueCounters, Rng, Tap,
    VirtioPci,
};
use crate::devices::{DirectMemory, DmaMaster, HostServices, MessageWrites, ServiceListener};
use crate::interrupts::{DeviceLine, FunctionInterrupts, Interrupts};
use crate::iommu::{AssignedFunction, Iommu};
use crate::memory::MachineMemory;
use crate::pci::{
    EventVector, HostBridge, InterruptVector, IntxRouter, Location, PciBus, PciFunction,
};
use crate::report::DeviceReport;
use crate::trace::{Trace, TracedDma};
use crate::vfio::{self, page_size, AssignedDevice, Lender, VfioError, VfioPci, VfioProblem};
use crate::{Error, Result};
use twostage::spec::pci::Bdf;
use vfio_ioctls::VfioIommufd;

/// The file of a bound device, and the iommufd that it is bound to.
pub(crate) type BoundFile = (Arc<File>, Arc<VfioIommufd>);

/// The requesters that go behind virtual IOMMUs. Devices that share a Requester ID are one.
pub(crate) fn assigned_functions(config: &MachineConfig) -> Result<Vec<AssignedFunction>> {
    let mut functions: Vec<AssignedFunction> = Vec::new();
    for (device, place) in config.devices.iter().zip(config.places()?) {
        let (bdf, pasid) = (place.rid(), device.pasid());
        if functions.iter().any(|other| other.bdf == bdf) {
            continue;
        }
        if let Some(iommu) = config.iommu_of(device.iommu()) {
            let vfio = match device {
                DeviceConfig::Vfio(vfio) => Some(vfio.path.clone()),
                _ => None,
            };
            let (pri, stall) = (device.pri(), device.stall());
            functions.push(AssignedFunction { bdf, pasid, pri, stall, iommu, vfio });
        }
    }
    Ok(functions)
}

/// The physical devices that are behind no virtual IOMMU.
pub(crate) fn direct_functions(config: &MachineConfig) -> Result<Vec<(Bdf, PathBuf)>> {
    let mut functions = Vec::new();
    for (device, place) in config.devices.iter().zip(config.places()?) {
        match device {
            DeviceConfig::Vfio(vfio) if config.iommu_of(&vfio.iommu).is_none() => {
                functions.push((place.rid(), vfio.path.clone()));
            }
            _ => {}
        }
    }
    Ok(functions)
}

/// What connects devices with the vCPUs.
pub(crate) struct Wiring {
    /// For INTx and messages.
    pub interrupts: Arc<Interrupts>,
    /// For notifications.
    pub doorbells: Arc<dyn Doorbells>,
    /// For mapping the memory of devices into the guest.
    pub lender: Arc<dyn Lender>,
    /// The files of physical devices.
    pub files: BTreeMap<Bdf, BoundFile>,
    pub trace: Option<Arc<Trace>>,
}

/// The bus, and the devices on it.
pub(crate) struct PciTopology {
    pub bus: Arc<PciBus>,
    devices: Vec<PlacedDevice>,
    /// What the event loop has to serve, until [`PciTopology::take_subscribers`].
    subscribers: Vec<Box<dyn MutEventSubscriber>>,
}

struct PlacedDevice {
    bdf: Bdf,
    /// The id of the virtual IOMMU that it is behind.
    iommu: Option<String>,
    device: Device,
}

/// A device, with what its report needs.
enum Device {
    Edu(Arc<Edu>),
    Virtio(Arc<VirtioPci>),
    Vfio,
}

impl PciTopology {
    /// The host bridge at 00:00.0, and the devices, root ports and bridges of `config`, with the
    /// places of BARs and windows.
    pub fn new(
        config: &MachineConfig,
        memory: &MachineMemory,
        iommus: &[Iommu],
        wiring: Wiring,
    ) -> Result<Self> {
        let mut builder = Builder {
            bus: PciBus::default(),
            room: Room::new()?,
            intx: {
                let interrupts = wiring.interrupts.clone();
                IntxRouter::new(Arc::new(move |gsi, level| interrupts.set_line(gsi, level)))
            },
            memory,
            wiring,
            subscribers: Vec::new(),
        };
        builder.bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        let bridges = Bridges::new(&config.bridge_places()?, &mut builder.bus);
        let places = config.places()?;
        let mut numbers: Vec<_> = (0..places.len()).collect();
        // What is behind one bridge has its BARs side by side.
        numbers.sort_by_key(|number| places.get(*number).map(|place| place.bdf.bus()));
        let mut devices = Vec::new();
        for number in numbers {
            let (Some(device), Some(place)) = (config.devices.get(number), places.get(number))
            else {
                continue;
            };
            let slot = bridges.slot(place);
            builder.room.enter(place);
            let iommu = config.iommu_of(device.iommu()).and_then(|n| iommus.get(n));
            let remapping = config.interrupt_iommu_of(device);
            let remapping = remapping.and_then(|number| iommus.get(number));
            let remapper = remapping.and_then(|iommu| iommu.model.interrupt_remapper());
            let interrupts = builder.wiring.interrupts.of_function(slot.rid, remapper);
            let model = match device {
                DeviceConfig::Edu(edu) => Device::Edu(builder.edu(&slot, edu, iommu, interrupts)?),
                DeviceConfig::Vfio(vfio) => {
                    builder.vfio(&slot, vfio, iommu, interrupts)?;
                    Device::Vfio
                }
                virtio => {
                    let backend = backend(number, virtio)?;
                    Device::Virtio(builder.virtio(&slot, backend, iommu, interrupts)?)
                }
            };
            let iommu = iommu.map(|iommu| iommu.id.clone());
            devices.push(PlacedDevice { bdf: place.bdf, iommu, device: model });
        }
        bridges.open(&builder.room, &builder.bus);
        Ok(Self { bus: Arc::new(builder.bus), devices, subscribers: builder.subscribers })
    }

    /// What the event loop has to serve for the devices; empty from the second call on.
    pub fn take_subscribers(&mut self) -> Vec<Box<dyn MutEventSubscriber>> {
        std::mem::take(&mut self.subscribers)
    }

    /// The machine stops: when this returns, the virtio devices make no more requests.
    pub fn halt(&self) {
        for placed in &self.devices {
            if let Device::Virtio(virtio) = &placed.device {
                virtio.halt();
            }
        }
    }

    /// What the devices have done so far.
    pub fn report(&self) -> Vec<DeviceReport> {
        let report = |placed: &PlacedDevice| {
            let (model, dma_done, dma_failed) = match &placed.device {
                Device::Edu(edu) => {
                    ("edu", Some(edu.counters().done()), Some(edu.counters().failed()))
                }
                Device::Virtio(virtio) => {
                    let counters = virtio.counters();
                    let (done, failed) = (counters.done.get(), counters.unreachable.get());
                    (virtio.model(), Some(done), Some(failed))
                }
                Device::Vfio => ("vfio", None, None),
            };
            let queues = match &placed.device {
                Device::Virtio(virtio) => {
                    virtio.queue_counters().iter().map(QueueCounters::snapshot).collect()
                }
                Device::Edu(_) | Device::Vfio => Vec::new(),
            };
            let served_by = match &placed.device {
                Device::Virtio(virtio) => virtio.served_by(),
                Device::Edu(_) | Device::Vfio => None,
            };
            let (bdf, iommu) = (placed.bdf, placed.iommu.clone());
            DeviceReport { bdf, model, iommu, served_by, dma_done, dma_failed, queues }
        };
        self.devices.iter().map(report).collect()
    }
}

/// Puts devices on the bus.
struct Builder<'a> {
    bus: PciBus,
    room: Room,
    intx: IntxRouter,
    memory: &'a MachineMemory,
    wiring: Wiring,
    subscribers: Vec<Box<dyn MutEventSubscriber>>,
}

impl Builder<'_> {
    /// A place for a BAR.
    fn place(&mut self, size: u32) -> Result<u32> {
        // PCI memory lies below 4 GiB.
        self.room.place(size.into()).map(|address| address as u32)
    }

    fn insert<T: PciFunction + 'static>(&mut self, bdf: Bdf, function: T) -> Arc<T> {
        let function = Arc::new(function);
        self.bus.insert(bdf, function.clone());
        function
    }

    fn edu(
        &mut self,
        slot: &Slot,
        config: &EduConfig,
        iommu: Option<&Iommu>,
        interrupts: FunctionInterrupts,
    ) -> Result<Arc<Edu>> {
        let (bdf, [registers, messages, memory]) = (slot.bdf, edu::BAR_SIZES);
        let bar = self.place(registers)?;
        let more_bars = [self.place(messages)?, self.place(memory)?];
        let messages = Arc::new(interrupts);
        let vector = || Ok(messages.vector()? as Arc<dyn InterruptVector>);
        let dma: Box<dyn DmaMaster> = match iommu {
            Some(iommu) => iommu.dma_master(slot.rid, messages.clone())?,
            None => {
                let memory = Box::new(DirectMemory(self.memory.clone()));
                Box::new(MessageWrites::new(memory, messages.clone()))
            }
        };
        let dma = match self.wiring.trace.clone() {
            Some(trace) => Box::new(TracedDma { inner: dma, trace, name: format!("{bdf} edu") }),
            None => dma,
        };
        let pin = self.intx.pin(bdf, slot.upwards.iter().copied());
        let location = Location { way: slot.way.clone(), bar };
        let edu = Edu::new(config, location, more_bars, pin, messages.clone(), &vector, dma)?;
        Ok(self.insert(bdf, edu))
    }

    fn virtio(
        &mut self,
        slot: &Slot,
        backend: Box<dyn Backend>,
        iommu: Option<&Iommu>,
        interrupts: FunctionInterrupts,
    ) -> Result<Arc<VirtioPci>> {
        let address = self.place(virtio::BAR_SIZE)?;
        let memory = self.memory.map().clone();
        let memory = match iommu {
            Some(iommu) => DeviceMemory::behind_iommu(memory, iommu.dma_port(slot.rid)?),
            None => DeviceMemory::direct(memory),
        };
        let vector = || Ok(interrupts.vector()? as Arc<dyn InterruptVector>);
        let name = format!("{} {}", slot.bdf, backend.model().name);
        let (doorbells, trace) = (self.wiring.doorbells.clone(), self.wiring.trace.clone());
        let location = Location { way: slot.way.clone(), bar: address };
        let device = VirtioPci::new(name, backend, memory, location, &vector, doorbells, trace)?;
        Ok(self.insert(slot.bdf, device))
    }

    fn vfio(
        &mut self,
        slot: &Slot,
        config: &VfioConfig,
        iommu: Option<&Iommu>,
        interrupts: FunctionInterrupts,
    ) -> Result<()> {
        let name = config.name();
        let file = self.wiring.files.remove(&slot.rid);
        let (file, iommufd) =
            file.ok_or_else(|| Error::Pci(format!("--vfio {name}: it is not bound")))?;
        let what = "querying its description";
        let host = AssignedDevice::new(file, iommufd)
            .map_err(|source| VfioError::new(&name, VfioProblem::Call { what, source }))?;
        let Self { room, intx, wiring, subscribers, .. } = self;
        let mut line = || {
            let pin = intx.pin(slot.bdf, slot.upwards.iter().copied());
            let register = pin.line();
            let DeviceLine { line, subscriber } = wiring.interrupts.lines().device_line(pin)?;
            subscribers.extend(subscriber);
            Ok((register, line))
        };
        let nothing = || (HostServices::default(), Arc::new(|_| ()) as ServiceListener);
        let (services, enabled) = iommu.map_or_else(nothing, |iommu| iommu.services(slot.rid));
        let around = vfio::Surroundings {
            way: slot.way.clone(),
            place: &mut |size| room.place(size),
            lender: wiring.lender.clone(),
            vectors: Arc::new(move || Ok(interrupts.device_vector()? as Arc<dyn EventVector>)),
            line: &mut line,
            services,
            enabled,
            page: page_size(),
            answers: |bar| bar.start >= PCI_MMIO_START && bar.last <= PCI_MMIO_LAST,
        };
        let function = VfioPci::new(name, Arc::new(host), around)?;
        self.insert(slot.bdf, function);
        Ok(())
    }
}

/// The backend of the virtio device `number`, counted from 0, of `config`, with its files open.
fn backend(number: usize, config: &DeviceConfig) -> Result<Box<dyn Backend>> {
    Ok(match config {
        DeviceConfig::Disk(disk) => {
            let opened = Disk::open(&disk.path, disk.access)?;
            Box::new(Block::new(opened, disk.queues.into()).map_err(Error::os("preparing a disk"))?)
        }
        DeviceConfig::Net(net) => {
            let tap = match &net.tap {
                TapConfig::Name(name) => Tap::open(name)?,
                TapConfig::Fd(fd) => Tap::from_fd(*fd)?,
            };
            let mac = net.mac.unwrap_or_else(|| MacAddress::local(number as u8 + 1));
            Box::new(Net::new(tap, mac))
        }
        DeviceConfig::Rng(rng) => {
            let failed = |source| Error::Rng { path: rng.source.clone(), source };
            Box::new(Rng::open(&rng.source).map_err(failed)?)
        }
        DeviceConfig::Edu(_) | DeviceConfig::Vfio(_) => {
            return Err(Error::Pci(format!("device {} is not a virtio device", number + 1)));
        }
    })
}

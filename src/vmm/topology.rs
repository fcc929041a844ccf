// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI bus of a machine, as its configuration has it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_allocator::{AddressAllocator, AllocPolicy};

use super::config::{DeviceConfig, MachineConfig};
use super::devices::edu::{self, Edu};
use super::devices::{DirectMemory, DmaMaster, MessageWrites};
use super::interrupts::Interrupts;
use super::iommu::{AssignedFunction, Iommu};
use super::memory::{MachineMemory, PCI_MMIO_LAST, PCI_MMIO_START};
use super::pci::{HostBridge, IntxRouter, PciBus};
use super::report::DeviceReport;
use super::{Error, Result};
use crate::spec::pci::Bdf;
use crate::viommu::InterruptSink;

/// Where the device `number` of a configuration goes, counted from 0: the host bridge is first.
fn bdf_of(number: usize) -> Result<Bdf> {
    u8::try_from(number + 1)
        .ok()
        .and_then(|device| Bdf::new(0, device, 0))
        .ok_or_else(|| Error::Pci(format!("bus 0 has no room for {} devices", number + 1)))
}

/// Whether a device is behind the virtual IOMMU.
fn behind_iommu(config: &MachineConfig, device: &DeviceConfig) -> bool {
    let DeviceConfig::Edu(edu) = device;
    config.iommu.is_some() && edu.iommu.unwrap_or(true)
}

/// The functions that go behind the virtual IOMMU.
pub(super) fn assigned_functions(config: &MachineConfig) -> Result<Vec<AssignedFunction>> {
    let mut functions = Vec::new();
    for (number, device) in config.devices.iter().enumerate() {
        if behind_iommu(config, device) {
            let DeviceConfig::Edu(edu) = device;
            functions.push(AssignedFunction { bdf: bdf_of(number)?, pasid: edu.pasid });
        }
    }
    Ok(functions)
}

/// The bus, and the devices on it.
pub(super) struct PciTopology {
    pub bus: Arc<PciBus>,
    edus: Vec<PlacedEdu>,
}

struct PlacedEdu {
    bdf: Bdf,
    behind_iommu: bool,
    edu: Arc<Edu>,
}

impl PciTopology {
    /// The host bridge at 00:00.0 and the devices of `config` from 00:01.0 up, their BARs placed.
    pub fn new(
        config: &MachineConfig,
        memory: &MachineMemory,
        iommu: Option<&Iommu>,
        interrupts: Arc<Interrupts>,
        messages: Arc<dyn InterruptSink>,
    ) -> Result<Self> {
        let mut bus = PciBus::default();
        let mut edus = Vec::new();
        let mut window = AddressAllocator::new(PCI_MMIO_START, PCI_MMIO_LAST - PCI_MMIO_START + 1)
            .map_err(|error| Error::Pci(error.to_string()))?;
        let intx = IntxRouter::new(Arc::new(move |gsi, level| interrupts.set_line(gsi, level)));
        bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        for (number, device) in config.devices.iter().enumerate() {
            let bdf = bdf_of(number)?;
            let DeviceConfig::Edu(edu_config) = device;
            let size = u64::from(edu::BAR_SIZE);
            let address = window
                .allocate(size, size, AllocPolicy::FirstMatch)
                .map_err(|error| Error::Pci(error.to_string()))?
                .start();
            let iommu = iommu.filter(|_| behind_iommu(config, device));
            let dma: Box<dyn DmaMaster> = match iommu {
                Some(iommu) => iommu.dma_master(bdf),
                None => Box::new(DirectMemory(memory.clone())),
            };
            let dma = Box::new(MessageWrites::new(dma, messages.clone()));
            // The window lies below 4 GiB.
            let address = address as u32;
            let edu = Edu::new(edu_config, address, intx.pin(bdf), messages.clone(), dma)?;
            let edu = Arc::new(edu);
            bus.insert(bdf, edu.clone());
            edus.push(PlacedEdu { bdf, behind_iommu: iommu.is_some(), edu });
        }
        Ok(Self { bus: Arc::new(bus), edus })
    }

    /// What the devices have done so far.
    pub fn report(&self) -> Vec<DeviceReport> {
        let report = |placed: &PlacedEdu| DeviceReport {
            bdf: placed.bdf,
            model: "edu",
            behind_iommu: placed.behind_iommu,
            dma_done: placed.edu.counters().done(),
            dma_failed: placed.edu.counters().failed(),
        };
        self.edus.iter().map(report).collect()
    }
}

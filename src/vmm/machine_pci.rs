// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PCI bus of a machine, as its configuration has it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use vm_allocator::{AddressAllocator, AllocPolicy};

use super::config::DeviceConfig;
use super::devices::edu::{self, Edu};
use super::devices::{DirectMemory, DmaMaster};
use super::interrupts::Interrupts;
use super::memory::{MachineMemory, PCI_MMIO_LAST, PCI_MMIO_START};
use super::pci::{HostBridge, IntxRouter, PciBus};
use super::{Error, Result};
use crate::spec::pci::Bdf;

/// The bus, and the devices on it by their own type.
pub(super) struct PciTopology {
    pub bus: Arc<PciBus>,
    pub edus: Vec<(Bdf, Arc<Edu>)>,
}

impl PciTopology {
    /// The host bridge at 00:00.0 and `devices` from 00:01.0 up, their BARs placed.
    pub fn new(
        devices: &[DeviceConfig],
        memory: &MachineMemory,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self> {
        let mut bus = PciBus::default();
        let mut edus = Vec::new();
        let mut window = AddressAllocator::new(PCI_MMIO_START, PCI_MMIO_LAST - PCI_MMIO_START + 1)
            .map_err(|error| Error::Pci(error.to_string()))?;
        let intx = {
            let interrupts = interrupts.clone();
            IntxRouter::new(Arc::new(move |gsi, level| interrupts.set_line(gsi, level)))
        };
        bus.insert(Bdf::from_raw(0), Arc::new(HostBridge::new()));
        for (number, DeviceConfig::Edu(config)) in (1..).zip(devices) {
            let bdf = Bdf::new(0, number, 0)
                .ok_or_else(|| Error::Pci(format!("no room for device {number}")))?;
            let size = u64::from(edu::BAR_SIZE);
            let address = window
                .allocate(size, size, AllocPolicy::FirstMatch)
                .map_err(|error| Error::Pci(error.to_string()))?
                .start();
            let dma: Box<dyn DmaMaster> = Box::new(DirectMemory(memory.clone()));
            let edu = Arc::new(Edu::new(
                config,
                // The window lies below 4 GiB.
                address as u32,
                intx.pin(bdf),
                interrupts.clone(),
                dma,
            )?);
            bus.insert(bdf, edu.clone());
            edus.push((bdf, edu));
        }
        Ok(Self { bus: Arc::new(bus), edus })
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening a machine's devices: by number, or in a group by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage::spec::pci::Bdf;
use twostage_emulated::Machine;

use crate::config::{Device as DeviceEntry, Dma};
use crate::files::device::Device;
use crate::files::edu::Edu;
use crate::memory::pins::Pins;

/// A device of the machine.
#[derive(Debug)]
pub struct Entry {
    /// Its part of the machine's description.
    pub config: DeviceEntry,
    /// The number of its group.
    pub group: u32,
}

/// Opens devices of a machine, or of one group in it.
#[derive(Debug)]
pub struct Opener {
    /// The machine.
    pub machine: Arc<Machine>,
    /// Its devices, by number.
    pub devices: Arc<BTreeMap<u32, Entry>>,
    /// Keeps memory available for DMA, whatever the program does.
    pub pins: Arc<Pins>,
    /// The only group whose devices are found by name; none for all.
    pub group: Option<u32>,
}

impl Opener {
    /// Opens the device `number`.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn open(&self, number: u32) -> Result<Device, Errno> {
        let device = self.devices.get(&number).ok_or(Errno::ENODEV)?;
        let name = device_name(number);
        let file = self.machine.open_device(&name)?;
        let edu = match device.config.dma {
            Dma::None => None,
            Dma::Edu => {
                let port = self.machine.dma_port(&name);
                port.map(|port| Edu::new(port, self.pins.clone()))
            }
        };
        Ok(Device::new(name, file, edu))
    }

    /// The number of the device at the PCI address `name`, such as `0000:00:04.0`.
    pub fn named(&self, name: &str) -> Option<u32> {
        let name = name.strip_prefix("0000:").unwrap_or(name);
        let rid = name.parse::<Bdf>().ok()?;
        let is_it = |device: &&Entry| {
            device.config.rid() == Ok(rid) && self.group.is_none_or(|group| device.group == group)
        };
        self.devices.values().find(is_it).map(|device| device.config.vfio)
    }
}

/// The machine's name of device `number`.
pub fn device_name(number: u32) -> String {
    format!("vfio{number}")
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated machine of a process, and which paths lead to it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::sync::Arc;

use twostage::emulated::{AddressWidth, DeviceConfig, Machine, VtdUnit, VtdUnitConfig};
use twostage::iommufd::Errno;

use crate::config::{Config, Device as DeviceEntry, Dma, Iommu};
use crate::device::Device;
use crate::edu::Edu;
use crate::file::File;
use crate::iommufd::Iommufd;

/// Names the file that describes the machine.
const FILE_VARIABLE: &str = "TWOSTAGE_IOMMUFD";

/// A path of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// `/dev/iommu`.
    Iommu,
    /// `/dev/vfio/vfio`.
    Container,
    /// `/dev/vfio/devices/vfioN`.
    Device(u32),
}

impl Node {
    /// What `path` is; `None` when it is none of ours, whether it is there or not.
    pub fn of(path: &[u8]) -> Option<Self> {
        match path {
            b"/dev/iommu" => Some(Self::Iommu),
            b"/dev/vfio/vfio" => Some(Self::Container),
            _ => {
                let number = path.strip_prefix(b"/dev/vfio/devices/vfio")?;
                let text = std::str::from_utf8(number).ok()?;
                // As the kernel writes it: no sign, no leading zero.
                let number: u32 = text.parse().ok()?;
                (number.to_string() == text).then_some(Self::Device(number))
            }
        }
    }

    /// Major and minor number of the character device.
    pub fn device_number(self) -> (u32, u32) {
        match self {
            // Misc devices: a number given out at run time, and VFIO's.
            Self::Iommu => (10, 125),
            Self::Container => (10, 196),
            Self::Device(number) => (511, number),
        }
    }
}

/// A machine with devices.
#[derive(Debug)]
pub struct World {
    machine: Arc<Machine>,
    devices: BTreeMap<u32, DeviceEntry>,
}

impl World {
    /// The machine that the environment names, or the default.
    ///
    /// # Errors
    /// `ENODEV` its description cannot be used; standard error says why.
    pub fn from_environment() -> Result<Self, Errno> {
        let file = env::var_os(FILE_VARIABLE).map(PathBuf::from);
        let described = Config::load(file.as_deref()).map_err(|error| error.to_string());
        described.and_then(|config| Self::new(&config)).map_err(|error| {
            let name = file
                .as_deref()
                .map_or("the default machine".into(), |file| file.display().to_string());
            log::error!("{FILE_VARIABLE}: {name}: {error}");
            Errno::ENODEV
        })
    }

    /// The machine of `config`.
    ///
    /// # Errors
    /// Says what in it cannot be.
    pub fn new(config: &Config) -> Result<Self, String> {
        let machine = Machine::new();
        let mut units = BTreeMap::new();
        for iommu in &config.iommu {
            units.insert(&iommu.name, machine.add_unit(VtdUnit::new(unit_config(iommu))));
        }
        let mut devices = BTreeMap::new();
        for device in &config.device {
            let (name, number) = (&device.iommu, device.vfio);
            let rid = device.rid().map_err(|error| error.to_string())?;
            let unit = units.get(name).ok_or_else(|| format!("there is no IOMMU '{name}'"))?;
            machine
                .add_device(&device_name(number), *unit, rid, device_config(device))
                .map_err(|error| error.to_string())?;
            devices.insert(number, device.clone());
        }
        Ok(Self { machine, devices })
    }

    /// Whether `node` is there.
    pub fn has(&self, node: Node) -> bool {
        match node {
            Node::Iommu | Node::Container => true,
            Node::Device(number) => self.devices.contains_key(&number),
        }
    }

    /// Opens `node`.
    ///
    /// # Errors
    /// `ENOENT` there is no such device.
    pub fn open(&self, node: Node) -> Result<Arc<dyn File>, Errno> {
        let number = match node {
            Node::Iommu => return Ok(Arc::new(Iommufd::new("iommu", self.machine.open()))),
            Node::Container => return Ok(Arc::new(Iommufd::new("vfio", self.machine.open()))),
            Node::Device(number) => number,
        };
        let device = self.devices.get(&number).ok_or(Errno::ENOENT)?;
        let name = device_name(number);
        let file = self.machine.open_device(&name)?;
        let edu = match device.dma {
            Dma::None => None,
            Dma::Edu => self.machine.dma_port(&name).map(Edu::new),
        };
        Ok(Arc::new(Device::new(name, file, edu)))
    }
}

fn device_name(number: u32) -> String {
    format!("vfio{number}")
}

fn unit_config(iommu: &Iommu) -> VtdUnitConfig {
    VtdUnitConfig {
        address_width: match iommu.address_width {
            57 => AddressWidth::Bits57,
            _ => AddressWidth::Bits48,
        },
        pasid_bits: iommu.pasid_bits,
        nesting: iommu.nesting,
        device_tlb: iommu.ats,
        erratum_772415: iommu.erratum_772415,
        guest_second_stage: false,
        ..VtdUnitConfig::default()
    }
}

fn device_config(device: &DeviceEntry) -> DeviceConfig {
    DeviceConfig {
        pasid_bits: device.pasid_bits,
        ats: device.ats,
        reserved: device.reserved(),
        group: device.group,
        ..DeviceConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(Node::of(b"/dev/iommu"), Some(Node::Iommu));
        assert_eq!(Node::of(b"/dev/vfio/vfio"), Some(Node::Container));
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio12"), Some(Node::Device(12)));
        for other in ["/dev/iommu/", "/dev/vfio", "/dev/vfio/devices/vfio", "dev/iommu"] {
            assert_eq!(Node::of(other.as_bytes()), None, "{other}");
        }
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio01"), None);
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio+1"), None);
    }

    #[test]
    fn a_machine_has_what_its_description_says() {
        let world = World::new(&Config::load(None).unwrap()).unwrap();
        assert!(world.has(Node::Iommu) && world.has(Node::Device(1)));
        assert!(!world.has(Node::Device(2)));
        assert_eq!(world.open(Node::Device(2)).unwrap_err(), Errno::ENOENT);
        assert_eq!(world.open(Node::Device(0)).unwrap().name(), "vfio0");
        assert_eq!(world.open(Node::Container).unwrap().name(), "vfio");
    }

    #[test]
    fn two_devices_at_one_address() {
        let text = include_str!("default.toml").replace("00:05.0", "00:04.0");
        let error = World::new(&Config::parse(&text).unwrap()).unwrap_err();
        assert!(error.contains("00:04.0"), "{error}");
    }
}

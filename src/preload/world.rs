// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The emulated machine of a process, and its paths.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::PathBuf;
use std::sync::Arc;

use twostage::iommufd::Errno;
use twostage_emulated::{
    AddressWidth, DeviceConfig, EmulatedUnit, Machine, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit,
    VtdUnitConfig,
};

use crate::config::{Config, Device as DeviceEntry, Iommu, Model};
use crate::files::file::File;
use crate::files::group::{device_name, Entry, Group, GroupFile, Opener};
use crate::files::iommufd::Iommufd;
use crate::files::users::Groups;
use crate::memory::pins::Pins;

/// Names the file that describes the machine.
const FILE_VARIABLE: &str = "TWOSTAGE_IOMMUFD";

/// A path of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// `/dev/iommu`.
    Iommu,
    /// `/dev/vfio/vfio`.
    Container,
    /// `/dev/vfio/N`.
    Group(u32),
    /// `/dev/vfio/devices/vfioN`.
    Device(u32),
}

impl Node {
    /// The node of `path`; `None` if it is not one of ours, whether it exists or not.
    pub fn of(path: &[u8]) -> Option<Self> {
        match path {
            b"/dev/iommu" => Some(Self::Iommu),
            b"/dev/vfio/vfio" => Some(Self::Container),
            _ => match path.strip_prefix(b"/dev/vfio/devices/vfio") {
                Some(number) => number_of(number).map(Self::Device),
                None => number_of(path.strip_prefix(b"/dev/vfio/")?).map(Self::Group),
            },
        }
    }

    /// The node of the open file `name`.
    pub fn of_file(name: &str) -> Option<Self> {
        match name {
            "iommu" => Some(Self::Iommu),
            "vfio" => Some(Self::Container),
            _ => match name.strip_prefix("group") {
                Some(number) => number_of(number.as_bytes()).map(Self::Group),
                None => number_of(name.strip_prefix("vfio")?.as_bytes()).map(Self::Device),
            },
        }
    }

    /// Its path.
    pub fn path(self) -> String {
        match self {
            Self::Iommu => "/dev/iommu".to_owned(),
            Self::Container => "/dev/vfio/vfio".to_owned(),
            Self::Group(number) => format!("/dev/vfio/{number}"),
            Self::Device(number) => format!("/dev/vfio/devices/{}", device_name(number)),
        }
    }

    /// Major and minor number of the character device.
    pub fn device_number(self) -> (u32, u32) {
        match self {
            // Misc devices: a dynamic number, and VFIO's.
            Self::Iommu => (10, 125),
            Self::Container => (10, 196),
            Self::Group(number) => (510, number),
            Self::Device(number) => (511, number),
        }
    }
}

/// A number as the kernel writes it: no sign, no leading zero.
fn number_of(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    text.parse().ok().filter(|number: &u32| number.to_string() == text)
}

/// A machine with devices.
#[derive(Debug)]
pub struct World {
    machine: Arc<Machine>,
    devices: Arc<BTreeMap<u32, Entry>>,
    iommus: Vec<Iommu>,
    capabilities: u64,
    groups: Arc<Groups>,
    /// Of the process.
    pins: Arc<Pins>,
}

impl World {
    /// The machine from the environment, or the default, in the process with `pins`.
    ///
    /// # Errors
    /// `ENODEV` its description is invalid; the reason is on standard error.
    pub fn from_environment(pins: &Arc<Pins>) -> Result<Self, Errno> {
        let file = env::var_os(FILE_VARIABLE).map(PathBuf::from);
        let described = Config::load(file.as_deref()).map_err(|error| error.to_string());
        described.and_then(|config| Self::new(&config, pins.clone())).map_err(|error| {
            let name = file
                .as_deref()
                .map_or("the default machine".into(), |file| file.display().to_string());
            log::error!("{FILE_VARIABLE}: {name}: {error}");
            Errno::ENODEV
        })
    }

    /// The machine of `config`, likewise.
    ///
    /// # Errors
    /// Says what is invalid in it.
    pub fn new(config: &Config, pins: Arc<Pins>) -> Result<Self, String> {
        let machine = Machine::new();
        let mut units = BTreeMap::new();
        for iommu in &config.iommu {
            units.insert(&iommu.name, machine.add_unit(unit(iommu)));
        }
        for device in &config.device {
            let (name, number) = (&device.iommu, device.vfio);
            let rid = device.rid().map_err(|error| error.to_string())?;
            let unit = units.get(name).ok_or_else(|| format!("there is no IOMMU '{name}'"))?;
            machine
                .add_device(&device_name(number), *unit, rid, device_config(device))
                .map_err(|error| error.to_string())?;
        }
        let devices = Arc::new(with_groups(&config.device));
        let capabilities = config.capabilities.iter().fold(0, |all, one| all | one.bit());
        Ok(Self {
            machine,
            devices,
            iommus: config.iommu.clone(),
            capabilities,
            groups: Arc::default(),
            pins,
        })
    }

    /// Capabilities granted to every process here, besides its own, as bits.
    pub fn capabilities(&self) -> u64 {
        self.capabilities
    }

    /// Its devices, by number.
    pub fn devices(&self) -> &BTreeMap<u32, Entry> {
        &self.devices
    }

    /// Its IOMMUs.
    pub fn iommus(&self) -> &[Iommu] {
        &self.iommus
    }

    /// Whether `node` exists.
    pub fn has(&self, node: Node) -> bool {
        match node {
            Node::Iommu | Node::Container => true,
            Node::Device(number) => self.devices.contains_key(&number),
            Node::Group(number) => self.devices.values().any(|device| device.group == number),
        }
    }

    /// Opens `node`.
    ///
    /// # Errors
    /// `ENOENT` there is no such device; `EBUSY` the group is open, or a device of it is bound.
    pub fn open(&self, node: Node) -> Result<Arc<dyn File>, Errno> {
        if !self.has(node) {
            return Err(Errno::ENOENT);
        }
        Ok(match node {
            Node::Iommu => Arc::new(Iommufd::new("iommu", self.machine.open())),
            Node::Container => Arc::new(Iommufd::new("vfio", self.machine.open())),
            Node::Group(number) => Arc::new(GroupFile(self.group(number)?)),
            Node::Device(number) => {
                let device = self.opener(None).open(number)?;
                Arc::new(device.outside_group(self.groups.clone()))
            }
        })
    }

    fn opener(&self, group: Option<u32>) -> Opener {
        Opener {
            machine: self.machine.clone(),
            devices: self.devices.clone(),
            pins: self.pins.clone(),
            group,
        }
    }

    fn group(&self, number: u32) -> Result<Arc<Group>, Errno> {
        self.groups.open(number, || Group::new(number, self.opener(Some(number))))
    }
}

/// Gives every device a group: the requested number, or an unused one.
fn with_groups(devices: &[DeviceEntry]) -> BTreeMap<u32, Entry> {
    let taken: BTreeSet<u32> = devices.iter().filter_map(|device| device.group).collect();
    let mut free = (0..).filter(|number| !taken.contains(number));
    let entries = devices.iter().map(|config| {
        let group = config.group.or_else(|| free.next()).unwrap_or(u32::MAX);
        (config.vfio, Entry { config: config.clone(), group })
    });
    entries.collect()
}

fn unit(iommu: &Iommu) -> EmulatedUnit {
    match iommu.model {
        Model::Vtd => VtdUnit::new(
            VtdUnitConfig::default()
                .with_address_width(match iommu.address_width {
                    39 => AddressWidth::Bits39,
                    57 => AddressWidth::Bits57,
                    _ => AddressWidth::Bits48,
                })
                .with_pasid_bits(iommu.pasid_bits)
                .with_nesting(iommu.nesting)
                .with_device_tlb(iommu.ats)
                .with_page_requests(iommu.pri)
                .with_erratum_772415(iommu.erratum_772415)
                .with_guest_second_stage(false),
        )
        .into(),
        Model::Smmuv3 => SmmuV3Unit::new(
            SmmuV3UnitConfig::default()
                .with_address_width(iommu.address_width)
                .with_ssid_bits(iommu.pasid_bits)
                .with_nesting(iommu.nesting)
                .with_ats(iommu.ats)
                .with_page_requests(iommu.pri)
                .with_s2fwb(iommu.s2fwb),
        )
        .into(),
    }
}

fn device_config(device: &DeviceEntry) -> DeviceConfig {
    DeviceConfig::default()
        .with_pasid_bits(device.pasid_bits)
        .with_ats(device.ats)
        .with_pri(device.pri)
        .with_reserved(device.reserved())
        .with_group(device.group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(Node::of(b"/dev/iommu"), Some(Node::Iommu));
        assert_eq!(Node::of(b"/dev/vfio/vfio"), Some(Node::Container));
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio12"), Some(Node::Device(12)));
        assert_eq!(Node::of(b"/dev/vfio/7"), Some(Node::Group(7)));
        for other in [
            "/dev/iommu/",
            "/dev/vfio",
            "/dev/vfio/07",
            "/dev/vfio/",
            "/dev/vfio/devices/vfio",
            "dev/iommu",
        ] {
            assert_eq!(Node::of(other.as_bytes()), None, "{other}");
        }
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio01"), None);
        assert_eq!(Node::of(b"/dev/vfio/devices/vfio+1"), None);
    }

    #[test]
    fn a_machine_has_what_its_description_says() {
        let world = World::new(&Config::load(None).unwrap(), Arc::default()).unwrap();
        assert!(world.has(Node::Iommu) && world.has(Node::Device(1)));
        assert!(!world.has(Node::Device(2)));
        assert_eq!(world.open(Node::Device(2)).unwrap_err(), Errno::ENOENT);
        assert_eq!(world.open(Node::Device(0)).unwrap().name(), "vfio0");
        assert_eq!(world.open(Node::Container).unwrap().name(), "vfio");
    }

    #[test]
    fn every_device_has_a_group() {
        let config = Config::load(None).unwrap();
        let groups = |first: Option<u32>| {
            let mut devices = config.device.clone();
            devices[0].group = first;
            with_groups(&devices).into_values().map(|device| device.group).collect::<Vec<_>>()
        };
        assert_eq!(groups(None), [0, 1]);
        assert_eq!(groups(Some(0)), [0, 1]);
        assert_eq!(groups(Some(7)), [7, 0]);
    }

    #[test]
    fn a_group_is_open_once() {
        let world = World::new(&Config::load(None).unwrap(), Arc::default()).unwrap();
        let group = world.open(Node::Group(1)).unwrap();
        assert_eq!(world.open(Node::Group(1)).unwrap_err(), Errno::EBUSY);
        drop(group);
        world.open(Node::Group(1)).unwrap();
        let opener = world.opener(Some(1));
        assert_eq!(opener.named("0000:00:05.0"), Some(1));
        assert_eq!(opener.named("0000:00:04.0"), None, "of another group");
    }

    #[test]
    fn two_devices_at_one_address() {
        let text = include_str!("default.toml").replace("00:05.0", "00:04.0");
        let error = World::new(&Config::parse(&text).unwrap(), Arc::default()).unwrap_err();
        assert!(error.contains("00:04.0"), "{error}");
    }
}

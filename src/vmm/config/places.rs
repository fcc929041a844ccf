// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the functions of a machine are: on bus 0 or behind root ports and bridges.
//!
//! Device 0 of bus 0 is the host bridge. The devices on bus 0 follow in their order, then the root
//! ports. Buses are numbered from the root, as a kernel that numbers them anew does: each root
//! port's, and after it that of a bridge behind it. A root port has one slot, device 0 of its bus.
//!
//! Conventional devices begin with device 0, too, whose own Requester ID is the one that all of
//! them have: Linux 7.2, in scalable mode, sets up a function's own only.

use super::error::{ConfigError, MAX_DEVICES};
use super::MachineConfig;
use crate::arch::layout::MAX_BUSES;
use twostage::spec::pci::Bdf;
use twostage::viommu::bridges::{requester_id, Bridge, BridgeKind};

/// A PCIe root port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootPortConfig {
    /// Its name for devices and bridges.
    pub id: String,
}

/// A bridge from PCI Express to conventional PCI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciBridgeConfig {
    /// Its name for devices.
    pub id: String,
    /// The id of the root port that it is behind.
    pub bus: String,
}

/// Devices on a bus of conventional PCI.
const CONVENTIONAL: usize = 32;

/// Where a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its address.
    pub bdf: Bdf,
    /// The bridges that it is behind, from the root bus on.
    pub bridges: Vec<Bridge>,
    /// The last bus behind the last one of them.
    pub last_bus: u8,
}

impl Place {
    /// The Requester ID of its DMA and messages.
    pub fn rid(&self) -> Bdf {
        requester_id(self.bdf, &self.bridges)
    }
}

/// Where a root port or a bridge is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BridgePlace {
    pub id: String,
    /// Its address, the number of the bus behind it, and its kind.
    pub bridge: Bridge,
    /// The last bus behind it.
    pub subordinate: u8,
    /// The bridges that it is behind, from the root bus on.
    pub bridges: Vec<Bridge>,
}

impl MachineConfig {
    /// Where the root ports and bridges are, a port before the bridge behind it.
    ///
    /// # Errors
    /// There is no place for one, or two have one name.
    pub(crate) fn bridge_places(&self) -> Result<Vec<BridgePlace>, ConfigError> {
        let on_root = self.devices.iter().filter(|device| device.bus().is_none()).count();
        if on_root + self.root_ports.len() > MAX_DEVICES {
            return Err(ConfigError::TooManyDevices(on_root + self.root_ports.len()));
        }
        let buses = 1 + self.root_ports.len() + self.pci_bridges.len();
        if buses as u64 > MAX_BUSES {
            return Err(ConfigError::TooManyBuses(buses));
        }
        self.check_bridges()?;
        let mut places = Vec::new();
        // No more than fit on bus 0, and no more buses than there may be: no cast loses anything.
        for (device, port) in (on_root as u8 + 1..).zip(&self.root_ports) {
            let secondary = places.len() as u8 + 1;
            let kind = BridgeKind::Port;
            let bridge = Bridge { bdf: at(0, device), secondary, kind };
            let behind = self.pci_bridges.iter().find(|bridge| bridge.bus == port.id);
            let subordinate = secondary + u8::from(behind.is_some());
            let id = port.id.clone();
            places.push(BridgePlace { id, bridge, subordinate, bridges: Vec::new() });
            if let Some(to_pci) = behind {
                let kind = BridgeKind::ExpressToPci;
                let inner = Bridge { bdf: at(secondary, 0), secondary: subordinate, kind };
                let (id, bridges) = (to_pci.id.clone(), vec![bridge]);
                places.push(BridgePlace { id, bridge: inner, subordinate, bridges });
            }
        }
        Ok(places)
    }

    /// Where the devices are, in their order.
    ///
    /// # Errors
    /// There is no place for one.
    pub(crate) fn places(&self) -> Result<Vec<Place>, ConfigError> {
        let bridges = self.bridge_places()?;
        let mut taken = vec![0_usize; bridges.len()];
        let mut on_root = 0;
        let mut places = Vec::new();
        for (number, device) in (1..).zip(&self.devices) {
            let Some(bus) = device.bus() else {
                // Counted above.
                on_root += 1;
                places.push(Place { bdf: at(0, on_root), bridges: Vec::new(), last_bus: 0 });
                continue;
            };
            let option = device.option();
            let found = bridges.iter().zip(&mut taken).find(|(bridge, _)| bridge.id == bus);
            let Some((bridge, taken)) = found else {
                let ids: Vec<_> = bridges.iter().map(|bridge| bridge.id.as_str()).collect();
                let known = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
                return Err(ConfigError::UnknownBus(option, number, bus.to_owned(), known));
            };
            let BridgePlace { bridge: Bridge { secondary, kind, .. }, subordinate, .. } = *bridge;
            let (slots, what) = match kind {
                // A bridge behind it is in its slot.
                BridgeKind::Port => {
                    (usize::from(subordinate == secondary), "a root port has one slot")
                }
                BridgeKind::ExpressToPci | BridgeKind::PciToPci => (CONVENTIONAL, "32 devices"),
            };
            if *taken == slots {
                return Err(ConfigError::BusIsFull(option, number, bus.to_owned(), what));
            }
            let bdf = at(secondary, *taken as u8);
            *taken += 1;
            let bridges = [bridge.bridges.as_slice(), &[bridge.bridge]].concat();
            places.push(Place { bdf, bridges, last_bus: bridge.subordinate });
        }
        Ok(places)
    }

    /// The number of buses.
    pub(crate) fn buses(&self) -> u64 {
        1 + self.root_ports.len() as u64 + self.pci_bridges.len() as u64
    }

    /// Checks the names of root ports and bridges, and that a bridge is alone behind a root port.
    fn check_bridges(&self) -> Result<(), ConfigError> {
        let ports = || self.root_ports.iter().map(|port| &port.id);
        let bridges = || self.pci_bridges.iter().map(|bridge| &bridge.id);
        let ids: Vec<_> = ports().chain(bridges()).collect();
        for (number, id) in ids.iter().enumerate() {
            if ids.iter().take(number).any(|other| other == id) {
                return Err(ConfigError::SameBus((*id).clone()));
            }
        }
        for (number, bridge) in self.pci_bridges.iter().enumerate() {
            let (id, bus) = (bridge.id.clone(), bridge.bus.clone());
            if bridges().any(|other| *other == bus) {
                return Err(ConfigError::BridgeBehindBridge(id, bus));
            }
            if !ports().any(|port| *port == bus) {
                return Err(ConfigError::NoSuchPort(id, bus));
            }
            let before = self.pci_bridges.iter().take(number);
            if let Some(other) = before.into_iter().find(|other| other.bus == bus) {
                return Err(ConfigError::TwoBridges(id, bus, other.id.clone()));
            }
        }
        Ok(())
    }
}

/// Function 0 of `device`, which is below 32, on `bus`.
fn at(bus: u8, device: u8) -> Bdf {
    Bdf::from_raw(u16::from(bus) << 8 | u16::from(device) << 3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{testing, DeviceConfig, EduConfig, IommuChoice, IommuConfig, VfioConfig};

    fn edu(bus: Option<&str>) -> DeviceConfig {
        DeviceConfig::Edu(EduConfig { bus: bus.map(str::to_owned), ..EduConfig::default() })
    }

    /// With edus on `buses`, root ports `ports` and bridges of (id, bus).
    fn machine(buses: &[Option<&str>], ports: &[&str], bridges: &[(&str, &str)]) -> MachineConfig {
        let port = |id: &&str| RootPortConfig { id: (*id).to_owned() };
        let bridge = |(id, bus): &(&str, &str)| PciBridgeConfig {
            id: (*id).to_owned(),
            bus: (*bus).to_owned(),
        };
        MachineConfig {
            devices: buses.iter().map(|bus| edu(*bus)).collect(),
            root_ports: ports.iter().map(port).collect(),
            pci_bridges: bridges.iter().map(bridge).collect(),
            iommus: vec![IommuConfig::default()],
            ..testing::machine()
        }
    }

    #[test]
    fn buses_are_numbered_from_the_root_on() {
        let buses = [Some("br"), None, Some("c"), None, Some("br"), Some("a")];
        let config = machine(&buses, &["a", "b", "c"], &[("br", "b")]);
        assert_eq!((config.validate(), config.buses()), (Ok(()), 5));
        let bridges = config.bridge_places().unwrap();
        let numbers = bridges.iter().map(|place| {
            let Bridge { bdf, secondary, .. } = place.bridge;
            (place.id.as_str(), bdf.to_string(), secondary, place.subordinate)
        });
        let expected = [("a", "00:03.0", 1, 1), ("b", "00:04.0", 2, 3), ("br", "02:00.0", 3, 3)];
        let expected = expected.into_iter().chain([("c", "00:05.0", 4, 4)]);
        assert!(numbers.eq(expected.map(|(id, bdf, from, to)| (id, bdf.to_owned(), from, to))));
        let places = config.places().unwrap();
        let text = |bdf: Bdf| bdf.to_string();
        let bdfs: Vec<_> = places.iter().map(|place| text(place.bdf)).collect();
        assert_eq!(bdfs, ["03:00.0", "00:01.0", "04:00.0", "00:02.0", "03:01.0", "01:00.0"]);
        let rids: Vec<_> = places.iter().map(|place| text(place.rid())).collect();
        assert_eq!(rids, ["03:00.0", "00:01.0", "04:00.0", "00:02.0", "03:00.0", "01:00.0"]);
    }

    #[test]
    fn what_has_no_place_is_named() {
        let many: Vec<String> = (0..16).map(|number| format!("p{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (config, error) in [
            (machine(&[Some("x")], &["a"], &[]), "--device 1: bus=x, but there is no --root-port or --pci-bridge of this id; there is a"),
            (machine(&[Some("x")], &[], &[]), "--device 1: bus=x, but there is no --root-port or --pci-bridge of this id; there is none"),
            (machine(&[], &["a", "a"], &[]), "--root-port, --pci-bridge: there are two with id=a"),
            (machine(&[], &["a"], &[("a", "a")]), "--root-port, --pci-bridge: there are two with id=a"),
            (machine(&[Some("a"), Some("a")], &["a"], &[]), "--device 2: bus=a is full (a root port has one slot); add a --root-port for it"),
            (machine(&[Some("a")], &["a"], &[("b", "a")]), "--device 1: bus=a is full (a root port has one slot); add a --root-port for it"),
            (machine(&[], &["a"], &[("b", "a"), ("c", "a")]), "--pci-bridge c: bus=a has b in its only slot; add a --root-port"),
            (machine(&[], &["a"], &[("b", "a"), ("c", "b")]), "--pci-bridge c: bus=b is a bridge to PCI itself; it needs that of a --root-port"),
            (machine(&[], &[], &[("b", "a")]), "--pci-bridge b: bus=a, but there is no --root-port with id=a"),
            (machine(&[], &many, &[]), "--root-port, --pci-bridge: 17 buses; there is room for 16"),
            (machine(&[None; 31], &["a"], &[]), "32 devices and root ports on bus 0, which has room for 31"),
            (machine(&[Some("b"); 33], &["a"], &[("b", "a")]), "--device 33: bus=b is full (32 devices); add a --root-port for it"),
        ] {
            assert_eq!(config.validate().unwrap_err().to_string(), error);
        }
        assert_eq!(machine(&[], &many[..15], &[]).validate(), Ok(()));
        assert_eq!(machine(&[Some("b"); 32], &["a"], &[("b", "a")]).validate(), Ok(()));
    }

    #[test]
    fn conventional_devices_share_what_their_requester_id_decides() {
        let refused = |device: DeviceConfig| {
            let mut config = machine(&[Some("b")], &["a"], &[("b", "a")]);
            config.devices.push(device);
            config.validate().unwrap_err().to_string()
        };
        let bus = Some("b".to_owned());
        let off = EduConfig { iommu: IommuChoice::Off, bus: bus.clone(), ..EduConfig::default() };
        assert_eq!(
            refused(DeviceConfig::Edu(off)),
            "--device 2: bus=b: its devices share one Requester ID, and so need the same iommu="
        );
        let pasids = EduConfig { pasid_bits: 4, bus: bus.clone(), ..EduConfig::default() };
        assert_eq!(
            refused(DeviceConfig::Edu(pasids)),
            "--device 2: bus=b is conventional PCI, which has no PASIDs; it needs bus= of a --root-port"
        );
        let (path, id, iommu) = ("/a".into(), None, IommuChoice::Off);
        assert_eq!(
            refused(DeviceConfig::Vfio(VfioConfig { path, id, iommu, bus })),
            "--vfio 2: bus=b is conventional PCI, which has no assigned devices; it needs bus= of a --root-port"
        );
    }
}

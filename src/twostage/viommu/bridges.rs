// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Functions behind bridges: which Requester ID an IOMMU sees of them, and which a guest looks up.
//!
//! Sources: PCI Express Base Specification 6.0, §2.2.4.2; PCI Express to PCI/PCI-X Bridge
//! Specification 1.0, §2.3.

use std::ops::RangeInclusive;

use crate::spec::pci::Bdf;

/// What a bridge does with the Requester IDs of the functions behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BridgeKind {
    /// A port of a root complex or a switch: requests keep theirs.
    Port,
    /// From PCI Express to conventional PCI, where requests have none: all get that of device 0,
    /// function 0 of the bridge's secondary bus.
    ExpressToPci,
    /// From conventional PCI to conventional PCI, or of a root complex to conventional PCI: all get
    /// that of the bridge.
    PciToPci,
}

/// A bridge on the way from the root bus to a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bridge {
    /// Its own address.
    pub bdf: Bdf,
    /// The number of the bus on its other side.
    pub secondary: u8,
    /// What it does with Requester IDs.
    pub kind: BridgeKind,
}

impl Bridge {
    /// The Requester ID of all that is behind it, if it is one for all.
    fn alias(&self) -> Option<Bdf> {
        match self.kind {
            BridgeKind::Port => None,
            BridgeKind::ExpressToPci => Some(Bdf::from_raw(u16::from(self.secondary) << 8)),
            BridgeKind::PciToPci => Some(self.bdf),
        }
    }
}

/// The first of `bridges`, which are in their order from the root bus on, that gives everything
/// behind it one Requester ID.
pub fn conventional(bridges: &[Bridge]) -> Option<&Bridge> {
    bridges.iter().find(|bridge| bridge.kind != BridgeKind::Port)
}

/// The Requester ID that an IOMMU at the root complex sees of `function` behind `bridges`, which
/// are in their order from the root bus on. Functions with the same one share a policy: to a
/// virtual IOMMU they are one requester.
///
/// ```
/// use twostage::spec::pci::Bdf;
/// use twostage::viommu::bridges::{requester_id, Bridge, BridgeKind};
///
/// let bdf = |raw| Bdf::from_raw(raw);
/// let port = Bridge { bdf: bdf(0x0018), secondary: 1, kind: BridgeKind::Port };
/// let to_pci = Bridge { bdf: bdf(0x0100), secondary: 2, kind: BridgeKind::ExpressToPci };
/// assert_eq!(requester_id(bdf(0x0100), &[port]), bdf(0x0100));
/// assert_eq!(requester_id(bdf(0x0210), &[port, to_pci]), bdf(0x0200));
/// ```
pub fn requester_id(function: Bdf, bridges: &[Bridge]) -> Bdf {
    conventional(bridges).and_then(Bridge::alias).unwrap_or(function)
}

/// The Requester IDs that firmware has to lead to the IOMMU of `function` behind `bridges`, in
/// ranges: a guest looks up each function's own and that of [`requester_id`]. Behind a bridge to
/// conventional PCI its own may be any of the buses from the secondary to `last_bus`, the
/// subordinate one.
pub fn looked_up(
    function: Bdf,
    bridges: &[Bridge],
    last_bus: u8,
) -> impl Iterator<Item = RangeInclusive<u16>> {
    let own = match conventional(bridges) {
        Some(bridge) => u16::from(bridge.secondary) << 8..=u16::from(last_bus) << 8 | 0xff,
        None => function.raw()..=function.raw(),
    };
    let seen = requester_id(function, bridges).raw();
    let shared = (!own.contains(&seen)).then_some(seen..=seen);
    shared.into_iter().chain([own])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdf(text: &str) -> Bdf {
        text.parse().unwrap()
    }

    fn bridge(at: &str, secondary: u8, kind: BridgeKind) -> Bridge {
        Bridge { bdf: bdf(at), secondary, kind }
    }

    #[test]
    fn ports_pass_requester_ids_on_and_bridges_to_pci_do_not() {
        use BridgeKind::{ExpressToPci, PciToPci, Port};
        let port = bridge("00:03.0", 1, Port);
        let to_pci = bridge("01:00.0", 2, ExpressToPci);
        let inner = bridge("02:04.0", 3, PciToPci);
        for (function, bridges, seen) in [
            ("00:03.0", &[][..], "00:03.0"),
            ("01:00.5", &[port], "01:00.5"),
            // A switch below the port.
            ("05:00.0", &[port, bridge("01:00.0", 4, Port), bridge("04:01.0", 5, Port)], "05:00.0"),
            ("02:00.0", &[port, to_pci], "02:00.0"),
            ("02:1f.7", &[port, to_pci], "02:00.0"),
            // The bridge nearest to the root says what the IOMMU sees.
            ("03:01.0", &[port, to_pci, inner], "02:00.0"),
            ("03:01.0", &[bridge("00:1e.0", 3, PciToPci)], "00:1e.0"),
        ] {
            assert_eq!(requester_id(bdf(function), bridges), bdf(seen), "{function}, {bridges:?}");
        }
    }

    #[test]
    fn a_guest_looks_up_functions_and_what_they_share() {
        use BridgeKind::{ExpressToPci, PciToPci, Port};
        let port = bridge("00:03.0", 1, Port);
        let to_pci = bridge("01:00.0", 2, ExpressToPci);
        let looked_up = |function, bridges: &[Bridge], last_bus| {
            looked_up(bdf(function), bridges, last_bus).collect::<Vec<_>>()
        };
        assert_eq!(looked_up("01:00.0", &[port], 1), [0x100..=0x100]);
        assert_eq!(looked_up("02:03.0", &[port, to_pci], 2), [0x200..=0x2ff]);
        assert_eq!(looked_up("03:03.0", &[port, to_pci], 3), [0x200..=0x3ff]);
        let legacy = bridge("00:1e.0", 3, PciToPci);
        assert_eq!(looked_up("03:00.0", &[legacy], 3), [0xf0..=0xf0, 0x300..=0x3ff]);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where devices are put: behind which bridges, and where in PCI memory.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use vm_allocator::{AddressAllocator, AllocPolicy};

use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
use crate::config::{BridgePlace, Place};
use crate::pci::{Bridge, BusNumbers, PciBus, Way, WINDOW_ALIGNMENT};
use crate::{Error, Result};
use twostage::spec::pci::Bdf;

/// Where a device is put.
pub(super) struct Slot {
    /// Its address.
    pub bdf: Bdf,
    /// The Requester ID of its DMA and messages.
    pub rid: Bdf,
    /// The bridge that it is behind.
    pub way: Option<Arc<Way>>,
    /// The device numbers of bridges on the way to the root bus.
    pub upwards: Vec<u8>,
}

/// The bridges of a machine, by the buses behind them.
pub(super) struct Bridges(BTreeMap<u8, Arc<Bridge>>);

impl Bridges {
    /// Those at `places`, put on `bus`.
    pub fn new(places: &[BridgePlace], bus: &mut PciBus) -> Self {
        let mut bridges = BTreeMap::<u8, Arc<Bridge>>::new();
        for BridgePlace { id, bridge, subordinate, .. } in places {
            let (primary, secondary) = (bridge.bdf.bus(), bridge.secondary);
            let numbers = BusNumbers { primary, secondary, subordinate: *subordinate };
            let up = bridges.get(&primary).map(|port| port.way().clone());
            let made = Arc::new(Bridge::new(id, bridge.kind, numbers, up));
            bus.insert_bridge(bridge.bdf, made.clone());
            bridges.insert(secondary, made);
        }
        Self(bridges)
    }

    /// The slot at `place`.
    pub fn slot(&self, place: &Place) -> Slot {
        let nearest = self.0.get(&place.bdf.bus());
        Slot {
            bdf: place.bdf,
            rid: place.rid(),
            way: nearest.map(|bridge| bridge.way().clone()),
            upwards: place.bridges.iter().rev().map(|bridge| bridge.bdf.device()).collect(),
        }
    }

    /// Opens the windows for the BARs in `room`, and tells the functions on `bus`.
    pub fn open(&self, room: &Room, bus: &PciBus) {
        for (numbers, window) in &room.windows {
            // From the root on.
            for (_, bridge) in self.0.range(numbers.clone()) {
                bridge.open(window);
                bus.reprogrammed(bridge);
            }
        }
    }
}

/// The room for BARs: those on the root bus from the start of PCI memory up; those behind each root
/// port, which has one window, together, from the end down.
pub(super) struct Room {
    free: AddressAllocator,
    /// Everything from here on is for devices behind ports.
    next: u64,
    /// Where BARs are placed now: behind the root port with these buses, or on the root bus.
    port: Option<RangeInclusive<u8>>,
    windows: Vec<(RangeInclusive<u8>, RangeInclusive<u64>)>,
}

impl Room {
    /// All of PCI memory.
    pub fn new() -> Result<Self> {
        let free = AddressAllocator::new(PCI_MMIO_START, PCI_MMIO_LAST - PCI_MMIO_START + 1)
            .map_err(|error| Error::Pci(error.to_string()))?;
        Ok(Self { free, next: PCI_MMIO_LAST + 1, port: None, windows: Vec::new() })
    }

    /// From now on BARs are of the device at `place`. Devices behind one root port come together,
    /// after those on the root bus.
    pub fn enter(&mut self, place: &Place) {
        let port = place.bridges.first().map(|port| port.secondary..=place.last_bus);
        if port != self.port {
            self.next = self.next / WINDOW_ALIGNMENT * WINDOW_ALIGNMENT;
            self.port = port;
        }
    }

    /// A place for a BAR of `size` bytes, a power of two.
    pub fn place(&mut self, size: u64) -> Result<u64> {
        let policy = match &self.port {
            None => AllocPolicy::FirstMatch,
            Some(_) => AllocPolicy::ExactMatch(self.next.saturating_sub(size) & !(size - 1)),
        };
        let range = self.free.allocate(size, size, policy);
        let no_room = |error| Error::Pci(format!("no room for a BAR of {size:#x} bytes: {error}"));
        let start = range.map_err(no_room)?.start();
        if let Some(port) = &self.port {
            let first = start / WINDOW_ALIGNMENT * WINDOW_ALIGNMENT;
            match self.windows.last_mut() {
                Some((of, window)) if of == port => *window = first..=*window.end(),
                _ => self.windows.push((port.clone(), first..=self.next - 1)),
            }
            self.next = start;
        }
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use twostage::viommu::bridges::{Bridge, BridgeKind};

    fn behind(secondary: u8, last_bus: u8) -> Place {
        let bdf = Bdf::from_raw(u16::from(secondary) << 3);
        let bridge = Bridge { bdf, secondary, kind: BridgeKind::Port };
        let bdf = Bdf::from_raw(u16::from(secondary) << 8);
        Place { bdf, bridges: vec![bridge], last_bus }
    }

    #[test]
    fn what_is_behind_one_port_is_in_one_window_of_its_own() {
        let mut room = Room::new().unwrap();
        assert_eq!(room.place(0x1000).unwrap(), PCI_MMIO_START);
        let end = PCI_MMIO_LAST + 1;
        room.enter(&behind(1, 2));
        assert_eq!(room.place(0x4000).unwrap(), end - 0x4000);
        assert_eq!(room.place(0x10_0000).unwrap(), end - 0x20_0000);
        room.enter(&behind(3, 3));
        assert_eq!(room.place(0x1000).unwrap(), end - 0x20_1000);
        // Aligned to its size, with a gap.
        assert_eq!(room.place(0x40_0000).unwrap() % 0x40_0000, 0);
        let windows: Vec<_> = room.windows.iter().map(|(_, window)| window.clone()).collect();
        assert_eq!(windows[0], end - 0x20_0000..=end - 1);
        assert_eq!(*windows[1].end(), end - 0x20_0001);
        assert_eq!(*windows[1].start(), room.next);
        assert_eq!(windows[1].start() % WINDOW_ALIGNMENT, 0);
    }

    #[test]
    fn a_bar_that_does_not_fit_is_an_error() {
        let mut room = Room::new().unwrap();
        room.place(1 << 28).unwrap();
        room.enter(&behind(1, 1));
        let error = room.place(1 << 30).unwrap_err().to_string();
        assert!(error.contains("no room for a BAR of 0x40000000 bytes"), "{error}");
    }
}

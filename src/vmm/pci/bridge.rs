// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Bridges: root ports with access control services, and bridges from PCI Express to conventional
//! PCI. They have no slot for hot-plugging, no I/O window and no interrupts.
//!
//! Buses have numbers from the start, which firmware tables and the virtual IOMMU know. Software
//! that gives other numbers reaches configuration space by these; DMA and messages of functions
//! behind the bridge are blocked meanwhile, as the IOMMU does not know them by the new numbers.
//!
//! Sources: PCI Express Base Specification 6.0, §7.5.1.3 (type 1 header), §7.5.3, §7.7.11; PCI
//! Express to PCI/PCI-X Bridge Specification 1.0.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use super::capabilities::{add_access_control, add_express};
use super::layout::*;
use super::way::{Programmed, Way};
use super::{ConfigSpace, Identity, PciFunction};
use twostage::viommu::bridges::BridgeKind;
use twostage::warn_limited;

/// QEMU's, which no driver takes for more than they are.
const ROOT_PORT: Identity =
    Identity { vendor: 0x1b36, device: 0x000c, class: 0x06_0400, revision: 0 };
const TO_PCI: Identity = Identity { vendor: 0x1b36, device: 0x000e, class: 0x06_0400, revision: 0 };

/// Alignment and size of windows, in bytes.
pub const WINDOW_ALIGNMENT: u64 = 1 << 20;

/// Bus numbers of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusNumbers {
    /// Of its own bus.
    pub primary: u8,
    /// Of the bus behind it.
    pub secondary: u8,
    /// Of the last bus behind it.
    pub subordinate: u8,
}

/// A bridge.
pub struct Bridge {
    name: String,
    config: Mutex<ConfigSpace>,
    way: Arc<Way>,
    /// Software resets what is behind it, and nobody has done it yet.
    reset: AtomicBool,
}

impl Bridge {
    /// A bridge of `kind`, itself behind `up`, as firmware leaves it: with `numbers`, forwarding
    /// requests, its windows closed. Log lines call it `name`.
    pub fn new(name: &str, kind: BridgeKind, numbers: BusNumbers, up: Option<Arc<Way>>) -> Self {
        let port = kind == BridgeKind::Port;
        let mut config = ConfigSpace::new(if port { ROOT_PORT } else { TO_PCI });
        set_bridge(&mut config);
        config.behind(up.clone());
        let express = if port { EXPRESS_ROOT_PORT } else { EXPRESS_TO_PCI };
        add_express(&mut config, express, 0, 0);
        if port {
            add_access_control(&mut config);
        }
        config.set_u8(PRIMARY_BUS, numbers.primary);
        config.set_u8(SECONDARY_BUS, numbers.secondary);
        config.set_u8(SUBORDINATE_BUS, numbers.subordinate);
        let command = Command::new().with_memory_space(true).with_bus_master(true);
        config.set_u16(COMMAND, command.into_bits());
        let way = Arc::new(Way::new(kind, numbers.secondary, up));
        way.program(programmed(&config));
        let reset = AtomicBool::new(false);
        Self { name: name.to_owned(), config: Mutex::new(config), way, reset }
    }

    /// The way through it.
    pub fn way(&self) -> &Arc<Way> {
        &self.way
    }

    /// Opens the window for memory that is not prefetchable: `range`, below 4 GiB, of whole
    /// [`WINDOW_ALIGNMENT`]s.
    pub fn open(&self, range: &RangeInclusive<u64>) {
        let register = |address: u64| (address >> 16) as u16 & WINDOW_ADDRESS;
        let mut config = self.config.lock();
        config.set_u16(MEMORY_BASE, register(*range.start()));
        config.set_u16(MEMORY_BASE + 2, register(*range.end()));
        self.way.program(programmed(&config));
    }

    /// Whether software has begun to reset what is behind it since the last call.
    pub(super) fn take_reset(&self) -> bool {
        self.reset.swap(false, Ordering::SeqCst)
    }
}

impl PciFunction for Bridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn config_is_memory(&self) -> bool {
        true
    }

    /// Returns also whether it is programmed in another way.
    fn config_written(&self, offset: u16, length: usize) -> bool {
        let config = self.config.lock();
        let written = usize::from(offset)..usize::from(offset) + length;
        let control = written.contains(&usize::from(BRIDGE_CONTROL));
        let resets = control && config.u16(BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0;
        self.reset.fetch_or(resets, Ordering::SeqCst);
        let programmed = programmed(&config);
        let (bus, known) = (programmed.buses.0, self.way.known_bus());
        let changed = self.way.program(programmed);
        if changed && bus != known && bus != 0 {
            warn_limited!(
                "{}: the guest calls the bus behind it {bus:#04x}, and the IOMMU {known:#04x}: \
                 DMA of what is there is blocked until it has its number back",
                self.name
            );
        }
        changed || resets
    }

    fn reset(&self) {
        let mut config = self.config.lock();
        config.reset();
        self.way.program(programmed(&config));
    }

    fn read_bar(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        // It has no BAR.
        data.fill(0xff);
    }

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

impl fmt::Debug for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bridge").field("name", &self.name).field("way", &self.way).finish()
    }
}

/// Makes `config` that of a bridge (§7.5.1.3) with memory windows: a prefetchable one of 64 bits,
/// and another one; both are closed.
fn set_bridge(config: &mut ConfigSpace) {
    config.set_u8(HEADER_TYPE, HEADER_TYPE_BRIDGE);
    config.allow(PRIMARY_BUS, &[0xff; 3]);
    for window in [MEMORY_BASE, PREFETCHABLE_BASE] {
        let kind = if window == PREFETCHABLE_BASE { PREFETCHABLE_64 } else { 0 };
        config.allow(window, &[WINDOW_ADDRESS.to_le_bytes(); 2].concat());
        config.set_u16(window, WINDOW_ADDRESS | kind);
        config.set_u16(window + 2, kind);
    }
    config.allow(PREFETCHABLE_BASE_UPPER, &[0xff; 8]);
    config.allow(BRIDGE_CONTROL, &(SECONDARY_BUS_RESET | BRIDGE_CONTROL_KEPT).to_le_bytes());
}

/// What software has programmed into a bridge with `config`.
fn programmed(config: &ConfigSpace) -> Programmed {
    let command = config.command();
    let [secondary, subordinate] = config.u16(SECONDARY_BUS).to_le_bytes();
    let windows = match command.memory_space() {
        true => [MEMORY_BASE, PREFETCHABLE_BASE]
            .into_iter()
            .filter_map(|register| {
                let wide = register == PREFETCHABLE_BASE;
                let upper = |at: u16| if wide { u64::from(config.u32(at)) << 32 } else { 0 };
                let address = |at| u64::from(config.u16(at) & WINDOW_ADDRESS) << 16;
                let first = address(register) | upper(PREFETCHABLE_BASE_UPPER);
                let last = address(register + 2) | upper(PREFETCHABLE_BASE_UPPER + 4);
                (first <= last).then_some(first..=last | (WINDOW_ALIGNMENT - 1))
            })
            .collect(),
        false => Vec::new(),
    };
    Programmed { buses: (secondary, subordinate), windows, requests: command.bus_master() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: BusNumbers = BusNumbers { primary: 0, secondary: 1, subordinate: 2 };

    fn write(bridge: &Bridge, offset: u16, data: &[u8]) -> bool {
        bridge.config().lock().write(offset, data);
        bridge.config_written(offset, data.len())
    }

    fn read(bridge: &Bridge, offset: u16) -> u32 {
        bridge.config().lock().u32(offset)
    }

    #[test]
    fn a_root_port_says_what_it_is() {
        let port = Bridge::new("rp0", BridgeKind::Port, NUMBERS, None);
        assert_eq!((read(&port, 0x00), read(&port, 0x08)), (0x000c_1b36, 0x0604_0000));
        assert_eq!((read(&port, 0x0c), read(&port, 0x18)), (0x0001_0000, 0x0002_0100));
        assert_eq!(read(&port, 0x1c) & 0xffff, 0, "no I/O window");
        assert_eq!(read(&port, 0x24), 0x0001_fff1, "a closed window of 64 bits");
        // Version 2, a root port without a slot; a link of one lane; TLP prefixes.
        assert_eq!((read(&port, 0x40), read(&port, 0x4c)), (0x0042_0010, 0x11));
        assert_eq!((read(&port, 0x50), read(&port, 0x64)), (0x0011_0000, 1 << 21));
        // ACS: what it can do, and what of it software has switched on.
        assert_eq!((read(&port, 0x100), read(&port, 0x104)), (0x0001_000d, 0x1d));
        write(&port, 0x106, &[0xff; 2]);
        assert_eq!(read(&port, 0x104), 0x001d_001d);
        write(&port, 0x00, &[0; 24]);
        assert_eq!((read(&port, 0x00), read(&port, 0x0c)), (0x000c_1b36, 0x0001_0000));
    }

    #[test]
    fn a_bridge_to_pci_has_no_access_control() {
        let to_pci = Bridge::new("br0", BridgeKind::ExpressToPci, NUMBERS, None);
        assert_eq!((read(&to_pci, 0x00), read(&to_pci, 0x40)), (0x000e_1b36, 0x0072_0010));
        assert_eq!(read(&to_pci, 0x100), 0);
        assert!(to_pci.way().is_conventional());
        let behind = Way::new(BridgeKind::Port, 3, Some(to_pci.way().clone()));
        assert!(behind.is_conventional());
    }

    #[test]
    fn memory_is_forwarded_in_the_windows() {
        let port = Bridge::new("rp0", BridgeKind::Port, NUMBERS, None);
        let reaches = |start, last| port.way().reaches(start, last);
        assert!(!reaches(0, 0) && !reaches(0xfff0_0000, 0xfff0_0fff));
        port.open(&(0xe010_0000..=0xe02f_ffff));
        assert_eq!(read(&port, 0x20), 0xe020_e010);
        assert!(reaches(0xe010_0000, 0xe02f_ffff));
        assert!(!reaches(0xe00f_ffff, 0xe010_0000) && !reaches(0xe02f_ffff, 0xe030_0000));
        // 64-bit addresses, by software; what has no decoder does not change.
        assert!(write(&port, 0x24, &0xffff_000fu32.to_le_bytes()));
        assert!(write(&port, 0x28, &[1, 0, 0, 0, 2, 0, 0, 0]));
        assert_eq!(read(&port, 0x24), 0xfff1_0001);
        assert!(reaches(0x1_0000_0000, 0x2_ffff_ffff) && !reaches(0x3_0000_0000, 0x3_0000_0000));
        assert!(write(&port, 4, &[4, 0]));
        assert!(!reaches(0xe010_0000, 0xe010_0000), "memory space is disabled");
        assert!(!write(&port, 4, &[4, 0]), "nothing changed");
    }

    #[test]
    fn requests_need_bus_mastering_and_the_known_number_on_all_the_way() {
        let port = Bridge::new("rp0", BridgeKind::Port, NUMBERS, None);
        let numbers = BusNumbers { primary: 1, secondary: 2, subordinate: 2 };
        let up = Some(port.way().clone());
        let to_pci = Bridge::new("br0", BridgeKind::ExpressToPci, numbers, up);
        let way = to_pci.way();
        assert!(way.takes_requests(), "as firmware leaves it");
        for (bridge, offset, value, back) in
            [(&port, 4, 2, 6), (&to_pci, 4, 2, 6), (&port, 0x19, 7, 1), (&to_pci, 0x19, 0, 2)]
        {
            assert!(write(bridge, offset, &[value]));
            assert!(!way.takes_requests(), "{bridge:?}");
            assert!(write(bridge, offset, &[back]));
            assert!(way.takes_requests());
        }
    }

    #[test]
    fn a_reset_of_the_secondary_bus_is_taken_once() {
        let port = Bridge::new("rp0", BridgeKind::Port, NUMBERS, None);
        assert!(!port.take_reset());
        assert!(write(&port, 0x3e, &[0x43, 0]));
        assert!(port.take_reset() && !port.take_reset());
        assert!(!write(&port, 0x3e, &[3, 0]) && !port.take_reset());
    }
}

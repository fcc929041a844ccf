// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of an assigned device, and what the guest has of it.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::spec::pci::Bdf;
use twostage_vmm::inside::pci::{
    BarPlacement, EventLine, EventVector, InterruptVector, MsiMessage, PasidCapabilities, PciBus,
    PciFunction, PciMemory,
};
use twostage_vmm::inside::vfio::{Lender, Loan, Surroundings, VfioPci};
use twostage_vmm::inside::{BusDevice, HostServices, PCI_MMIO_LAST, PCI_MMIO_START};
use twostage_vmm::Mapping;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::device::{Device, CONFIG_SIZE};
use crate::input::Input;

const BDF: Bdf = Bdf::from_raw(0x18);
/// Capabilities that may be visible.
const VISIBLE: [u8; 6] = [0x01, 0x03, 0x05, 0x09, 0x10, 0x11];
/// Extended ones: serial number and vendors', and those that are emulated, ATS, PRI and PASID; 0
/// is none.
const EXTENDED: [u16; 7] = [0x00, 0x03, 0x0b, 0x23, 0x0f, 0x13, 0x1b];

struct Vector(EventFd);

impl InterruptVector for Vector {
    fn update(&self, _: Option<MsiMessage>) {}

    fn trigger(&self) {}
}

impl EventVector for Vector {
    fn event(&self) -> &EventFd {
        &self.0
    }
}

struct Line([EventFd; 2]);

impl EventLine for Line {
    fn assert_event(&self) -> &EventFd {
        &self.0[0]
    }

    fn end_event(&self) -> &EventFd {
        &self.0[1]
    }

    fn release(&self) {}
}

/// What the guest has mapped: address and length.
type Lent = Arc<Mutex<BTreeSet<(u64, u64)>>>;

struct Slots(Lent);

struct Slot(Lent, (u64, u64));

impl Lender for Slots {
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>> {
        let piece = (address, mapping.length());
        let mut lent = self.0.lock();
        // As KVM has it: slots do not overlap.
        let overlaps = |(at, length): &(u64, u64)| *at < piece.0 + piece.1 && piece.0 < at + length;
        if lent.iter().any(overlaps) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        lent.insert(piece);
        drop(lent);
        Ok(Box::new(Slot(self.0.clone(), piece)))
    }
}

impl Loan for Slot {}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("descriptors")
}

/// The machine.
pub struct Machine {
    device: Arc<Device>,
    function: Arc<VfioPci>,
    bus: Arc<PciBus>,
    lent: Lent,
    /// What the guest may write of the device's own configuration space.
    allowed: Vec<Range<u16>>,
    /// The MSI-X structures that must not be mapped: BAR, first and last page of the table.
    trapped: Option<(usize, Range<u64>)>,
}

impl Machine {
    /// A machine with a device that `input` describes; `None` if it cannot be assigned.
    pub fn new(input: &mut Input<'_>) -> Option<Self> {
        let device = Arc::new(Device::new(input));
        let choice = input.byte();
        let lent = Lent::default();
        let mut next = PCI_MMIO_START;
        let place = &mut |size: u64| {
            let at = next.next_multiple_of(size);
            if at.saturating_add(size) > PCI_MMIO_LAST {
                // No room, as for the others of a bus.
                return Ok(1 << 45);
            }
            next = at + size;
            Ok(at)
        };
        let pasid = PasidCapabilities::new().with_max_width(20);
        let services = HostServices {
            pasid: (choice & 1 != 0).then_some(pasid),
            ats: choice & 2 != 0,
            pri: choice & 4 != 0,
        };
        let vectors =
            Arc::new(|| -> Result<Arc<dyn EventVector>, _> { Ok(Arc::new(Vector(event()))) });
        let around = Surroundings {
            way: None,
            place,
            lender: Arc::new(Slots(lent.clone())),
            vectors,
            line: &mut || Ok((10, Box::new(Line([event(), event()])))),
            services,
            enabled: Arc::new(|_| {}),
            page: 0x1000,
            answers: |bar: &BarPlacement| bar.start >= PCI_MMIO_START && bar.last <= PCI_MMIO_LAST,
        };
        let function = match VfioPci::new("device".to_owned(), device.clone(), around) {
            Ok(function) => Arc::new(function),
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return None;
            }
        };
        let mut bus = PciBus::default();
        bus.insert(BDF, function.clone());
        device.take_written();
        // The command register.
        let allowed = std::iter::once(4..6).collect();
        let bus = Arc::new(bus);
        let mut machine = Self { device, function, bus, lent, allowed, trapped: None };
        machine.look();
        Some(machine)
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    fn u16(&self, offset: u16) -> u16 {
        self.u32(offset) as u16
    }

    fn u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.read_config(BDF, offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// The capabilities that the guest sees.
    fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let mut at = self.u16(0x34) & 0xff;
        while at != 0 {
            assert!(found.len() < 64, "the list is a loop");
            found.push((self.u16(at) as u8, at));
            at = self.u16(at) >> 8;
        }
        found
    }

    /// Looks at what the guest sees at the start.
    fn look(&mut self) {
        let all = self.capabilities();
        self.device.take_written();
        let end = |at: u16| all.iter().map(|(_, next)| *next).filter(|next| *next > at).min();
        for (id, at) in &all {
            assert!(VISIBLE.contains(id), "capability {id:#x} is visible");
            let again = all.iter().filter(|(other, _)| other == id).count() > 1;
            assert!(!again || matches!(id, 0x03 | 0x09), "capability {id:#x} is there twice");
            // Up to the next one, or more of what is in between and not seen.
            if matches!(id, 0x03 | 0x09 | 0x10) {
                self.allowed.push(at + 2..end(*at).unwrap_or(0x100).max(at + 4));
            }
            if *id == 0x11 {
                let place = self.u32(at + 4);
                let vectors = u64::from(self.u16(at + 2) & 0x7ff) + 1;
                let start = u64::from(place & !7);
                self.trapped = Some(((place & 7) as usize, start..start + 16 * vectors));
            }
        }
        let mut at = 0x100;
        for _ in 0..CONFIG_SIZE / 8 {
            let header = self.u32(at);
            let (id, next) = (header as u16, (header >> 20) as u16);
            assert!(EXTENDED.contains(&id), "extended capability {id:#x} is visible");
            if matches!(id, 0x0b | 0x23) {
                // Its length is its own.
                let length = (self.u32(at + 4) >> 20) as u16;
                self.allowed.push(at + 4..at.saturating_add(length.max(8)));
            }
            if next == 0 {
                return;
            }
            assert!(next >= 0x100);
            at = next;
        }
        panic!("the list of extended capabilities is a loop");
    }

    pub fn write_config(&self, register: u16, data: &[u8]) {
        self.bus.write_config(BDF, register, data);
    }

    pub fn read_config(&self, register: u16, size: usize) {
        self.bus.read_config(BDF, register, &mut [0; 8][..size]);
    }

    pub fn capability(&self, which: u8, offset: u16, data: &[u8]) {
        let all = self.capabilities();
        if let Some((_, at)) = all.get(usize::from(which) % all.len().max(1)) {
            self.write_config(at + offset, data);
        }
    }

    /// Where a BAR is, as the guest has placed it.
    fn bar(&self, number: usize) -> Option<u64> {
        let at = 0x10 + 4 * number as u16;
        let low = self.u32(at);
        let high = if low & 7 == 4 { u64::from(self.u32(at + 4)) << 32 } else { 0 };
        (number < 6).then_some(high | u64::from(low & !0xf))
    }

    pub fn access(&self, bar: usize, offset: u64, data: &mut [u8], write: bool) {
        let Some(start) = self.bar(bar) else { return };
        let address = start.wrapping_add(offset);
        let memory = PciMemory(self.bus.clone());
        if (PCI_MMIO_START..=PCI_MMIO_LAST).contains(&address) {
            match write {
                true => memory.write(address - PCI_MMIO_START, data),
                false => memory.read(address - PCI_MMIO_START, data),
            }
        }
    }

    /// Writes an entry of the MSI-X table, and message control.
    pub fn msix(&self, vector: u8, control: u8, value: u64) {
        let all = self.capabilities();
        let Some((_, at)) = all.iter().find(|(id, _)| *id == 0x11) else { return };
        let Some((bar, table)) = &self.trapped else { return };
        let entry = table.start + 16 * u64::from(vector % 17);
        for (offset, value) in [(0, value), (8, u64::from(control & 1) << 32)] {
            self.access(*bar, entry + offset, &mut value.to_le_bytes(), true);
        }
        self.write_config(at + 2, &[0, control]);
    }

    pub fn reset(&self) {
        self.function.reset();
    }

    /// What holds at any time.
    pub fn check(&self) {
        for byte in self.device.take_written() {
            let allowed = self.allowed.iter().any(|range| range.contains(&byte));
            assert!(allowed, "the guest wrote byte {byte:#x} of the device");
        }
        let lent = self.lent.lock();
        let decodes = self.u16(4) & 2 != 0;
        assert!(decodes || lent.is_empty(), "BARs that do not decode are mapped");
        for (address, length) in lent.iter() {
            let inside = (0..6).filter_map(|bar| self.bar(bar)).any(|start| start <= *address);
            assert!(inside && *address >= PCI_MMIO_START && address + length - 1 <= PCI_MMIO_LAST);
            if let Some((bar, table)) = &self.trapped {
                let start = self.bar(*bar).unwrap_or_default();
                let table = start + table.start..start + table.end;
                // Another BAR may be at the same place: then it is its memory.
                let shares = |other: usize| {
                    let at = self.bar(other).unwrap_or_default();
                    let end = at.saturating_add(self.device.size(other));
                    at < table.end && table.start < end
                };
                let shared = (0..6).any(|other| other != *bar && shares(other));
                let over = *address < table.end && table.start < address + length;
                assert!(!over || shared, "the MSI-X table is mapped");
            }
        }
    }

    /// The guest is gone.
    pub fn end(self) {
        let Self { device, function, bus, lent, .. } = self;
        device.refuse(false);
        drop(bus);
        drop(function);
        assert!(lent.lock().is_empty(), "something is still mapped");
        assert_eq!(device.interrupts(), 0, "an interrupt is still on");
        assert_eq!(device.config()[4] & 6, 0, "the device may still make requests");
    }
}

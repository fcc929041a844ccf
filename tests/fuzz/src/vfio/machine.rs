// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of an assigned device, and what the guest has of it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::spec::pci::Bdf;
use twostage_vmm::inside::pci::{
    BarPlacement, EventLine, EventVector, PasidCapabilities, PciBus, PciFunction, PciMemory,
};
use twostage_vmm::inside::vfio::{Lender, Loan, Surroundings, VfioPci};
use twostage_vmm::inside::{
    BusDevice, HostServices, OfferedServices, PCI_MMIO_LAST, PCI_MMIO_START,
};
use twostage_vmm::{HostDevice, Irq, Mapping};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Device, CONFIG_SIZE, DEVICE_BYTE};
use super::messages::{event, Vectors};
use super::naive::{half, Naive};
use crate::input::Input;
use crate::models::msix::Msix;

const BDF: Bdf = Bdf::from_raw(0x18);
/// Bytes that the guest reads at a time when it reads all: a factor of what is behind the header.
const PIECE: usize = 64;

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

/// What the guest has mapped: address, length, and the address in this process.
type Lent = Arc<Mutex<BTreeSet<(u64, u64, u64)>>>;

struct Slots(Lent);

struct Slot(Lent, (u64, u64, u64));

impl Lender for Slots {
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>> {
        let piece = (address, mapping.length(), mapping.address());
        let mut lent = self.0.lock();
        // As KVM has it: slots do not overlap.
        let overlaps =
            |(at, length, _): &(u64, u64, u64)| *at < piece.0 + piece.1 && piece.0 < at + length;
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

/// The machine.
pub struct Machine {
    device: Arc<Device>,
    function: Arc<VfioPci>,
    bus: Arc<PciBus>,
    lent: Lent,
    /// What the guest may have.
    naive: Naive,
    /// Where in configuration space anything but zeros may be seen.
    shown: Vec<Range<u16>>,
    vectors: Arc<Vectors>,
    msix: RefCell<Msix>,
    /// Two BARs were at the same place: not all that could be mapped is.
    overlapped: Cell<bool>,
    /// The device refused something: not all that should be on is.
    refused: Cell<bool>,
}

impl Machine {
    /// A machine with a device that `input` describes; `None` if it cannot be assigned.
    pub fn new(input: &mut Input<'_>) -> Option<Self> {
        let device = Arc::new(Device::new(input));
        let naive = Naive::new(&device);
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
        let vectors = Arc::<Vectors>::default();
        let make = vectors.clone();
        let make = Arc::new(move || -> Result<Arc<dyn EventVector>, _> { Ok(make.make()) });
        let msix = Msix::new(naive.msix.map_or(0, |(_, vectors)| vectors.into()));
        let around = Surroundings {
            way: None,
            place,
            lender: Arc::new(Slots(lent.clone())),
            vectors: make,
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
        let bus = Arc::new(bus);
        let mut machine = Self {
            device,
            function,
            bus,
            lent,
            naive,
            shown: Vec::new(),
            vectors,
            msix: RefCell::new(msix),
            overlapped: Cell::default(),
            refused: Cell::default(),
        };
        machine.clear_table();
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
        assert_eq!(self.capabilities(), self.naive.list);
        let (mut at, mut extended, mut made) = (0x100, Vec::new(), None);
        for _ in 0..CONFIG_SIZE / 8 {
            let header = self.u32(at);
            let (id, next) = (header as u16, (header >> 20) as u16);
            match id {
                0 => assert_eq!(at, 0x100, "an empty capability"),
                0x0f | 0x13 | 0x1b => made = made.or(Some(at)),
                _ => {
                    assert!(made.is_none(), "a capability of the device's after those made for it");
                    extended.push(id);
                }
            }
            if next == 0 {
                break;
            }
            assert!(next >= 0x100);
            at = next;
        }
        assert_eq!(extended, self.naive.extended);
        // What is made for the guest is the last in the list, and together.
        let made = made.map_or(0..0, |start| start..start + OfferedServices::LENGTH);
        // In pieces, of which what may be seen is taken out.
        let mut hidden = [0; CONFIG_SIZE];
        for (at, piece) in (0x40..).step_by(PIECE).zip(hidden[0x40..].chunks_mut(PIECE)) {
            self.bus.read_config(BDF, at, piece);
        }
        self.shown = self.naive.visible.clone();
        self.shown.extend([0..0x40, 0x100..0x104, made]);
        for seen in &self.shown {
            hidden[usize::from(seen.start)..usize::from(seen.end)].fill(0);
        }
        if hidden != [0; CONFIG_SIZE] {
            panic!("byte {:#x?} is seen", hidden.iter().position(|byte| *byte != 0));
        }
        self.device.take_written();
    }

    /// The guest writes: what is the device's gets there; of the rest only the command register.
    pub fn write_config(&self, register: u16, data: &[u8]) {
        self.device.take_written();
        self.bus.write_config(BDF, register, data);
        let control =
            self.naive.control.map(|at| usize::from(at + 1).wrapping_sub(register.into()));
        let resets = control.and_then(|at| data.get(at)).is_some_and(|byte| byte & 0x80 != 0);
        let inside = usize::from(register) + data.len() <= CONFIG_SIZE;
        let written: BTreeSet<_> = self.device.take_written().into_iter().collect();
        let bytes = (register..).zip(data).filter(|_| inside);
        let live = |at: &u16| self.naive.live.iter().any(|range| range.contains(at));
        let expected: Vec<_> = bytes.filter(|(at, _)| live(at)).collect();
        for at in &written {
            let is_expected = expected.iter().any(|(expected, _)| expected == at);
            assert!(matches!(at, 4 | 5) || is_expected || !inside, "the guest wrote {at:#x}");
        }
        if resets {
            self.clear_table();
            return;
        }
        for (at, byte) in expected {
            assert!(written.contains(&at), "byte {at:#x} did not get to the device");
            assert_eq!(self.device.config()[usize::from(at)], *byte, "byte {at:#x}");
        }
        if register < 6 && usize::from(register) + data.len() > 4 {
            let command = half(&self.device.config(), 4);
            assert_eq!(command, self.u16(4) & 0x406, "the command register");
        }
    }

    /// The guest reads; what is the device's is as it is there.
    pub fn read_config(&self, register: u16, size: usize) {
        let mut data = [0; 8];
        self.bus.read_config(BDF, register, &mut data[..size]);
        if self.device.refuses() || usize::from(register) + size > CONFIG_SIZE {
            return;
        }
        for (at, byte) in (register..).zip(&data[..size]) {
            if self.naive.live.iter().any(|range| range.contains(&at)) {
                assert_eq!(*byte, self.device.config()[usize::from(at)], "byte {at:#x}");
            } else if !self.shown.iter().any(|range| range.contains(&at)) {
                assert_eq!(*byte, 0, "byte {at:#x} is seen");
            }
        }
    }

    pub fn capability(&self, which: u8, offset: u16, data: &[u8]) {
        let all = &self.naive.list;
        if let Some((_, at)) = all.get(usize::from(which) % all.len().max(1)) {
            self.write_config(at + offset, data);
        }
    }

    /// The BARs' registers.
    fn registers(&self) -> [u32; 6] {
        std::array::from_fn(|number| self.u32(0x10 + 4 * number as u16))
    }

    /// Where BARs decode, in order.
    fn places(&self) -> Vec<(usize, u64)> {
        match self.u16(4) & 2 {
            0 => Vec::new(),
            _ => self.naive.places(self.registers()),
        }
    }

    /// The guest accesses a place by an offset from where a BAR is.
    pub fn access(&self, bar: usize, offset: u64, data: &mut [u8], write: bool) {
        let places = self.places();
        let Some((_, start)) = places.iter().find(|(index, _)| *index == bar) else { return };
        let address = start.wrapping_add(offset);
        if !(PCI_MMIO_START..=PCI_MMIO_LAST).contains(&address) {
            return;
        }
        // The first BAR that has all of it answers.
        let end = address + data.len() as u64;
        let answers = places.iter().find_map(|(index, start)| {
            let size = self.naive.bars[*index]?.size;
            (*start <= address && end <= start + size).then(|| (*index, address - start))
        });
        let is_device = answers.is_some_and(|(index, offset)| {
            !self.naive.is_msix(index, &(offset..offset + data.len() as u64))
        });
        let memory = PciMemory(self.bus.clone());
        self.device.take_stores();
        match write {
            true => memory.write(address - PCI_MMIO_START, data),
            false => memory.read(address - PCI_MMIO_START, data),
        }
        let stored = self.device.take_stores();
        let expected = answers.filter(|_| is_device && write);
        let expected = expected.map(|(index, offset)| (index, offset, data.to_vec()));
        assert_eq!(stored, expected.into_iter().collect::<Vec<_>>());
        if !write && !self.device.refuses() {
            let read_device = data.iter().all(|byte| *byte == DEVICE_BYTE);
            assert!(read_device || !is_device, "reads are not the device's");
        }
        if !write && answers.is_none() {
            assert!(data.iter().all(|byte| *byte == 0xff), "nothing is there");
        }
        if let Some((index, offset)) = answers {
            self.access_structures(index, offset, data, write);
        }
    }

    /// The structures of MSI-X are those of the naive one.
    fn access_structures(&self, bar: usize, offset: u64, data: &[u8], write: bool) {
        let mut msix = self.msix.borrow_mut();
        let at = |(of, bytes): &(usize, Range<u64>)| {
            (*of == bar && bytes.contains(&offset)).then(|| offset - bytes.start)
        };
        let mut structures = self.naive.structures.iter().map(at);
        let (table, pending) = (structures.next().flatten(), structures.next().flatten());
        if self.naive.msix.is_none() {
            let hidden = write || table.or(pending).is_none() || data.iter().all(|b| *b == 0xff);
            assert!(hidden, "the host's own table is seen");
            return;
        }
        match (table, pending) {
            (Some(at), _) if write => msix.write_table(at, data),
            (Some(at), _) => assert_eq!(data, msix.read_table(at, data.len()), "{at:#x} of it"),
            (_, Some(at)) if !write => {
                assert_eq!(data, msix.read_pending(at, data.len()), "pending bits at {at:#x}");
            }
            _ => {}
        }
    }

    /// As after a reset: each vector is masked.
    fn clear_table(&self) {
        let vectors = self.naive.msix.map_or(0, |(_, vectors)| vectors);
        self.msix.borrow_mut().reset();
        let Some((bar, table)) = self.naive.structures.first().filter(|_| vectors > 0) else {
            return;
        };
        // Of the last vector, too.
        for vector in [0, u64::from(vectors) - 1] {
            let mut control = [0; 4];
            self.function.read_bar(*bar, table.start + 16 * vector + 12, &mut control);
            assert_eq!(control, [1, 0, 0, 0], "vector {vector} after a reset");
        }
    }

    /// Writes an entry of the MSI-X table, reads it, and writes message control. The device may
    /// have an interrupt before or afterwards.
    pub fn msix(&self, vector: u8, control: u8, value: u64) {
        let [table, pending] = &self.naive.structures[..] else { return };
        let number = vector % 17;
        if control & 2 != 0 {
            self.fire(number);
        }
        let entry = table.1.start + 16 * u64::from(number);
        let data = u64::from(control & 1) << 32 | u64::from(vector);
        for (offset, value) in [(0, value), (8, data)] {
            self.access(table.0, entry + offset, &mut value.to_le_bytes(), true);
        }
        if let Some((at, _)) = self.naive.msix {
            self.access(table.0, entry, &mut [0; 8], false);
            self.write_config(at + 2, &[0, control]);
        }
        self.program();
        if control & 4 != 0 {
            self.fire(number);
        }
        self.access(pending.0, pending.1.start, &mut [0; 8], false);
    }

    /// The device has an interrupt, if it has this vector on.
    fn fire(&self, number: u8) {
        if let Some(event) = self.device.trigger(Irq::Msix, number.into()) {
            self.vectors.of(event).fire();
            self.msix.borrow_mut().trigger(number.into());
        }
    }

    /// The naive MSI-X follows message control. What is pending when it is off is lost.
    fn program(&self) {
        let mut msix = self.msix.borrow_mut();
        let control = self.naive.msix.map_or(0, |(at, _)| self.u16(at + 2));
        if control & 0x8000 == 0 {
            msix.forget();
        }
        // As far as this is known here.
        msix.program(control, true);
    }

    /// Vectors have the guest's messages, and these were sent.
    fn check_messages(&self) {
        self.program();
        let mut msix = self.msix.borrow_mut();
        msix.compare(self.vectors.sent.take());
        let (_, vectors) = self.naive.msix.unwrap_or_default();
        let has = self.device.irq(Irq::Msix).map_or(0, |info| info.count).min(vectors.into());
        for number in 0..has {
            let message = msix.message(number as usize);
            match self.device.trigger(Irq::Msix, number) {
                Some(event) => {
                    assert_eq!(self.vectors.of(event).message(), message, "vector {number}");
                }
                None => assert!(message.is_none() || self.refused.get(), "{number} is off"),
            }
        }
    }

    pub fn reset(&self) {
        self.function.reset();
        self.clear_table();
    }

    /// What holds at any time.
    pub fn check(&self) {
        self.check_mapped();
        self.check_interrupts();
        self.check_messages();
    }

    /// The guest has mapped its BARs, and nothing else.
    fn check_mapped(&self) {
        let lent: BTreeSet<_> = self
            .lent
            .lock()
            .iter()
            .map(|(address, length, host)| {
                let (bar, offset) = self.device.mapped_at(*host);
                (*address, *length, bar, offset)
            })
            .collect();
        let expected = self.naive.pieces(&self.places());
        let overlap = expected.iter().zip(expected.iter().skip(1)).any(|(one, other)| {
            // In the order of addresses.
            one.0 + one.1 > other.0
        });
        self.overlapped.set(self.overlapped.get() || overlap);
        match self.overlapped.get() {
            true => assert!(lent.is_subset(&expected), "{lent:x?}, not {expected:x?}"),
            false => assert_eq!(lent, expected),
        }
    }

    /// One kind of interrupt is on: the one that the guest has chosen.
    fn check_interrupts(&self) {
        let enabled = |at: Option<u16>, bit| at.is_some_and(|at| self.u16(at) & bit != 0);
        let kind = match (
            enabled(self.naive.msix.map(|(at, _)| at + 2), 1 << 15),
            enabled(self.naive.msi, 1),
        ) {
            (true, _) => Irq::Msix,
            (_, true) => Irq::Msi,
            _ => Irq::Intx,
        };
        let on = self.device.interrupts();
        assert!(on.iter().all(|(of, _)| *of == kind), "{on:?} are on, not {kind:?}");
        let refused = self.refused.get() || self.device.refuses();
        self.refused.set(refused);
        if kind == Irq::Intx && !refused {
            assert_eq!(on.len(), usize::from(self.naive.intx), "the pin");
        }
    }

    /// The guest is gone.
    pub fn end(self) {
        let Self { device, function, bus, lent, .. } = self;
        device.refuse(false);
        drop(bus);
        drop(function);
        assert!(lent.lock().is_empty(), "something is still mapped");
        assert!(device.interrupts().is_empty(), "an interrupt is still on");
        assert_eq!(device.config()[4] & 6, 0, "the device may still make requests");
    }
}

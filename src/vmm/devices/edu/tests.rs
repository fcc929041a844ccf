// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as software sees it: BAR, configuration space, interrupts, and DMA by the worker.

use std::sync::mpsc::{channel, Receiver};
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::{DirectMemory, DmaError, NotNow, Services};
use crate::memory::MachineMemory;
use crate::pci::{IntxRouter, Location, MsiMessage};
use twostage::patience::wait_until;
use twostage::spec::pci::{Bdf, Pasid};
use twostage_emulated::edu::{Failure, BUFFER_START};

mod services;

const WITH_PASIDS: Services = Services { pasid: true, ats: false, pri: false };

struct Messages(Mutex<Sender<(u64, u32)>>);

impl InterruptSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().send((address, data)).unwrap();
    }
}

/// A vector of MSI-X, which sends there, too.
struct Vector {
    messages: Arc<Messages>,
    message: Mutex<Option<MsiMessage>>,
}

impl InterruptVector for Vector {
    fn update(&self, message: Option<MsiMessage>) {
        *self.message.lock() = message;
    }

    fn trigger(&self) {
        let message = self.message.lock().unwrap();
        self.messages.send_msi(message.address, message.data);
    }
}

struct Fixture {
    edu: Edu,
    memory: MachineMemory,
    messages: Receiver<(u64, u32)>,
    levels: Receiver<(u32, bool)>,
}

/// Device control of PCI Express, after MSI; the control register of the PASID capability.
const DEVICE_CONTROL: u16 = 0x58;
const PASID_CONTROL: u16 = 0x106;
/// Message control of MSI-X, after PCI Express.
const MSIX_CONTROL: u16 = 0x8e;

fn reset(edu: &Edu) {
    edu.config().lock().write(DEVICE_CONTROL, &[0, 0x80]);
    assert!(edu.config_written(DEVICE_CONTROL, 2), "the bus learns of it");
}

impl Fixture {
    fn new() -> Self {
        Self::with(|memory| Box::new(DirectMemory(memory)))
    }

    /// With the way to memory that `dma` makes.
    fn with(dma: impl FnOnce(MachineMemory) -> Box<dyn DmaMaster>) -> Self {
        Self::of(&EduConfig { pasid_bits: 6, ..EduConfig::default() }, dma)
    }

    fn of(config: &EduConfig, dma: impl FnOnce(MachineMemory) -> Box<dyn DmaMaster>) -> Self {
        let (send_message, messages) = channel();
        let (send_level, levels) = channel();
        let send_level = Mutex::new(send_level);
        let router = IntxRouter::new(Arc::new(move |gsi, level| {
            // The IOAPIC input has the same level.
            if gsi < 16 {
                send_level.lock().send((gsi, level)).unwrap();
            }
        }));
        let memory = MachineMemory::new(0x10000).unwrap();
        let messages_sent = Arc::new(Messages(Mutex::new(send_message)));
        let edu = Edu::new(
            config,
            Location { way: None, bar: 0xe000_0000 },
            [0xe010_0000, 0xe010_4000],
            router.pin(Bdf::new(0, 1, 0).unwrap(), []),
            messages_sent.clone(),
            &|| Ok(Arc::new(Vector { messages: messages_sent.clone(), message: Mutex::default() })),
            dma(memory.clone()),
        )
        .unwrap();
        let fixture = Self { edu, memory, messages, levels };
        fixture.write_config(4, &[6, 0]);
        fixture
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.edu.config().lock().write(offset, data);
        self.edu.config_written(offset, data.len());
    }

    fn config(&self, offset: u16) -> u32 {
        self.edu.config().lock().u32(offset)
    }

    fn write(&self, offset: u64, value: u64) {
        self.edu.write_bar(0, offset, &value.to_le_bytes());
    }

    fn write32(&self, offset: u64, value: u32) {
        self.edu.write_bar(0, offset, &value.to_le_bytes());
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.edu.read_bar(0, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn enable_msi(&self) {
        self.write_config(0x44, &0xfee0_0000u32.to_le_bytes());
        self.write_config(0x4c, &[0x41, 0]);
        self.write_config(0x42, &[1, 0]);
    }

    fn transfer(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.write(0x80, source);
        self.write(0x88, destination);
        self.write(0x90, count);
        self.write(0x98, command);
    }
}

#[test]
fn intx_follows_the_causes() {
    let fixture = Fixture::new();
    fixture.write32(0x60, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    let mut status = [0; 2];
    fixture.edu.config().lock().read(6, &mut status);
    assert_ne!(status[0] & 8, 0);
    // Disabled in the command register, then enabled again.
    fixture.write_config(4, &[6, 4]);
    assert_eq!(fixture.levels.recv().unwrap(), (11, false));
    fixture.write_config(4, &[6, 0]);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    fixture.write32(0x64, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, false));
    assert!(fixture.messages.try_recv().is_err());
}

#[test]
fn msi_takes_the_place_of_intx() {
    let fixture = Fixture::new();
    fixture.write32(0x60, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    fixture.enable_msi();
    assert_eq!(fixture.levels.recv().unwrap(), (11, false));
    fixture.write32(0x60, 2);
    assert_eq!(fixture.messages.recv().unwrap(), (0xfee0_0000, 0x41));
    fixture.write32(0x64, 3);
    assert!(fixture.messages.try_recv().is_err());
    assert!(fixture.levels.try_recv().is_err());
}

#[test]
fn each_byte_of_the_causes_has_a_vector() {
    let fixture = Fixture::new();
    let messages = usize::from(MESSAGES_BAR);
    for (vector, data) in (0..VECTORS).zip(0x50u32..) {
        let entry =
            [0xfee0_0000, 0, data, 0].into_iter().zip((u64::from(vector) * 16..).step_by(4));
        entry.for_each(|(word, at)| fixture.edu.write_bar(messages, at, &u32::to_le_bytes(word)));
    }
    fixture.write32(0x60, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    fixture.write_config(MSIX_CONTROL, &[0, 0x80]);
    assert_eq!(fixture.levels.recv().unwrap(), (11, false));
    fixture.write32(0x60, 0x8000_0100);
    let received = || fixture.messages.try_iter().map(|(_, data)| data).collect::<Vec<_>>();
    assert_eq!(received(), [0x51, 0x53]);
    // Masked, it waits.
    fixture.edu.write_bar(messages, 0x1c, &[1, 0, 0, 0]);
    fixture.write32(0x60, 0x101);
    assert_eq!(received(), [0x50]);
    let pending = || {
        let mut bits = [0; 8];
        fixture.edu.read_bar(messages, PENDING_BITS.into(), &mut bits);
        bits[0]
    };
    assert_eq!(pending(), 2);
    fixture.edu.write_bar(messages, 0x1c, &[0; 4]);
    assert_eq!((received(), pending()), (vec![0x51], 0));
    // Messages are requests.
    fixture.write_config(4, &[2, 0]);
    fixture.write32(0x60, 1);
    assert!(received().is_empty());
    reset(&fixture.edu);
    fixture.write_config(4, &[6, 0]);
    fixture.write32(0x60, 1);
    assert_eq!((received(), fixture.levels.recv().unwrap()), (vec![], (11, true)));
}

#[test]
fn memory_is_what_was_written_until_a_reset() {
    let fixture = Fixture::new();
    let bar = usize::from(MEMORY_BAR);
    let read = || {
        let mut bytes = [0; 8];
        fixture.edu.read_bar(bar, MEMORY_SIZE as u64 - 8, &mut bytes);
        bytes
    };
    fixture.edu.write_bar(bar, MEMORY_SIZE as u64 - 4, b"mine");
    assert_eq!(read(), *b"\0\0\0\0mine");
    reset(&fixture.edu);
    assert_eq!(read(), [0; 8]);
}

#[test]
fn dma_goes_both_ways_and_interrupts_at_its_end() {
    let fixture = Fixture::new();
    fixture.enable_msi();
    fixture.memory.map().write_slice(b"a message", GuestAddress(0x1000)).unwrap();
    fixture.transfer(0x1000, BUFFER_START + 8, 9, 0b101);
    assert_eq!(fixture.messages.recv().unwrap(), (0xfee0_0000, 0x41));
    assert_eq!(fixture.read32(0x98), 0b100);
    assert_eq!(fixture.read32(0x24), 0x100);
    fixture.transfer(BUFFER_START + 8, 0x2ffc, 9, 0b111);
    fixture.messages.recv().unwrap();
    let mut data = [0; 9];
    fixture.memory.map().read_slice(&mut data, GuestAddress(0x2ffc)).unwrap();
    assert_eq!(&data, b"a message");
    assert_eq!((fixture.edu.counters().done(), fixture.edu.counters().failed()), (2, 0));
}

#[test]
fn dma_that_fails_ends_and_is_counted() {
    let fixture = Fixture::new();
    fixture.enable_msi();
    // No memory there; outside the buffer; a PASID that cannot be translated.
    fixture.transfer(BUFFER_START, 0x1_0000, 8, 0b111);
    fixture.messages.recv().unwrap();
    fixture.transfer(0, 0x1000, 8, 0b111);
    fixture.messages.recv().unwrap();
    fixture.write_config(PASID_CONTROL, &[1, 0]);
    fixture.write32(0xa0, 0x8000_0001);
    fixture.transfer(BUFFER_START, 0x1000, 8, 0b111);
    fixture.messages.recv().unwrap();
    assert_eq!(fixture.read32(0x98) & 1, 0);
    assert_eq!((fixture.edu.counters().done(), fixture.edu.counters().failed()), (0, 3));
}

#[test]
fn without_bus_mastering_there_is_neither_dma_nor_msi() {
    let fixture = Fixture::new();
    fixture.enable_msi();
    fixture.write_config(4, &[2, 0]);
    fixture.transfer(BUFFER_START, 0x1000, 8, 0b111);
    while fixture.read32(0x98) & 1 != 0 {
        thread::yield_now();
    }
    assert_eq!(fixture.edu.counters().failed(), 1);
    assert_eq!(fixture.read32(0x24), 0x100);
    assert!(fixture.messages.try_recv().is_err());
}

#[test]
fn accesses_of_any_size_are_harmless() {
    let fixture = Fixture::new();
    for size in [1, 2, 3, 8] {
        let mut data = vec![0; size];
        fixture.edu.read_bar(0, 0, &mut data);
        assert!(data.iter().all(|byte| *byte == 0xff));
        fixture.edu.write_bar(0, 4, &data);
    }
    assert_eq!(fixture.read32(4), 0);
}

/// Whether a request is a write, and its PASID.
type Seen = (bool, Option<Pasid>);

/// Makes requests only after `begun` was told of each and `go` allowed it, or has no other end.
struct Held {
    memory: DirectMemory,
    begun: Sender<Seen>,
    go: Receiver<()>,
}

impl Held {
    fn hold(&self, write: bool, pasid: Option<Pasid>) {
        self.begun.send((write, pasid)).unwrap();
        // An error means that nobody holds it.
        let _ = self.go.recv();
    }
}

impl DmaMaster for Held {
    fn read(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &mut [u8],
    ) -> std::result::Result<(), DmaError> {
        self.hold(false, pasid);
        self.memory.read(None, iova, data)
    }

    fn write(
        &mut self,
        pasid: Option<Pasid>,
        iova: u64,
        data: &[u8],
    ) -> std::result::Result<(), DmaError> {
        self.hold(true, pasid);
        self.memory.write(None, iova, data)
    }
}

/// A device whose requests are seen, and are held until `go` allows them.
fn held() -> (Fixture, Receiver<Seen>, Sender<()>) {
    let ((begun, seen), (go, wait)) = (channel(), channel());
    let fixture = Fixture::with(move |memory| {
        Box::new(Held { memory: DirectMemory(memory), begun, go: wait })
    });
    (fixture, seen, go)
}

#[test]
fn a_request_carries_a_pasid_only_while_the_capability_allows_it() {
    let (fixture, requests, go) = held();
    drop(go);
    fixture.enable_msi();
    assert_eq!(fixture.config(0x100), 0x0001_001b);
    for (control, pasid, shown) in [(0, None, 0), (1, Pasid::new(5), 0x8000_0005), (0, None, 0)] {
        fixture.write_config(PASID_CONTROL, &[control, 0]);
        // Wider than the capability says.
        fixture.write32(0xa0, 0x8000_0045);
        assert_eq!(fixture.read32(0xa0), shown);
        fixture.transfer(0x1000, BUFFER_START, 8, 0b101);
        assert_eq!(requests.recv().unwrap(), (false, pasid));
        fixture.messages.recv().unwrap();
    }
}

#[test]
fn a_reset_makes_the_function_what_it_was_without_an_address() {
    let fixture = Fixture::new();
    fixture.write_config(PASID_CONTROL, &[1, 0]);
    fixture.write32(0xa0, 0x8000_0005);
    fixture.write32(4, 7);
    fixture.write(0x80, 0x1234);
    fixture.write32(0x60, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    reset(&fixture.edu);
    assert_eq!(fixture.levels.recv().unwrap(), (11, false));
    let command_and_status = 0x11 << 16;
    assert_eq!((fixture.config(4), fixture.config(0x10)), (command_and_status, 0));
    assert_eq!((fixture.config(DEVICE_CONTROL), fixture.config(0x104)), (0, 6 << 8));
    for (register, value) in [(0, 0x0100_00ed), (4, 0), (0x24, 0), (0x80, 0), (0x98, 0)] {
        assert_eq!(fixture.read32(register), value, "{register:#x}");
    }
    // MSI is off as well, and comes back.
    fixture.write_config(4, &[6, 0]);
    fixture.write32(0x60, 1);
    assert_eq!(fixture.levels.recv().unwrap(), (11, true));
    assert!(fixture.messages.try_recv().is_err());
    fixture.enable_msi();
    fixture.write32(0x60, 1);
    assert_eq!(fixture.messages.recv().unwrap(), (0xfee0_0000, 0x41));
}

#[test]
fn a_reset_ends_a_transfer_after_the_request_under_way_and_the_next_one_knows_nothing_of_it() {
    let (fixture, requests, go) = held();
    fixture.enable_msi();
    fixture.memory.map().write_slice(&[0x5a; 0x2000], GuestAddress(0x1000)).unwrap();
    // Of two pages: two requests.
    fixture.transfer(0x1ff8, BUFFER_START, 16, 0b101);
    assert_eq!(requests.recv().unwrap(), (false, None));
    thread::scope(|scope| {
        let resetting = scope.spawn(|| reset(&fixture.edu));
        wait_until("a reset", || fixture.edu.shared.rights.life() == 1);
        assert!(!resetting.is_finished(), "a request is being made");
        go.send(()).unwrap();
    });
    drop(go);
    // Software begins again at once.
    fixture.write_config(4, &[6, 0]);
    fixture.enable_msi();
    fixture.transfer(BUFFER_START, 0x3000, 16, 0b111);
    assert_eq!(fixture.messages.recv().unwrap(), (0xfee0_0000, 0x41));
    assert_eq!(requests.try_iter().collect::<Vec<_>>(), [(true, None)], "no second read");
    let mut data = [0xff; 16];
    fixture.memory.map().read_slice(&mut data, GuestAddress(0x3000)).unwrap();
    assert_eq!(data, [0; 16], "the buffer is empty");
    assert_eq!((fixture.edu.counters().done(), fixture.edu.counters().failed()), (1, 0));
    assert_eq!(fixture.read32(0x98), 0b110);
}

/// Loses the right to requests with this PASID while its first request is made.
struct Revoked {
    requests: Arc<Mutex<Vec<u64>>>,
    rights: Arc<Rights>,
    pasid: Option<Pasid>,
    revoke: Option<Sender<()>>,
}

impl DmaMaster for Revoked {
    fn read(
        &mut self,
        _: Option<Pasid>,
        iova: u64,
        _: &mut [u8],
    ) -> std::result::Result<(), DmaError> {
        self.write(None, iova, &[])
    }

    fn write(
        &mut self,
        _: Option<Pasid>,
        iova: u64,
        _: &[u8],
    ) -> std::result::Result<(), DmaError> {
        self.requests.lock().push(iova);
        drop(self.revoke.take());
        // What revokes it waits for this request.
        let (rights, pasid) = (&self.rights, self.pasid);
        wait_until("the loss of the right", || {
            !rights.gate.is_open()
                || rights.life() != 0
                || pasid.is_some() && !rights.services().pasid
        });
        Ok(())
    }
}

#[test]
fn the_right_is_asked_for_each_request() {
    type Revoke = fn(&Rights) -> bool;
    let ways: [(Revoke, Option<Pasid>); 3] = [
        (|rights| rights.set(false, WITH_PASIDS), None),
        (|rights| rights.set(true, Services::default()), Pasid::new(5)),
        // Software may use the device again before the transfer notices.
        (|rights| (rights.reset(), rights.set(true, WITH_PASIDS)).1, None),
    ];
    for (way, to_memory) in ways.iter().flat_map(|way| [(way, false), (way, true)]) {
        let ((how, pasid), rights) = (*way, Arc::new(Rights::default()));
        rights.set(true, WITH_PASIDS);
        rights.gate.start();
        let (revoke, revoked) = channel();
        let revoker = thread::spawn({
            let rights = rights.clone();
            move || {
                // An error means that the other end is gone.
                revoked.recv().unwrap_err();
                how(&rights);
            }
        });
        let requests = Arc::<Mutex<Vec<u64>>>::default();
        let (seen, revoke) = (requests.clone(), Some(revoke));
        let memory = Revoked { requests, rights: rights.clone(), pasid, revoke };
        let mut memory = GatedMemory { memory: Box::new(memory), rights, control: None, life: 0 };
        let (source, destination) =
            if to_memory { (BUFFER_START, 0x1ff0) } else { (0x1ff0, BUFFER_START) };
        let (count, done) = (0x20, 0);
        let mut transfer = Transfer { source, destination, count, to_memory, pasid, done };
        let result = Engine::new(u64::MAX).run(&mut transfer, &mut memory);
        assert_eq!(result, Err(Failure::Stopped { iova: 0x2000, stop: NotNow.into() }));
        assert_eq!(*seen.lock(), [0x1ff0]);
        revoker.join().unwrap();
    }
}

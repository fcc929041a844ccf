// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device as software sees it: BAR, configuration space, interrupts, and DMA by the worker.

use std::sync::mpsc::{channel, Receiver};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::DirectMemory;
use crate::memory::MachineMemory;
use crate::pci::IntxRouter;
use twostage::patience::wait_until;
use twostage::spec::pci::Bdf;
use twostage_emulated::edu::{Failure, BUFFER_START};

struct Messages(Mutex<Sender<(u64, u32)>>);

impl InterruptSink for Messages {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().send((address, data)).unwrap();
    }
}

struct Fixture {
    edu: Edu,
    memory: MachineMemory,
    messages: Receiver<(u64, u32)>,
    levels: Receiver<(u32, bool)>,
}

impl Fixture {
    fn new() -> Self {
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
        let edu = Edu::new(
            &EduConfig { pasid: true, ..EduConfig::default() },
            0xe000_0000,
            router.pin(Bdf::new(0, 1, 0).unwrap()),
            Arc::new(Messages(Mutex::new(send_message))),
            Box::new(DirectMemory(memory.clone())),
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
    fixture.write_config(0x106, &[1, 0]);
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

/// Loses its permission while its first request is made.
struct Revoked {
    requests: Arc<Mutex<Vec<u64>>>,
    gate: Arc<RequestGate>,
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
        wait_until("the loss of the right", || !self.gate.is_open());
        Ok(())
    }
}

#[test]
fn the_right_is_asked_for_each_request() {
    for to_memory in [false, true] {
        let gate = Arc::new(RequestGate::default());
        gate.set_bus_master(true);
        gate.start();
        let (revoke, revoked) = channel();
        let revoker = thread::spawn({
            let gate = gate.clone();
            move || {
                // An error means that the other end is gone.
                revoked.recv().unwrap_err();
                gate.set_bus_master(false);
            }
        });
        let requests = Arc::<Mutex<Vec<u64>>>::default();
        let (seen, revoke) = (requests.clone(), Some(revoke));
        let memory = Revoked { requests, gate: gate.clone(), revoke };
        let mut memory = GatedMemory { memory: Box::new(memory), gate };
        let (source, destination) =
            if to_memory { (BUFFER_START, 0x1ff0) } else { (0x1ff0, BUFFER_START) };
        let (count, pasid, done) = (0x20, None, 0);
        let mut transfer = Transfer { source, destination, count, to_memory, pasid, done };
        let result = Engine::new(u64::MAX).run(&mut transfer, &mut memory);
        assert_eq!(result, Err(Failure::Stopped { iova: 0x2000, stop: NotNow.into() }));
        assert_eq!(*seen.lock(), [0x1ff0]);
        revoker.join().unwrap();
    }
}

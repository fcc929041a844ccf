// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An `edu` beside a naive one, which learns of all that software does to it: the registers of
//! interrupts and the messages that are sent agree after each access.

use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use twostage_vmm::inside::edu::Edu;
use twostage_vmm::inside::pci::{ConfigSpace, PciFunction};

use super::naive;
use super::transfers::Transfers;
use crate::models::msix::{Message, Msix, Sent};

/// One for each byte of the causes.
const VECTORS: usize = 4;
const MESSAGES_BAR: usize = 1;
const PENDING: u64 = 0x1000;
const STATUS: u64 = 0x20;
const CAUSES: u64 = 0x24;
const COMMAND: u64 = 0x98;

/// The naive one.
struct Naive {
    interrupts: bool,
    causes: u32,
    command: u8,
    transfers: Transfers,
    msix: Msix,
    /// MSIs that must have been sent.
    sent: Vec<Message>,
}

impl Naive {
    fn new(mask: u64) -> Self {
        let transfers = Transfers::new(mask);
        Self {
            interrupts: false,
            causes: 0,
            command: 0,
            transfers,
            msix: Msix::new(VECTORS),
            sent: Vec::new(),
        }
    }

    fn reset(&mut self) {
        self.msix.reset();
        self.transfers.reset();
        (self.interrupts, self.causes, self.command) = (false, 0, 0);
    }

    /// Software writes a register, while messages are sent as `messages` says, and the function may
    /// make requests as `rights` does: any, and with PASIDs.
    fn write(&mut self, offset: u64, data: &[u8], messages: &Messages, rights: (bool, bool)) {
        let wide = data.len() == 8 && offset >= 0x80;
        if !(wide || data.len() == 4) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let all = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let value = all as u32;
        match offset {
            0x08 if self.interrupts => self.raise(1, messages),
            STATUS => self.interrupts = value & 0x80 != 0,
            0x60 => self.raise(value, messages),
            0x64 => self.causes &= !value,
            0x80 => self.transfers.source = all,
            0x88 => self.transfers.destination = all,
            0x90 => self.transfers.count = all,
            0xa0 if rights.1 => self.transfers.pasid = value & 0x800f_ffff,
            COMMAND if value & 1 != 0 => {
                self.command = value as u8 & 6;
                let pasid = rights.1 && self.transfers.pasid & 1 << 31 != 0;
                if rights.0 {
                    self.transfers.run(value & 2 != 0, pasid);
                }
                // It interrupts however it ends.
                if value & 4 != 0 {
                    self.raise(0x100, messages);
                }
            }
            _ => {}
        }
    }

    fn raise(&mut self, causes: u32, messages: &Messages) {
        self.causes |= causes;
        match messages {
            Messages::Msix => {
                let bytes = causes.to_le_bytes().into_iter().enumerate();
                bytes.filter(|(_, byte)| *byte != 0).for_each(|(at, _)| self.msix.trigger(at));
            }
            Messages::Msi(message) if self.causes != 0 => self.sent.push(*message),
            _ => {}
        }
    }
}

/// How messages are sent.
enum Messages {
    Msix,
    Msi(Message),
    No,
}

/// A bridge, and the number that it must give to the bus behind it.
pub type Way = (Arc<dyn PciFunction>, u8);

/// The real one, with the naive one beside it.
pub struct Watched {
    pub edu: Edu,
    /// The bridges that it is behind.
    pub ways: Vec<Way>,
    /// What its vectors send, what it sends itself, and what its DMA is that is a message.
    pub messages: [Arc<Sent>; 3],
    /// Reads the memory of its DMA.
    memory: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    naive: Mutex<Naive>,
}

impl Watched {
    pub fn new(
        edu: Edu,
        ways: Vec<Way>,
        messages: [Arc<Sent>; 3],
        mask: u64,
        memory: Box<dyn Fn() -> Vec<u8> + Send + Sync>,
    ) -> Self {
        Self { edu, ways, messages, memory, naive: Mutex::new(Naive::new(mask)) }
    }

    pub fn may_request(&self) -> bool {
        naive::may_request(&self.edu, self.ways.iter().map(|(way, number)| (&**way, *number)))
    }

    fn messages(&self) -> Messages {
        let register = |at| u64::from(self.config().lock().u32(at));
        let control = |id| {
            let at = naive::capability(&self.edu, id).expect("it has MSI and MSI-X");
            (at, register(at) >> 16)
        };
        match (control(5), control(0x11)) {
            (_, (_, control)) if control & 0x8000 != 0 => Messages::Msix,
            ((at, control), _) if control & 1 != 0 && self.may_request() => {
                let address = register(at + 8) << 32 | register(at + 4);
                Messages::Msi((address, register(at + 12) as u16 as u32))
            }
            _ => Messages::No,
        }
    }

    /// Message control of MSI-X may have been written.
    fn program(&self, naive: &mut Naive) {
        let at = naive::capability(&self.edu, 0x11).expect("it has MSI-X");
        let control = self.config().lock().u16(at + 2);
        naive.msix.program(control, self.may_request());
    }

    /// What software sees of interrupts, and what was sent.
    fn compare(&self, mut naive: MutexGuard<'_, Naive>) {
        let [by_vectors, by_msi, by_dma] = &self.messages;
        naive.msix.compare(by_vectors.take());
        assert_eq!(by_msi.take(), std::mem::take(&mut naive.sent), "MSIs");
        assert_eq!(by_dma.take(), std::mem::take(&mut naive.transfers.sent), "messages by DMA");
        let (status, causes) = (u64::from(naive.interrupts) << 7, u64::from(naive.causes));
        let command = u64::from(naive.command);
        let transfers = &naive.transfers;
        let wide = [(0x80, transfers.source), (0x88, transfers.destination)];
        let narrow = [(STATUS, status), (CAUSES, causes), (COMMAND, command)];
        for (register, expected) in wide.into_iter().chain(narrow) {
            let (mut data, size) = ([0; 8], if register < 0x80 { 4 } else { 8 });
            self.edu.read_bar(0, register, &mut data[..size]);
            assert_eq!(u64::from_le_bytes(data), expected, "register {register:#x}");
        }
        let pending = self.config().lock().u16(6) & 8 != 0;
        assert_eq!(pending, naive.causes != 0, "the status register");
        let mut bits = [0; 8];
        self.edu.read_bar(MESSAGES_BAR, PENDING, &mut bits);
        assert_eq!(bits[..], naive.msix.read_pending(0, 8), "pending bits");
    }
}

impl PciFunction for Watched {
    fn config(&self) -> &Mutex<ConfigSpace> {
        self.edu.config()
    }

    fn config_is_memory(&self) -> bool {
        self.edu.config_is_memory()
    }

    fn config_reading(&self, offset: u16, length: usize) {
        self.edu.config_reading(offset, length);
    }

    fn config_written(&self, offset: u16, length: usize) -> bool {
        let reset = self.edu.config_written(offset, length);
        let mut naive = self.naive.lock();
        if reset {
            naive.reset();
        }
        self.program(&mut naive);
        self.compare(naive);
        reset
    }

    fn reset(&self) {
        self.edu.reset();
        let mut naive = self.naive.lock();
        naive.reset();
        self.compare(naive);
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        self.edu.read_bar(bar, offset, data);
        if bar == MESSAGES_BAR {
            let naive = self.naive.lock();
            let expected = match offset.checked_sub(PENDING) {
                None => naive.msix.read_table(offset, data.len()),
                Some(offset) => naive.msix.read_pending(offset, data.len()),
            };
            assert_eq!(data, expected, "{offset:#x} of the BAR of MSI-X");
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        self.edu.write_bar(bar, offset, data);
        let mut naive = self.naive.lock();
        match bar {
            0 => {
                let pasid = naive::extended(&self.edu, 0x1b);
                let pasids = pasid.is_some_and(|at| self.config().lock().u16(at + 6) & 1 != 0);
                naive.write(offset, data, &self.messages(), (self.may_request(), pasids));
                if offset == COMMAND {
                    assert!((self.memory)() == naive.transfers.memory, "memory after a transfer");
                }
            }
            MESSAGES_BAR => naive.msix.write_table(offset, data),
            _ => {}
        }
        self.compare(naive);
    }
}

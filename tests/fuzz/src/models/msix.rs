// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MSI-X (PCIe 6.0 §7.7.2) naively: a table of bytes, pending bits, and the messages that must have
//! been sent; and those that were.

use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::viommu::InterruptSink;
use twostage_vmm::inside::pci::{InterruptVector, MsiMessage};

/// Bytes of an entry of the table: address, data, and a control word, of which bit 0 is the mask.
const ENTRY: usize = 16;
const CONTROL: usize = 12;

/// Address and data of a message.
pub type Message = (u64, u32);

/// MSI-X of one function.
pub struct Msix {
    table: Vec<u8>,
    pending: Vec<bool>,
    enabled: bool,
    masked: bool,
    /// Messages are requests: the function may make some.
    may_request: bool,
    /// With their vectors.
    sent: Vec<(usize, Message)>,
}

impl Msix {
    /// As after a reset.
    pub fn new(vectors: usize) -> Self {
        let mut table = vec![0; ENTRY * vectors];
        table.iter_mut().skip(CONTROL).step_by(ENTRY).for_each(|control| *control = 1);
        let (pending, sent) = (vec![false; vectors], Vec::new());
        Self { table, pending, enabled: false, masked: false, may_request: false, sent }
    }

    /// A reset: what is pending is lost.
    pub fn reset(&mut self) {
        *self = Self { sent: std::mem::take(&mut self.sent), ..Self::new(self.pending.len()) };
    }

    /// Message control is now this, and the function may make requests or not.
    pub fn program(&mut self, control: u16, may_request: bool) {
        (self.enabled, self.masked) = (control & 0x8000 != 0, control & 0x4000 != 0);
        self.may_request = may_request;
        self.send();
    }

    /// Software writes the table: aligned doublewords, one or two.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data).filter(|_| whole(offset, data.len())) {
            let old = usize::try_from(at).ok().and_then(|at| self.table.get_mut(at));
            let Some(old) = old else { continue };
            *old = match at as usize % ENTRY {
                ..CONTROL => *byte,
                CONTROL => byte & 1,
                _ => 0,
            };
        }
        self.send();
    }

    /// What software reads in the table.
    pub fn read_table(&self, offset: u64, length: usize) -> Vec<u8> {
        let byte = |at| self.table.get(usize::try_from(at).ok()?).copied();
        let bytes = (offset..).take(length);
        bytes.map(|at| byte(at).filter(|_| whole(offset, length)).unwrap_or_default()).collect()
    }

    /// What software reads of the pending bits.
    pub fn read_pending(&self, offset: u64, length: usize) -> Vec<u8> {
        let bit = |at: u64, bit: u64| {
            let pending = usize::try_from(8 * at + bit).ok().and_then(|at| self.pending.get(at));
            u8::from(pending == Some(&true)) << bit
        };
        (offset..).take(length).map(|at| (0..8).map(|number| bit(at, number)).sum()).collect()
    }

    /// The function has an interrupt for `vector`.
    pub fn trigger(&mut self, vector: usize) {
        if let Some(pending) = self.pending.get_mut(vector).filter(|_| self.enabled) {
            *pending = true;
            self.send();
        }
    }

    /// What is pending is lost.
    pub fn forget(&mut self) {
        self.pending.fill(false);
    }

    /// The message of `vector`, if it can be sent now.
    pub fn message(&self, vector: usize) -> Option<Message> {
        let entry = self.table.get(ENTRY * vector..)?.get(..ENTRY)?;
        let half = |at| u32::from_le_bytes([at, at + 1, at + 2, at + 3].map(|at: usize| entry[at]));
        let on = self.enabled && !self.masked && self.may_request && entry[CONTROL] == 0;
        on.then(|| (u64::from(half(4)) << 32 | u64::from(half(0) & !3), half(8)))
    }

    /// Sends what is pending, as far as it can be sent.
    fn send(&mut self) {
        for vector in 0..self.pending.len() {
            if self.pending[vector] {
                let message = self.message(vector);
                self.pending[vector] = message.is_none();
                self.sent.extend(message.map(|message| (vector, message)));
            }
        }
    }

    /// What must have been sent since the last time.
    pub fn take(&mut self) -> Vec<(usize, Message)> {
        std::mem::take(&mut self.sent)
    }

    /// `sent` is that, in any order.
    pub fn compare(&mut self, mut sent: Vec<Message>) {
        let mut expected: Vec<_> = self.take().into_iter().map(|(_, message)| message).collect();
        sent.sort_unstable();
        expected.sort_unstable();
        assert_eq!(sent, expected, "messages sent, and those expected");
    }

    /// Software reads the pending bit of `vector`, where it is not known when it is triggered: what
    /// can be sent is not pending, and what is pending stays so.
    pub fn observe(&mut self, vector: usize, pending: bool) {
        match self.message(vector) {
            Some(_) => assert!(!pending, "vector {vector} is pending, and not masked"),
            None => {
                assert!(pending || !self.pending[vector], "what was pending in {vector} is lost")
            }
        }
        self.pending[vector] = pending;
    }

    /// Software reads all of the table as `table`, after it has written to it nobody knows what.
    pub fn learn(&mut self, table: &[u8], pending: u64) {
        self.table.copy_from_slice(table);
        let bits = self.pending.iter_mut().enumerate();
        bits.for_each(|(number, bit)| *bit = pending >> number & 1 != 0);
    }
}

/// Only accesses to whole doublewords mean anything.
fn whole(offset: u64, length: usize) -> bool {
    [4, 8].contains(&length) && offset.is_multiple_of(length as u64)
}

/// The messages that were sent.
#[derive(Default)]
pub struct Sent(Mutex<Vec<Message>>);

impl InterruptSink for Sent {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().push((address, data));
    }
}

impl Sent {
    pub fn take(&self) -> Vec<Message> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// A vector: it sends there.
pub struct Vector {
    sent: Arc<Sent>,
    message: Mutex<Option<MsiMessage>>,
}

impl Vector {
    pub fn new(sent: Arc<Sent>) -> Self {
        Self { sent, message: Mutex::default() }
    }
}

impl InterruptVector for Vector {
    fn update(&self, message: Option<MsiMessage>) {
        *self.message.lock() = message;
    }

    fn trigger(&self) {
        let MsiMessage { address, data } = self.message.lock().expect("a vector without a message");
        self.sent.send_msi(address, data);
    }
}

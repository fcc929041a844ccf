// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The messages of a device: each is the one that its vector has, and is sent when it may be, or is
//! pending until then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{self, Thread};

use twostage_vmm::inside::pci::{InterruptVector, MsiMessage};

use crate::models::msix::{self, Message, Msix, Sent};

/// Counts messages, and wakes the driver.
pub struct Vector {
    messages: msix::Vector,
    sent: Arc<Sent>,
    count: AtomicU64,
    driver: Thread,
}

impl Vector {
    pub fn new() -> Self {
        let sent = Arc::<Sent>::default();
        let (messages, count) = (msix::Vector::new(sent.clone()), AtomicU64::new(0));
        Self { messages, sent, count, driver: thread::current() }
    }
}

impl InterruptVector for Vector {
    fn update(&self, message: Option<MsiMessage>) {
        self.messages.update(message);
    }

    fn trigger(&self) {
        self.messages.trigger();
        self.count.fetch_add(1, Ordering::Relaxed);
        self.driver.unpark();
    }
}

/// All vectors, beside a naive MSI-X that does not know when the device has an interrupt.
pub struct Messages {
    vectors: Vec<Arc<Vector>>,
    pub naive: Msix,
    /// The last message that each could send.
    last: Vec<Option<Message>>,
}

impl Messages {
    pub fn new(vectors: Vec<Arc<Vector>>) -> Self {
        let (naive, last) = (Msix::new(vectors.len()), vec![None; vectors.len()]);
        Self { vectors, naive, last }
    }

    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// How many `vector` has sent.
    pub fn count(&self, vector: usize) -> u64 {
        self.vectors[vector].count.load(Ordering::Relaxed)
    }

    /// The naive one has changed.
    pub fn changed(&mut self) {
        for (vector, last) in self.last.iter_mut().enumerate() {
            *last = self.naive.message(vector).or(*last);
        }
    }

    /// What was sent and is pending is of no interest.
    pub fn forget(&mut self) {
        self.naive.take();
        self.vectors.iter().for_each(|vector| drop(vector.sent.take()));
    }

    /// After something that the driver did: what was pending was sent if it may be. Of the rest the
    /// device sent some, each to where its vector says, unless it was `quiet`. `pending`: the bits
    /// that the driver reads now; `late`: what was sent may have been before the vector was masked.
    pub fn check(&mut self, pending: u64, quiet: bool, late: bool) {
        let mut expected = self.naive.take();
        for (number, vector) in self.vectors.iter().enumerate() {
            let mut rest = vector.sent.take();
            while let Some(at) = expected.iter().position(|(of, _)| *of == number) {
                let (_, message) = expected.remove(at);
                let sent = rest.iter().position(|sent| *sent == message);
                rest.remove(sent.unwrap_or_else(|| panic!("what was pending in {number} is lost")));
            }
            let now = self.naive.message(number);
            for message in rest {
                assert!(!quiet, "vector {number} sends what it does not have");
                assert!(late || now.is_some(), "vector {number} is masked");
                assert_eq!(Some(message), self.last[number], "the message of vector {number}");
            }
            self.naive.observe(number, pending >> number & 1 != 0);
        }
    }
}

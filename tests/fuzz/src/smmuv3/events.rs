// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event queue, as the guest reads it.

use twostage::spec::smmuv3::event::{EventRecord, EVENT_SIZE};
use twostage::spec::smmuv3::regs;
use twostage_emulated::kit::Mmio;

use super::image::page;
use super::world::World;
use crate::models::memory::PAGE;

/// Binary logarithm of its entries, of a page.
const EVENT_BITS: u64 = 7;

impl World {
    /// Whether transactions that stall get into the event queue as it was set up at the start.
    pub fn has_stalls(&self) -> bool {
        self.header.stalls && self.is_event_queue()
    }

    /// Binary logarithm of the entries of the event queue: of few where they wait for room.
    pub fn event_bits(&self) -> u64 {
        match self.header.stalls {
            true => 1,
            false => EVENT_BITS,
        }
    }

    /// The guest has read all events.
    pub fn read_events(&mut self) {
        self.smmu.write32(regs::EVENTQ_CONS, self.read32(regs::EVENTQ_PROD));
    }

    /// Whether events get into the queue as it was set up at the start.
    pub fn has_events(&self) -> bool {
        self.header.events && self.is_event_queue()
    }

    fn is_event_queue(&self) -> bool {
        self.cr0().eventqen()
            && self.read64(regs::EVENTQ_BASE) == (page::EVENTS * PAGE) | self.event_bits()
            // EVENTQ_ABT_ERR
            && (self.read32(regs::GERROR) ^ self.read32(regs::GERRORN)) & 4 == 0
    }

    /// Takes all events out of the queue, and returns the index of the next one.
    pub fn drop_events(&mut self) -> u32 {
        if !std::mem::replace(&mut self.is_quiet, true) {
            self.nesting.quiesce().expect("a moment is enough");
        }
        let prod = self.read32(regs::EVENTQ_PROD);
        // With the overflow acknowledged.
        self.smmu.write32(regs::EVENTQ_CONS, prod);
        prod
    }

    /// How many events got into the queue since its next one was to be at `index`, and the first of
    /// them.
    pub fn events_since(&self, index: u32) -> (u32, EventRecord) {
        if self.header.events {
            self.nesting.quiesce().expect("a moment is enough");
        }
        let count = self.read32(regs::EVENTQ_PROD).wrapping_sub(index) % (2 << self.event_bits());
        (count, self.event_at(index))
    }

    pub fn event_at(&self, index: u32) -> EventRecord {
        let at = u64::from(index % (1 << self.event_bits())) * EVENT_SIZE;
        let word = |of: u64| self.memory.load(page::EVENTS * PAGE + at + of * 8).unwrap_or(0);
        EventRecord::from_words([word(0), word(1), word(2), word(3)])
    }
}

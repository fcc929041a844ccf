// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An IOAPIC, which turns interrupt lines into messages: its registers, its redirection entries,
//! and the lines that assigned devices assert.
//!
//! Source: Intel 82093AA data sheet (§3.0), with the EOI register of version 20h; redirection
//! entries in remappable format are VT-d's (§5.1.5.1).

use std::fmt;
use std::sync::{Arc, MutexGuard, Weak};

use bitfield_struct::bitfield;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::PINS;
use crate::bus::BusDevice;
use crate::interrupts::device_line::LineEvents;
use crate::pci::{EventLine, IntxPin};
use twostage::spec::vtd::interrupt::MessageData;
use twostage::sync::Mutex;
use twostage::viommu::{InterruptListener, MsiMessage};

/// Version: 20h has an EOI register.
const VERSION: u8 = 0x20;

/// Offset of IOREGSEL, which selects a register.
const REGISTER_SELECT: u64 = 0x00;
/// Offset of IOWIN, the selected register.
const WINDOW: u64 = 0x10;
/// Offset of the EOI register.
const EOI: u64 = 0x40;

/// Index of IOAPICID.
const ID: u8 = 0x00;
/// Index of IOAPICVER.
const VERSION_REGISTER: u8 = 0x01;
/// Index of IOAPICARB.
const ARBITRATION: u8 = 0x02;
/// Index of the low half of the first redirection entry; its high half follows.
const REDIRECTION: u8 = 0x10;

/// Destination of an IOAPIC's messages. Called with the IOAPIC locked: it must not call the IOAPIC.
pub(super) trait PinOutput: Send + Sync {
    /// `messages` (of pin 0 and up) are those of level-triggered pins from now on: the end of these
    /// interrupts must be reported.
    fn watch(&self, messages: &[Option<MsiMessage>]);

    /// Sends `message`. `false` when it is blocked on its way.
    fn send(&self, message: MsiMessage) -> bool;
}

/// Is notified of the end of a pin's interrupts, to deassert it. Called without locks held.
pub(super) trait EndListener: Send + Sync {
    /// A level-triggered interrupt of the pin has ended.
    fn interrupt_ended(&self);
}

/// An IOAPIC of [`PINS`] pins. Can be called by any thread.
pub struct Ioapic {
    state: Mutex<State>,
    output: Box<dyn PinOutput>,
    /// By pin. Filled while the machine is built.
    listeners: Mutex<Vec<(u32, Weak<dyn EndListener>)>>,
}

/// The guest-visible state.
#[derive(Debug)]
struct State {
    id: u8,
    select: u8,
    entries: [RedirectionEntry; PINS as usize],
    /// One bit for each asserted pin.
    asserted: u32,
}

impl Ioapic {
    /// An IOAPIC after reset: every pin is masked.
    pub(super) fn new(id: u8, output: Box<dyn PinOutput>) -> Arc<Self> {
        let entries = [RedirectionEntry::new(); PINS as usize];
        let state = State { id, select: 0, entries, asserted: 0 };
        Arc::new(Self { state: Mutex::new(state), output, listeners: Mutex::default() })
    }

    /// An IOAPIC that sends messages with `send`, which returns whether they pass.
    #[cfg(feature = "test-support")]
    pub fn with_output(id: u8, send: Box<dyn Fn(MsiMessage) -> bool + Send + Sync>) -> Arc<Self> {
        struct Output(Box<dyn Fn(MsiMessage) -> bool + Send + Sync>);
        impl PinOutput for Output {
            fn watch(&self, _: &[Option<MsiMessage>]) {}

            fn send(&self, message: MsiMessage) -> bool {
                (self.0)(message)
            }
        }
        Self::new(id, Box::new(Output(send)))
    }

    /// Asserts or deasserts the line of `pin`; ignored if there is no such pin.
    pub fn set_line(&self, pin: u32, asserted: bool) {
        let mut state = self.state();
        let Some(entry) = state.entries.get(pin as usize).copied() else { return };
        let bit = 1 << pin;
        let rises = asserted && state.asserted & bit == 0;
        state.asserted = if asserted { state.asserted | bit } else { state.asserted & !bit };
        if entry.level() {
            self.serve_level(&mut state, pin);
        } else if rises && !entry.masked() {
            // An edge while the pin is masked is lost.
            self.output.send(entry.message());
        }
    }

    /// A pulse on the line of `pin`: an edge.
    pub fn pulse(&self, pin: u32) {
        self.set_line(pin, true);
        self.set_line(pin, false);
    }

    /// Adds a listener for the end of interrupts of `pin`.
    pub(super) fn add_end_listener(&self, pin: u32, listener: Weak<dyn EndListener>) {
        self.listeners().push((pin, listener));
    }

    /// The level-triggered interrupt `vector` of some LAPIC has ended.
    pub fn end_of_interrupt(&self, vector: u8) {
        let waits = |entry: &RedirectionEntry| {
            entry.level() && entry.remote_irr() && entry.vector() == vector
        };
        let ended: Vec<u32> = {
            let state = self.state();
            (0..PINS)
                .zip(&state.entries)
                .filter(|(_, entry)| waits(entry))
                .map(|(p, _)| p)
                .collect()
        };
        // Before the pin is evaluated again: its device may deassert it.
        for listener in self.listeners_of(&ended) {
            listener.interrupt_ended();
        }
        let mut state = self.state();
        for pin in ended {
            if let Some(entry) = state.entries.get_mut(pin as usize).filter(|entry| waits(entry)) {
                entry.set_remote_irr(false);
                self.serve_level(&mut state, pin);
            }
        }
    }

    fn listeners_of(&self, pins: &[u32]) -> Vec<Arc<dyn EndListener>> {
        let listeners = self.listeners();
        let of_pins = listeners.iter().filter(|(pin, _)| pins.contains(pin));
        of_pins.filter_map(|(_, listener)| listener.upgrade()).collect()
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<(u32, Weak<dyn EndListener>)>> {
        self.listeners.lock()
    }

    /// Sends the interrupt of a level-triggered pin, if it is asserted and not waiting for an EOI.
    fn serve_level(&self, state: &mut State, pin: u32) {
        let asserted = state.asserted & 1 << pin != 0;
        let Some(entry) = state.entries.get(pin as usize).copied() else { return };
        let may = entry.level() && !entry.masked() && !entry.remote_irr();
        if !asserted || !may {
            return;
        }
        // A message that was blocked when the entry was written may pass now, without notice.
        self.watch(state);
        if self.output.send(entry.message()) {
            if let Some(entry) = state.entries.get_mut(pin as usize) {
                entry.set_remote_irr(true);
            }
        }
    }

    fn watch(&self, state: &State) {
        // A masked pin may still wait for its EOI.
        let level = |entry: &RedirectionEntry| entry.level().then(|| entry.message());
        self.output.watch(&state.entries.each_ref().map(level));
    }

    fn write_register(&self, value: u32) {
        let mut state = self.state();
        let Some((pin, high)) = redirection_half(state.select) else {
            if state.select == ID {
                state.id = (value >> 24) as u8 & 0xf;
            }
            return;
        };
        if let Some(entry) = state.entries.get_mut(pin as usize) {
            let shift = if high { 32 } else { 0 };
            let before = *entry;
            *entry = entry.written(u64::from(value) << shift, u64::from(u32::MAX) << shift);
            if *entry != before {
                self.watch(&state);
                self.serve_level(&mut state, pin);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn read_register(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => u32::from(self.id) << 24,
            VERSION_REGISTER => (PINS - 1) << 16 | u32::from(VERSION),
            select => redirection_half(select)
                .and_then(|(pin, high)| {
                    let bits = self.entries.get(pin as usize)?.into_bits();
                    Some(if high { (bits >> 32) as u32 } else { bits as u32 })
                })
                .unwrap_or(0),
        }
    }
}

/// The pin of the redirection entry that the register `select` belongs to, and whether it is the
/// high half.
fn redirection_half(select: u8) -> Option<(u32, bool)> {
    let offset = u32::from(select.checked_sub(REDIRECTION)?);
    Some((offset / 2, offset % 2 != 0))
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let value = match offset {
            REGISTER_SELECT => state.select.into(),
            WINDOW => state.read_register(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u32::from_le_bytes(bytes);
        match offset {
            REGISTER_SELECT => self.state().select = value as u8,
            WINDOW => self.write_register(value),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl InterruptListener for Ioapic {
    fn interrupts_changed(&self) {
        self.watch(&self.state());
    }
}

impl fmt::Debug for Ioapic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioapic").field("state", &self.state).finish_non_exhaustive()
    }
}

/// A redirection entry.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct RedirectionEntry {
    /// Vector; in remappable format only used to match EOIs.
    pub vector: u8,
    /// Delivery mode.
    #[bits(3)]
    pub delivery_mode: u8,
    /// Destination mode: logical. In remappable format bit 15 of the interrupt index.
    pub logical: bool,
    /// Delivery status. Read-only; messages are delivered at once.
    pub delivery_status: bool,
    /// Polarity: active low. Ignored: lines here are asserted or not.
    pub active_low: bool,
    /// Remote IRR: a level-triggered interrupt waits for its EOI. Read-only.
    pub remote_irr: bool,
    /// Trigger mode: level.
    pub level: bool,
    /// Masked.
    #[bits(default = true)]
    pub masked: bool,
    #[bits(31)]
    __: u32,
    /// Bits 19:4 of the message's address: the destination in the upper eight; in remappable format
    /// the interrupt index above the format bit.
    pub address: u16,
}

impl RedirectionEntry {
    /// Bits that software can write.
    const WRITABLE: u64 = 0xffff_0000_0001_afff;

    /// The entry after software wrote the bits `mask` of it. An edge-triggered interrupt does not
    /// wait for an EOI.
    const fn written(self, value: u64, mask: u64) -> Self {
        let mask = mask & Self::WRITABLE;
        let new = Self::from_bits(self.into_bits() & !mask | value & mask);
        let waits = new.remote_irr() && new.level();
        new.with_remote_irr(waits)
    }

    /// The entry's message: its bits map to address and data in the same way in both formats.
    fn message(self) -> MsiMessage {
        let address = 0xfee0_0000 | u64::from(self.address()) << 4 | u64::from(self.logical()) << 2;
        let data = MessageData::new()
            .with_vector(self.vector())
            .with_delivery_mode(self.delivery_mode())
            .with_assert(true)
            .with_level(self.level());
        MsiMessage { address, data: data.into_bits() }
    }
}

/// The line of one pin. The event loop asserts it when its eventfd is written; the vCPU whose
/// interrupt ends deasserts it and writes the other eventfd.
pub(super) struct PinLine {
    pin: IntxPin,
    events: LineEvents,
}

impl PinLine {
    /// The line of `pin` with the eventfds `events`.
    pub fn new(pin: IntxPin, events: LineEvents) -> Arc<Self> {
        Arc::new(Self { pin, events })
    }

    /// The eventfd was written.
    fn assert(&self) {
        if self.events.assert.read().is_ok() {
            self.pin.set(true);
        }
    }
}

impl EndListener for PinLine {
    /// Also if another device on the line caused the interrupt: then nothing was masked, and
    /// unmasking has no effect.
    fn interrupt_ended(&self) {
        self.pin.set(false);
        if let Err(error) = self.events.end.write(1) {
            log::debug!("{:?}: {error}", self.pin);
        }
    }
}

/// A [`PinLine`] as owned by its device.
pub(super) struct OwnedPinLine(pub Arc<PinLine>);

impl EventLine for OwnedPinLine {
    fn assert_event(&self) -> &EventFd {
        &self.0.events.assert
    }

    fn end_event(&self) -> &EventFd {
        &self.0.events.end
    }

    fn release(&self) {
        // Discards an unread write, so that it does not assert the line later.
        let _ = self.0.events.assert.read();
        self.0.pin.set(false);
    }
}

/// A [`PinLine`] in the event loop.
pub(super) struct WatchedPinLine(pub Arc<PinLine>);

impl MutEventSubscriber for WatchedPinLine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0.events.assert, EventSet::IN)) {
            log::error!("{:?} is never asserted: {error}", self.0.pin);
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.assert();
    }
}

impl fmt::Debug for PinLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PinLine").field(&self.pin).finish()
    }
}

#[cfg(test)]
mod tests;

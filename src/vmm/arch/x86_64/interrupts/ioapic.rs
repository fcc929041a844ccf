// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An IOAPIC: turns interrupt lines into messages.

use std::fmt;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use super::redirection::{self as registers, RedirectionEntry};
use crate::arch::layout::PINS;
use crate::bus::BusDevice;
use twostage::viommu::{InterruptListener, MsiMessage};

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
            if state.select == registers::ID {
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
            registers::ID | registers::ARBITRATION => u32::from(self.id) << 24,
            registers::VERSION_REGISTER => (PINS - 1) << 16 | u32::from(registers::VERSION),
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
    let offset = u32::from(select.checked_sub(registers::REDIRECTION)?);
    Some((offset / 2, offset % 2 != 0))
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        let value = match offset {
            registers::REGISTER_SELECT => state.select.into(),
            registers::WINDOW => state.read_register(),
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
            registers::REGISTER_SELECT => self.state().select = value as u8,
            registers::WINDOW => self.write_register(value),
            registers::EOI => self.end_of_interrupt(value as u8),
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Default)]
    struct Output {
        sent: Mutex<Vec<u32>>,
        watched: Mutex<Vec<Option<MsiMessage>>>,
        blocked: AtomicBool,
    }

    impl PinOutput for Arc<Output> {
        fn watch(&self, messages: &[Option<MsiMessage>]) {
            *self.watched.lock() = messages.to_vec();
        }

        fn send(&self, message: MsiMessage) -> bool {
            self.sent.lock().push(message.data & 0xff);
            !self.blocked.load(Ordering::SeqCst)
        }
    }

    fn ioapic() -> (Arc<Ioapic>, Arc<Output>) {
        let output = Arc::new(Output::default());
        (Ioapic::new(5, Box::new(output.clone())), output)
    }

    impl Ioapic {
        fn get(&self, index: u8) -> u32 {
            self.write(0, &[index]);
            let mut data = [0; 4];
            self.read(0x10, &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&self, index: u8, value: u32) {
            self.write(0, &u32::from(index).to_le_bytes());
            self.write(0x10, &value.to_le_bytes());
        }

        fn set_pin(&self, pin: u8, value: u32) {
            self.set(0x10 + 2 * pin, value);
        }

        fn remote_irr(&self, pin: u8) -> bool {
            self.get(0x10 + 2 * pin) & 1 << 14 != 0
        }
    }

    impl Output {
        fn take(&self) -> Vec<u32> {
            std::mem::take(&mut self.sent.lock())
        }
    }

    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;

    #[test]
    fn registers_are_what_the_data_sheet_says() {
        let (ioapic, _) = ioapic();
        assert_eq!((ioapic.get(0), ioapic.get(1), ioapic.get(2)), (5 << 24, 0x17_0020, 5 << 24));
        ioapic.set(0, 0xffff_ffff);
        assert_eq!(ioapic.get(0), 0xf << 24);
        ioapic.set(1, 0);
        assert_eq!(ioapic.get(1), 0x17_0020);
        for pin in 0..24 {
            assert_eq!((ioapic.get(0x10 + 2 * pin), ioapic.get(0x11 + 2 * pin)), (MASKED, 0));
        }
        ioapic.set(0x3f, 0xffff_ffff);
        ioapic.set(0x3e, 0xffff_ffff);
        assert_eq!((ioapic.get(0x3e), ioapic.get(0x3f)), (0x1_afff, 0xffff_0000));
        // Beyond the last entry there is nothing.
        for index in [0x03, 0x0f, 0x40, 0x41, 0xff] {
            ioapic.set(index, 0xffff_ffff);
            assert_eq!(ioapic.get(index), 0);
        }
        let mut data = [0xaa; 8];
        ioapic.read(0x20, &mut data);
        assert_eq!(data, [0; 8]);
        ioapic.read(0x00, &mut data);
        assert_eq!(data, [0xff, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn an_edge_is_sent_once_and_lost_while_masked() {
        let (ioapic, output) = ioapic();
        ioapic.pulse(4);
        ioapic.set_pin(4, 0x34);
        assert_eq!(output.take(), [0u32; 0]);
        ioapic.set_line(4, true);
        ioapic.set_line(4, true);
        assert_eq!((output.take(), ioapic.remote_irr(4)), (vec![0x34], false));
        ioapic.set_line(4, false);
        ioapic.pulse(4);
        assert_eq!(output.take(), [0x34]);
        ioapic.set_line(24, true);
        ioapic.set_line(255, true);
        assert_eq!(output.take(), [0u32; 0]);
    }

    #[test]
    fn a_level_is_sent_again_at_each_eoi_until_it_falls() {
        let (ioapic, output) = ioapic();
        ioapic.set_line(16, true);
        ioapic.set_pin(16, LEVEL | 0x50);
        assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], true));
        ioapic.set_line(16, true);
        ioapic.end_of_interrupt(0x51);
        assert_eq!(output.take(), [0u32; 0]);
        ioapic.end_of_interrupt(0x50);
        assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], true));
        ioapic.set_line(16, false);
        assert!(ioapic.remote_irr(16));
        // By the register, too.
        ioapic.write(0x40, &0x50u32.to_le_bytes());
        assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![], false));
    }

    #[test]
    fn a_masked_level_is_sent_when_it_is_unmasked() {
        let (ioapic, output) = ioapic();
        ioapic.set_pin(16, LEVEL | MASKED | 0x50);
        ioapic.set_line(16, true);
        assert_eq!(output.take(), [0u32; 0]);
        ioapic.set_pin(16, LEVEL | 0x50);
        assert_eq!(output.take(), [0x50]);
        // Masked while in service: its EOI counts, and nothing is sent until it is unmasked.
        ioapic.set_pin(16, LEVEL | MASKED | 0x50);
        assert!(ioapic.remote_irr(16));
        ioapic.end_of_interrupt(0x50);
        assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![], false));
        ioapic.set_pin(16, LEVEL | 0x50);
        assert_eq!(output.take(), [0x50]);
        // How software without the EOI register ends an interrupt: edge, then level again.
        ioapic.set_pin(16, MASKED | 0x50);
        assert!(!ioapic.remote_irr(16));
        ioapic.set_pin(16, LEVEL | 0x50);
        assert_eq!(output.take(), [0x50]);
    }

    #[test]
    fn a_blocked_level_waits_for_no_eoi() {
        let (ioapic, output) = ioapic();
        output.blocked.store(true, Ordering::SeqCst);
        ioapic.set_pin(16, LEVEL | 0x50);
        ioapic.set_line(16, true);
        assert_eq!((output.take(), ioapic.remote_irr(16)), (vec![0x50], false));
    }

    #[test]
    fn ends_are_wanted_of_level_pins_only() {
        let (ioapic, output) = ioapic();
        ioapic.set_pin(3, 0x33);
        ioapic.set_pin(16, LEVEL | MASKED | 0x50);
        ioapic.set(0x10 + 2 * 16 + 1, 0x0200_0000);
        let message = MsiMessage { address: 0xfee0_2000, data: 0xc050 };
        let watched = || output.watched.lock().clone();
        let mut wanted = vec![None; 24];
        wanted[16] = Some(message);
        assert_eq!(watched(), wanted);
        output.watched.lock().clear();
        // No change, no notification.
        ioapic.set_pin(3, 0x33);
        assert_eq!(watched(), []);
        ioapic.interrupts_changed();
        assert_eq!(watched(), wanted);
        // Registered before the interrupt is sent, whatever was registered before.
        ioapic.set_pin(16, LEVEL | 0x50);
        output.watched.lock().clear();
        ioapic.set_line(16, true);
        assert_eq!((watched(), output.take()), (wanted, vec![0x50]));
    }
}

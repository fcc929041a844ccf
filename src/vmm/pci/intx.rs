// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INTx: the functions' interrupt pins and the shared lines they are connected to.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use twostage::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout::INTX_LINES;
use twostage::spec::pci::Bdf;

/// An interrupt line that pins share.
#[derive(Debug, Clone, Copy)]
pub struct IntxLine {
    /// Value of the interrupt line register of its functions.
    pub register: u8,
    /// The interrupt controller inputs that it is connected to.
    pub gsis: &'static [u32],
}

/// A line that is asserted by writing an eventfd and deasserted at the guest's end of interrupt.
pub trait EventLine: Send + Sync {
    /// The eventfd that asserts it.
    fn assert_event(&self) -> &EventFd;

    /// The eventfd that is written at the end of the interrupt, after the line was deasserted.
    fn end_event(&self) -> &EventFd;

    /// Deasserts it: earlier writes have no effect any more.
    fn release(&self);
}

/// The index in [`INTX_LINES`] of the line for `pin`, 0 for INTA, of device number `device` on
/// bus 0.
pub fn line_of_pin(device: u8, pin: u8) -> usize {
    (usize::from(device) + usize::from(pin)) % INTX_LINES.len()
}

/// Where INTA of device number `device` arrives on bus 0, from behind bridges whose device numbers,
/// from the function upwards, are `bridges`: the last one's number and pin. Each connects the pins
/// behind it with its own by device number (PCI-to-PCI Bridge Architecture 1.2, §9.1).
pub fn root_pin(device: u8, bridges: impl IntoIterator<Item = u8>) -> (u8, u8) {
    const PINS: u8 = 4;
    bridges.into_iter().fold((device, 0), |(device, pin), bridge| (bridge, (pin + device) % PINS))
}

/// Drives a line: (GSI, level).
type Drive = dyn Fn(u32, bool) + Send + Sync;

/// Connects pins to lines.
pub struct IntxRouter {
    lines: [Arc<Line>; INTX_LINES.len()],
}

struct Line {
    line: IntxLine,
    /// The functions with an asserted pin: the line is their OR.
    asserted: Mutex<BTreeSet<Bdf>>,
    drive: Arc<Drive>,
}

impl IntxRouter {
    /// A router that drives lines through `drive`.
    pub fn new(drive: Arc<Drive>) -> Self {
        let line = |line| Arc::new(Line { line, asserted: Mutex::default(), drive: drive.clone() });
        Self { lines: INTX_LINES.map(line) }
    }

    /// INTA of the function at `bdf`, behind bridges whose device numbers, from the function
    /// upwards, are `bridges`.
    pub fn pin(&self, bdf: Bdf, bridges: impl IntoIterator<Item = u8>) -> IntxPin {
        let (device, pin) = root_pin(bdf.device(), bridges);
        IntxPin { line: self.lines[line_of_pin(device, pin)].clone(), function: bdf }
    }
}

impl fmt::Debug for IntxRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntxRouter").finish_non_exhaustive()
    }
}

/// An interrupt pin, initially deasserted.
pub struct IntxPin {
    line: Arc<Line>,
    function: Bdf,
}

impl IntxPin {
    /// The value of the interrupt line register.
    pub fn line(&self) -> u8 {
        self.line.line.register
    }

    /// The interrupt controller inputs that its line is connected to.
    pub fn gsis(&self) -> &'static [u32] {
        self.line.line.gsis
    }

    /// Asserts or deasserts the pin.
    pub fn set(&self, asserted: bool) {
        // Held while driving the line, so that levels reach the interrupt controller in order.
        let mut pins = self.line.asserted.lock();
        let before = !pins.is_empty();
        if asserted {
            pins.insert(self.function);
        } else {
            pins.remove(&self.function);
        }
        let after = !pins.is_empty();
        if before != after {
            for gsi in self.line.line.gsis {
                (self.line.drive)(*gsi, after);
            }
        }
    }
}

impl fmt::Debug for IntxPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IntxPin({})", self.line())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_line_falls_when_the_last_pin_does() {
        let levels = Arc::new(Mutex::new(Vec::new()));
        let seen = levels.clone();
        let router = IntxRouter::new(Arc::new(move |gsi, level| seen.lock().push((gsi, level))));
        let one = router.pin(Bdf::new(0, 1, 0).unwrap(), []);
        let five = router.pin(Bdf::new(0, 5, 0).unwrap(), []);
        let two = router.pin(Bdf::new(0, 2, 0).unwrap(), []);
        assert_eq!(one.line(), five.line());
        assert_ne!(one.line(), two.line());
        one.set(true);
        five.set(true);
        one.set(true);
        one.set(false);
        five.set(false);
        two.set(false);
        let inputs = INTX_LINES[line_of_pin(1, 0)].gsis;
        let expected = [true, false].map(|level| inputs.iter().map(move |gsi| (*gsi, level)));
        assert_eq!(*levels.lock(), expected.into_iter().flatten().collect::<Vec<_>>());
    }

    #[test]
    fn bridges_turn_the_pins_by_device_number() {
        assert_eq!(root_pin(5, []), (5, 0));
        assert_eq!(root_pin(0, [3]), (3, 0), "a port has one device");
        assert_eq!(root_pin(6, [0, 3]), (3, 2));
        assert_eq!(root_pin(3, [2, 7]), (7, 1));
        let router = IntxRouter::new(Arc::new(|_, _| {}));
        let behind = router.pin(Bdf::new(2, 1, 0).unwrap(), [0, 3]);
        let root = router.pin(Bdf::new(0, 4, 0).unwrap(), []);
        assert_eq!(behind.line(), root.line());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INTx: the functions' interrupt pins and the shared lines they are connected to.

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

/// The index in [`INTX_LINES`] of the line for INTA of device number `device` on bus 0.
pub fn line_of_pin(device: u8) -> usize {
    usize::from(device) % INTX_LINES.len()
}

/// Drives a line: (GSI, level).
type Drive = dyn Fn(u32, bool) + Send + Sync;

/// Connects pins to lines.
pub struct IntxRouter {
    lines: [Arc<Line>; INTX_LINES.len()],
}

struct Line {
    line: IntxLine,
    /// One bit for each device number with an asserted pin: the line is their OR.
    asserted: Mutex<u32>,
    drive: Arc<Drive>,
}

impl IntxRouter {
    /// A router that drives lines through `drive`.
    pub fn new(drive: Arc<Drive>) -> Self {
        let line = |line| Arc::new(Line { line, asserted: Mutex::new(0), drive: drive.clone() });
        Self { lines: INTX_LINES.map(line) }
    }

    /// INTA of the function at `bdf`, on bus 0.
    pub fn pin(&self, bdf: Bdf) -> IntxPin {
        let line = &self.lines[line_of_pin(bdf.device())];
        IntxPin { line: line.clone(), device: bdf.device() }
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
    device: u8,
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
        let bit = 1 << self.device;
        // Held while driving the line, so that levels reach the interrupt controller in order.
        let mut pins = self.line.asserted.lock();
        let before = *pins != 0;
        *pins = if asserted { *pins | bit } else { *pins & !bit };
        let after = *pins != 0;
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
        let one = router.pin(Bdf::new(0, 1, 0).unwrap());
        let five = router.pin(Bdf::new(0, 5, 0).unwrap());
        let two = router.pin(Bdf::new(0, 2, 0).unwrap());
        assert_eq!(one.line(), five.line());
        assert_ne!(one.line(), two.line());
        one.set(true);
        five.set(true);
        one.set(true);
        one.set(false);
        five.set(false);
        two.set(false);
        let inputs = INTX_LINES[line_of_pin(1)].gsis;
        let expected = [true, false].map(|level| inputs.iter().map(move |gsi| (*gsi, level)));
        assert_eq!(*levels.lock(), expected.into_iter().flatten().collect::<Vec<_>>());
    }
}

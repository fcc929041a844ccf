// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A line to the IOAPIC here, asserted by an assigned device's eventfd.

use std::fmt;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::ioapic::EndListener;
use crate::interrupts::device_line::LineEvents;
use crate::pci::{EventLine, IntxPin};

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
            log::error!("{:?} is never asserted: {error:?}", self.0.pin);
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
mod tests {
    use twostage::sync::Mutex;

    use super::*;
    use crate::pci::IntxRouter;
    use twostage::spec::pci::Bdf;

    #[test]
    fn a_line_is_asserted_until_the_interrupt_ends() {
        let levels = Arc::new(Mutex::new(Vec::new()));
        let seen = levels.clone();
        let router = IntxRouter::new(Arc::new(move |_, level| seen.lock().push(level)));
        let pin = router.pin(Bdf::new(0, 1, 0).unwrap());
        let inputs = pin.gsis().len();
        let line = PinLine::new(pin, LineEvents::new().unwrap());
        let owned = OwnedPinLine(line.clone());
        let took = || {
            let levels = std::mem::take(&mut *levels.lock());
            levels.into_iter().step_by(inputs).collect::<Vec<_>>()
        };
        line.assert();
        assert_eq!(took(), [] as [bool; 0], "nobody wrote");
        owned.assert_event().write(1).unwrap();
        line.assert();
        assert_eq!(took(), [true]);
        line.interrupt_ended();
        assert_eq!((took(), owned.end_event().read().unwrap()), (vec![false], 1));
        // Released with an unread write: it does not take effect later.
        owned.assert_event().write(1).unwrap();
        owned.release();
        line.assert();
        assert_eq!(took(), [] as [bool; 0]);
    }
}

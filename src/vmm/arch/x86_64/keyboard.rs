// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keyboard controller, as far as guests use it to reset the machine.

use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::process::stop::{ResetCause, StopReason, Stopper};

/// I/O port for data. Those between the two belong to other devices: 0x61 is the chipset's port B.
pub(super) const DATA_PORT: u64 = 0x60;
/// I/O port for commands, and for the status.
pub(super) const COMMAND_PORT: u64 = 0x64;

/// Stops the machine when the controller's reset line is pulsed.
struct ResetLine(Stopper);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.stop(StopReason::Reset(ResetCause::KeyboardController));
        Ok(())
    }
}

/// The controller, behind both of its ports.
pub(super) struct KeyboardController(Mutex<I8042Device<ResetLine>>);

impl KeyboardController {
    pub fn new(stopper: Stopper) -> Arc<Self> {
        Arc::new(Self(Mutex::new(I8042Device::new(ResetLine(stopper)))))
    }

    /// The port `number`, one of the two.
    pub fn port(self: &Arc<Self>, number: u64) -> KeyboardPort {
        // At most five ports from the first to the last.
        KeyboardPort { controller: self.clone(), offset: (number - DATA_PORT) as u8 }
    }
}

/// One of the controller's ports.
pub(super) struct KeyboardPort {
    controller: Arc<KeyboardController>,
    /// From the first of them.
    offset: u8,
}

impl KeyboardPort {
    fn device(&self) -> MutexGuard<'_, I8042Device<ResetLine>> {
        self.controller.0.lock()
    }
}

impl BusDevice for KeyboardPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.device().read(self.offset);
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let [byte] = data {
            let Ok(()) = self.device().write(self.offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_stops_the_machine() {
        let stopper = Stopper::new().unwrap();
        let controller = KeyboardController::new(stopper.clone());
        let (data, command) = (controller.port(DATA_PORT), controller.port(COMMAND_PORT));
        command.write(0, &[0x20]);
        data.write(0, &[0xfe]);
        assert_eq!(stopper.reason(), None);
        command.write(0, &[0xfe]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::KeyboardController)));
    }
}

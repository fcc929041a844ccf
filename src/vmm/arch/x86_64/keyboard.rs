// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The keyboard controller, as far as guests use it to reset the machine.
#![forbid(unsafe_code)]

use std::sync::{Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use crate::vmm::bus::BusDevice;
use crate::vmm::stop::{ResetCause, StopReason, Stopper};

/// First I/O port: data; the command port is 0x64.
pub(super) const FIRST_PORT: u64 = 0x60;
/// Last I/O port.
pub(super) const LAST_PORT: u64 = 0x64;

/// Stops the machine when the controller's reset line is pulsed.
struct ResetLine(Stopper);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.stop(StopReason::Reset(ResetCause::KeyboardController));
        Ok(())
    }
}

/// Ports 0x60 to 0x64.
pub(super) struct KeyboardController(Mutex<I8042Device<ResetLine>>);

impl KeyboardController {
    pub fn new(stopper: Stopper) -> Self {
        Self(Mutex::new(I8042Device::new(ResetLine(stopper))))
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            // The range of the device is five ports.
            *byte = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let Ok(()) = device.write(offset as u8, *byte);
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
        controller.write(4, &[0x20]);
        assert_eq!(stopper.reason(), None);
        controller.write(4, &[0xfe]);
        assert_eq!(stopper.reason(), Some(&StopReason::Reset(ResetCause::KeyboardController)));
    }
}

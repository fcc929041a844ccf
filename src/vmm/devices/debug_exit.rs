// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The debug-exit register: the value a guest writes becomes the exit code of the process.

use crate::bus::BusDevice;
use crate::process::stop::{StopReason, Stopper};

/// Its length in bytes: as wide as QEMU's isa-debug-exit usually is.
pub(crate) const LENGTH: u64 = 4;

/// A register of up to four bytes, of which only the first is used; reads as 0.
pub(crate) struct DebugExit {
    stopper: Stopper,
}

impl DebugExit {
    pub fn new(stopper: Stopper) -> Self {
        Self { stopper }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [value, ..]) = (offset, data) {
            self.stopper.stop(StopReason::DebugExit(*value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_of_an_access_of_any_width_is_the_exit_code() {
        for data in [&[7][..], &[7, 1], &[7, 1, 2, 3]] {
            let stopper = Stopper::new().unwrap();
            let port = DebugExit::new(stopper.clone());
            port.write(1, &[9]);
            assert_eq!(stopper.reason(), None);
            port.write(0, data);
            assert_eq!(stopper.reason(), Some(&StopReason::DebugExit(7)));
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The debug-exit port: what a guest writes becomes the exit code of the process.
#![forbid(unsafe_code)]

use super::bus::BusDevice;
use super::stop::{StopReason, Stopper};

/// The I/O port.
pub(super) const PORT: u64 = 0xf4;

/// A port of one byte; reads as 0.
pub(super) struct DebugExit {
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

    fn write(&self, _offset: u64, data: &[u8]) {
        if let [value, ..] = data {
            self.stopper.stop(StopReason::DebugExit(*value));
        }
    }
}

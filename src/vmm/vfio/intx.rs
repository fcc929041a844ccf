// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! INTx of an assigned device: a level made of two eventfds.
//!
//! VFIO writes the first when the device asserts its pin, and masks the pin. The line's owner
//! asserts the line, deasserts it at the guest's end of interrupt, and writes the second, which
//! unmasks the pin: if the device still asserts it, everything starts again.

use std::fmt;
use std::sync::Arc;

use super::host_device::{HostDevice, Irq};
use crate::pci::EventLine;
use twostage::ratelimit::RateLimit;

/// The pin of a device.
pub struct Intx {
    host: Arc<dyn HostDevice>,
    line: Box<dyn EventLine>,
    complaints: RateLimit,
}

impl Intx {
    /// The pin of `host`, disabled, connected to `line`.
    pub fn new(host: Arc<dyn HostDevice>, line: Box<dyn EventLine>) -> Self {
        Self { host, line, complaints: RateLimit::default() }
    }

    /// Enables it.
    pub fn enable(&self) {
        let assert = [Some(self.line.assert_event())];
        let result = self
            .host
            .set_triggers(Irq::Intx, 0, &assert)
            .and_then(|()| self.host.set_intx_unmask(self.line.end_event()));
        if let Err(error) = result {
            self.complaints.warn(format_args!("INTx: switching on: {error}"));
        }
    }

    /// Disables it.
    pub fn disable(&self) {
        if let Err(error) = self.host.disable_irq(Irq::Intx) {
            self.complaints.warn(format_args!("INTx: switching off: {error}"));
        }
        self.line.release();
    }
}

impl fmt::Debug for Intx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intx").field("host", &self.host).finish_non_exhaustive()
    }
}

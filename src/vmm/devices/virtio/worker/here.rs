// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A worker without a thread, for fuzzers: it serves when it is told to, and so in the same order
//! each time.

use std::fmt;
use std::sync::Arc;

use twostage::sync::Mutex;

use super::{Device, EndOf, Service};

/// What serves a device. Dropping it stops the device, as the end of a thread does.
pub(super) struct Here {
    device: Arc<Mutex<Device>>,
    service: Service,
    /// Dropped last.
    _end: EndOf,
}

impl Here {
    /// Serves `device` until it is dropped, which `end` tells.
    pub fn new(device: Arc<Mutex<Device>>, service: Service, end: EndOf) -> Self {
        // Notifications before DRIVER_OK may have been missed.
        service.link().notify_all();
        Self { device, service, _end: end }
    }

    /// Serves what was notified, once; with `input`, what a thread would be told by the host and by
    /// time, too. Returns whether anything was notified.
    pub fn turn(&mut self, input: bool) -> bool {
        let mut device = self.device.lock();
        let mut any = false;
        let link = self.service.link().clone();
        for (number, event) in link.queue_events().iter().enumerate() {
            if event.read().is_ok() {
                any = true;
                self.service.notified(&mut device, number);
            }
        }
        if input {
            self.service.input(&mut device);
            self.service.look_now(&mut device);
        }
        any
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        self.device.lock().backend.stop();
    }
}

impl fmt::Debug for Here {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Here").field("service", &self.service).finish_non_exhaustive()
    }
}

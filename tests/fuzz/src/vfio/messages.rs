// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the interrupts of the device's messages go: what a hypervisor does with their eventfds.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use twostage::sync::Mutex;

use twostage::viommu::InterruptSink;
use twostage_vmm::inside::pci::{EventVector, InterruptVector, MsiMessage};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::models::msix::Sent;

pub fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("descriptors")
}

/// A vector: its eventfd is read while it has a message.
pub struct Vector {
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
    sent: Arc<Sent>,
}

impl Vector {
    pub fn message(&self) -> Option<(u64, u32)> {
        self.message.lock().map(|message| (message.address, message.data))
    }

    /// The device has an interrupt.
    pub fn fire(&self) {
        self.event.write(1).expect("a small number");
        self.look();
    }

    /// Sends what came.
    fn look(&self) {
        let Some((address, data)) = self.message() else { return };
        if self.event.read().is_ok() {
            self.sent.send_msi(address, data);
        }
    }
}

impl InterruptVector for Vector {
    fn update(&self, message: Option<MsiMessage>) {
        *self.message.lock() = message;
        self.look();
    }

    fn trigger(&self) {}

    fn is_pending(&self) -> bool {
        let came = self.event.read().ok();
        came.inspect(|count| self.event.write(*count).expect("it was there")).is_some()
    }
}

impl EventVector for Vector {
    fn event(&self) -> &EventFd {
        &self.event
    }
}

/// All vectors that were made.
#[derive(Default)]
pub struct Vectors {
    all: Mutex<Vec<Arc<Vector>>>,
    pub sent: Arc<Sent>,
}

impl Vectors {
    pub fn make(&self) -> Arc<Vector> {
        let (message, sent) = (Mutex::default(), self.sent.clone());
        let vector = Arc::new(Vector { event: event(), message, sent });
        self.all.lock().push(vector.clone());
        vector
    }

    /// The one with this eventfd.
    pub fn of(&self, event: RawFd) -> Arc<Vector> {
        let all = self.all.lock();
        let found = all.iter().find(|vector| vector.event.as_raw_fd() == event);
        found.expect("an eventfd that is no vector's").clone()
    }
}

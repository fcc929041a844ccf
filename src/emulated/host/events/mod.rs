// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What users read from descriptors: page requests of devices, and events of vIOMMUs.
//!
//! A queue has its own lock: reporting and reading need no other. With it held, the watcher is
//! notified and devices are answered (which takes the lock of their page requests). A read never
//! blocks; to sleep until there is something, use a [`Readiness`].

mod faults;
mod vevents;

use std::fmt;
use std::sync::Arc;
use twostage::sync::Mutex;

pub(crate) use faults::{AttachmentId, FaultQueue, PendingGroup};
pub(crate) use vevents::{VeventQueue, ViommuEvents, MAX_DEPTH};

use crate::host::refusal::Outcome;
use twostage::iommufd::Readiness;

/// The watcher of a queue's state: none at first.
#[derive(Default)]
struct Watcher(Mutex<Option<Arc<dyn Readiness>>>);

impl Watcher {
    fn set(&self, watcher: Arc<dyn Readiness>, readable: bool) {
        watcher.changed(readable);
        *self.0.lock() = Some(watcher);
    }

    fn tell(&self, readable: bool) {
        if let Some(watcher) = &*self.0.lock() {
            watcher.changed(readable);
        }
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

/// Destination of a read: gets the offset in the buffer and the bytes.
pub(crate) type Output<'a> = &'a mut dyn FnMut(usize, &[u8]) -> Outcome<()>;

/// Source of a write: gets the offset in the buffer and fills the bytes.
pub(crate) type Input<'a> = &'a mut dyn FnMut(usize, &mut [u8]) -> Outcome<()>;

/// The result of a read or write that stopped at `done` bytes because of `outcome`: the error only
/// if nothing was done.
fn transferred(done: usize, outcome: Outcome<()>) -> Outcome<usize> {
    match outcome {
        Err(refusal) if done == 0 => Err(refusal),
        _ => Ok(done),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a user reads from descriptors: page requests of devices, and events of vIOMMUs.
//!
//! A queue has a lock of its own: who reports and who reads need no other. The watcher is told, and
//! devices are answered (which takes the lock of their page requests), with it held. A read never
//! waits; who wants to sleep until there is something gives the queue a [`Readiness`].

mod faults;
mod vevents;

use std::fmt;
use std::sync::Arc;
use twostage::sync::Mutex;

pub(crate) use faults::{AttachmentId, FaultQueue, PendingGroup};
pub(crate) use vevents::{VeventQueue, ViommuEvents, MAX_DEPTH};

use crate::host::refusal::Outcome;
use twostage::iommufd::Readiness;

/// Who is told of a queue's state: nobody at first.
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

/// Where what is read goes: given the offset in the buffer and the bytes.
pub(crate) type Output<'a> = &'a mut dyn FnMut(usize, &[u8]) -> Outcome<()>;

/// Where what is written comes from: given the offset in the buffer, fills the bytes.
pub(crate) type Input<'a> = &'a mut dyn FnMut(usize, &mut [u8]) -> Outcome<()>;

/// What a read or a write that stopped at `done` bytes because of `outcome` answers: the error only
/// when nothing was done.
fn transferred(done: usize, outcome: Outcome<()>) -> Outcome<usize> {
    match outcome {
        Err(refusal) if done == 0 => Err(refusal),
        _ => Ok(done),
    }
}

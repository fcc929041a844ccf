// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Wakes the thread that ends a process which should end ([`super::overdue`]).

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};

use crate::{Error, Result};

/// Readable from the first ring on.
static BELL: OnceLock<OwnedFd> = OnceLock::new();

/// Called before [`wait`].
///
/// # Errors
/// There are no descriptors left.
pub(crate) fn hang() -> Result<()> {
    let bell = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
    let bell = bell.map_err(Error::os("eventfd"))?;
    // There is only one.
    let _ = BELL.set(bell);
    Ok(())
}

/// Wakes whoever waits. For signal handlers.
pub(crate) fn ring() {
    if let Some(bell) = BELL.get() {
        // A full counter is readable, too.
        let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
    }
}

/// Waits for the first ring.
pub(crate) fn wait() {
    let Some(bell) = BELL.get() else { return };
    let mut wanted = [PollFd::new(bell, PollFlags::IN)];
    // Signals come in between.
    while !poll(&mut wanted, None).is_ok_and(|ready| ready != 0) {}
}

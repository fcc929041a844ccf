// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The owner's side of the protocol without hooks, for fuzzers: files of the default machine, and
//! messages to them as a process may send them that has a descriptor of one.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::callers::calls;
use crate::world::Node;
use crate::{state, sys};

/// How long an answer may take, in any case.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// Opens the file at `path`, such as `/dev/iommu`: a descriptor, as programs have it.
///
/// # Errors
/// The errno that `open(2)` gives.
pub fn open(path: &str) -> Result<OwnedFd, i32> {
    let open = || {
        let state = state::current();
        let node = Node::of(path.as_bytes()).ok_or(twostage::iommufd::Errno::ENOENT)?;
        state.start_service(calls::serve)?;
        // As for a program that has just closed it.
        state.end_hung_up();
        let file = state.world()?.open(node)?;
        state.publish(file).map(|(fd, _)| fd)
    };
    open().map_err(|errno: twostage::iommufd::Errno| errno.raw())
}

/// Two ends of a channel for answers.
///
/// # Errors
/// The kernel's errno.
pub fn channel() -> Result<(OwnedFd, OwnedFd), i32> {
    sys::socket_pair().map_err(|errno| errno.raw())
}

/// Sends a message with a descriptor, or without, through `fd`, without waiting.
///
/// # Errors
/// The kernel's errno.
pub fn send(fd: BorrowedFd<'_>, message: &[u8], passed: Option<BorrowedFd<'_>>) -> Result<(), i32> {
    let passed = passed.map(|passed| passed.as_raw_fd());
    sys::send(fd.as_raw_fd(), message, passed, false).map_err(|errno| errno.raw())
}

/// The next message on `fd`, and a descriptor that comes with it: `None` when the other end is
/// closed, or after a time that no answer may take.
pub fn receive(fd: BorrowedFd<'_>) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    if !sys::is_readable_within(fd.as_raw_fd(), PATIENCE) {
        log::error!("no answer for {PATIENCE:?}");
        return None;
    }
    let mut message = vec![0; 64];
    let (length, passed) = sys::receive(fd.as_raw_fd(), &mut message, false).ok().flatten()?;
    message.truncate(length);
    (length > 0).then_some((message, passed))
}

/// How many files there are, after those have ended whose last descriptors are closed.
pub fn files() -> usize {
    let state = state::current();
    state.end_hung_up();
    state.open_files()
}

/// Whether memory of this process at `address` is pinned.
pub fn is_pinned(address: u64, length: u64) -> bool {
    let pins = &state::current().pins;
    pins.sweep();
    pins.is_held(address, length)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An owner's thread that notices descriptors closed elsewhere, and serves the calls of other
//! processes. It is started with the first file.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread;

use twostage::iommufd::Errno;

use crate::internal::Internal;
use crate::sys;

/// The thread's interface for others.
#[derive(Debug)]
pub struct Service {
    epoll: Arc<Internal>,
}

impl Service {
    /// Starts the thread, which calls `serve` for a file, by the inode of its descriptors, whenever
    /// it has an event. It takes no signals.
    ///
    /// # Errors
    /// `EAGAIN` no more threads; the kernel's error if there are no more descriptors.
    pub fn start(serve: fn(u64)) -> Result<Self, Errno> {
        let epoll = Arc::new(Internal::new(sys::epoll()?));
        let builder = thread::Builder::new().name("twostage-iommufd".to_owned());
        let events = epoll.clone();
        sys::with_signals_blocked(|| builder.spawn(move || watch(&events, serve)))
            .map_err(|_| Errno::from_raw(libc::EAGAIN))?;
        Ok(Self { epoll })
    }

    /// Watches the owner's end `end` of the file whose descriptors have `inode`.
    ///
    /// # Errors
    /// The error of `epoll_ctl(2)`.
    pub fn watch(&self, end: RawFd, inode: u64) -> Result<(), Errno> {
        sys::watch(self.epoll.raw(), end, inode)
    }
}

fn watch(epoll: &Internal, serve: fn(u64)) {
    // Fails if the process has lost the descriptor: nothing is served then.
    while let Ok(inode) = sys::next_event(epoll.raw()) {
        serve(inode);
    }
}

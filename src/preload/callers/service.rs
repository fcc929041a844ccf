// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of an owner that sees descriptors closed elsewhere, and takes the calls of other
//! processes. It is started with the first file.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread;

use twostage::iommufd::Errno;

use crate::internal::Internal;
use crate::sys;

/// The thread's side that others may use.
#[derive(Debug)]
pub struct Service {
    epoll: Arc<Internal>,
}

impl Service {
    /// Starts the thread, which calls `serve` for a file, by the inode of its descriptors, whenever
    /// something happens to it. It takes no signals.
    ///
    /// # Errors
    /// `EAGAIN` there can be no more threads; what the kernel says when it has no more descriptors.
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
    /// What `epoll_ctl(2)` says.
    pub fn watch(&self, end: RawFd, inode: u64) -> Result<(), Errno> {
        sys::watch(self.epoll.raw(), end, inode)
    }
}

fn watch(epoll: &Internal, serve: fn(u64)) {
    // Fails when the process has lost the descriptor: nothing is served then.
    while let Ok(inode) = sys::next_event(epoll.raw()) {
        serve(inode);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread of an owner that sees descriptors closed elsewhere, and takes the calls of other
//! processes. It is started with the first file.
#![forbid(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread;

use twostage::iommufd::Errno;

use crate::internal::Internal;
use crate::state::{self, State};
use crate::{remote, sys};

/// The thread's side that others may use.
#[derive(Debug)]
pub struct Service {
    epoll: Arc<Internal>,
}

impl Service {
    /// Starts the thread. It takes no signals.
    ///
    /// # Errors
    /// `EAGAIN` there can be no more threads; what the kernel says when it has no more descriptors.
    pub fn start() -> Result<Self, Errno> {
        let epoll = Arc::new(Internal::new(sys::epoll()?));
        let builder = thread::Builder::new().name("twostage-iommufd".to_owned());
        let events = epoll.clone();
        sys::with_signals_blocked(|| builder.spawn(move || serve(&events)))
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

fn serve(epoll: &Internal) {
    // Fails when the process has lost the descriptor: nothing is served then.
    while let Ok(inode) = sys::next_event(epoll.raw()) {
        let state = state::current();
        match answer_one(state, inode) {
            Ok(true) => {}
            // Nothing more was asked.
            Ok(false) => state.hung_up(inode),
            Err(errno) => log::warn!("a call from another process: {errno}"),
        }
    }
}

/// Takes one call on the file with `inode`; whether there was one.
fn answer_one(state: &State, inode: u64) -> Result<bool, Errno> {
    let _serving = state.serving();
    match state.own(inode) {
        Some(own) => remote::answer_one(&own),
        None => Ok(false),
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The library's own descriptors, out of the program's way.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::sys;
use crate::table::{self, Entry};

/// A descriptor that the program must not touch.
#[derive(Debug)]
pub struct Internal(OwnedFd);

impl Internal {
    /// Moves `fd` to a number that programs do not expect.
    pub fn new(fd: OwnedFd) -> Self {
        let fd = sys::duplicate(fd.as_raw_fd()).unwrap_or(fd);
        // A number beyond the table is unlikely to be closed by accident.
        table::set(fd.as_raw_fd(), Entry::Internal);
        Self(fd)
    }

    /// The number.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Drop for Internal {
    fn drop(&mut self) {
        table::set(self.raw(), Entry::NotOurs);
    }
}

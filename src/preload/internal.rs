// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Descriptors of the library's own, out of the program's way.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::sys;
use crate::table::{self, Entry};

/// A descriptor that the program must not touch.
#[derive(Debug)]
pub struct Internal(OwnedFd);

impl Internal {
    /// Moves `fd` to where programs do not expect it.
    pub fn new(fd: OwnedFd) -> Self {
        let fd = sys::duplicate(fd.as_raw_fd()).unwrap_or(fd);
        // A number too high for the table is one that the program hardly closes by chance.
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

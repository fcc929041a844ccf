// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that makes an ioctl, with the descriptors that it has of emulated files.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::user_space::{RegionSpace, UserSpace};
use super::{EmulatedHost, EventFile};
use crate::iommufd::Errno;

/// The process that makes an ioctl, with the descriptors that it has of emulated files: none, and no
/// room for one, unless it says otherwise.
pub trait Process: UserSpace {
    /// The iommufd that is open as `fd`.
    ///
    /// # Errors
    /// `EBADF` nothing is open there; `EBADFD` something else is.
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        let _ = fd;
        Err(Errno::EBADF)
    }

    /// Opens `file`, to be closed on exec, and gives its descriptor. Called with nothing locked.
    ///
    /// # Errors
    /// `EMFILE`, or what else keeps the process from it.
    fn install(&self, file: EventFile) -> Result<i32, Errno> {
        let _ = file;
        Err(Errno::EMFILE)
    }
}

impl Process for RegionSpace {}

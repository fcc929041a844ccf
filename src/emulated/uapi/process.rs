// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that makes an ioctl, and its descriptors.

use std::sync::Arc;

use crate::host::emulated_host::EmulatedHost;
use crate::host::event_file::EventFile;
use crate::host::user_space::{RegionSpace, TestFile, UserSpace};
use twostage::iommufd::Errno;

/// The process that makes an ioctl, with its descriptors of emulated files; by default it has none
/// and cannot open any.
pub trait Process: UserSpace {
    /// The iommufd open as `fd`.
    ///
    /// # Errors
    /// `EBADF` nothing is open there; `EBADFD` something else is.
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        let _ = fd;
        Err(Errno::EBADF)
    }

    /// Opens `file` with close-on-exec, and returns its descriptor. Called without locks held.
    ///
    /// # Errors
    /// `EMFILE`, or another error of the process.
    fn install(&self, file: EventFile) -> Result<i32, Errno> {
        let _ = file;
        Err(Errno::EMFILE)
    }

    /// Opens `file` with close-on-exec, and returns its descriptor.
    ///
    /// # Errors
    /// `EMFILE`, or another error of the process.
    #[doc(hidden)]
    fn install_test_file(&self, file: Arc<dyn TestFile>) -> Result<i32, Errno> {
        let _ = file;
        Err(Errno::EMFILE)
    }

    /// The file of a test operation open as `fd`.
    #[doc(hidden)]
    fn test_file(&self, fd: i32) -> Option<Arc<dyn TestFile>> {
        let _ = fd;
        None
    }
}

impl Process for RegionSpace {}

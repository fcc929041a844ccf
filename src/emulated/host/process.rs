// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process that makes an ioctl, with the descriptors that it has of emulated files.

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use crate::host::user_space::{RegionSpace, UserSpace};
use crate::{DmaBuf, EmulatedHost, EventFile};
use twostage::iommufd::Errno;

/// A file that an operation of Linux's own tests opened (feature `selftest`). Dropping it closes
/// it.
#[doc(hidden)]
pub trait TestFile: Any + Debug + Send + Sync {
    /// What it is called, for logs.
    fn name(&self) -> &'static str;

    /// The memory of a device that it is.
    fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        None
    }
}

/// The process that makes an ioctl, with the descriptors that it has of emulated files: none, and
/// no room for one, unless it says otherwise.
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

    /// Opens `file`, to be closed on exec, and gives its descriptor.
    ///
    /// # Errors
    /// `EMFILE`, or what else keeps the process from it.
    #[doc(hidden)]
    fn install_test_file(&self, file: Arc<dyn TestFile>) -> Result<i32, Errno> {
        let _ = file;
        Err(Errno::EMFILE)
    }

    /// The file of a test operation that the process has open as `fd`.
    #[doc(hidden)]
    fn test_file(&self, fd: i32) -> Option<Arc<dyn TestFile>> {
        let _ = fd;
        None
    }
}

impl Process for RegionSpace {}

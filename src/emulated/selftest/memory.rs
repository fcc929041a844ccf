// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that can be passed as a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;

/// A folder of files in memory.
const DIRECTORY: &str = "/dev/shm";

/// An unnamed file: `length` bytes of zeroes, in memory.
///
/// # Errors
/// `ENOMEM` not available.
pub fn unnamed_memory(length: u64) -> Outcome<File> {
    let open = || -> io::Result<File> {
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open(DIRECTORY)?;
        file.set_len(length)?;
        Ok(file)
    };
    open().or_else(|error| refuse(Errno::ENOMEM, format!("{DIRECTORY}: {error}")))
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lock of a disk image: one writes it, or several read it.
//!
//! It is the kind that QEMU and cloud-hypervisor take, too: an advisory lock of the open file, whose
//! owner is the open file and not the process, so that one process cannot have an image twice.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes the lock of all of `file`, until that is closed: alone, which takes a file that is open for
/// writing, or together with others that only read.
///
/// # Errors
/// `EAGAIN` somebody has it; what the system says of a file that has no locks.
pub(super) fn take(file: &File, alone: bool) -> io::Result<()> {
    let kind = if alone { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // To the end, wherever that will be.
        l_len: 0,
        // Of no process.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open while `file` is borrowed, and the kernel reads one `flock`, which
    // lives until the call returns.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opens files named by the user without blocking, whatever they are: opening a FIFO waits for its
//! other end, and a terminal for its line, uninterruptibly.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use crate::process::jail;

/// Opens the file at `path` with `options` and these `flags` (`O_*`). The caller checks the type by
/// the opened file's metadata: checking before would be racy.
///
/// # Errors
/// The system's error; opening a FIFO for writing needs a reader.
pub(crate) fn open(path: &Path, options: &OpenOptions, flags: libc::c_int) -> io::Result<File> {
    let mut options = options.clone();
    options.custom_flags(flags | libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) if is_fifo(path) => io::Error::other("a FIFO that nobody reads"),
        Some(libc::EACCES) if jail::is_inside() => io::Error::other(format!(
            "{error}: the jail opens only the files that were there at the start, not one that has \
             replaced such a file; --jail off does"
        )),
        _ => error,
    })?;
    set_nonblocking(file.as_raw_fd(), false)?;
    Ok(file)
}

fn is_fifo(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Sets whether reading and writing `fd` blocks.
///
/// # Errors
/// `EBADF` if it is not a file descriptor.
pub(crate) fn set_nonblocking(fd: RawFd, nonblocking: bool) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument, and touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags == -1 {
        return Err(io::Error::last_os_error());
    }
    let flags = match nonblocking {
        true => flags | libc::O_NONBLOCK,
        false => flags & !libc::O_NONBLOCK,
    };
    // SAFETY: F_SETFL takes a number, and touches no memory.
    match unsafe { libc::fcntl(fd, libc::F_SETFL, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::io::{Read, Write};

    fn fifo(directory: &tempfile::TempDir) -> std::path::PathBuf {
        let path = directory.path().join("fifo");
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name has a zero at its end, and is only read.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        path
    }

    #[test]
    fn no_end_of_a_fifo_waits_for_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(&directory);
        let error = open(&path, File::options().write(true), 0).unwrap_err();
        assert!(error.to_string().contains("nobody reads"), "{error}");
        let mut reader = open(&path, File::options().read(true), 0).unwrap();
        assert!(reader.metadata().unwrap().file_type().is_fifo());
        let mut writer = open(&path, File::options().write(true), 0).unwrap();
        writer.write_all(b"word").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "word");
    }

    #[test]
    fn only_the_open_does_not_wait() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let opened = open(file.path(), File::options().read(true), 0).unwrap();
        let flags = |fd: &File| {
            // SAFETY: F_GETFL takes no argument, and touches no memory.
            unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) }
        };
        assert_eq!(flags(&opened) & libc::O_NONBLOCK, 0);
        set_nonblocking(opened.as_raw_fd(), true).unwrap();
        assert_ne!(flags(&opened) & libc::O_NONBLOCK, 0);
        assert!(set_nonblocking(-1, true).is_err());
        assert!(open(Path::new("/nonexistent/file"), File::options().read(true), 0).is_err());
    }
}

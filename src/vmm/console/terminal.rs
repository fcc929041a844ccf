// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Standard input: its terminal, and reading without ever blocking, even if other readers of the
//! same terminal or pipe take the input first.
//!
//! The terminal is raw while a guest uses it, and restored afterwards. It belongs to the whole
//! process and is shared with others: the shell takes it when the process goes to the background,
//! and processes in the background must not touch it.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use rustix::fs::{fcntl_getfl, makedev, OFlags};
use rustix::net::{recv, RecvFlags};
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{tcgetattr, tcgetpgrp, tcsetattr, OptionalActions, Termios};

use crate::process::disposition;

/// The terminal's settings before the process changed them.
static BEFORE: OnceLock<Termios> = OnceLock::new();
/// It is raw and must be restored.
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal.
pub(crate) fn is_there() -> bool {
    io::stdin().is_terminal()
}

/// Whether this process may read and change the terminal, which need not be the session's
/// controlling terminal.
pub(crate) fn is_ours() -> bool {
    tcgetpgrp(stdin()).map_or(true, |foreground| foreground == getpgrp())
}

/// Input as in `cfmakeraw`; output processing stays, as others write lines to the same terminal.
fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes = before.output_modes;
    raw
}

/// Makes the terminal raw, until [`restore`] or the process's death by a signal. Returns whether it
/// is the first time.
pub(crate) fn make_raw() -> io::Result<bool> {
    let first = BEFORE.get().is_none();
    let now = tcgetattr(stdin())?;
    let before = BEFORE.get_or_init(|| now);
    disposition::before_death(restore);
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw(before))?;
    Ok(first)
}

/// The process continues after it was stopped: the shell had the terminal meanwhile.
pub(crate) fn resume() {
    if let Some(before) = BEFORE.get().filter(|_| RAW.load(Ordering::SeqCst) && is_ours()) {
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &raw(before)) {
            log::warn!("the terminal cannot be made raw again: {error}");
        }
    }
}

/// Restores the terminal. Called by signal handlers, too: only makes system calls.
pub(crate) fn restore() {
    let Some(before) = BEFORE.get().filter(|_| RAW.swap(false, Ordering::SeqCst)) else { return };
    // In the background it is the shell's, unless nobody has changed it since.
    let left_raw = || {
        let raw = raw(before);
        tcgetattr(stdin()).is_ok_and(|now| {
            (now.input_modes, now.local_modes) == (raw.input_modes, raw.local_modes)
        })
    };
    if is_ours() || left_raw() {
        // If it is gone, nothing can be done.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// A descriptor to read from.
#[derive(Debug)]
pub(super) struct Input {
    file: File,
    is_socket: bool,
}

impl Input {
    /// Reads from `descriptor`, whose flags are not changed, as it may be shared.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(descriptor: impl AsFd) -> io::Result<Self> {
        let file = File::from(descriptor.as_fd().try_clone_to_owned()?);
        let is_socket = file.metadata()?.file_type().is_socket();
        let file = of_our_own(&file).unwrap_or(file);
        Ok(Self { file, is_socket })
    }

    /// Reads what is available; `EAGAIN` if nothing is.
    pub fn read(&self, bytes: &mut [u8]) -> rustix::io::Result<usize> {
        match self.is_socket {
            true => recv(&self.file, bytes, RecvFlags::DONTWAIT).map(|(length, _)| length),
            false => rustix::io::read(&self.file, bytes),
        }
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Opens `file` again to get separate flags, if reading could block and the reopened file is the
/// same. Fails without /proc, or for another user's terminal: then a competing reader can make us
/// block.
fn of_our_own(file: &File) -> Option<File> {
    let metadata = file.metadata().ok()?;
    // The other side of a terminal: opening it would create a new one.
    let is_multiplexer = metadata.rdev() == makedev(5, 2);
    let is_terminal = file.is_terminal() && !is_multiplexer;
    let is_read = !fcntl_getfl(file).ok()?.contains(OFlags::WRONLY);
    if !(is_read && (metadata.file_type().is_fifo() || is_terminal)) {
        return None;
    }
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use rustix::io::Errno;
    use rustix::pty::{grantpt, openpt, ptsname, unlockpt, OpenptFlags};

    use super::*;

    fn read(input: &Input) -> Result<Vec<u8>, Errno> {
        let mut bytes = [0; 64];
        input.read(&mut bytes).map(|length| bytes[..length].to_vec())
    }

    /// What is written to `writer` is read, and nobody blocks for more.
    fn assert_does_not_wait(reader: &File, writer: &mut impl Write) {
        let flags = fcntl_getfl(reader).unwrap();
        let input = Input::new(reader).unwrap();
        assert_eq!(read(&input), Err(Errno::AGAIN));
        writer.write_all(b"word\n").unwrap();
        assert_eq!(read(&input).unwrap(), b"word\n");
        assert_eq!(read(&input), Err(Errno::AGAIN));
        assert_eq!(fcntl_getfl(reader).unwrap(), flags, "it was another's");
    }

    #[test]
    fn nothing_is_waited_for() {
        let (reader, mut writer) = io::pipe().unwrap();
        let reader = File::from(OwnedFd::from(reader));
        assert_does_not_wait(&reader, &mut writer);
        drop(writer);
        assert_eq!(read(&Input::new(&reader).unwrap()).unwrap(), b"");

        let (reader, mut writer) = UnixStream::pair().unwrap();
        let reader = File::from(OwnedFd::from(reader));
        assert_does_not_wait(&reader, &mut writer);
        drop(writer);
        assert_eq!(read(&Input::new(&reader).unwrap()).unwrap(), b"");

        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let path = ptsname(&user, Vec::new()).unwrap().into_string().unwrap();
        let mut programs = File::options();
        programs.read(true).write(true).custom_flags(libc::O_NOCTTY);
        let reader = programs.open(path).unwrap();
        assert_does_not_wait(&reader, &mut File::from(user));
    }

    #[test]
    fn a_file_is_read_on_from_where_it_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before, after").unwrap();
        file.seek(io::SeekFrom::Start(8)).unwrap();
        let input = Input::new(&file).unwrap();
        assert_eq!(read(&input).unwrap(), b"after");
        assert_eq!(read(&input).unwrap(), b"");
    }

    #[test]
    fn the_other_side_of_a_terminal_is_no_other_terminals() {
        let user = File::from(openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap());
        assert!(of_our_own(&user).is_none());
    }
}

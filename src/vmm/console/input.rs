// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading what is there, and never waiting for more: others may read from the same terminal or
//! pipe, and take what was there a moment ago.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use rustix::fs::{fcntl_getfl, makedev, OFlags};
use rustix::net::{recv, RecvFlags};

/// A descriptor that is read from.
#[derive(Debug)]
pub(crate) struct Input {
    file: File,
    is_socket: bool,
}

impl Input {
    /// Reads from `descriptor`, which stays as it is: whoever shares it may want to wait.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(descriptor: impl AsFd) -> io::Result<Self> {
        let file = File::from(descriptor.as_fd().try_clone_to_owned()?);
        let is_socket = file.metadata()?.file_type().is_socket();
        let file = of_our_own(&file).unwrap_or(file);
        Ok(Self { file, is_socket })
    }

    /// Reads what is there. `EAGAIN`: nothing.
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

/// `file` once more, where reading could wait and what is opened is the same, with flags of our
/// own. Not to be had without /proc, or for another user's terminal: then who else reads can make
/// us wait.
fn of_our_own(file: &File) -> Option<File> {
    let metadata = file.metadata().ok()?;
    // The other side of a terminal: opened, it is that of a new one.
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

    /// What is written to `writer` is read, and nobody waits for more.
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A tap interface of the host.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

/// Where tap interfaces are asked for.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Why there is no tap interface.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface can have such a name.
    #[error("tap={0}: not a name of an interface (1 to 15 bytes)")]
    Name(String),
    /// There is none of that name.
    #[error("tap={0}: no such interface; make it with: ip tuntap add mode tap name {0}")]
    NotThere(String),
    /// The system refuses it.
    #[error("{name}: {source}{}", advice(.source))]
    Refused {
        /// How it was named: `tap=NAME` or `fd=NUMBER`.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; it must belong to this user (ip tuntap add … user NAME), or CAP_NET_ADMIN is needed"
        }
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EINVAL) => "; is it a tap interface, with one queue?",
        _ => "",
    }
}

/// A tap interface. Frames have a virtio-net header in front. Nothing waits.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Bytes of the header in front of each frame (virtio 1.3 §5.1.6).
    pub const HEADER_SIZE: usize = 12;

    /// The interface with this name, which must exist.
    ///
    /// # Errors
    /// When it does not, or may not be used.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let refused = |source| TapError::Refused { name: format!("tap={name}"), source };
        let bytes = name.as_bytes();
        let c_name = CString::new(name).map_err(|_| TapError::Name(name.to_owned()))?;
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ {
            return Err(TapError::Name(name.to_owned()));
        }
        // SAFETY: the argument is a string with a NUL at its end, which is only read.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::NotThere(name.to_owned()));
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_DEVICE);
        let file = opened.map_err(refused)?;
        // SAFETY: all bytes zero is a value of this plain C structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // The three flags are in the low 16 bits, the width of the field.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives on during the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
        check(result).map_err(refused)?;
        Self { file }.prepared().map_err(refused)
    }

    /// The interface behind a file descriptor that this process was started with.
    ///
    /// # Errors
    /// When it is no tap interface with virtio-net headers.
    pub fn from_fd(fd: RawFd) -> Result<Self, TapError> {
        let refused = |source| TapError::Refused { name: format!("fd={fd}"), source };
        // SAFETY: F_DUPFD_CLOEXEC takes a number and touches no memory; a number that is no file
        // descriptor is an error. The result, if it is one, is a new descriptor that nobody owns.
        let file = unsafe {
            let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
            check(copy).map_err(refused)?;
            File::from_raw_fd(copy)
        };
        // SAFETY: F_GETFL and F_SETFL take numbers and touch no memory.
        let result = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        check(result).map_err(refused)?;
        Self { file }.prepared().map_err(refused)
    }

    fn prepared(self) -> io::Result<Self> {
        let size = Self::HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives on during the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) })?;
        Ok(self)
    }

    /// Says what the host may leave to the guest: `TUN_F_*`.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument as a number and touches no memory of ours.
        check(unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags))
        })
    }

    /// Receives a frame with its header; a frame that is longer than `data` is cut.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn receive(&self, data: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(data)
    }

    /// Sends a frame with its header.
    ///
    /// # Errors
    /// What the system says; `WouldBlock` when there is no room.
    pub fn send(&self, data: &[u8]) -> io::Result<()> {
        (&self.file).write(data).map(drop)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_named() {
        for (name, hint) in [
            ("", "not a name"),
            ("a-name-of-16-bytes", "not a name"),
            ("a\0b", "not a name"),
            ("twostage-none", "twostage-none: no such interface"),
        ] {
            let error = Tap::open(name).unwrap_err().to_string();
            assert!(error.contains(hint), "{error}");
        }
        // The loopback interface exists, and is no tap: refused, whoever asks.
        assert!(matches!(Tap::open("lo").unwrap_err(), TapError::Refused { .. }));
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for fd in [file.as_raw_fd(), -1] {
            assert!(matches!(Tap::from_fd(fd).unwrap_err(), TapError::Refused { .. }));
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A host tap interface.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::process::named_file::set_nonblocking;

/// The device that tap interfaces are opened by.
const TUN_DEVICE: &str = "/dev/net/tun";

/// Why there is no tap interface.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a valid interface name.
    #[error("tap={0}: not a name of an interface (1 to 15 bytes)")]
    Name(String),
    /// There is none with this name.
    #[error("tap={0}: no such interface; make it with: ip tuntap add mode tap name {0}")]
    NotThere(String),
    /// A descriptor of something else.
    #[error("fd={0}: the descriptor is not a tap interface")]
    NotTap(RawFd),
    /// Its frame format is not the one needed here.
    #[error(
        "fd={fd}: the tap interface {interface} lacks {flag}; whoever opens it (TUNSETIFF) must \
         ask for IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    Flag {
        /// The descriptor.
        fd: RawFd,
        /// The interface.
        interface: String,
        /// The missing flag.
        flag: &'static str,
    },
    /// The system refuses it.
    #[error("{name}: {source}{}", advice(.source))]
    Refused {
        /// As specified: `tap=NAME` or `fd=NUMBER`.
        name: String,
        /// The system's error.
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

/// A tap interface. Frames have a virtio-net header in front. Nothing blocks.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// As on the command line: `tap=NAME` or `fd=NUMBER`.
    name: String,
}

impl Tap {
    /// Bytes of the header in front of each frame (virtio 1.3 §5.1.6).
    pub const HEADER_SIZE: usize = 12;

    /// The interface with this name, which must exist.
    ///
    /// # Errors
    /// It does not exist, or may not be used.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let refused = |source| TapError::Refused { name: format!("tap={name}"), source };
        let bytes = name.as_bytes();
        let c_name = CString::new(name).map_err(|_| TapError::Name(name.to_owned()))?;
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ {
            return Err(TapError::Name(name.to_owned()));
        }
        // SAFETY: the argument is a NUL-terminated string, which is only read.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::NotThere(name.to_owned()));
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN_DEVICE);
        let file = opened.map_err(refused)?;
        let mut request = no_interface();
        for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        // The three flags are in the low 16 bits, the width of the field.
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
        check(result).map_err(refused)?;
        Self { file, name: format!("tap={name}") }.prepared().map_err(refused)
    }

    /// The interface behind a file descriptor that this process was started with.
    ///
    /// # Errors
    /// It is not a tap interface with virtio-net headers.
    pub fn from_fd(fd: RawFd) -> Result<Self, TapError> {
        let refused = |source| TapError::Refused { name: format!("fd={fd}"), source };
        // SAFETY: F_DUPFD_CLOEXEC takes a number and touches no memory; an invalid descriptor is an
        // error. The result, on success, is a new descriptor without another owner.
        let file = unsafe {
            let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
            check(copy).map_err(refused)?;
            File::from_raw_fd(copy)
        };
        // Not a tun/tap file, or without an interface: in any case, not a tap.
        let (interface, flags) = interface_of(&file).map_err(|_| TapError::NotTap(fd))?;
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::NotTap(fd));
        }
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(TapError::Flag { fd, interface, flag: "IFF_VNET_HDR" });
        }
        if !has_no_packet_info(&file, flags) {
            return Err(TapError::Flag { fd, interface, flag: "IFF_NO_PI" });
        }
        set_nonblocking(file.as_raw_fd(), true).map_err(refused)?;
        Self { file, name: format!("fd={fd}") }.prepared().map_err(refused)
    }

    fn prepared(self) -> io::Result<Self> {
        let size = Self::HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &size) })?;
        Ok(self)
    }

    /// Its name in messages, as on the command line.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets which offloads the host may leave to the guest: `TUN_F_*`.
    ///
    /// # Errors
    /// The system's error.
    pub fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument as a number and touches no memory of ours.
        check(unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(flags))
        })
    }

    /// Receives a frame with its header; a frame longer than `data` is truncated.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn receive(&self, data: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(data)
    }

    /// Sends a frame with its header.
    ///
    /// # Errors
    /// The system's error; `WouldBlock` when the queue is full.
    pub fn send(&self, data: &[u8]) -> io::Result<()> {
        (&self.file).write(data).map(drop)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// A request about an interface, filled with zeros.
fn no_interface() -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid value of this plain C structure.
    unsafe { std::mem::zeroed() }
}

/// Name and flags of the interface behind `file`.
fn interface_of(file: &File) -> io::Result<(String, libc::c_int)> {
    let mut answer = no_interface();
    // SAFETY: TUNGETIFF writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF as _, &mut answer) })?;
    // SAFETY: TUNGETIFF has written the flags; any value is valid.
    let flags = unsafe { answer.ifr_ifru.ifru_flags }.into();
    let name = answer.ifr_name.iter().take_while(|byte| **byte != 0);
    let name: Vec<u8> = name.flat_map(|byte| byte.to_ne_bytes()).collect();
    Ok((String::from_utf8_lossy(&name).into_owned(), flags))
}

/// Whether the tap interface behind `file` has IFF_NO_PI. In its `flags`, the same bit also means
/// that no filter is attached (IFF_NOFILTER of `linux/if_tun.h`), so an accept-all filter is
/// attached for a moment to tell.
fn has_no_packet_info(file: &File, flags: libc::c_int) -> bool {
    if flags & libc::IFF_NO_PI == 0 {
        return false;
    }
    let mut all_pass = libc::sock_filter {
        // Two small numbers.
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: u32::MAX,
    };
    let mut filter = libc::sock_fprog { len: 0, filter: std::ptr::null_mut() };
    let fd = file.as_raw_fd();
    // SAFETY: TUNGETFILTER writes one `sock_fprog`, which outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::TUNGETFILTER as _, &mut filter) };
    // Other drivers of tap interfaces (macvtap) have no filters, and no such flag. A filter
    // attached by somebody else is left alone; it may be our own from before a reset.
    if check(result).is_err() || filter.len != 0 {
        return true;
    }
    filter = libc::sock_fprog { len: 1, filter: &mut all_pass };
    // SAFETY: TUNATTACHFILTER reads the `sock_fprog` and the instruction it points to, which both
    // outlive the call.
    if check(unsafe { libc::ioctl(fd, libc::TUNATTACHFILTER as _, &filter) }).is_err() {
        return true;
    }
    let flags = interface_of(file).map_or(flags, |(_, flags)| flags);
    // SAFETY: TUNDETACHFILTER reads nothing from its argument.
    unsafe { libc::ioctl(fd, libc::TUNDETACHFILTER as _, &filter) };
    flags & libc::IFF_NO_PI != 0
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use twostage::skips::not_tested;

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
        // The loopback interface exists and is not a tap: refused for every user.
        assert!(matches!(Tap::open("lo").unwrap_err(), TapError::Refused { .. }));
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let (socket, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        for fd in [file.as_raw_fd(), socket.as_raw_fd()] {
            let error = Tap::from_fd(fd).unwrap_err().to_string();
            assert_eq!(error, format!("fd={fd}: the descriptor is not a tap interface"));
        }
        assert!(matches!(Tap::from_fd(-1).unwrap_err(), TapError::Refused { .. }));
    }

    /// A new interface opened with these flags, which exists as long as the file is open.
    fn interface(flags: libc::c_int) -> Option<File> {
        let made = OpenOptions::new().read(true).write(true).open(TUN_DEVICE).and_then(|file| {
            let mut request = no_interface();
            for (to, from) in request.ifr_name.iter_mut().zip(b"twostage%d") {
                *to = *from as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = flags as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
            let result =
                unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) };
            check(result).map(|()| file)
        });
        made.inspect_err(|error| not_tested(format!("no tap interface is to be had ({error})")))
            .ok()
    }

    #[test]
    fn a_descriptor_is_asked_what_its_frames_look_like() {
        use libc::{IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR};
        for (flags, hint) in [
            (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, None),
            (IFF_TAP | IFF_NO_PI, Some("lacks IFF_VNET_HDR")),
            (IFF_TAP | IFF_VNET_HDR, Some("lacks IFF_NO_PI")),
            (IFF_TAP, Some("the tap interface twostage")),
            (IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, Some("not a tap interface")),
        ] {
            let Some(file) = interface(flags) else { return };
            match (Tap::from_fd(file.as_raw_fd()), hint) {
                (Ok(_), None) => {}
                (Err(error), Some(hint)) => assert!(error.to_string().contains(hint), "{error}"),
                (result, _) => panic!("{flags:#x}: {result:?}"),
            }
        }
        // A descriptor without an interface.
        let Ok(file) = OpenOptions::new().read(true).write(true).open(TUN_DEVICE) else { return };
        let error = Tap::from_fd(file.as_raw_fd()).unwrap_err();
        assert!(matches!(error, TapError::NotTap(_)), "{error}");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sockets: pairs, names, messages with descriptors.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_long};
use std::io::{IoSlice, IoSliceMut};
use std::mem::{size_of, MaybeUninit};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use twostage::iommufd::Errno;

use super::{checked, errno, numbered, wait_until};

/// Room for one descriptor with a message.
const CONTROL: usize = rustix::cmsg_space!(ScmRights(1));

/// A pair of connected sockets that preserve message boundaries, with close-on-exec.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).map_err(errno)
}

/// Makes reads and writes of `fd` that bypass the hooks fail with `EAGAIN` at once if they would
/// block.
pub fn give_up_soon(fd: RawFd) -> Result<(), Errno> {
    [Timeout::Recv, Timeout::Send].into_iter().try_for_each(|timeout| {
        let soon = Some(Duration::from_micros(1));
        set_socket_timeout(numbered(fd)?, timeout, soon).map_err(errno)
    })
}

/// Names the socket `fd`.
pub fn bind_name(fd: RawFd, name: &[u8]) -> Result<(), Errno> {
    let address = SocketAddrUnix::new_abstract_name(name).map_err(errno)?;
    rustix::net::bind(numbered(fd)?, &address).map_err(errno)
}

/// The abstract name of the socket at the other end of `fd`; `None` if `fd` is no socket, or has
/// none.
pub fn peer_name(fd: RawFd) -> Option<Vec<u8>> {
    let address = rustix::net::getpeername(numbered(fd).ok()?).ok()??;
    // The kernel counts the end of a path of the full length, and `rustix` panics at that.
    let fits = address.addr_len() as usize <= size_of::<libc::sockaddr_un>();
    let address = SocketAddrUnix::try_from(fits.then_some(address)?).ok()?;
    address.abstract_name().filter(|name| !name.is_empty()).map(<[u8]>::to_vec)
}

/// Reads an option of the socket `fd` into `value`.
///
/// # Safety
/// Any value that the kernel has for the option must be a valid `T`.
unsafe fn read_option<T>(fd: RawFd, option: c_int, value: &mut T) -> Result<(), Errno> {
    let mut length = size_of::<T>() as libc::socklen_t;
    let to = (&raw mut *value).cast();
    // SAFETY: the value has `length` bytes.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, to, &mut length) };
    checked(c_long::from(result)).map(drop)
}

/// The process that created the socket at the other end of `fd`. (`rustix` has no pid 0, which the
/// kernel returns for a process of an outer pid namespace.)
pub fn peer_process(fd: RawFd) -> Result<i32, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    // SAFETY: the option is such a structure of numbers.
    unsafe { read_option(fd, libc::SO_PEERCRED, &mut credentials) }?;
    Ok(credentials.pid)
}

/// A pidfd of the process that created the socket at the other end of `fd`, with close-on-exec;
/// from Linux 6.5 on. (`rustix` does not have the option.)
pub fn peer_pidfd(fd: RawFd) -> Result<OwnedFd, Errno> {
    /// `SO_PEERPIDFD`.
    const PEER_PIDFD: c_int = 77;
    let mut pidfd: RawFd = -1;
    // SAFETY: the option is a number.
    unsafe { read_option(fd, PEER_PIDFD, &mut pidfd) }?;
    // SAFETY: the number is new; a pidfd is closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Sends `bytes` as one message, and `passed` with it. Without room for it, fails with `EAGAIN` if
/// `wait` is not set.
pub fn send(fd: RawFd, bytes: &[u8], passed: Option<RawFd>, wait: bool) -> Result<(), Errno> {
    let fd = numbered(fd)?;
    let passed = passed.map(numbered).transpose()?;
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if let Some(passed) = &passed {
        control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(passed)));
    }
    let mut flags = SendFlags::NOSIGNAL;
    flags.set(SendFlags::DONTWAIT, !wait);
    loop {
        let bytes = [IoSlice::new(bytes)];
        match rustix::net::sendmsg(fd, &bytes, &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            // The program may have made the socket non-blocking.
            Err(rustix::io::Errno::AGAIN) if wait => wait_until(fd, PollFlags::OUT),
            Err(error) => return Err(errno(error)),
        }
    }
}

/// Receives one message into `bytes`, and the descriptor that came with it, if any (close-on-exec).
/// Returns its length: 0 if the other end is closed, `None` if there is none and `wait` is not set.
pub fn receive(
    fd: RawFd,
    bytes: &mut [u8],
    wait: bool,
) -> Result<Option<(usize, Option<OwnedFd>)>, Errno> {
    let fd = numbered(fd)?;
    let mut space = [MaybeUninit::uninit(); CONTROL];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut flags = RecvFlags::CMSG_CLOEXEC;
    flags.set(RecvFlags::DONTWAIT, !wait);
    let length = loop {
        let mut bytes = [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(fd, &mut bytes, &mut control, flags) {
            Ok(message) => break message.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if !wait => return Ok(None),
            Err(rustix::io::Errno::AGAIN) => wait_until(fd, PollFlags::IN),
            Err(error) => return Err(errno(error)),
        }
    };
    let passed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut passed) => passed.next(),
        _ => None,
    });
    Ok(Some((length, passed)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_an_abstract_name_is_a_name() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(peer_name(one.as_raw_fd()), None);
        assert_eq!(peer_name(std::io::stdin().as_raw_fd()), None);
        // The longest path: the kernel's length then is one more than the structure's.
        let folder = tempfile::tempdir().unwrap();
        let room = size_of::<libc::sockaddr_un>() - size_of::<libc::sa_family_t>();
        let name = "n".repeat(room - folder.path().as_os_str().len() - 1);
        let path = folder.path().join(name);
        let (_listener, near) = full_path(&path);
        assert_eq!(peer_name(near.as_raw_fd()), None);
    }

    /// A socket connected to one at `path`, which fills the address without a NUL at its end.
    fn full_path(path: &std::path::Path) -> (OwnedFd, OwnedFd) {
        let mut address = libc::sockaddr_un { sun_family: libc::AF_UNIX as _, sun_path: [0; 108] };
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        assert_eq!(bytes.len(), address.sun_path.len());
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = *from as libc::c_char;
        }
        let socket = || {
            let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap()
        };
        let (far, near) = (socket(), socket());
        let (address, length) = ((&raw const address).cast(), size_of_val(&address) as u32);
        // SAFETY: the address is as long as said.
        assert_eq!(unsafe { libc::bind(far.as_raw_fd(), address, length) }, 0);
        rustix::net::listen(&far, 1).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::connect(near.as_raw_fd(), address, length) }, 0);
        (far, near)
    }
}

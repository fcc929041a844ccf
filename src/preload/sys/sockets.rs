// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sockets: pairs, names, messages with descriptors.
#![allow(unsafe_code)]

use std::ffi::{c_long, c_void};
use std::mem::size_of;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use libc::{iovec, msghdr, pollfd};
use twostage::iommufd::Errno;

use super::checked;

/// A pair of connected sockets that preserve message boundaries, with close-on-exec.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut pair: [RawFd; 2] = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for two.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) };
    checked(c_long::from(result))?;
    // SAFETY: both were just created.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
}

/// Makes reads and writes of `fd` that bypass the hooks fail with `EAGAIN` at once if they would
/// block.
pub fn give_up_soon(fd: RawFd) -> Result<(), Errno> {
    let soon = libc::timeval { tv_sec: 0, tv_usec: 1 };
    let length = size_of_val(&soon) as libc::socklen_t;
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let value = (&raw const soon).cast();
        // SAFETY: the option's value has `length` bytes.
        let result = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, value, length) };
        checked(c_long::from(result))?;
    }
    Ok(())
}

/// The address of a socket in the abstract name space.
fn abstract_address(name: &[u8]) -> (libc::sockaddr_un, libc::socklen_t) {
    let mut address =
        libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: [0; 108] };
    // The first byte stays zero: the abstract name space.
    for (to, from) in address.sun_path.iter_mut().skip(1).zip(name) {
        *to = *from as libc::c_char;
    }
    let length = size_of::<libc::sa_family_t>() + 1 + name.len().min(107);
    (address, length as libc::socklen_t)
}

/// Names the socket `fd`.
pub fn bind_name(fd: RawFd, name: &[u8]) -> Result<(), Errno> {
    let (address, length) = abstract_address(name);
    // SAFETY: the address is as long as said.
    let result = unsafe { libc::bind(fd, (&raw const address).cast(), length) };
    checked(c_long::from(result)).map(drop)
}

/// The name of the socket at the other end of `fd`; `None` if `fd` is no socket, or has none.
pub fn peer_name(fd: RawFd) -> Option<Vec<u8>> {
    let (mut address, mut length) = abstract_address(&[0; 107]);
    // SAFETY: the address has room for `length` bytes.
    let result = unsafe { libc::getpeername(fd, (&raw mut address).cast(), &mut length) };
    if result != 0 || address.sun_family != libc::AF_UNIX as libc::sa_family_t {
        return None;
    }
    let path = (length as usize).checked_sub(size_of::<libc::sa_family_t>())?;
    let name = address.sun_path.get(1..path)?;
    // Signed on x86, unsigned on arm64.
    Some(name.iter().flat_map(|byte| byte.to_ne_bytes()).collect())
}

/// The process that created the socket at the other end of `fd`.
pub fn peer_process(fd: RawFd) -> Result<i32, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let to = (&raw mut credentials).cast();
    // SAFETY: the option's value has `length` bytes.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, to, &mut length) };
    checked(c_long::from(result)).map(|_| credentials.pid)
}

/// A pidfd of the process that created the socket at the other end of `fd`, with close-on-exec;
/// from Linux 6.5 on.
pub fn peer_pidfd(fd: RawFd) -> Result<OwnedFd, Errno> {
    /// `SO_PEERPIDFD`.
    const PEER_PIDFD: libc::c_int = 77;
    let mut pidfd: RawFd = -1;
    let mut length = size_of::<RawFd>() as libc::socklen_t;
    let to = (&raw mut pidfd).cast();
    // SAFETY: the option's value has `length` bytes.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, PEER_PIDFD, to, &mut length) };
    checked(c_long::from(result))?;
    // SAFETY: the number is new; a pidfd is closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Room for one descriptor with a message.
#[repr(C, align(8))]
struct Control([u8; 32]);

/// Sends `bytes` as one message, and `passed` with it.
pub fn send(fd: RawFd, bytes: &[u8], passed: Option<RawFd>) -> Result<(), Errno> {
    let mut vector = iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: bytes.len() };
    let mut control = Control([0; 32]);
    let mut message = message(&mut vector);
    if let Some(passed) = passed {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the macros compute from sizes; the header is in `control`, which has room for one
        // descriptor.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(passed);
        }
    }
    loop {
        // SAFETY: everything that the message points to is valid until the end.
        let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) };
        match checked(sent as c_long) {
            Ok(_) => return Ok(()),
            Err(errno) if errno.raw() == libc::EINTR => {}
            // The program may have made the socket non-blocking.
            Err(errno) if errno.raw() == libc::EAGAIN => wait_until(fd, libc::POLLOUT),
            Err(errno) => return Err(errno),
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
    let mut vector = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = Control([0; 32]);
    let mut message = message(&mut vector);
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = size_of::<Control>() as _;
    let flags = libc::MSG_CMSG_CLOEXEC | if wait { 0 } else { libc::MSG_DONTWAIT };
    let length = loop {
        // SAFETY: everything that the message points to is valid until the end.
        let received = unsafe { libc::recvmsg(fd, &mut message, flags) };
        match checked(received as c_long) {
            Ok(length) => break length as usize,
            Err(errno) if errno.raw() == libc::EINTR => {}
            Err(errno) if errno.raw() == libc::EAGAIN && !wait => return Ok(None),
            Err(errno) if errno.raw() == libc::EAGAIN => wait_until(fd, libc::POLLIN),
            Err(errno) => return Err(errno),
        }
    };
    // SAFETY: the kernel filled in the headers; a descriptor in them is new.
    let passed = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (!header.is_null()
            && (*header).cmsg_level == libc::SOL_SOCKET
            && (*header).cmsg_type == libc::SCM_RIGHTS)
            .then(|| OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
    };
    Ok(Some((length, passed)))
}

fn message(vector: &mut iovec) -> msghdr {
    // SAFETY: all zeroes are a valid message header.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vector;
    message.msg_iovlen = 1;
    message
}

fn wait_until(fd: RawFd, events: i16) {
    let mut poll = pollfd { fd, events, revents: 0 };
    // SAFETY: the structure is one.
    unsafe { libc::poll(&mut poll, 1, -1) };
}

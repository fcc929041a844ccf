// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Safe wrappers of system calls. None of them goes through a hook.
#![allow(unsafe_code)]

mod memory;
mod sockets;

use std::ffi::{c_int, c_long, CStr};
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{pollfd, syscall};
use twostage::iommufd::Errno;

pub use memory::*;
pub use sockets::*;

/// The error of the last system call.
pub fn last_errno() -> Errno {
    // SAFETY: the pointer is to a thread-local variable.
    Errno::from_raw(unsafe { *libc::__errno_location() })
}

/// Sets the thread's `errno`.
pub fn set_errno(errno: Errno) {
    // SAFETY: the pointer is to a thread-local variable.
    unsafe { *libc::__errno_location() = errno.raw() }
}

fn checked(result: c_long) -> Result<c_long, Errno> {
    if result < 0 {
        return Err(last_errno());
    }
    Ok(result)
}

/// The process.
pub fn process_id() -> i32 {
    // SAFETY: the call has no preconditions.
    unsafe { libc::getpid() }
}

/// A descriptor of process `pid`, closed on exec.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the call accesses no memory.
    let fd = checked(unsafe { syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the number is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The file that the process `pidfd` has open as `fd`, with close-on-exec.
pub fn pidfd_getfd(pidfd: RawFd, fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: the call accesses no memory.
    let fd = checked(unsafe { syscall(libc::SYS_pidfd_getfd, pidfd, fd, 0) })?;
    // SAFETY: the number is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// When process `pid` started, in clock ticks since boot.
pub fn start_time(pid: i32) -> Option<u64> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name, which may be anything, ends with the last parenthesis; the 22nd field is the time.
    let end = text.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The calling thread.
#[cfg(feature = "selftest")]
pub fn thread_id() -> i32 {
    // SAFETY: the call has no preconditions.
    unsafe { libc::gettid() }
}

/// The effective capabilities of process `pid`; of this thread when it is 0. Bit `n` is capability
/// `n`.
pub fn capabilities(pid: i32) -> Result<u64, Errno> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, pid as u32];
    // Effective, permitted and inheritable; the low halves first.
    let mut data = [[0u32; 3]; 2];
    // SAFETY: this version has a header of two words, and two times three words of data.
    checked(unsafe { syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) })?;
    let [[low, ..], [high, ..]] = data;
    Ok(u64::from(high) << 32 | u64::from(low))
}

/// `RLIMIT_MEMLOCK` of process `pid`, in bytes; of this one when it is 0.
pub fn memlock_limit(pid: i32) -> Result<u64, Errno> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let (old, new) = (&raw mut limit, std::ptr::null::<libc::rlimit64>());
    // SAFETY: there is room for the limits; none are set.
    checked(unsafe { syscall(libc::SYS_prlimit64, pid, libc::RLIMIT_MEMLOCK, new, old) })?;
    Ok(limit.rlim_cur)
}

/// The user that this process belongs to.
pub fn user_id() -> u32 {
    // SAFETY: the call has no preconditions.
    unsafe { libc::getuid() }
}

/// Set in the address space where it was created, but not in a copy made by fork. (A `vfork` makes
/// no copy.)
#[derive(Debug)]
pub struct Mark(*const AtomicU32);

// SAFETY: the page is never unmapped, and what is in it is atomic.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    /// A mark that is set.
    pub fn new() -> Result<Self, Errno> {
        const LENGTH: usize = 4096;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping accesses nothing.
        let page = checked(unsafe { syscall(libc::SYS_mmap, 0, LENGTH, rights, flags, -1, 0) })?;
        // SAFETY: the page is ours.
        let wiped = unsafe { syscall(libc::SYS_madvise, page, LENGTH, libc::MADV_WIPEONFORK) };
        checked(wiped)?;
        let mark = Self(page as *const AtomicU32);
        // SAFETY: the page is as large, and zero.
        unsafe { &*mark.0 }.store(1, Ordering::Release);
        Ok(mark)
    }

    /// Whether this is the address space where it was created.
    pub fn is_set(&self) -> bool {
        // SAFETY: the page is never unmapped.
        unsafe { &*self.0 }.load(Ordering::Acquire) != 0
    }
}

/// A number that is unique among all open files: that of the file behind `fd`.
pub fn inode(fd: RawFd) -> Result<u64, Errno> {
    status(fd).map(|status| status.st_ino)
}

/// `fstat(2)`.
pub fn status(fd: RawFd) -> Result<libc::stat64, Errno> {
    let mut status = MaybeUninit::<libc::stat64>::zeroed();
    // SAFETY: there is room for the status.
    checked(unsafe { syscall(libc::SYS_fstat, fd, status.as_mut_ptr()) })?;
    // SAFETY: all zeroes are a valid value, and so is what the kernel wrote.
    Ok(unsafe { status.assume_init() })
}

/// Numbers below are left to the program, as far as the limit allows.
const FIRST_INTERNAL: c_int = 512;

/// A duplicate of `fd` with a number that programs do not expect; with close-on-exec.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: duplicating affects nothing else.
    let new = unsafe { syscall(libc::SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, FIRST_INTERNAL) };
    // SAFETY: the number is new.
    checked(new).map(|new| unsafe { OwnedFd::from_raw_fd(new as RawFd) })
}

/// Sets close-on-exec and non-blocking mode of `fd`.
pub fn set_flags(fd: RawFd, close_on_exec: bool, nonblocking: bool) -> Result<(), Errno> {
    let descriptor = if close_on_exec { libc::FD_CLOEXEC } else { 0 };
    let file = if nonblocking { libc::O_NONBLOCK } else { 0 };
    // SAFETY: only changes flags.
    checked(unsafe { syscall(libc::SYS_fcntl, fd, libc::F_SETFD, descriptor) })?;
    // SAFETY: as above.
    checked(unsafe { syscall(libc::SYS_fcntl, fd, libc::F_SETFL, file) }).map(drop)
}

/// Writes the eight bytes of `number` to `fd`.
pub fn write_number(fd: RawFd, number: u64) -> Result<(), Errno> {
    let bytes = number.to_ne_bytes();
    // SAFETY: the bytes are valid during the call, and only read.
    checked(unsafe { syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) }).map(drop)
}

/// Whether `fd` is an eventfd.
pub fn is_eventfd(fd: RawFd) -> bool {
    // A symbolic link, which has no hook.
    std::fs::read_link(format!("/proc/self/fd/{fd}"))
        .is_ok_and(|link| link.as_os_str() == "anon_inode:[eventfd]")
}

/// A non-blocking eventfd with close-on-exec.
#[cfg(test)]
pub fn eventfd() -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no preconditions.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    // SAFETY: the number is new.
    checked(c_long::from(fd)).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Reads eight bytes from `fd`.
#[cfg(test)]
pub fn read_number(fd: RawFd) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    // SAFETY: there is room for the bytes.
    checked(unsafe { syscall(libc::SYS_read, fd, bytes.as_mut_ptr(), bytes.len()) })?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Closes a number that is not owned by this library.
pub fn close_number(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the program requested it, or it was inherited and never handed out.
    checked(unsafe { syscall(libc::SYS_close, fd) }).map(drop)
}

/// The current `poll(2)` events of `fd`.
pub fn events(fd: RawFd) -> i16 {
    let mut poll = pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: the structure is one.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready > 0 {
        poll.revents
    } else {
        0
    }
}

/// An `epoll` instance, closed on exec.
pub fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no preconditions.
    let fd = checked(c_long::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }))?;
    // SAFETY: the number is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Makes `epoll` report input and hang-ups of `fd`, as `key`.
pub fn watch(epoll: RawFd, fd: RawFd, key: u64) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: key };
    // SAFETY: the event is one.
    let result = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event) };
    checked(c_long::from(result)).map(drop)
}

/// Waits for `epoll`; returns the key of one descriptor with an event.
pub fn next_event(epoll: RawFd) -> Result<u64, Errno> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    loop {
        // SAFETY: there is room for one event.
        let count = unsafe { libc::epoll_wait(epoll, &mut event, 1, -1) };
        match checked(c_long::from(count)) {
            Ok(0) => {}
            Ok(_) => return Ok(event.u64),
            Err(errno) if errno.raw() == libc::EINTR => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Runs `work` with all signals blocked; threads that it starts inherit this.
pub fn with_signals_blocked<T>(work: impl FnOnce() -> T) -> T {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: each set is filled before it is read.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = work();
    // SAFETY: `before` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut()) };
    result
}

/// The contents of the file at `path`. A `File` would be opened through the hook.
pub fn read_to_string(path: &CStr) -> Result<String, Errno> {
    let (flags, directory) = (libc::O_RDONLY | libc::O_CLOEXEC, libc::AT_FDCWD);
    // SAFETY: the path is a C string.
    let fd = checked(unsafe { syscall(libc::SYS_openat, directory, path.as_ptr(), flags) })?;
    // SAFETY: the number is new.
    let mut file = unsafe { File::from_raw_fd(fd as RawFd) };
    let mut text = String::new();
    match file.read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// An unnamed file that contains `bytes`, positioned at the start; with close-on-exec.
pub fn file_of(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"twostage-iommufd".as_ptr(), libc::MFD_CLOEXEC) };
    let fd = checked(c_long::from(fd))? as RawFd;
    // SAFETY: the number is new.
    let file = unsafe { File::from_raw_fd(fd) };
    match file.write_all_at(bytes, 0) {
        Ok(()) => Ok(file.into()),
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Calls `child` in the child of every fork made by libc.
pub fn at_fork_in_child(child: unsafe extern "C" fn()) {
    // SAFETY: the function is valid as long as the library, which is never unloaded.
    unsafe { libc::pthread_atfork(None, None, Some(child)) };
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls of our own, in safe clothes. None of them goes through a hook.

use std::ffi::{c_int, c_long, c_void, CStr};
use std::fs::File;
use std::io::Read;
use std::mem::{size_of, MaybeUninit};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use libc::{iovec, msghdr, pollfd, syscall};
use twostage::iommufd::Errno;

/// What the system call that just failed said.
pub fn last_errno() -> Errno {
    // SAFETY: the pointer is to the thread's own variable.
    Errno::from_raw(unsafe { *libc::__errno_location() })
}

/// Sets the thread's `errno`.
pub fn set_errno(errno: Errno) {
    // SAFETY: the pointer is to the thread's own variable.
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

/// Is set in the address space where it was made, and not in the copy of it that a fork makes. (A
/// `vfork` makes none.)
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
        // SAFETY: a new mapping touches nothing.
        let page = checked(unsafe { syscall(libc::SYS_mmap, 0, LENGTH, rights, flags, -1, 0) })?;
        // SAFETY: the page is ours.
        let wiped = unsafe { syscall(libc::SYS_madvise, page, LENGTH, libc::MADV_WIPEONFORK) };
        checked(wiped)?;
        let mark = Self(page as *const AtomicU32);
        // SAFETY: the page is as large, and zero.
        unsafe { &*mark.0 }.store(1, Ordering::Release);
        Ok(mark)
    }

    /// Whether this is the address space where it was made.
    pub fn is_set(&self) -> bool {
        // SAFETY: the page is mapped for good.
        unsafe { &*self.0 }.load(Ordering::Acquire) != 0
    }
}

/// Reads from the memory of process `pid` at `address` on, up to the first byte that cannot be read;
/// returns how many bytes were.
pub fn read_memory(pid: i32, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel writes to `bytes` alone, and checks the other address.
    let read = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    checked(read as c_long).map(|count| count as usize)
}

/// Writes to the memory of process `pid` from `address` on; returns how many bytes could be.
///
/// # Safety
/// When `pid` is this process: it must hand that memory out for writing, as the program does whose
/// system call names it.
pub unsafe fn write_memory(pid: i32, address: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: bytes.len() };
    let remote = iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel reads `bytes` alone, and checks the other address; what is there is the
    // caller's promise.
    let written = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    checked(written as c_long).map(|count| count as usize)
}

/// A pair of connected sockets that keep the bounds of messages; both are closed on exec.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut pair: [RawFd; 2] = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the array has room for two.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) };
    checked(c_long::from(result))?;
    // SAFETY: both were just made, for nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) })
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

/// The name of the socket at the other end of `fd`; `None` when `fd` is no socket, or has none.
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

/// Which process made the socket at the other end of `fd`.
pub fn peer_process(fd: RawFd) -> Result<i32, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    let to = (&raw mut credentials).cast();
    // SAFETY: the option's value has `length` bytes.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, to, &mut length) };
    checked(c_long::from(result)).map(|_| credentials.pid)
}

/// The number that tells the file behind `fd` from every other one that is open.
pub fn inode(fd: RawFd) -> Result<u64, Errno> {
    status(fd).map(|status| status.st_ino)
}

/// `fstat(2)`.
pub fn status(fd: RawFd) -> Result<libc::stat64, Errno> {
    let mut status = MaybeUninit::<libc::stat64>::zeroed();
    // SAFETY: there is room for the status.
    checked(unsafe { syscall(libc::SYS_fstat, fd, status.as_mut_ptr()) })?;
    // SAFETY: zeroes are a valid value, and so is what the kernel wrote.
    Ok(unsafe { status.assume_init() })
}

/// Numbers below are left to the program, as far as the limit allows.
const FIRST_INTERNAL: c_int = 512;

/// Another number for the file behind `fd`, where programs do not expect it; closed on exec.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: duplicating touches nothing else.
    let new = unsafe { syscall(libc::SYS_fcntl, fd, libc::F_DUPFD_CLOEXEC, FIRST_INTERNAL) };
    // SAFETY: the number is new.
    checked(new).map(|new| unsafe { OwnedFd::from_raw_fd(new as RawFd) })
}

/// Sets whether `fd` is closed on exec, and whether its file is of the kind that does not block.
pub fn set_flags(fd: RawFd, close_on_exec: bool, nonblocking: bool) -> Result<(), Errno> {
    let descriptor = if close_on_exec { libc::FD_CLOEXEC } else { 0 };
    let file = if nonblocking { libc::O_NONBLOCK } else { 0 };
    // SAFETY: flags alone are changed.
    checked(unsafe { syscall(libc::SYS_fcntl, fd, libc::F_SETFD, descriptor) })?;
    // SAFETY: as above.
    checked(unsafe { syscall(libc::SYS_fcntl, fd, libc::F_SETFL, file) }).map(drop)
}

/// Writes the eight bytes of `number` to `fd`.
pub fn write_number(fd: RawFd, number: u64) -> Result<(), Errno> {
    let bytes = number.to_ne_bytes();
    // SAFETY: the bytes are there for the call, and only read.
    checked(unsafe { syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) }).map(drop)
}

/// Closes a number that belongs to nobody in this library.
pub fn close_number(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller's program asked for it, or it was inherited and never handed out.
    checked(unsafe { syscall(libc::SYS_close, fd) }).map(drop)
}

/// What `poll(2)` says of `fd` now.
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

/// Room for one descriptor beside a message.
#[repr(C, align(8))]
struct Control([u8; 32]);

/// Sends `bytes` as one message, and `passed` with it.
pub fn send(fd: RawFd, bytes: &[u8], passed: Option<RawFd>) -> Result<(), Errno> {
    let mut vector = iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: bytes.len() };
    let mut control = Control([0; 32]);
    let mut message = message(&mut vector);
    if let Some(passed) = passed {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the macros compute from sizes; the header they find lies in `control`, which has
        // room for one descriptor.
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
        // SAFETY: all that the message points to lives until the end.
        let sent = unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) };
        match checked(sent as c_long) {
            Ok(_) => return Ok(()),
            Err(errno) if errno.raw() == libc::EINTR => {}
            // The program may have made the socket one that does not block.
            Err(errno) if errno.raw() == libc::EAGAIN => wait_until(fd, libc::POLLOUT),
            Err(errno) => return Err(errno),
        }
    }
}

/// Receives one message into `bytes`, and a descriptor when one came with it (closed on exec).
/// Returns its length: 0 when the other end is closed, `None` when there is none and `wait` is not
/// set.
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
        // SAFETY: all that the message points to lives until the end.
        let received = unsafe { libc::recvmsg(fd, &mut message, flags) };
        match checked(received as c_long) {
            Ok(length) => break length as usize,
            Err(errno) if errno.raw() == libc::EINTR => {}
            Err(errno) if errno.raw() == libc::EAGAIN && !wait => return Ok(None),
            Err(errno) if errno.raw() == libc::EAGAIN => wait_until(fd, libc::POLLIN),
            Err(errno) => return Err(errno),
        }
    };
    // SAFETY: the kernel filled the headers in; a descriptor in them is new, and nobody else's.
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
    // SAFETY: zeroes are a valid message header.
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

/// An `epoll` instance, closed on exec.
pub fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: the call has no preconditions.
    let fd = checked(c_long::from(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }))?;
    // SAFETY: the number is new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Has `epoll` report input and hang-ups of `fd`, as `key`.
pub fn watch(epoll: RawFd, fd: RawFd, key: u64) -> Result<(), Errno> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: key };
    // SAFETY: the event is one.
    let result = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event) };
    checked(c_long::from(result)).map(drop)
}

/// Waits for `epoll`; the key of one descriptor that has something to say.
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

/// Does `work` with every signal blocked; a thread that it starts begins so.
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

/// Reserves `length` bytes of addresses, away from the program's own: it may rely on what it has
/// unmapped to stay unmapped.
pub fn reserve(length: u64) -> Result<u64, Errno> {
    /// Below what the kernel and programs use by themselves.
    const AREA: Range<u64> = 0x1000_0000_0000..0x5000_0000_0000;
    const STEP: u64 = 2 << 20;
    static NEXT: AtomicU64 = AtomicU64::new(AREA.start);
    let step = length.saturating_add(STEP).checked_next_multiple_of(STEP).ok_or(Errno::ENOMEM)?;
    let mut hint = NEXT.fetch_add(step, Ordering::Relaxed);
    if !AREA.contains(&hint) {
        hint = AREA.start;
        NEXT.store(AREA.start.saturating_add(step), Ordering::Relaxed);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: what is mapped already stays, and the kernel chooses another place: this is not
    // MAP_FIXED.
    let address = unsafe { syscall(libc::SYS_mmap, hint, length, libc::PROT_NONE, flags, -1, 0) };
    checked(address).map(|address| address as u64)
}

/// Maps the memory at `from`, `length` bytes in one shared mapping, a second time over `to`.
///
/// # Safety
/// `length` bytes at `to` are a mapping of the caller's.
pub unsafe fn map_again(from: u64, length: u64, to: u64) -> Result<(), Errno> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: an old length of 0 leaves `from` as it is; what is at `to` is the caller's.
    checked(unsafe { syscall(libc::SYS_mremap, from, 0, length, flags, to) }).map(drop)
}

/// Maps `length` bytes of `file`, shared, over `to`.
///
/// # Safety
/// As [`map_again`].
pub unsafe fn map_file(
    file: &File,
    offset: u64,
    length: u64,
    writable: bool,
    to: u64,
) -> Result<(), Errno> {
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let rights = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    let fd = file.as_raw_fd();
    // SAFETY: what is at `to` is the caller's.
    checked(unsafe { syscall(libc::SYS_mmap, to, length, rights, flags, fd, offset) }).map(drop)
}

/// Unmaps what the program asked to have unmapped earlier.
///
/// # Safety
/// Nothing uses the memory any more.
pub unsafe fn unmap(address: u64, length: u64) {
    // SAFETY: the caller's promise.
    unsafe { syscall(libc::SYS_munmap, address, length) };
}

/// The text of the file at `path`. A `File` would be opened through the hook.
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

/// A file without a name that holds `bytes`, to be read from the start; closed on exec.
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

/// Calls `child` in the child of every fork that libc does.
pub fn at_fork_in_child(child: unsafe extern "C" fn()) {
    // SAFETY: the function lives as long as the library, which is never unloaded.
    unsafe { libc::pthread_atfork(None, None, Some(child)) };
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! System calls: descriptors, processes, and memory. None of them goes through a hook: `rustix`
//! does not call libc, and what it lacks is called by names that have no hook.
#![allow(unsafe_code)]

mod sockets;

use std::ffi::{c_int, c_long, c_void, CStr};
use std::fs::File;
use std::io::Read;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libc::{iovec, syscall};
use rustix::event::{epoll, PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, FlockOperation, MemfdFlags, Mode, OFlags, Stat, CWD};
use rustix::io::FdFlags;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use twostage::iommufd::Errno;

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

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// `fd` as an argument of a system call.
///
/// # Errors
/// `EBADF`: it is negative.
fn numbered(fd: RawFd) -> Result<BorrowedFd<'static>, Errno> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: it is not -1. It is only passed to the kernel, which checks whether it is open; it is
    // open, or was named by the program whose call this serves.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// The process.
pub fn process_id() -> i32 {
    std::process::id().cast_signed()
}

/// A descriptor of process `pid`, closed on exec.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    let pid = Pid::from_raw(pid).ok_or(Errno::EINVAL)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(errno)
}

/// The file that the process `pidfd` has open as `fd`, with close-on-exec.
pub fn pidfd_getfd(pidfd: RawFd, fd: RawFd) -> Result<OwnedFd, Errno> {
    let flags = PidfdGetfdFlags::empty();
    rustix::process::pidfd_getfd(numbered(pidfd)?, fd, flags).map_err(errno)
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
    rustix::thread::gettid().as_raw_pid()
}

/// The effective capabilities of process `pid`; of this thread when it is 0. Bit `n` is capability
/// `n`.
pub fn capabilities(pid: i32) -> Result<u64, Errno> {
    let sets = rustix::thread::capabilities(Pid::from_raw(pid)).map_err(errno)?;
    Ok(sets.effective.bits())
}

/// `RLIMIT_MEMLOCK` of process `pid`, in bytes; of this one when it is 0.
pub fn memlock_limit(pid: i32) -> Result<u64, Errno> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    let (old, new) = (&raw mut limit, std::ptr::null::<libc::rlimit64>());
    // `rustix` cannot read limits of other processes without setting them.
    // SAFETY: there is room for the limits; none are set.
    checked(unsafe { syscall(libc::SYS_prlimit64, pid, libc::RLIMIT_MEMLOCK, new, old) })?;
    Ok(limit.rlim_cur)
}

/// The user that this process belongs to.
pub fn user_id() -> u32 {
    rustix::process::getuid().as_raw()
}

/// The user that makes this process's files.
pub fn effective_user_id() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes a character device at `path` that is none: nobody can open it, and every user may make it.
///
/// # Errors
/// `EPERM` the file system, or the kernel, has no such devices.
pub fn make_dead_device(path: &Path) -> Result<(), Errno> {
    let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
    rustix::fs::mknodat(CWD, path, kind, mode, 0).map_err(errno)
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
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping accesses nothing.
        let page = unsafe { rustix::mm::mmap_anonymous(null_mut(), LENGTH, rights, flags) };
        let page = page.map_err(errno)?;
        // SAFETY: the page is ours.
        unsafe { rustix::mm::madvise(page, LENGTH, Advice::LinuxWipeOnFork) }.map_err(errno)?;
        let mark = Self(page.cast_const().cast());
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

/// The number of the file behind `fd`, which no other open file has.
pub fn inode(fd: RawFd) -> Result<u64, Errno> {
    status(fd).map(|status| status.st_ino)
}

/// `fstat(2)`.
pub fn status(fd: RawFd) -> Result<Stat, Errno> {
    rustix::fs::fstat(numbered(fd)?).map_err(errno)
}

/// Numbers below are left to the program, as far as the limit allows.
const FIRST_INTERNAL: c_int = 512;

/// A duplicate of `fd` with a number that programs do not expect; with close-on-exec.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    rustix::io::fcntl_dupfd_cloexec(numbered(fd)?, FIRST_INTERNAL).map_err(errno)
}

/// Sets close-on-exec and non-blocking mode of `fd`.
pub fn set_flags(fd: RawFd, close_on_exec: bool, nonblocking: bool) -> Result<(), Errno> {
    let descriptor = if close_on_exec { FdFlags::CLOEXEC } else { FdFlags::empty() };
    let file = if nonblocking { OFlags::NONBLOCK } else { OFlags::empty() };
    let fd = numbered(fd)?;
    rustix::io::fcntl_setfd(fd, descriptor).map_err(errno)?;
    rustix::fs::fcntl_setfl(fd, file).map_err(errno)
}

/// Writes the eight bytes of `number` to `fd`.
pub fn write_number(fd: RawFd, number: u64) -> Result<(), Errno> {
    rustix::io::write(numbered(fd)?, &number.to_ne_bytes()).map(drop).map_err(errno)
}

/// Whether `fd` is an eventfd.
pub fn is_eventfd(fd: RawFd) -> bool {
    path_of(fd).is_some_and(|path| path == b"anon_inode:[eventfd]")
}

/// A non-blocking eventfd with close-on-exec.
#[cfg(test)]
pub(crate) fn eventfd() -> Result<OwnedFd, Errno> {
    use rustix::event::EventfdFlags;

    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    rustix::event::eventfd(0, flags).map_err(errno)
}

/// Reads eight bytes from `fd`.
pub fn read_number(fd: RawFd) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    rustix::io::read(numbered(fd)?, &mut bytes).map_err(errno)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Closes a number that is not owned by this library.
pub fn close_number(fd: RawFd) {
    // SAFETY: the program requested it, or it was inherited and never handed out.
    unsafe { rustix::io::close(fd) };
}

/// The current `poll(2)` events of `fd`.
pub fn events(fd: RawFd) -> PollFlags {
    let Ok(fd) = numbered(fd) else { return PollFlags::empty() };
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let ready = rustix::event::poll(&mut polled, Some(&Timespec::default()));
    let [polled] = polled;
    ready.map_or(PollFlags::empty(), |_| polled.revents())
}

/// Waits until `fd` has one of the `events`, or the other end is closed.
fn wait_until(fd: BorrowedFd<'_>, events: PollFlags) {
    // A signal ends it early; the caller tries again.
    let _ = rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, events)], None);
}

/// Waits until `fd` can be read, or the other end is closed, for at most `limit`. Returns whether
/// it can.
pub fn is_readable_within(fd: RawFd, limit: Duration) -> bool {
    let Ok(fd) = numbered(fd) else { return false };
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        // It is not too large for the kernel's structure, or there is no limit.
        let left = Timespec::try_from(left).ok();
        let mut files = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match rustix::event::poll(&mut files, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|number| number > 0),
        }
    }
}

/// An `epoll` instance, closed on exec.
pub fn epoll() -> Result<OwnedFd, Errno> {
    epoll::create(epoll::CreateFlags::CLOEXEC).map_err(errno)
}

/// Makes `epoll` report input and hang-ups of `fd`, as `key`.
pub fn watch(epoll: RawFd, fd: RawFd, key: u64) -> Result<(), Errno> {
    let (data, events) = (epoll::EventData::new_u64(key), epoll::EventFlags::IN);
    epoll::add(numbered(epoll)?, numbered(fd)?, data, events).map_err(errno)
}

/// The same, once if `fd` is readable, and once whenever it becomes readable: others may read it.
pub fn watch_edges(epoll: RawFd, fd: RawFd, key: u64) -> Result<(), Errno> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    let data = epoll::EventData::new_u64(key);
    epoll::add(numbered(epoll)?, numbered(fd)?, data, flags).map_err(errno)
}

/// Undoes [`watch`] or [`watch_edges`].
pub fn unwatch(epoll: RawFd, fd: RawFd) -> Result<(), Errno> {
    epoll::delete(numbered(epoll)?, numbered(fd)?).map_err(errno)
}

/// Waits for `epoll`; returns the key of one descriptor with an event.
pub fn next_event(epoll: RawFd) -> Result<u64, Errno> {
    let (data, flags) = (epoll::EventData::new_u64(0), epoll::EventFlags::empty());
    let mut events = [epoll::Event { data, flags }];
    loop {
        match epoll::wait(numbered(epoll)?, &mut events, None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(events[0].data.u64()),
            Err(error) => return Err(errno(error)),
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
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(errno)?;
    let mut text = String::new();
    match File::from(file).read_to_string(&mut text) {
        Ok(_) => Ok(text),
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Locks the open file `fd` until its last descriptor is closed.
///
/// # Errors
/// `EWOULDBLOCK` it is locked by another open.
pub fn lock(fd: RawFd) -> Result<(), Errno> {
    rustix::fs::flock(numbered(fd)?, FlockOperation::NonBlockingLockExclusive).map_err(errno)
}

/// The path of the open file `fd`.
pub fn path_of(fd: RawFd) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{fd}");
    rustix::fs::readlinkat(CWD, link, Vec::new()).ok().map(std::ffi::CString::into_bytes)
}

/// An unnamed file that contains `bytes`, positioned at the start; with close-on-exec.
pub fn file_of(bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create(c"twostage-iommufd", MemfdFlags::CLOEXEC);
    let file = File::from(file.map_err(errno)?);
    match file.write_all_at(bytes, 0) {
        Ok(()) => Ok(file.into()),
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Fills `bytes` from `offset` of the file `fd` on, whose position stays.
///
/// # Errors
/// `EIO` there is less.
pub fn read_at(fd: RawFd, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    let wanted = bytes.len();
    let read = rustix::io::pread(numbered(fd)?, bytes, offset).map_err(errno)?;
    (read == wanted).then_some(()).ok_or(Errno::from_raw(libc::EIO))
}

/// Writes `bytes` likewise.
///
/// # Errors
/// `EIO` there is no room.
pub fn write_at(fd: RawFd, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let written = rustix::io::pwrite(numbered(fd)?, bytes, offset).map_err(errno)?;
    (written == bytes.len()).then_some(()).ok_or(Errno::from_raw(libc::EIO))
}

/// Calls `child` in the child of every fork made by libc.
pub fn at_fork_in_child(child: unsafe extern "C" fn()) {
    // SAFETY: the function is valid as long as the library, which is never unloaded.
    unsafe { libc::pthread_atfork(None, None, Some(child)) };
}

/// `address`, for `rustix`.
fn pointer(address: u64) -> *mut c_void {
    without_provenance_mut(address as usize)
}

/// Reads from the memory of process `pid` at `address` on, up to the first unreadable byte; returns
/// the number of bytes. (`rustix` has neither this nor [`write_memory`].)
pub fn read_memory(pid: i32, address: u64, bytes: &mut [u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel only writes to `bytes`, and checks the other address.
    let read = unsafe { libc::process_vm_readv(pid, &local, 1, &remote, 1, 0) };
    checked(read as c_long).map(|count| count as usize)
}

/// Writes to the memory of process `pid` from `address` on; returns the number of bytes written.
///
/// # Safety
/// If `pid` is this process, the program must have passed the memory for writing, such as in an
/// argument of a system call.
pub unsafe fn write_memory(pid: i32, address: u64, bytes: &[u8]) -> Result<usize, Errno> {
    let local = iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: bytes.len() };
    let remote = iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: the kernel only reads `bytes`, and checks the other address; the caller guarantees
    // that it may be written.
    let written = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    checked(written as c_long).map(|count| count as usize)
}

/// Reserves `length` bytes of address space, away from the program's: it may rely on unmapped
/// addresses staying unmapped.
pub fn reserve(length: u64) -> Result<u64, Errno> {
    /// Below what the kernel and programs use by default.
    const AREA: Range<u64> = 0x1000_0000_0000..0x5000_0000_0000;
    const STEP: u64 = 2 << 20;
    static NEXT: AtomicU64 = AtomicU64::new(AREA.start);
    let step = length.saturating_add(STEP).checked_next_multiple_of(STEP).ok_or(Errno::ENOMEM)?;
    let mut hint = NEXT.fetch_add(step, Ordering::Relaxed);
    if !AREA.contains(&hint) {
        hint = AREA.start;
        NEXT.store(AREA.start.saturating_add(step), Ordering::Relaxed);
    }
    let (rights, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: existing mappings are not affected, and the kernel may choose another place: this is
    // not MAP_FIXED.
    let mapped =
        unsafe { rustix::mm::mmap_anonymous(pointer(hint), length as usize, rights, flags) };
    mapped.map(|mapped| mapped.addr() as u64).map_err(errno)
}

/// Maps the memory at `from`, `length` bytes in one shared mapping, a second time over `to`.
///
/// # Safety
/// `length` bytes at `to` must be a mapping of the caller.
pub unsafe fn map_again(from: u64, length: u64, to: u64) -> Result<(), Errno> {
    let (flags, length) = (MremapFlags::MAYMOVE, length as usize);
    // SAFETY: an old length of 0 does not affect `from`; what is at `to` is the caller's.
    unsafe { rustix::mm::mremap_fixed(pointer(from), 0, length, flags, pointer(to)) }
        .map(drop)
        .map_err(errno)
}

/// Maps `length` bytes of `file`, shared, over `to`.
///
/// # Safety
/// As [`map_again`].
pub unsafe fn map_file(
    file: &impl AsFd,
    offset: u64,
    length: u64,
    writable: bool,
    to: u64,
) -> Result<(), Errno> {
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    let rights = ProtFlags::READ | if writable { ProtFlags::WRITE } else { ProtFlags::empty() };
    // SAFETY: what is at `to` is the caller's.
    unsafe { rustix::mm::mmap(pointer(to), length as usize, rights, flags, file, offset) }
        .map(drop)
        .map_err(errno)
}

/// Reads from this process at `address` on, whatever the protection, like a device that has the
/// pages; returns whether all of it could be read.
pub fn read_anyway(address: u64, bytes: &mut [u8]) -> bool {
    let memory = File::open("/proc/self/mem");
    memory.is_ok_and(|memory| memory.read_exact_at(bytes, address).is_ok())
}

/// Writes likewise.
pub fn write_anyway(address: u64, bytes: &[u8]) -> bool {
    // Writes go to private pages even if they are read-only: `FOLL_FORCE`.
    let memory = File::options().write(true).open("/proc/self/mem");
    memory.is_ok_and(|memory| memory.write_all_at(bytes, address).is_ok())
}

/// Whether `file` is backed by memory: shmem (a memfd, for example) or hugetlbfs.
pub fn is_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file)
        .is_ok_and(|status| [libc::TMPFS_MAGIC, libc::HUGETLBFS_MAGIC].contains(&status.f_type))
}

/// Unmaps what the program requested to unmap earlier.
///
/// # Safety
/// Nothing may use the memory any more.
pub unsafe fn unmap(address: u64, length: u64) {
    // SAFETY: guaranteed by the caller. It does not fail for mapped memory.
    let _ = unsafe { rustix::mm::munmap(pointer(address), length as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With `use-libc`, calls of `rustix` would go through the hooks.
    #[test]
    fn rustix_does_not_call_libc() {
        set_errno(Errno::EEXIST);
        assert_eq!(status(1 << 20).unwrap_err(), Errno::EBADF);
        assert_eq!(last_errno(), Errno::EEXIST);
        assert_eq!(status(-1).unwrap_err(), Errno::EBADF);
    }
}

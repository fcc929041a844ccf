// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory: access to that of processes, and mappings.
#![allow(unsafe_code)]

use std::ffi::{c_long, c_void};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::without_provenance_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::iovec;
use rustix::mm::{MapFlags, MremapFlags, ProtFlags};
use twostage::iommufd::Errno;

use super::{checked, errno};

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
    file: &File,
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

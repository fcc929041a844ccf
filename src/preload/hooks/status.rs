// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Status of paths and descriptors: character devices that everybody may read and write.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};
use std::os::fd::RawFd;

use twostage::iommufd::Errno;

use super::{answer_int, node, ours};
use crate::next;
use crate::world::Node;

const MODE: u32 = libc::S_IFCHR | 0o666;
/// The first inode number of ours, only used for stat.
const FIRST_INODE: u64 = 0x7500_0000;

fn inode(node: Node) -> u64 {
    let (major, minor) = node.device_number();
    FIRST_INODE | u64::from(major) << 12 | u64::from(minor)
}

/// The node that `fd` was opened as, if it is one of ours.
///
/// # Errors
/// `EBADF` it is being closed.
fn node_of(fd: RawFd) -> Result<Option<Node>, Errno> {
    let name = ours(fd).map_or(Ok(None), |state| state.name(fd))?;
    Ok(name.and_then(|name| Node::of_file(&name)))
}

/// # Safety
/// `status` is null, or has room for a status.
unsafe fn fill(node: Node, status: *mut libc::stat64) -> c_int {
    if status.is_null() {
        return answer_int(Err(Errno::EFAULT));
    }
    let (major, minor) = node.device_number();
    // SAFETY: all zeroes are a valid status.
    let mut filled: libc::stat64 = unsafe { std::mem::zeroed() };
    filled.st_ino = inode(node);
    filled.st_mode = MODE;
    filled.st_nlink = 1;
    filled.st_blksize = 4096;
    filled.st_rdev = libc::makedev(major, minor);
    // SAFETY: guaranteed by the caller.
    unsafe { status.write(filled) };
    0
}

macro_rules! of_paths {
    ($(
        fn $name:ident $([$before:ident: $before_type:ty])?
            (path, status $(, $flags:ident: $flags_type:ty)?);
    )*) => {
        $(
            #[cfg_attr(not(test), no_mangle)]
            unsafe extern "C" fn $name(
                $($before: $before_type,)?
                path: *const c_char,
                status: *mut libc::stat64
                $(, $flags: $flags_type)?
            ) -> c_int {
                // SAFETY: libc's contract for the path.
                match unsafe { node(path) } {
                    // SAFETY: libc's contract for the status.
                    Some((_, node)) => unsafe { fill(node, status) },
                    // SAFETY: the arguments are as the program gave them.
                    None => unsafe { next::$name($($before,)? path, status $(, $flags)?) },
                }
            }
        )*
    };
}

of_paths! {
    fn stat(path, status);
    fn stat64(path, status);
    fn lstat(path, status);
    fn lstat64(path, status);
    fn fstatat[directory: c_int](path, status, flags: c_int);
    fn fstatat64[directory: c_int](path, status, flags: c_int);
}

macro_rules! of_descriptors {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, status: *mut libc::stat64) -> c_int {
            match node_of(fd) {
                // SAFETY: libc's contract for the status.
                Ok(Some(node)) => unsafe { fill(node, status) },
                Err(errno) => answer_int(Err(errno)),
                // SAFETY: the arguments are as the program gave them.
                Ok(None) => unsafe { next::$name(fd, status) },
            }
        }
    )* };
}

of_descriptors!(fstat fstat64);

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: u32,
    status: *mut libc::statx,
) -> c_int {
    // SAFETY: libc's contract for the path.
    let Some((_, node)) = (unsafe { node(path) }) else {
        // SAFETY: the arguments are as the program gave them.
        return unsafe { next::statx(directory, path, flags, mask, status) };
    };
    if status.is_null() {
        return answer_int(Err(Errno::EFAULT));
    }
    // SAFETY: all zeroes are a valid status.
    let mut filled: libc::statx = unsafe { std::mem::zeroed() };
    filled.stx_mask = libc::STATX_BASIC_STATS;
    filled.stx_ino = inode(node);
    filled.stx_mode = MODE as u16;
    filled.stx_nlink = 1;
    filled.stx_blksize = 4096;
    (filled.stx_rdev_major, filled.stx_rdev_minor) = node.device_number();
    // SAFETY: libc's contract for the status.
    unsafe { status.write(filled) };
    0
}

fn may(mode: c_int) -> c_int {
    // Devices are not executable.
    answer_int(if mode & libc::X_OK == 0 { Ok(0) } else { Err(Errno::EACCES) })
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: libc's contract for the path.
    match unsafe { node(path) } {
        Some(_) => may(mode),
        // SAFETY: the arguments are as the program gave them.
        None => unsafe { next::access(path, mode) },
    }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn faccessat(
    directory: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    // SAFETY: libc's contract for the path.
    match unsafe { node(path) } {
        Some(_) => may(mode),
        // SAFETY: the arguments are as the program gave them.
        None => unsafe { next::faccessat(directory, path, mode, flags) },
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening paths, and the status of paths and descriptors: character devices that everybody may
//! read and write, and what stands for the machine's `/sys`.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, CStr};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};

use libc::mode_t;
use twostage::iommufd::Errno;

use super::{answer_int, ours, Place};
#[cfg(feature = "selftest")]
use crate::files::fail_nth;
use crate::world::Node;
use crate::{callers::calls, memory::proc_status, next, state, sys};

/// Opens `path`, which leads to `place`, if it, or its content, is emulated.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn open_ours(place: &Place, path: *const c_char, flags: c_int) -> Option<c_int> {
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    if let Place::Node(state, node) = *place {
        // What the kernel checks before it asks the device.
        if flags & libc::O_CREAT != 0 && flags & libc::O_EXCL != 0 {
            return Some(answer_int(Err(Errno::EEXIST)));
        }
        if flags & libc::O_DIRECTORY != 0 {
            return Some(answer_int(Err(Errno::from_raw(libc::ENOTDIR))));
        }
        let opened = state.world().and_then(|world| match world.open(node) {
            Err(Errno::EBUSY) => {
                // Perhaps busy only because of a process that is gone.
                state.end_hung_up();
                world.open(node)
            }
            opened => opened,
        });
        let installed = opened.and_then(|file| {
            state.start_service(calls::serve)?;
            state.install(file, close_on_exec)
        });
        return Some(answer_int(installed.map(i64::from)));
    }
    #[cfg(feature = "selftest")]
    // SAFETY: guaranteed by the caller.
    if let Some(opened) = unsafe { open_fault_injection(path, close_on_exec) } {
        return Some(opened);
    }
    // SAFETY: guaranteed by the caller.
    unsafe { status_file(path) }.map(|status| give(status, close_on_exec))
}

/// Returns the descriptor `file` to the program.
fn give(file: OwnedFd, close_on_exec: bool) -> c_int {
    let opened = sys::set_flags(file.as_raw_fd(), close_on_exec, false);
    answer_int(opened.map(|()| i64::from(file.into_raw_fd())))
}

/// Opens `path` if it belongs to Linux's fault injection.
///
/// # Safety
/// `path` is null or a C string.
#[cfg(feature = "selftest")]
unsafe fn open_fault_injection(path: *const c_char, close_on_exec: bool) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: guaranteed by the caller.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    if fail_nth::is_switch(path) {
        // What is written there is ignored.
        let written = sys::file_of(b"");
        return Some(
            written.map_or_else(|errno| answer_int(Err(errno)), |file| give(file, close_on_exec)),
        );
    }
    let state = fail_nth::is_own(path).then(state::current)?;
    let installed = state
        .start_service(calls::serve)
        .and_then(|()| state.install(std::sync::Arc::new(fail_nth::FailNthFile), close_on_exec));
    Some(answer_int(installed.map(i64::from)))
}

/// The status of a process with pinned memory.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn status_file(path: *const c_char) -> Option<OwnedFd> {
    let state = state::begun().filter(|_| !path.is_null())?;
    // SAFETY: guaranteed by the caller.
    let pid = proc_status::process_of(unsafe { CStr::from_ptr(path) }.to_bytes())?;
    proc_status::open(state, pid)
}

macro_rules! fopen {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
            // SAFETY: libc's contract for the path.
            match unsafe { status_file(path) } {
                // SAFETY: the descriptor belongs to a file, and is owned by the stream from now on;
                // the mode is as the program gave it.
                Some(status) => unsafe { libc::fdopen(status.into_raw_fd(), mode) },
                None => {
                    // SAFETY: libc's contract for the path.
                    let place = unsafe { Place::of(libc::AT_FDCWD, path) };
                    // SAFETY: the arguments are as the program gave them, or stand for them.
                    unsafe { next::$name(place.instead_of(path), mode) }
                }
            }
        }
    )* };
}

fopen!(fopen fopen64);

macro_rules! hooks {
    ($(
        fn $name:ident $([$before:ident: $before_type:ty])?
            (path, flags $(, $mode:ident: $mode_type:ty)?);
    )*) => {
        $(
            #[cfg_attr(not(test), no_mangle)]
            unsafe extern "C" fn $name(
                $($before: $before_type,)?
                path: *const c_char,
                flags: c_int
                $(, $mode: $mode_type)?
            ) -> c_int {
                // SAFETY: libc's contract for the path.
                let place = unsafe { Place::of(folder!($($before)?), path) };
                // SAFETY: as above.
                match unsafe { open_ours(&place, path, flags) } {
                    Some(result) => result,
                    None => {
                        let path = place.instead_of(path);
                        // SAFETY: the arguments are as the program gave them, or stand for them.
                        unsafe { next::$name($($before,)? path, flags $(, $mode)?) }
                    }
                }
            }
        )*
    };
}

// The names that begin with underscores are called by programs built with _FORTIFY_SOURCE.
hooks! {
    fn open(path, flags, mode: mode_t);
    fn open64(path, flags, mode: mode_t);
    fn openat[directory: c_int](path, flags, mode: mode_t);
    fn openat64[directory: c_int](path, flags, mode: mode_t);
    fn __open_2(path, flags);
    fn __open64_2(path, flags);
    fn __openat_2[directory: c_int](path, flags);
    fn __openat64_2[directory: c_int](path, flags);
}

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
                let place = unsafe { Place::of(folder!($($before)?), path) };
                if let Place::Node(_, node) = place {
                    // SAFETY: libc's contract for the status.
                    return unsafe { fill(node, status) };
                }
                $(
                    // SAFETY: as above.
                    if $before >= 0 && unsafe { is_descriptor(path, $flags) } {
                        // SAFETY: libc's contract for the status.
                        return unsafe { fstat64($before, status) };
                    }
                )?
                let path = place.instead_of(path);
                // SAFETY: the arguments are as the program gave them, or stand for them.
                unsafe { next::$name($($before,)? path, status $(, $flags)?) }
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

/// The node of `fd`, whose mode is this to the kernel: a socket that came without a hook, as in a
/// message of another process, may be one of ours.
fn node_of_socket(fd: RawFd, mode: u32) -> Option<Node> {
    if mode & libc::S_IFMT != libc::S_IFSOCK || !state::is_emulated(fd) {
        return None;
    }
    state::current().recognise(fd)?;
    node_of(fd).ok()?
}

macro_rules! of_descriptors {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, status: *mut libc::stat64) -> c_int {
            match node_of(fd) {
                // SAFETY: libc's contract for the status.
                Ok(Some(node)) => return unsafe { fill(node, status) },
                Err(errno) => return answer_int(Err(errno)),
                Ok(None) => {}
            }
            // SAFETY: the arguments are as the program gave them.
            let result = unsafe { next::$name(fd, status) };
            if result == 0 {
                // SAFETY: the kernel has filled it.
                if let Some(node) = node_of_socket(fd, unsafe { (*status).st_mode }) {
                    // SAFETY: as above.
                    return unsafe { fill(node, status) };
                }
            }
            result
        }
    )* };
}

of_descriptors!(fstat fstat64);

/// Whether a call with these arguments is about a descriptor: how Rust's `File::metadata` asks.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn is_descriptor(path: *const c_char, flags: c_int) -> bool {
    // SAFETY: guaranteed by the caller: a C string has a first byte.
    flags & libc::AT_EMPTY_PATH != 0 && !path.is_null() && unsafe { *path } == 0
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: u32,
    status: *mut libc::statx,
) -> c_int {
    // SAFETY: libc's contract for the path.
    let place = unsafe { Place::of(directory, path) };
    let named = match place {
        Place::Node(_, node) => Some(node),
        Place::Elsewhere | Place::Shown(_) => None,
    };
    // SAFETY: as above.
    let of_descriptor = named.is_none() && unsafe { is_descriptor(path, flags) };
    let node = match if of_descriptor { node_of(directory) } else { Ok(named) } {
        Ok(Some(node)) => node,
        Err(errno) => return answer_int(Err(errno)),
        Ok(None) => {
            let path = place.instead_of(path);
            // SAFETY: the arguments are as the program gave them, or stand for them.
            let result = unsafe { next::statx(directory, path, flags, mask, status) };
            if result != 0 || !of_descriptor {
                return result;
            }
            // SAFETY: the kernel has filled it.
            let mode = u32::from(unsafe { (*status).stx_mode });
            match node_of_socket(directory, mode) {
                Some(node) => node,
                None => return result,
            }
        }
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
    match unsafe { Place::of(libc::AT_FDCWD, path) } {
        Place::Node(..) => may(mode),
        // SAFETY: the arguments are as the program gave them, or stand for them.
        place => unsafe { next::access(place.instead_of(path), mode) },
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
    match unsafe { Place::of(directory, path) } {
        Place::Node(..) => may(mode),
        // SAFETY: the arguments are as the program gave them, or stand for them.
        place => unsafe { next::faccessat(directory, place.instead_of(path), mode, flags) },
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Listing folders, following links, extended attributes: of what stands for the machine's `/sys`
//! and `/dev/vfio`.
//!
//! An open folder is a real one of the process's folder; what is read from it needs no hook.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void, CStr, CString};

use libc::{size_t, ssize_t, AT_FDCWD};
use twostage::iommufd::Errno;
use twostage_emulated::uapi::UserSpace;

use super::{answer, Place};
use crate::callers::process::Process;
use crate::world::Node;
use crate::{next, state, sys};

macro_rules! lists {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char $(, $argument: $type)*) -> $result {
            // SAFETY: libc's contract for the path.
            let place = unsafe { Place::of(AT_FDCWD, path) };
            // SAFETY: the arguments are as the program gave them, or stand for them.
            unsafe { next::$name(place.instead_of(path) $(, $argument)*) }
        }
    )* };
}

lists! {
    opendir() -> *mut c_void;
    scandir(list: *mut c_void, filter: *const c_void, compare: *const c_void) -> c_int;
    scandir64(list: *mut c_void, filter: *const c_void, compare: *const c_void) -> c_int;
}

macro_rules! attributes {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => { $(
        /// Asked for by `ls -l`, which complains if there is no file.
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char $(, $argument: $type)*) -> ssize_t {
            // SAFETY: libc's contract for the path.
            match unsafe { Place::of(AT_FDCWD, path) } {
                Place::Node(..) => answer(Err(Errno::EOPNOTSUPP)) as ssize_t,
                // SAFETY: the arguments are as the program gave them, or stand for them.
                place => unsafe { next::$name(place.instead_of(path) $(, $argument)*) },
            }
        }
    )* };
}

attributes! {
    getxattr(name: *const c_char, to: *mut c_void, count: size_t);
    lgetxattr(name: *const c_char, to: *mut c_void, count: size_t);
    listxattr(to: *mut c_char, count: size_t);
    llistxattr(to: *mut c_char, count: size_t);
}

/// The length of what `path`, which the next library returned, stands for; which is the end of it.
fn outer(path: &[u8]) -> Option<usize> {
    let sysfs = state::begun().and_then(state::State::made_sysfs)?;
    sysfs.outer(path).map(<[u8]>::len)
}

/// Replaces the path of `length` bytes at `to` by what it stands for; returns the length.
///
/// # Safety
/// There are so many bytes.
unsafe fn outwards(to: *mut c_char, length: usize) -> usize {
    // SAFETY: guaranteed by the caller.
    let path = unsafe { std::slice::from_raw_parts(to.cast::<u8>(), length) };
    let Some(rest) = outer(path) else { return length };
    // SAFETY: the rest ends where the path does.
    unsafe { std::ptr::copy(to.add(length - rest), to, rest) };
    rest
}

/// Where the link at `path` leads, if that is into the folder; whole, however little room the
/// program has for it.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn translated(folder: c_int, path: *const c_char) -> Option<Vec<u8>> {
    state::begun().and_then(state::State::made_sysfs)?;
    let errno = sys::last_errno();
    let mut target = vec![0; libc::PATH_MAX as usize];
    // SAFETY: there is so much room, and the path is as the caller guarantees.
    let read = unsafe { next::readlinkat(folder, path, target.as_mut_ptr().cast(), target.len()) };
    sys::set_errno(errno);
    target.truncate(usize::try_from(read).ok()?);
    let rest = outer(&target)?;
    Some(target.split_off(target.len() - rest))
}

/// The result of `readlink` with room for `count` bytes at `to`, where it writes `target`.
fn give(target: &[u8], to: *mut c_char, count: size_t) -> ssize_t {
    let target = target.get(..count).unwrap_or(target);
    let written = Process::own().write(to as u64, target);
    answer(written.map(|()| target.len() as i64).map_err(|_| Errno::EFAULT)) as ssize_t
}

macro_rules! links {
    ($($name:ident($($folder:ident)?; $($room:ident)?);)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            $($folder: c_int,)?
            path: *const c_char,
            to: *mut c_char,
            count: size_t
            $(, $room: size_t)?
        ) -> ssize_t {
            // SAFETY: libc's contract for the path.
            let place = unsafe { Place::of(folder!($($folder)?), path) };
            if let Place::Node(..) = place {
                return answer(Err(Errno::EINVAL)) as ssize_t;
            }
            let path = place.instead_of(path);
            // SAFETY: libc's contract for the path.
            let translated = unsafe { translated(folder!($($folder)?), path) };
            match translated.filter(|_| count > 0 $(&& count <= $room)?) {
                Some(target) => give(&target, to, count),
                // SAFETY: the arguments are as the program gave them, or stand for them.
                None => unsafe { next::$name($($folder,)? path, to, count $(, $room)?) },
            }
        }
    )* };
}

links! {
    readlink(; );
    readlinkat(directory; );
    __readlink_chk(; room);
    __readlinkat_chk(directory; room);
}

/// The path of a node, as `realpath` returns it.
///
/// # Safety
/// As for `realpath`.
unsafe fn node_path(node: Node, to: *mut c_char) -> *mut c_char {
    // It has no zeroes.
    let path = CString::new(node.path()).unwrap_or_default();
    let path = path.as_ptr();
    if to.is_null() {
        // SAFETY: the path of a node is a C string.
        return unsafe { libc::strdup(path) };
    }
    // SAFETY: there is room for `PATH_MAX` bytes, and the path of a node is shorter.
    unsafe { libc::strcpy(to, path) }
}

/// `found`, which the next library returned, as the program is to see it.
///
/// # Safety
/// It is null or a C string that may be changed.
unsafe fn real(found: *mut c_char) -> *mut c_char {
    if !found.is_null() {
        // SAFETY: guaranteed by the caller.
        let length = unsafe { CStr::from_ptr(found) }.count_bytes();
        // SAFETY: as above; what remains is not longer, and there is room for the end.
        unsafe { found.add(outwards(found, length)).write(0) };
    }
    found
}

macro_rules! real_paths {
    ($($name:ident($($room:ident)?);)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            path: *const c_char,
            to: *mut c_char
            $(, $room: size_t)?
        ) -> *mut c_char {
            // SAFETY: libc's contract for the path.
            let place = unsafe { Place::of(AT_FDCWD, path) };
            if let Place::Node(_, node) = place {
                // SAFETY: libc's contract.
                return unsafe { node_path(node, to) };
            }
            // SAFETY: the arguments are as the program gave them, or stand for them.
            unsafe { real(next::$name(place.instead_of(path), to $(, $room)?)) }
        }
    )* };
}

real_paths! {
    realpath();
    __realpath_chk(room);
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn canonicalize_file_name(path: *const c_char) -> *mut c_char {
    // SAFETY: libc's contract for the path.
    unsafe { realpath(path, std::ptr::null_mut()) }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mapping and unmapping memory, and other changes of it: windows of iommufds and devices, and
//! pages that devices may access.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use libc::{off64_t, size_t, MAP_FAILED};
use twostage::iommufd::Errno;
use twostage_emulated::MmapRequest;

use super::ours;
use crate::files::file::Pages;
use crate::{memory::taken, next, state, sys};

fn failed(errno: Errno) -> *mut c_void {
    sys::set_errno(errno);
    MAP_FAILED
}

/// Whether any of `length` bytes at `address` is pinned in place.
fn is_held(address: *mut c_void, length: size_t) -> bool {
    state::begun().is_some_and(|state| state.pins.is_held(address as u64, length as u64))
}

/// `length` bytes at `address` have been replaced.
fn replaced(address: *mut c_void, length: size_t) {
    if let Some(state) = state::begun() {
        state.windows.remove(address as u64, length as u64);
    }
}

/// What to map instead of `fd`, if it is ours.
fn pages(
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off64_t,
) -> Option<Result<Pages, Errno>> {
    if flags & libc::MAP_ANONYMOUS != 0 {
        return None;
    }
    // MAP_SHARED_VALIDATE includes the bit of MAP_SHARED.
    let shared = flags & libc::MAP_SHARED != 0;
    let executable = protection & libc::PROT_EXEC != 0;
    let (offset, length) = (offset as u64, length as u64);
    ours(fd)?.map(fd, MmapRequest { offset, length, shared, executable })
}

macro_rules! mmap {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            address: *mut c_void,
            length: size_t,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: off64_t,
        ) -> *mut c_void {
            let fixed = flags & libc::MAP_FIXED != 0;
            if fixed && is_held(address, length) {
                log::error!("private memory at {address:?} is pinned: nothing can be mapped over \
                             it");
                return failed(Errno::ENOMEM);
            }
            let (mut fd, mut offset, mut window) = (fd, offset, None);
            match pages(length, protection, flags, fd, offset) {
                Some(Ok(pages)) => {
                    let (file, at) = pages.source();
                    // No larger than the program's.
                    (fd, offset) = (file, at as off64_t);
                    window = Some(pages);
                }
                Some(Err(errno)) => return failed(errno),
                None => {}
            }
            // SAFETY: as the program asked; the file may be the one behind its own.
            let mapped = unsafe { next::$name(address, length, protection, flags, fd, offset) };
            if mapped != MAP_FAILED {
                if fixed {
                    replaced(address, length);
                }
                if let Some(pages) = window {
                    state::current().windows.add(mapped as u64, length as u64, pages);
                }
            }
            mapped
        }
    )* };
}

mmap!(mmap mmap64);

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn munmap(address: *mut c_void, length: size_t) -> c_int {
    if state::begun().is_some_and(|state| !state.pins.release(address as u64, length as u64)) {
        return 0;
    }
    // Before unmapping, so that nobody maps anything there in between.
    replaced(address, length);
    // SAFETY: as the program asked.
    unsafe { next::munmap(address, length) }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn mremap(
    address: *mut c_void,
    old: size_t,
    new: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let over = flags & libc::MREMAP_FIXED != 0 && is_held(to, new);
    if over || is_held(address, old) {
        log::error!("private memory at {address:?} is pinned: it cannot be moved");
        return failed(Errno::ENOMEM);
    }
    // SAFETY: as the program asked.
    unsafe { next::mremap(address, old, new, flags, to) }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn mprotect(address: *mut c_void, length: size_t, protection: c_int) -> c_int {
    // SAFETY: as the program asked.
    let result = unsafe { next::mprotect(address, length, protection) };
    if result == 0 {
        taken::protected(address as u64, length as u64, protection);
    }
    result
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn madvise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    // SAFETY: as the program asked.
    let result = unsafe { next::madvise(address, length, advice) };
    if result == 0 {
        taken::advised(address as u64, length as u64, advice);
    }
    result
}

macro_rules! of_files {
    ($($allocate:ident $truncate:ident;)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $allocate(
            fd: c_int,
            mode: c_int,
            offset: off64_t,
            length: off64_t,
        ) -> c_int {
            // SAFETY: as the program asked.
            let result = unsafe { next::$allocate(fd, mode, offset, length) };
            if result == 0 {
                taken::allocated(fd, mode);
            }
            result
        }

        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $truncate(fd: c_int, length: off64_t) -> c_int {
            taken::resized(fd, length);
            // SAFETY: as the program asked.
            unsafe { next::$truncate(fd, length) }
        }
    )* };
}

of_files! {
    fallocate ftruncate;
    fallocate64 ftruncate64;
}

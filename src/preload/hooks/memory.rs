// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mapping and unmapping memory: windows of emulated files, and pages that devices may reach.

use std::ffi::{c_int, c_void};
use std::os::fd::AsRawFd;

use libc::{off64_t, size_t, MAP_FAILED};
use twostage::iommufd::Errno;

use super::ours;
use crate::{next, pins, sys};

fn failed(errno: Errno) -> *mut c_void {
    sys::set_errno(errno);
    MAP_FAILED
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
            if flags & libc::MAP_FIXED != 0 && pins::is_held(address as u64, length as u64) {
                log::error!("private memory at {address:?} is pinned: nothing can be mapped over it");
                return failed(Errno::ENOMEM);
            }
            let window = match flags & libc::MAP_ANONYMOUS {
                0 => ours(fd).and_then(|state| state.window(fd, offset as u64, length as u64)),
                _ => None,
            };
            match window {
                Some(Ok(window)) => {
                    let (fd, offset) = (window.file.as_raw_fd(), window.offset as off64_t);
                    // SAFETY: as the program asked, of the file that is behind its own.
                    unsafe { next::$name(address, length, protection, flags, fd, offset) }
                }
                Some(Err(errno)) => failed(errno),
                // SAFETY: as the program asked.
                None => unsafe { next::$name(address, length, protection, flags, fd, offset) },
            }
        }
    )* };
}

mmap!(mmap mmap64);

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn munmap(address: *mut c_void, length: size_t) -> c_int {
    if pins::release(address as u64, length as u64) {
        // SAFETY: as the program asked.
        return unsafe { next::munmap(address, length) };
    }
    0
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn mremap(
    address: *mut c_void,
    old: size_t,
    new: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let over = flags & libc::MREMAP_FIXED != 0 && pins::is_held(to as u64, new as u64);
    if over || pins::is_held(address as u64, old as u64) {
        log::error!("private memory at {address:?} is pinned: it cannot be moved");
        return failed(Errno::ENOMEM);
    }
    // SAFETY: as the program asked.
    unsafe { next::mremap(address, old, new, flags, to) }
}

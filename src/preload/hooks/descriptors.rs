// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Closing and duplicating descriptors.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong};
use std::os::fd::RawFd;

use twostage::iommufd::Errno;

use super::answer_int;
use crate::state::{self, State};
use crate::table::{self, Entry};
use crate::{next, sys};

/// Whether the table describes this process's descriptors. Looks for one of ours in it first, as
/// most programs have none.
fn is_own_table() -> bool {
    state::begun().is_none_or(State::has_descriptors)
}

/// `to` is now a duplicate of a descriptor that had `source` before.
fn duplicated(source: Entry, to: RawFd) {
    if !is_own_table() {
        return;
    }
    // Whoever closed the other one meanwhile did not close this.
    let is_file = matches!(source, Entry::File(_) | Entry::Closing)
        && state::current().recognise(to).is_some();
    // A number beyond the table is treated like a file that is not emulated: nothing to do.
    if !is_file && table::get(to) != Entry::NotOurs {
        table::set(to, Entry::NotOurs);
    }
}

/// A descriptor with `entry` was closed.
fn closed(entry: Entry) {
    if let Entry::File(slot) = entry {
        state::current().released(slot);
    }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    let entry = table::get(fd);
    let ours = entry != Entry::NotOurs && is_own_table();
    match entry {
        Entry::Internal if ours => return answer_int(Err(Errno::from_raw(libc::EBADF))),
        // Another thread is about to close it.
        Entry::Closing if ours && state::is_emulated(fd) => {
            return answer_int(Err(Errno::from_raw(libc::EBADF)));
        }
        // Later lookups by others fail.
        Entry::File(_) if ours && !table::replace(fd, entry, Entry::Closing) => {
            return answer_int(Err(Errno::from_raw(libc::EBADF)));
        }
        _ => {}
    }
    // SAFETY: as the program asked.
    let result = unsafe { next::close(fd) };
    if let Entry::File(_) = entry {
        if ours {
            table::replace(fd, Entry::Closing, Entry::NotOurs);
            closed(entry);
        }
    }
    result
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn close_range(first: u32, last: u32, flags: c_int) -> c_int {
    if first > last || !is_own_table() {
        // SAFETY: as the program asked.
        return unsafe { next::close_range(first, last, flags) };
    }
    let (unshare, on_exec) = (libc::CLOSE_RANGE_UNSHARE, libc::CLOSE_RANGE_CLOEXEC);
    let unshares = flags & unshare as c_int != 0;
    // The descriptors of a single-threaded program are shared with this library's thread only, and
    // stay so.
    let is_alone = unshares && state::begun().map_or_else(|| table::is_alone(0), State::is_alone);
    let flags = if is_alone { flags & !(unshare as c_int) } else { flags };
    let close = |first, last| {
        // SAFETY: as above.
        let result = unsafe { next::close_range(first, last, flags) };
        if result == 0 && unshares && !is_alone {
            table::leave();
        }
        result
    };
    if flags & on_exec as c_int != 0 {
        return close(first, last);
    }
    let mut files = Vec::new();
    let mut start = first;
    let mut result = 0;
    // The ranges between descriptors that the program does not know.
    for (fd, entry) in table::ours(first, last) {
        let number = fd as u32;
        if let Entry::File(_) = entry {
            // Those of the other threads stay open.
            if (!unshares || is_alone) && table::replace(fd, entry, Entry::Closing) {
                files.push((fd, entry));
            }
        } else if entry == Entry::Internal {
            if start < number {
                result |= close(start, number - 1);
            }
            start = number + 1;
        }
    }
    if start <= last {
        result |= close(start, last);
    }
    let errno = sys::last_errno();
    for (fd, entry) in files {
        // The kernel closes nothing if it does not know a flag.
        let is_open = state::is_emulated(fd);
        table::replace(fd, Entry::Closing, if is_open { entry } else { Entry::NotOurs });
        closed(entry);
    }
    sys::set_errno(errno);
    result
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: as the program asked.
    unsafe { close_range(first.max(0) as u32, u32::MAX, 0) };
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    let source = table::get(fd);
    // SAFETY: as the program asked.
    let new = unsafe { next::dup(fd) };
    if new >= 0 {
        duplicated(source, new);
    }
    new
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    if fd == to {
        // SAFETY: as the program asked.
        return unsafe { next::dup2(fd, to) };
    }
    // SAFETY: as above.
    duplicate_over(fd, to, || unsafe { next::dup2(fd, to) })
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    // SAFETY: as the program asked.
    duplicate_over(fd, to, || unsafe { next::dup3(fd, to, flags) })
}

fn duplicate_over(fd: c_int, to: c_int, duplicate: impl FnOnce() -> c_int) -> c_int {
    let before = table::get(to);
    if before != Entry::NotOurs && !is_own_table() {
        return duplicate();
    }
    if before == Entry::Internal {
        return answer_int(Err(Errno::from_raw(libc::EBADF)));
    }
    let source = table::get(fd);
    let new = duplicate();
    if new >= 0 {
        duplicated(source, new);
        closed(before);
    }
    new
}

macro_rules! fcntl {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
            let source = table::get(fd);
            // SAFETY: as the program asked.
            let result = unsafe { next::$name(fd, command, argument) };
            if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) && result >= 0 {
                duplicated(source, result);
            }
            result
        }
    )* };
}

fcntl!(fcntl fcntl64);

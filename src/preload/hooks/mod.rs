// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The functions of libc that programs call here instead.
//!
//! Each looks whether the path or the descriptor is one of ours, and is otherwise the next
//! library's. Functions that are variadic in C take what they may be given: on x86-64 and AArch64 a
//! variadic integer comes where a named one does, and what was not given is not used.
#![allow(unsafe_code)]

mod descriptors;
mod io;
mod memory;
mod open;
mod status;

use std::ffi::{c_char, c_int, CStr};
use std::os::fd::RawFd;

use twostage::iommufd::Errno;

use crate::state::{self, State};
use crate::table;
use crate::world::Node;
use crate::{logger, sys};

/// A result as libc gives it: -1, and `errno`.
fn answer(result: Result<i64, Errno>) -> i64 {
    result.unwrap_or_else(|errno| {
        sys::set_errno(errno);
        -1
    })
}

/// The same for those that give an `int`: a descriptor, or 0.
fn answer_int(result: Result<i64, Errno>) -> c_int {
    answer(result) as c_int
}

/// What `path` is, when the machine has it.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn node(path: *const c_char) -> Option<(&'static State, Node)> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let node = Node::of(unsafe { CStr::from_ptr(path) }.to_bytes())?;
    let state = state::current();
    state.world().is_ok_and(|world| world.has(node)).then_some((state, node))
}

/// The state when `fd` is, or may be, a descriptor of ours.
fn ours(fd: RawFd) -> Option<&'static State> {
    table::is_file(fd).then(state::current)
}

/// Learns which descriptors of ours came through exec.
extern "C" fn begin() {
    logger::start();
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let inherited: Vec<RawFd> = numbers.filter(|fd| state::is_emulated(*fd)).collect();
    for fd in inherited {
        state::current().recognise(fd);
    }
}

#[used]
#[cfg_attr(not(test), link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hooks: functions that replace those of libc.
//!
//! Each checks whether the path or the descriptor is one of ours, and otherwise calls the next
//! library's function. Functions that are variadic in C take all possible arguments: on x86-64 and
//! AArch64 a variadic integer is passed like a named one, and missing ones are not used.
#![allow(unsafe_code)]

mod descriptors;
mod io;
mod memory;
mod paths;

use std::ffi::{c_char, c_int, CStr};
use std::os::fd::RawFd;

use twostage::iommufd::Errno;

use crate::state::{self, State};
use crate::table;
use crate::world::Node;
use crate::{logger, sys};

/// A libc-style result: -1, and `errno`.
fn answer(result: Result<i64, Errno>) -> i64 {
    result.unwrap_or_else(|errno| {
        sys::set_errno(errno);
        -1
    })
}

/// The same for functions that return an `int`: a descriptor, or 0.
fn answer_int(result: Result<i64, Errno>) -> c_int {
    answer(result) as c_int
}

/// The node at `path`, if the machine has it.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn node(path: *const c_char) -> Option<(&'static State, Node)> {
    if path.is_null() {
        return None;
    }
    // SAFETY: guaranteed by the caller.
    let node = Node::of(unsafe { CStr::from_ptr(path) }.to_bytes())?;
    let state = state::current();
    state.world().is_ok_and(|world| world.has(node)).then_some((state, node))
}

/// The state if `fd` is, or may be, a descriptor of ours.
fn ours(fd: RawFd) -> Option<&'static State> {
    table::is_file(fd).then(state::current)
}

/// Finds the descriptors of ours that were inherited through exec.
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hooks: functions that replace those of libc.
//!
//! Each checks whether the path or the descriptor is one of ours, and otherwise calls the next
//! library's function. Functions that are variadic in C take all possible arguments: on x86-64 and
//! AArch64 a variadic integer is passed like a named one, and missing ones are not used.
#![allow(unsafe_code)]

/// The folder that the paths of a function are relative to: its argument, or the current one.
macro_rules! folder {
    () => {
        libc::AT_FDCWD
    };
    ($folder:ident) => {
        $folder
    };
}

mod descriptors;
mod folders;
mod io;
mod memory;
mod paths;

use std::ffi::{c_char, c_int, CStr, CString};
use std::os::fd::RawFd;

use twostage::iommufd::Errno;

use crate::state::{self, State};
use crate::world::Node;
use crate::{logger, sys, sysfs, table};

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

/// What a path of the program leads to.
enum Place {
    /// Nothing of ours.
    Elsewhere,
    /// A node of the machine.
    Node(&'static State, Node),
    /// A file or folder by this path: mostly in the process's [`sysfs`] folder.
    Shown(CString),
}

impl Place {
    /// Where `path`, relative to `folder` if it is relative, leads.
    ///
    /// # Safety
    /// `path` is null or a C string.
    unsafe fn of(folder: RawFd, path: *const c_char) -> Self {
        if path.is_null() {
            return Self::Elsewhere;
        }
        // SAFETY: guaranteed by the caller.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        match path.first() {
            None => Self::Elsewhere,
            Some(b'/') => Self::at(path),
            Some(_) => below(folder, path).map_or(Self::Elsewhere, |path| Self::at(&path)),
        }
    }

    /// Where `path`, from the root on, leads.
    fn at(path: &[u8]) -> Self {
        let node = Self::node(path);
        if matches!(node, Self::Node(..)) || !sysfs::is_shown(path) {
            return node;
        }
        let Some(sysfs) = state::current().sysfs() else { return Self::Elsewhere };
        // What is not there is not there in the folder, either.
        let plain = sysfs.plain(path).unwrap_or_else(|| path.to_vec());
        match Self::node(&plain) {
            Self::Elsewhere if sysfs::is_shown(&plain) => {
                sysfs.inner(&plain).map_or(Self::Elsewhere, Self::Shown)
            }
            // Back to the kernel's: perhaps from a folder that it has not.
            Self::Elsewhere => CString::new(plain).map_or(Self::Elsewhere, Self::Shown),
            node => node,
        }
    }

    /// The node at `path`, if the machine has it.
    fn node(path: &[u8]) -> Self {
        let Some(node) = Node::of(path) else { return Self::Elsewhere };
        let state = state::current();
        match state.world() {
            Ok(world) if world.has(node) => Self::Node(state, node),
            _ => Self::Elsewhere,
        }
    }

    /// What the next library is to be called with instead of `path`.
    fn instead_of(&self, path: *const c_char) -> *const c_char {
        match self {
            Self::Shown(inner) => inner.as_ptr(),
            Self::Elsewhere | Self::Node(..) => path,
        }
    }
}

/// What `path` in the open folder `folder` stands for, if that is in the process's folder.
fn below(folder: RawFd, path: &[u8]) -> Option<Vec<u8>> {
    let sysfs = state::begun().filter(|_| folder >= 0)?.made_sysfs()?;
    let open = sys::path_of(folder)?;
    Some([sysfs.outer(&open)?, path].join(&b'/'))
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

/// Removes what this process has shown.
extern "C" fn end() {
    if let Some(sysfs) = state::begun().and_then(State::made_sysfs) {
        sysfs.remove();
    }
}

#[used]
#[cfg_attr(not(test), link_section = ".fini_array")]
static END: extern "C" fn() = end;

#[used]
#[cfg_attr(not(test), link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

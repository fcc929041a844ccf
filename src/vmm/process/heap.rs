// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that is out of memory ends with one line and an exit code, instead of an abort: nobody
//! here could go on without.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write;

use crate::process::exit_code;
use crate::process::last_line::Line;

/// The system's allocator, which never fails.
#[derive(Debug)]
pub struct Heap;

// SAFETY: everything is the system's allocator's, and where that has no memory, the call does not
// return.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps what the system's allocator asks for.
        there(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        there(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        there(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// `memory`, if there is any.
fn there(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() {
        end_without(size)
    }
    memory
}

/// Ends the process, as there is no memory for `size` bytes.
pub(super) fn end_without(size: usize) -> ! {
    let mut line = Line::new();
    // What does not fit is cut off.
    let _ = writeln!(
        line,
        "twostage: error: there is no memory for {size} bytes; see ulimit -v, and what the host \
         has left"
    );
    line.end(exit_code::OS_ERROR)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stack of the main thread grows while it is used, and where the system has no memory for
//! that, the process gets SIGSEGV. So it grows at the start, where the lack of memory can be said.
//! Other threads' stacks have their memory from the start.

use std::hint::black_box;

use rustix::process::{getrlimit, Resource};
use vm_memory::MmapRegion;

use super::heap;

/// What the main thread needs at most, with much to spare, in bytes.
const NEEDED: usize = 1 << 20;
/// It grows by so many bytes at once.
const PIECE: usize = 16 << 10;

/// Lets the stack of this thread, the main one, grow to what the command needs, or to half of what
/// it may have. Where there is no memory for that, the process ends with one line.
pub fn grow() {
    let allowed = getrlimit(Resource::Stack).current;
    let needed = allowed.map_or(NEEDED, |allowed| NEEDED.min((allowed / 2) as usize));
    // As much is asked of the system, and given back.
    if MmapRegion::<()>::new(needed.max(PIECE)).is_err() {
        heap::end_without(needed);
    }
    touch(needed);
}

/// Uses at most `bytes` of the stack, in whole pieces.
#[inline(never)]
fn touch(bytes: usize) {
    if bytes < PIECE {
        return;
    }
    let mut piece = [0_u8; PIECE];
    black_box(&mut piece);
    touch(bytes - PIECE);
    // The piece is in use until here.
    black_box(&mut piece);
}

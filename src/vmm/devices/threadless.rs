// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices without threads, for fuzzers: what they do, they do when they are told to, and so in the
//! same order each time.

use std::cell::Cell;

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Devices that this thread makes or starts from now on have no thread of their own, or have.
pub fn without_threads(wanted: bool) {
    WANTED.set(wanted);
}

/// Whether a device is to have no thread.
pub fn is_wanted() -> bool {
    WANTED.get()
}

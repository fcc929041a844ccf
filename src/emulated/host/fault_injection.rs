// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault injection by position, like Linux's `fail-nth`: the n-th allocation of a thread fails.
//!
//! Everything that a call creates or records calls [`allocate`] first: objects, areas, pins, page
//! tables, attachments. So a test can make a call fail at each step in turn, and check that it
//! returns `ENOMEM` and has changed nothing. In ordinary builds allocations never fail.

use std::cell::Cell;

use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;

/// Whether allocations can be made to fail.
const INJECTED: bool = cfg!(any(test, feature = "selftest"));

thread_local! {
    /// Which allocation from now on fails, counted from 1; 0 for none.
    static FAIL_NTH: Cell<u64> = const { Cell::new(0) };
}

/// The `n`-th allocation of this thread from now on fails (1 is the next), once; 0 for none.
pub fn set_fail_nth(n: u64) {
    FAIL_NTH.set(n);
}

/// The failing allocation from now on: 0 once it has failed, or if none will.
pub fn fail_nth() -> u64 {
    FAIL_NTH.get()
}

/// Memory for `what`, for the error message.
///
/// # Errors
/// `ENOMEM` this allocation was to fail.
#[inline]
pub(crate) fn allocate(what: &'static str) -> Outcome<()> {
    if INJECTED {
        let left = fail_nth();
        set_fail_nth(left.saturating_sub(1));
        if left == 1 {
            return refuse(Errno::ENOMEM, format!("no memory for {what}"));
        }
    }
    Ok(())
}

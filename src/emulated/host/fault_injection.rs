// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault injection by position, in the manner of Linux's `fail-nth`: the n-th allocation of a
//! thread fails.
//!
//! Whatever a call makes or has to remember asks [`allocate`] first: objects, areas, what is
//! pinned, page tables, attachments. So a test can fail a call at each step in turn, and look that
//! it answers `ENOMEM` and has changed nothing. In ordinary builds there always is memory.

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

/// Which allocation from now on fails: 0 once it has failed, or when none is to.
pub fn fail_nth() -> u64 {
    FAIL_NTH.get()
}

/// Memory for `what`, in words.
///
/// # Errors
/// `ENOMEM` it is the allocation that was asked to fail.
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

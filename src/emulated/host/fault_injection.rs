// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Fault injection by position, in the manner of Linux's `fail-nth`: the n-th allocation of a
//! thread fails.
//!
//! Whatever a call makes or has to remember asks [`allocate`] first: objects, areas, what is
//! pinned, page tables, attachments. So a test can fail a call at each step in turn, and look that
//! it answers `ENOMEM` and has changed nothing. In ordinary builds there always is memory.

use crate::host::refusal::Outcome;

/// Memory for `what`, in words.
///
/// # Errors
/// `ENOMEM` it is the allocation that was asked to fail.
#[cfg(any(test, feature = "selftest"))]
pub(crate) fn allocate(what: &'static str) -> Outcome<()> {
    use crate::host::refusal::refuse;
    use twostage::iommufd::Errno;

    if injection::fails() {
        return refuse(Errno::ENOMEM, format!("no memory for {what}"));
    }
    Ok(())
}

/// Memory for `what`, in words.
#[cfg(not(any(test, feature = "selftest")))]
#[inline]
pub(crate) fn allocate(_what: &'static str) -> Outcome<()> {
    Ok(())
}

#[cfg(any(test, feature = "selftest"))]
pub use injection::{fail_nth, set_fail_nth};

#[cfg(any(test, feature = "selftest"))]
mod injection {
    use std::cell::Cell;

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

    pub(super) fn fails() -> bool {
        let left = FAIL_NTH.get();
        FAIL_NTH.set(left.saturating_sub(1));
        left == 1
    }
}

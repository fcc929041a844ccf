// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The error of a verb, independent of which verb it was; and the errors that a test asks for.
//!
//! Fault injection is by position, like Linux's `fail-nth`: the n-th allocation of a thread fails.
//! Everything that a call creates or records calls [`allocate`] first: objects, areas, pins, page
//! tables, attachments. So a test can make a call fail at each step in turn, and check that it
//! returns `ENOMEM` and has changed nothing. In ordinary builds allocations never fail.

use std::borrow::Cow;
use std::cell::Cell;

use twostage::iommufd::{Errno, HostError, ObjectId, Verb};

/// Linux's errno, and a description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Linux's error number.
    pub errno: Errno,
    /// What was wrong, with the value.
    pub detail: Cow<'static, str>,
}

/// The result of a rule of the objects.
pub(crate) type Outcome<T> = Result<T, Refusal>;

impl Refusal {
    /// `verb`, called on `object`, failed because of this.
    pub fn of(self, verb: Verb, object: impl Into<Option<ObjectId>>) -> HostError {
        HostError::new(verb, object, self.errno, self.detail)
    }
}

/// Refuses with `errno` because of `detail`.
pub(crate) fn refuse<T>(errno: Errno, detail: impl Into<Cow<'static, str>>) -> Outcome<T> {
    Err(Refusal { errno, detail: detail.into() })
}

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

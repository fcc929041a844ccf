// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The error of a verb, independent of which verb it was.

use std::borrow::Cow;

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

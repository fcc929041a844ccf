// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a requester is attached to.

use crate::iommufd::ObjectId;

/// What a requester is attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Attached {
    /// Nothing: it is blocked.
    #[default]
    Nothing,
    /// The nesting parent: untranslated.
    Parent,
    /// This `HWPT_NESTED`.
    Nested(ObjectId),
}

/// What the host was last told of a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Slot {
    /// What it was attached to.
    pub attached: Attached,
    /// An attach or a detach failed since, so that the host's books and its hardware may disagree.
    /// Only a detach makes them agree again.
    pub unsettled: bool,
}

impl Slot {
    /// Attached, without a doubt.
    pub fn on(attached: Attached) -> Self {
        Self { attached, unsettled: false }
    }
}

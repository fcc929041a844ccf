// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a requester was given.

use crate::viommu::RequesterConfig;

/// The configuration of a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::vtd) struct Given {
    pub config: RequesterConfig,
    /// The host has it. Otherwise the host refused, or lost it, and must be told again.
    pub applied: bool,
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What nesting has done so far.

/// Counters of a [`super::VtdNesting`], all from one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct VtdNestingCounters {
    /// `HWPT_NESTED` objects made.
    pub nested_allocs: u64,
    /// Requesters that were given a `HWPT_NESTED` that others used already.
    pub nested_shares: u64,
    /// Configurations that asked for what was there and cost no host call.
    pub unchanged: u64,
    /// Attachments that replaced another.
    pub replaces: u64,
    /// Attachments that the host refused.
    pub refused_attaches: u64,
    /// Invalidations that the virtual IOMMU handed over.
    pub invalidations_in: u64,
    /// Invalidation entries that the host completed.
    pub entries_out: u64,
    /// Ranges that needed no entry of their own, because another one covers them.
    pub merged: u64,
    /// Calls to the host, of any verb.
    pub host_calls: u64,
}

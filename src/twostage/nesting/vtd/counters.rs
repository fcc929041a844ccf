// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What nesting has done so far.

crate::counters! {
    /// Counters of a [`super::VtdNesting`], all from one moment.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct VtdNestingCounters {
        /// `HWPT_NESTED` objects made.
        nested_allocs,
        /// Requesters that were given a `HWPT_NESTED` that others used already.
        nested_shares,
        /// Configurations that asked for what was there and cost no host call.
        unchanged,
        /// Attachments that replaced another.
        replaces,
        /// Attachments that the host refused.
        refused_attaches,
        /// Invalidations that the virtual IOMMU handed over.
        invalidations_in,
        /// Invalidation entries that the host completed.
        entries_out,
        /// Ranges that needed no entry of their own, because another one covers them.
        merged,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

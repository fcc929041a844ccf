// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics of nesting.

crate::counters! {
    /// Counters of a [`super::VtdNesting`]: a snapshot.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct VtdNestingCounters {
        /// `HWPT_NESTED` objects allocated.
        nested_allocs,
        /// Requesters attached to a `HWPT_NESTED` that others used already.
        nested_shares,
        /// Configurations without a change, and so without a host call.
        unchanged,
        /// Attachments that replaced another one.
        replaces,
        /// Attachments refused by the host.
        refused_attaches,
        /// Invalidations received from the virtual IOMMU.
        invalidations_in,
        /// Invalidation entries completed by the host.
        entries_out,
        /// Ranges that needed no entry of their own, because another one covers them.
        merged,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

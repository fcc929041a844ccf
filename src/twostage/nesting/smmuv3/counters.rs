// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Statistics of the nesting of a virtual SMMUv3.

crate::counters! {
    /// Counters of a [`super::SmmuNesting`]. Those of events may change while they are read; the
    /// others are a snapshot.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct SmmuNestingCounters {
        /// `HWPT_NESTED` objects allocated.
        nested_allocs,
        /// Streams attached to an existing `HWPT_NESTED`.
        nested_shares,
        /// Configurations without a change, and so without a host call.
        unchanged,
        /// Attachments that replaced another one.
        replaces,
        /// Attachments refused by the host.
        refused_attaches,
        /// Commands received from the virtual SMMU.
        commands_in,
        /// Commands completed by the host; one that is issued twice counts twice.
        commands_out,
        /// Commands that needed no host call, because another one of their batch has the same
        /// effect.
        merged,
        /// Commands that needed no host call, because nothing they name can be cached.
        not_cached,
        /// Flushes of everything: after a refused batch, or for invalidations withheld while no
        /// stream used stage 1.
        full_flushes,
        /// Events delivered to the virtual SMMU.
        events,
        /// Times that events were found to be lost.
        events_lost,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What nesting of a virtual SMMUv3 has done so far.

crate::counters! {
    /// Counters of a [`super::SmmuNesting`]. Those of events go on while they are read; the rest
    /// are from one moment.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    pub struct SmmuNestingCounters {
        /// `HWPT_NESTED` objects made.
        nested_allocs,
        /// Streams that were given a `HWPT_NESTED` that was there already.
        nested_shares,
        /// Configurations that asked for what was there and cost no host call.
        unchanged,
        /// Attachments that replaced another.
        replaces,
        /// Attachments that the host refused.
        refused_attaches,
        /// Commands that the virtual SMMU handed over.
        commands_in,
        /// Commands that the host completed; one that it is given twice counts twice.
        commands_out,
        /// Commands that needed no host call, because another one of their batch does the same.
        merged,
        /// Commands that needed no host call, because nothing that they name can be cached.
        not_cached,
        /// Times that everything was flushed: after a refused batch, or for what was kept back
        /// while no stream used stage 1.
        full_flushes,
        /// Events that were brought to the virtual SMMU.
        events,
        /// Times that events turned out to be lost.
        events_lost,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

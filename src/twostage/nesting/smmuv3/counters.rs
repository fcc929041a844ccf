// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What nesting of a virtual SMMUv3 has done so far.

/// Counters of a [`super::SmmuNesting`]. Those of events go on while they are read; the rest are
/// from one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SmmuNestingCounters {
    /// `HWPT_NESTED` objects made.
    pub nested_allocs: u64,
    /// Streams that were given a `HWPT_NESTED` that was there already.
    pub nested_shares: u64,
    /// Configurations that asked for what was there and cost no host call.
    pub unchanged: u64,
    /// Attachments that replaced another.
    pub replaces: u64,
    /// Attachments that the host refused.
    pub refused_attaches: u64,
    /// Commands that the virtual SMMU handed over.
    pub commands_in: u64,
    /// Commands that the host completed; one that it is given twice counts twice.
    pub commands_out: u64,
    /// Commands that needed no host call, because another one of their batch does the same.
    pub merged: u64,
    /// Commands that needed no host call, because nothing that they name can be cached.
    pub not_cached: u64,
    /// Times that everything was flushed: after a refused batch, or for what was kept back while no
    /// stream used stage 1.
    pub full_flushes: u64,
    /// Events that were brought to the virtual SMMU.
    pub events: u64,
    /// Times that events turned out to be lost.
    pub events_lost: u64,
    /// Calls to the host, of any verb.
    pub host_calls: u64,
}

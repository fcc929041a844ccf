// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stream table entries: what a `HWPT_NESTED` is of.

use crate::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use crate::viommu::smmuv3::StreamPolicy;

/// Words 0 and 1 of a stream table entry.
pub(super) type Entry = [u64; 2];

/// The entry that terminates every transaction.
pub(super) const ABORT: Entry = fixed(StreamConfig::Abort);
/// The entry that lets every transaction pass, with events of what cannot.
const BYPASS: Entry = fixed(StreamConfig::Bypass);

const fn fixed(config: StreamConfig) -> Entry {
    [Ste0::new().with_v(true).with_config(config.into_bits()).into_bits(), 0]
}

/// The entry of `policy`; none while translation is off, when the nesting parent lets pass what
/// may. Linux gives the owner of stage 1 no event of a stream that is attached to that, and there
/// is none to be had.
pub(super) fn entry(policy: &StreamPolicy) -> Option<Entry> {
    match policy {
        StreamPolicy::Abort => Some(ABORT),
        StreamPolicy::GlobalBypass => None,
        StreamPolicy::Bypass => Some(BYPASS),
        StreamPolicy::Stage1 { ste } => Some(*ste),
    }
}

/// Whether transactions go through stage 1 by `entry`.
pub(super) fn translates(entry: Entry) -> bool {
    StreamConfig::from_bits(Ste0::from_bits(entry[0]).config()).stage1()
}

/// Whether devices may keep translations by `entry` (EATS).
pub(super) fn uses_ats(entry: Entry) -> bool {
    translates(entry) && Ste1::from_bits(entry[1]).eats() != 0
}

/// Whether there may be context descriptors of substreams by `entry` (S1CDMax).
pub(super) fn has_substreams(entry: Entry) -> bool {
    translates(entry) && Ste0::from_bits(entry[0]).s1cdmax() != 0
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stream table entries: what a `HWPT_NESTED` stands for.

use crate::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use crate::viommu::smmuv3::StreamPolicy;

/// Words 0 and 1 of a stream table entry.
pub(super) type Entry = [u64; 2];

/// The entry that terminates every transaction.
pub(super) const ABORT: Entry = fixed(StreamConfig::Abort);
/// The entry that lets every transaction pass, with events for those that cannot.
const BYPASS: Entry = fixed(StreamConfig::Bypass);

const fn fixed(config: StreamConfig) -> Entry {
    [Ste0::new().with_v(true).with_config(config.into_bits()).into_bits(), 0]
}

/// The entry of `policy`; `None` while translation is off, when the stream is attached to the
/// nesting parent. Linux reports no events of such a stream to the owner of stage 1, and none are
/// due.
pub(super) fn entry(policy: &StreamPolicy) -> Option<Entry> {
    match policy {
        StreamPolicy::Abort => Some(ABORT),
        StreamPolicy::GlobalBypass => None,
        StreamPolicy::Bypass => Some(BYPASS),
        StreamPolicy::Stage1 { ste } => Some(*ste),
    }
}

/// Whether transactions use stage 1 with `entry`.
pub(super) fn translates(entry: Entry) -> bool {
    StreamConfig::from_bits(Ste0::from_bits(entry[0]).config()).stage1()
}

/// Whether devices may cache translations with `entry` (EATS).
pub(super) fn uses_ats(entry: Entry) -> bool {
    translates(entry) && Ste1::from_bits(entry[1]).eats() != 0
}

/// Whether `entry` may have context descriptors for substreams (S1CDMax).
pub(super) fn has_substreams(entry: Entry) -> bool {
    translates(entry) && Ste0::from_bits(entry[0]).s1cdmax() != 0
}

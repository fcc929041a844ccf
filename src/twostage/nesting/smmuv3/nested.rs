// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The books of the `HWPT_NESTED` objects: which stream table entry each is of.

use std::collections::{BTreeMap, BTreeSet};

use crate::iommufd::ObjectId;
use crate::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use crate::spec::smmuv3::StreamId;
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

#[derive(Debug)]
struct Nested {
    entry: Entry,
    users: BTreeSet<StreamId>,
}

/// Every `HWPT_NESTED` there is. Books only: nothing here calls the host.
#[derive(Debug, Default)]
pub(super) struct NestedHwpts {
    by_id: BTreeMap<ObjectId, Nested>,
    by_entry: BTreeMap<Entry, ObjectId>,
}

impl NestedHwpts {
    /// The HWPT of `entry`.
    pub fn find(&self, entry: Entry) -> Option<ObjectId> {
        self.by_entry.get(&entry).copied()
    }

    /// Enters a new HWPT that nobody uses yet.
    pub fn insert(&mut self, hwpt: ObjectId, entry: Entry) {
        self.by_id.insert(hwpt, Nested { entry, users: BTreeSet::new() });
        self.by_entry.insert(entry, hwpt);
    }

    /// The entry of `hwpt`.
    pub fn entry(&self, hwpt: ObjectId) -> Option<Entry> {
        self.by_id.get(&hwpt).map(|nested| nested.entry)
    }

    /// From now on `stream` uses `hwpt`.
    pub fn join(&mut self, hwpt: ObjectId, stream: StreamId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            nested.users.insert(stream);
        }
    }

    /// From now on `stream` does not use `hwpt`.
    pub fn leave(&mut self, hwpt: ObjectId, stream: StreamId) {
        if let Some(nested) = self.by_id.get_mut(&hwpt) {
            nested.users.remove(&stream);
        }
    }

    /// Strikes out a HWPT with tables of the guest's if nobody uses it. Says whether it did. Those
    /// that abort and bypass stay: the guest needs them again.
    pub fn remove_unused(&mut self, hwpt: ObjectId) -> bool {
        match self.by_id.get(&hwpt) {
            Some(Nested { entry, users }) if users.is_empty() && translates(*entry) => {
                self.by_entry.remove(entry);
                self.by_id.remove(&hwpt);
                true
            }
            _ => false,
        }
    }

    /// Every HWPT, with its entry and its users.
    pub fn iter(&self) -> impl Iterator<Item = (ObjectId, Entry, &BTreeSet<StreamId>)> {
        self.by_id.iter().map(|(hwpt, nested)| (*hwpt, nested.entry, &nested.users))
    }

    /// Strikes out every HWPT.
    pub fn take_all(&mut self) -> Vec<ObjectId> {
        self.by_entry.clear();
        std::mem::take(&mut self.by_id).into_keys().collect()
    }
}

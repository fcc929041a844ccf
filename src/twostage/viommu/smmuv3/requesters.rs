// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The decision made for every stream ([`Ledger`]), and by which table.

use std::collections::BTreeMap;

use super::policy::ConfigFault;
use super::state::{StreamState, TableRegisters};
use super::StreamPolicy;
use crate::spec::smmuv3::StreamId;
use crate::viommu::ledger::{Entries, Ledger};

/// The decision for a stream: a policy, or why it is blocked.
pub(super) type Decision = Result<StreamPolicy, ConfigFault>;

/// The decision made for a stream.
pub(super) type Given = crate::viommu::ledger::Given<Decision>;

/// The streams behind an SMMU, and their decisions.
pub(super) type Streams = Ledger<Published>;

/// The state needed to explain an event of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// The location of the stream table, while translation is enabled or being enabled.
    pub table: Option<TableRegisters>,
    /// C_BAD_STREAMID is recorded (CR2.RECINVSID).
    pub recording_bad_streams: bool,
    pub given: Option<Given>,
}

/// The published state.
#[derive(Debug, Default)]
pub(super) struct Published {
    table: Option<TableRegisters>,
    recording_bad_streams: bool,
    streams: BTreeMap<StreamId, Option<Given>>,
}

impl Entries for Published {
    type Requester = StreamId;
    type Decision = Decision;

    fn is_block(decision: &Decision) -> bool {
        matches!(decision, Ok(StreamPolicy::Abort) | Err(_))
    }

    fn get(&self, stream: StreamId) -> Option<Given> {
        self.streams.get(&stream).copied().flatten()
    }

    fn set(&mut self, stream: StreamId, given: Given) {
        if let Some(place) = self.streams.get_mut(&stream) {
            *place = Some(given);
        }
    }

    fn unapply_all(&mut self) {
        self.streams.values_mut().flatten().for_each(|given| given.applied = false);
    }
}

impl Streams {
    /// Adds a stream without a decision; `false` if it exists already.
    pub fn add(&self, stream: StreamId) -> bool {
        let mut published = self.write();
        let new = !published.streams.contains_key(&stream);
        published.streams.entry(stream).or_default();
        new
    }

    /// Removes a stream; `false` if it does not exist.
    pub fn remove(&self, stream: StreamId) -> bool {
        self.write().streams.remove(&stream).is_some()
    }

    /// Every stream, ascending.
    pub fn all(&self) -> Vec<StreamId> {
        self.read().streams.keys().copied().collect()
    }

    /// Their part of a snapshot: the location of the stream table, and the streams.
    pub fn snapshot(&self) -> (Option<TableRegisters>, Vec<StreamState>) {
        let published = self.read();
        let streams = published
            .streams
            .iter()
            .map(|(&stream, given)| StreamState { stream, decision: given.map(Into::into) });
        (published.table, streams.collect())
    }

    pub fn contains(&self, stream: StreamId) -> bool {
        self.read().streams.contains_key(&stream)
    }

    /// From now on streams follow the table; with `None`, there are no events.
    pub fn set_table(&self, table: Option<TableRegisters>) {
        self.write().table = table;
    }

    /// Whether translation is enabled, or a failed attempt to enable it was not undone.
    pub fn is_translating(&self) -> bool {
        self.read().table.is_some()
    }

    /// Sets whether C_BAD_STREAMID is recorded (CR2.RECINVSID).
    pub fn set_recording_bad_streams(&self, recording: bool) {
        self.write().recording_bad_streams = recording;
    }

    /// The state needed to explain an event of `stream`; `None` if it does not exist.
    pub fn standing(&self, stream: StreamId) -> Option<Standing> {
        let published = self.read();
        let given = *published.streams.get(&stream)?;
        Some(Standing {
            table: published.table,
            recording_bad_streams: published.recording_bad_streams,
            given,
        })
    }

    /// All streams whose decision the host has not applied.
    pub fn unapplied(&self) -> Vec<StreamId> {
        let published = self.read();
        let unapplied =
            published.streams.iter().filter(|(_, given)| given.is_none_or(|given| !given.applied));
        unapplied.map(|(&stream, _)| stream).collect()
    }
}

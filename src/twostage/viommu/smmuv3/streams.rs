// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every stream was given, readable without the model's lock.

use crate::sync::RwLock;
use std::collections::BTreeMap;
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use super::policy::ConfigFault;
use super::StreamPolicy;
use crate::spec::smmuv3::regs::{StrtabBase, StrtabBaseCfg};
use crate::spec::smmuv3::StreamId;

/// What is decided for a stream: a policy, or why it is blocked.
pub(super) type Decision = Result<StreamPolicy, ConfigFault>;

/// Where the stream table is (STRTAB_BASE, STRTAB_BASE_CFG).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TableRegisters {
    pub base: StrtabBase,
    pub cfg: StrtabBaseCfg,
}

/// What a stream was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Given {
    pub decision: Decision,
    /// The host has done it. If not, it is given again at the next occasion.
    pub applied: bool,
}

/// What there is to know of an event of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// Where the stream table is, while translation is enabled or is being enabled.
    pub table: Option<TableRegisters>,
    /// C_BAD_STREAMID is recorded (CR2.RECINVSID).
    pub recording_bad_streams: bool,
    pub given: Option<Given>,
}

/// The streams behind an SMMU. A lock of its own, taken last and for a moment.
#[derive(Debug, Default)]
pub(super) struct Streams {
    published: RwLock<Published>,
}

#[derive(Debug, Default)]
struct Published {
    table: Option<TableRegisters>,
    recording_bad_streams: bool,
    /// The host is yet to be given what it lost, or did not take though it blocks nothing.
    owed: bool,
    streams: BTreeMap<StreamId, Option<Given>>,
}

impl Streams {
    fn read(&self) -> RwLockReadGuard<'_, Published> {
        self.published.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Published> {
        self.published.write()
    }

    /// Adds a stream that was given nothing; `false` when it is there already.
    pub fn add(&self, stream: StreamId) -> bool {
        let mut published = self.write();
        let new = !published.streams.contains_key(&stream);
        published.streams.entry(stream).or_default();
        new
    }

    /// Removes a stream; `false` when it is not there.
    pub fn remove(&self, stream: StreamId) -> bool {
        self.write().streams.remove(&stream).is_some()
    }

    /// Every stream, ascending.
    pub fn all(&self) -> Vec<StreamId> {
        self.read().streams.keys().copied().collect()
    }

    pub fn contains(&self, stream: StreamId) -> bool {
        self.read().streams.contains_key(&stream)
    }

    /// From now on streams go by the table, or there is none and no event.
    pub fn set_table(&self, table: Option<TableRegisters>) {
        self.write().table = table;
    }

    /// Whether translation is enabled, or an attempt to enable it was not undone.
    pub fn is_translating(&self) -> bool {
        self.read().table.is_some()
    }

    /// From now on C_BAD_STREAMID is recorded, or not (CR2.RECINVSID).
    pub fn set_recording_bad_streams(&self, recording: bool) {
        self.write().recording_bad_streams = recording;
    }

    /// What `stream` was given.
    pub fn given(&self, stream: StreamId) -> Option<Given> {
        self.read().streams.get(&stream).copied().flatten()
    }

    /// What there is to know of an event of `stream`; `None` when it is not here.
    pub fn standing(&self, stream: StreamId) -> Option<Standing> {
        let published = self.read();
        let given = *published.streams.get(&stream)?;
        Some(Standing {
            table: published.table,
            recording_bad_streams: published.recording_bad_streams,
            given,
        })
    }

    /// Publishes what `stream` is given. Nothing happens for a stream that is not here.
    pub fn give(&self, stream: StreamId, given: Given) {
        if let Some(place) = self.write().streams.get_mut(&stream) {
            *place = Some(given);
        }
    }

    /// The host may have lost any of what it was given: all of it is owed.
    pub fn distrust_host(&self) {
        let mut published = self.write();
        published.owed = true;
        published.streams.values_mut().flatten().for_each(|given| given.applied = false);
    }

    /// Whatever the host does not have is owed, or is not any more.
    pub fn set_owed(&self, owed: bool) {
        self.write().owed = owed;
    }

    /// Whether anything is owed to the host before more is acknowledged to the guest.
    pub fn is_owed(&self) -> bool {
        self.read().owed
    }

    /// Every stream whose decision the host does not have.
    pub fn unapplied(&self) -> Vec<StreamId> {
        let published = self.read();
        let unapplied =
            published.streams.iter().filter(|(_, given)| given.is_none_or(|given| !given.applied));
        unapplied.map(|(&stream, _)| stream).collect()
    }
}

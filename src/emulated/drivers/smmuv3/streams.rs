// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The streams of a vIOMMU, by the user's StreamIDs.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use crate::host::device::Requester;
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;
use twostage::spec::smmuv3::StreamId;

/// Destination of the events of a user's stream.
#[derive(Debug, Clone)]
pub(super) struct Vmaster {
    /// The user's StreamID.
    pub vsid: u32,
    /// The vEVENTQs of the vIOMMU.
    pub events: Arc<ViommuEvents>,
}

/// The streams of a vIOMMU.
#[derive(Debug)]
pub(super) struct Streams {
    /// Requester IDs by the user's StreamIDs.
    by_vsid: Mutex<BTreeMap<u64, u16>>,
    events: Arc<ViommuEvents>,
}

impl Streams {
    /// No streams yet; their events will go to `events`.
    pub fn new(events: Arc<ViommuEvents>) -> Self {
        Self { by_vsid: Mutex::default(), events }
    }

    /// The user calls the stream of requester ID `rid` `vsid`.
    pub fn insert(&self, vsid: u64, rid: u16) {
        self.by_vsid().insert(vsid, rid);
    }

    /// Removes the stream called `vsid`.
    pub fn remove(&self, vsid: u64) {
        self.by_vsid().remove(&vsid);
    }

    /// Destination of the events of `device`, if the vIOMMU knows it.
    pub fn vmaster(&self, device: &Requester) -> Option<Vmaster> {
        let (vsid, _) = self
            .by_vsid()
            .iter()
            .map(|(vsid, sid)| (*vsid, *sid))
            .find(|(_, sid)| *sid == device.rid.raw())?;
        // Linux truncates it like this.
        Some(Vmaster { vsid: vsid as u32, events: self.events.clone() })
    }

    /// The stream that the user calls `vsid`.
    ///
    /// # Errors
    /// `EIO` there is none.
    pub fn sid(&self, vsid: StreamId) -> Outcome<u16> {
        match self.by_vsid().get(&vsid.raw().into()) {
            Some(sid) => Ok(*sid),
            None => refuse(Errno::EIO, format!("no vDEVICE has the StreamID {vsid}")),
        }
    }

    fn by_vsid(&self) -> MutexGuard<'_, BTreeMap<u64, u16>> {
        self.by_vsid.lock()
    }
}

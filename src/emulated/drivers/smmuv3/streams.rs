// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The streams of a vIOMMU, by the user's StreamIDs, and where their events go.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use crate::host::device::Requester;
use crate::host::events::ViommuEvents;
use crate::host::refusal::{refuse, Outcome};
use crate::units::smmuv3::EventSink;
use twostage::iommufd::{Errno, FaultSink, HostFault, ObjectId, VEVENTQ_ARM_SMMUV3};
use twostage::spec::smmuv3::event::EventRecord;
use twostage::spec::smmuv3::StreamId;

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

/// Destination of the events of a user's stream.
#[derive(Debug, Clone)]
pub(super) struct Vmaster {
    /// The user's StreamID.
    pub vsid: u32,
    /// The vEVENTQs of the vIOMMU.
    pub events: Arc<ViommuEvents>,
}

/// The event destinations of a stream: stage 1's events go to the vIOMMU that it is attached
/// through, with the user's StreamID; stage 2's concern the host.
#[derive(Debug, Default)]
pub(super) struct Master(Mutex<Targets>);

#[derive(Default)]
struct Targets {
    /// The vIOMMU that the stream is attached through.
    vmaster: Option<Vmaster>,
    /// Beyond Linux: gets the faults of stage 2.
    sink: Option<(ObjectId, Weak<dyn FaultSink>)>,
}

impl std::fmt::Debug for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Targets").field("vmaster", &self.vmaster).finish_non_exhaustive()
    }
}

impl Master {
    /// Sets the vIOMMU that the stream is attached through, if any.
    pub fn set_vmaster(&self, vmaster: Option<Vmaster>) {
        self.targets().vmaster = vmaster;
    }

    /// Sets the sink for faults of stage 2.
    pub fn set_fault_sink(&self, sink: Option<(ObjectId, Weak<dyn FaultSink>)>) {
        self.targets().sink = sink;
    }

    fn targets(&self) -> MutexGuard<'_, Targets> {
        self.0.lock()
    }
}

impl EventSink for Master {
    fn event(&self, record: &EventRecord) {
        let targets = self.targets();
        if !record.qw1.s2() {
            if let Some(Vmaster { vsid, events }) = &targets.vmaster {
                let record = EventRecord { qw0: record.qw0.with_stream_id(*vsid), ..*record };
                let bytes: Vec<u8> =
                    record.to_words().into_iter().flat_map(u64::to_le_bytes).collect();
                // Without a vEVENTQ the event is dropped.
                let _ = events.report(VEVENTQ_ARM_SMMUV3, &bytes);
            }
            return;
        }
        let sink = targets.sink.as_ref().and_then(|(dev, sink)| Some((*dev, sink.upgrade()?)));
        drop(targets);
        if let Some((dev, sink)) = sink {
            sink.dma_fault(&HostFault {
                dev,
                pasid: record.substream().map(|substream| substream.raw()),
                address: record.input_address,
                write: !record.qw1.rnw(),
                execute: record.qw1.ind(),
                privileged: record.qw1.pnu(),
                reason: record.qw0.id(),
                stage2: true,
            });
        }
    }
}

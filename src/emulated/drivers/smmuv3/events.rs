// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routing of a stream's events: stage 1's go to the vIOMMU that it is attached through, with the
//! user's StreamID; stage 2's concern the host.

use std::sync::{MutexGuard, Weak};
use twostage::sync::Mutex;

use super::streams::Vmaster;
use crate::units::smmuv3::EventSink;
use twostage::iommufd::{FaultSink, HostFault, ObjectId, VEVENTQ_ARM_SMMUV3};
use twostage::spec::smmuv3::event::EventRecord;

/// The event destinations of a stream.
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where events of a stream go: stage 1's to the vIOMMU that the stream is the user's by, with the
//! user's StreamID; stage 2's are the host's own.

use std::sync::{MutexGuard, Weak};
use twostage::sync::Mutex;

use super::streams::Vmaster;
use crate::units::smmuv3::EventSink;
use twostage::iommufd::{FaultSink, HostFault, ObjectId, VEVENTQ_ARM_SMMUV3};
use twostage::spec::smmuv3::event::EventRecord;

/// A stream, as its events see it.
#[derive(Debug, Default)]
pub(super) struct Master(Mutex<Targets>);

#[derive(Default)]
struct Targets {
    /// The vIOMMU that the stream is attached through.
    vmaster: Option<Vmaster>,
    /// Beyond Linux: who is told of what stage 2 refuses.
    sink: Option<(ObjectId, Weak<dyn FaultSink>)>,
}

impl std::fmt::Debug for Targets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Targets").field("vmaster", &self.vmaster).finish_non_exhaustive()
    }
}

impl Master {
    /// From now on the stream is attached through `vmaster`, or through none.
    pub fn set_vmaster(&self, vmaster: Option<Vmaster>) {
        self.targets().vmaster = vmaster;
    }

    /// From now on `sink` is told of what stage 2 refuses.
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
                // Nobody need want events; there is nobody else to tell.
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

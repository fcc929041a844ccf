// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a transaction was terminated, and the event record (§7.3).

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use twostage::sync::Mutex;

use crate::dma::error::DmaFaultReason;
use crate::units::engine::{self, Report, Request, Stage2Refusal};
use twostage::spec::smmuv3::event::{EventClass, EventId, EventRecord, SecondAddress};
use twostage::spec::smmuv3::{StreamId, SubstreamId};

/// Destination of the events of one stream: what its driver does with the event queue.
pub(crate) trait EventSink: Debug + Send + Sync {
    /// A transaction was terminated; `record` has the reason and the physical StreamID.
    fn event(&self, record: &EventRecord);
}

/// Where the events of each stream go. The lock is never held together with the gate.
#[derive(Debug, Default)]
pub(super) struct Sinks(Mutex<BTreeMap<u16, Arc<dyn EventSink>>>);

impl Sinks {
    /// Events of `sid` go to `sink`.
    pub fn set(&self, sid: u16, sink: Arc<dyn EventSink>) {
        self.0.lock().insert(sid, sink);
    }

    fn get(&self, sid: u16) -> Option<Arc<dyn EventSink>> {
        self.0.lock().get(&sid).cloned()
    }
}

/// The event of a fault.
#[derive(Debug)]
struct Event {
    sid: u16,
    record: EventRecord,
    sinks: Arc<Sinks>,
}

impl Report for Event {
    fn deliver(&self) {
        if let Some(sink) = self.sinks.get(self.sid) {
            sink.event(&self.record);
        }
    }
}

/// What an address space has for transactions that fault in it (§5.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultModel {
    /// They are terminated, and recorded if CD.R says so.
    Terminate { recorded: bool },
    /// They stall (CD.S), which is always recorded.
    Stall,
}

/// A transaction was terminated, or stalls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The stream table entry aborts: there is no event.
    Abort,
    /// There is an event.
    Event {
        /// Its number.
        id: EventId,
        /// Stage 2 faulted.
        stage2: bool,
        /// The class of the access.
        class: EventClass,
        /// IPA or FetchAddr, in bytes, if the event has one.
        second_address: u64,
        /// Flags of a descriptor were to be written.
        update: bool,
        /// What becomes of it.
        model: FaultModel,
    },
}

/// What no context descriptor decides about.
const RECORDED: FaultModel = FaultModel::Terminate { recorded: true };

impl Fault {
    /// A fault of the stream's configuration.
    pub fn config(id: EventId) -> Self {
        let (class, update) = (EventClass::Cd, false);
        Self::Event { id, stage2: false, class, second_address: 0, update, model: RECORDED }
    }

    /// A stage-1 fault caused by the transaction's address.
    pub fn stage1(id: EventId, model: FaultModel) -> Self {
        let (class, update) = (EventClass::Input, false);
        Self::Event { id, stage2: false, class, second_address: 0, update, model }
    }

    /// The address of a transaction that bypasses stage 1 is too large.
    pub fn too_large() -> Self {
        Self::stage1(EventId::AddressSize, RECORDED)
    }

    /// A fetch from `address` failed.
    pub fn fetch(id: EventId, class: EventClass, address: u64) -> Self {
        let (second_address, update) = (address, false);
        Self::Event { id, stage2: false, class, second_address, update, model: RECORDED }
    }

    /// Stage 2 does not allow an access to `ipa`.
    pub fn stage2(why: Stage2Refusal, class: EventClass, ipa: u64) -> Self {
        let id = match why {
            Stage2Refusal::Beyond | Stage2Refusal::Absent => EventId::Translation,
            Stage2Refusal::Denied => EventId::Permission,
        };
        let (second_address, update) = (ipa, false);
        Self::Event { id, stage2: true, class, second_address, update, model: RECORDED }
    }

    /// Stage 2 does not allow writing the flags of the descriptor at `ipa` (§3.13.5).
    pub fn stage2_update(ipa: u64) -> Self {
        Self::Event {
            id: EventId::Permission,
            stage2: true,
            class: EventClass::TranslationTable,
            second_address: ipa,
            update: true,
            model: RECORDED,
        }
    }

    /// The fault of `request`, for its port; `sinks` are those of the unit.
    pub fn of(self, request: &Request, sinks: &Arc<Sinks>) -> engine::Fault {
        let (reason, stage2) = match self {
            Self::Abort => (DmaFaultReason::SmmuV3Abort, false),
            Self::Event { id, stage2, .. } => (DmaFaultReason::SmmuV3(id), stage2),
        };
        let event = |record| Event { sid: request.rid, record, sinks: Arc::clone(sinks) };
        engine::Fault {
            reason,
            stage2,
            asks_for_page: self.asks_for_page(),
            stalls: matches!(self, Self::Event { model: FaultModel::Stall, .. }),
            // Any structure may be cached, valid or not (§3.21.3), so software must announce each
            // that becomes valid: nobody is asked to.
            nothing_attached: false,
            report: self.record(request).map(|record| Box::new(event(record)) as Box<dyn Report>),
        }
    }

    /// Whether a device requests the page that a request did not get: it is not mapped, or not for
    /// that access. (A translation request for such a page raises no event, §3.9.1.)
    fn asks_for_page(&self) -> bool {
        let Self::Event { id, class, .. } = *self else { return false };
        let mendable = matches!(id, EventId::Translation | EventId::Access | EventId::Permission);
        mendable && class != EventClass::Cd
    }

    /// The event record of the fault of `request`, if any.
    fn record(&self, request: &Request) -> Option<EventRecord> {
        let Self::Event { id, stage2, class, second_address, update, model } = *self else {
            return None;
        };
        if model == (FaultModel::Terminate { recorded: false }) {
            return None;
        }
        let stream = StreamId(request.rid.into());
        let substream = request.pasid.and_then(SubstreamId::new);
        let mut record = EventRecord::new(id, stream, substream);
        if id.has_input() {
            let write = request.kind.write();
            record.input_address = request.address;
            record.qw1 = record
                .qw1
                .with_rnw(!write)
                .with_pnu(request.kind.privileged())
                .with_ind(!write && request.kind.execute());
        }
        let of_walk = id == EventId::WalkExternalAbort;
        if of_walk || id.second_address() == SecondAddress::Ipa {
            let of_table = id == EventId::Permission && class == EventClass::TranslationTable;
            record.qw1 = record
                .qw1
                .with_s2(stage2)
                .with_class(class.into_bits())
                .with_ttrnw(of_table && !update);
        }
        record.second_address = match id.second_address() {
            SecondAddress::None => 0,
            SecondAddress::Fetch => second_address & EventRecord::FETCH_ADDRESS,
            SecondAddress::Ipa => second_address & EventRecord::IPA,
        };
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::engine::RequestKind;

    fn request(write: bool, pasid: Option<u32>) -> Request {
        let kind = RequestKind::new(write, true, !write);
        Request { rid: 0x18, pasid, address: 0x1234_5678, kind }
    }

    #[test]
    fn a_record_has_what_its_event_defines() {
        let fault = Fault::stage1(EventId::Translation, RECORDED);
        let record = fault.record(&request(false, Some(5))).unwrap();
        assert_eq!(record.id(), Some(EventId::Translation));
        assert_eq!((record.stream(), record.substream()), (StreamId(0x18), SubstreamId::new(5)));
        assert_eq!((record.input_address, record.second_address), (0x1234_5678, 0));
        assert!(record.qw1.rnw() && record.qw1.pnu() && record.qw1.ind() && !record.qw1.s2());
        assert_eq!(record.qw1.class(), 2);

        let bad = Fault::config(EventId::BadCd).record(&request(true, None)).unwrap();
        assert_eq!((bad.substream(), bad.qw1.into_bits(), bad.input_address), (None, 0, 0));
    }

    #[test]
    fn a_fault_of_stage_2_has_its_address() {
        let fault = Fault::stage2(Stage2Refusal::Denied, EventClass::TranslationTable, 0x4_5678);
        let record = fault.record(&request(true, None)).unwrap();
        assert_eq!(record.second_address, 0x4_5000);
        assert!(record.qw1.s2() && record.qw1.ttrnw() && !record.qw1.rnw() && !record.qw1.ind());
        assert_eq!(record.qw1.class(), 1);
    }

    #[test]
    fn a_descriptor_that_may_not_be_updated_was_to_be_written() {
        let record = Fault::stage2_update(0x4_5678).record(&request(false, None)).unwrap();
        assert_eq!((record.id(), record.second_address), (Some(EventId::Permission), 0x4_5000));
        assert!(record.qw1.s2() && !record.qw1.ttrnw() && record.qw1.rnw());
        assert_eq!(record.qw1.class(), 1);
    }

    #[test]
    fn an_aborted_walk_says_that_it_was_one() {
        let class = EventClass::TranslationTable;
        let fault = Fault::fetch(EventId::WalkExternalAbort, class, 0x4_5678);
        let record = fault.record(&request(true, None)).unwrap();
        assert_eq!((record.second_address, record.qw1.class()), (0x4_5678, 1));
        assert!(!record.qw1.s2());
        let fault = Fault::fetch(EventId::CdFetch, EventClass::Input, 0x4_5678);
        assert_eq!(fault.record(&request(true, None)).unwrap().qw1.into_bits(), 0);
    }

    #[test]
    fn some_faults_leave_no_record() {
        assert_eq!(Fault::Abort.record(&request(true, None)), None);
        let silent =
            |model| Fault::stage1(EventId::Translation, model).record(&request(true, None));
        assert_eq!(silent(FaultModel::Terminate { recorded: false }), None);
        assert!(silent(FaultModel::Stall).is_some(), "of a device that cannot be stalled");
    }
}

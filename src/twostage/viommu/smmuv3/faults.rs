// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events of transactions, and what the guest is told of them (§7.3).
//!
//! For a stream blocked by the virtual SMMU: the reason. For one that uses the guest's tables: the
//! event of the walk, expressed in terms of the guest's own tables, as if the host's stage 2 were
//! the memory that contains them.
//!
//! No host reports transactions of a blocked stream: its own entry for the stream aborts, which
//! causes no event. So that a wrong entry does not go unnoticed, its event is recorded once when
//! the guest announces the entry with CMD_CFGI_STE, without address and SubstreamID. Not for an
//! entry that is missing or not valid (V=0), and not when a command or SMMUEN names all streams:
//! drivers turn off idle streams like that, and an event would blame them for transactions that
//! they do not make.

use super::fault_log::Recorded;
use super::policy::ConfigFault;
use super::requesters::Standing;
use super::{EventRecordWords, EventTarget, Smmu, StalledTransaction, StreamPolicy};
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::event::{Event1, EventClass, EventId, EventRecord};
use crate::spec::smmuv3::page_request::PageRequest;
use crate::viommu::{FaultOutcome, PageTicket};

impl EventTarget for Smmu {
    fn event(&self, record: EventRecordWords) {
        let record = EventRecord::from_words(record);
        let stream = record.stream();
        let Some(standing) = self.streams.standing(stream) else {
            self.log.warn(format_args!("SMMUv3: an event of the unknown stream {stream}"));
            return;
        };
        match explain(&standing, record) {
            Some(record) => self.record_event(record),
            None => {
                self.counters.events_suppressed.count();
                self.observe_event(&record, FaultOutcome::Suppressed);
            }
        }
    }

    fn page_requests(&self, requests: &[PageRequest], ticket: PageTicket) -> Option<PageResponse> {
        self.take_page_requests(requests, ticket)
    }

    fn stall_epoch(&self) -> u64 {
        self.epoch_of_stalls()
    }

    fn stalled(
        &self,
        transaction: &StalledTransaction,
        ticket: PageTicket,
        epoch: u64,
    ) -> Option<PageResponse> {
        self.take_stalled(transaction, ticket, epoch)
    }

    fn events_lost(&self) {
        self.counters.events_lost.count();
        let signal = self.fault_log().lose(self.offered);
        self.send(signal);
    }
}

impl Smmu {
    /// Writes an event to the event queue, or shows that it was lost.
    pub(super) fn record_event(&self, record: EventRecord) {
        let (recorded, signal) = self.fault_log().record(self.offered, &*self.memory, record);
        let (counter, outcome) = match recorded {
            Recorded::Yes => (&self.counters.events_recorded, FaultOutcome::Recorded),
            Recorded::Disabled => (&self.counters.events_suppressed, FaultOutcome::Suppressed),
            // None that stalls comes here.
            Recorded::Lost | Recorded::Held => (&self.counters.events_lost, FaultOutcome::Lost),
        };
        counter.count();
        self.observe_event(&record, outcome);
        self.send(signal);
    }

    pub(super) fn observe_event(&self, record: &EventRecord, outcome: FaultOutcome) {
        if let Some(observer) = &self.observer {
            observer.event(record, outcome);
        }
    }
}

/// The event that the guest sees for `record`, given the state of its stream; `None` for no event.
fn explain(standing: &Standing, record: EventRecord) -> Option<EventRecord> {
    // Without a stream table nothing is recorded.
    standing.table?;
    match standing.given?.decision {
        Err(blocked) => {
            let ConfigFault { event, .. } = blocked;
            if event == EventId::BadStreamId && !standing.recording_bad_streams {
                return None;
            }
            let told = EventRecord::new(event, record.stream(), record.substream());
            let second_address = blocked.record(record.stream()).second_address;
            Some(EventRecord { second_address, ..told })
        }
        // By the entry, or GBPA: no event.
        Ok(StreamPolicy::Abort | StreamPolicy::GlobalBypass) => None,
        Ok(StreamPolicy::Bypass) if record.qw1.s2() => Some(beyond_memory(record)),
        Ok(StreamPolicy::Stage1 { .. }) if record.qw1.s2() => Some(by_stage_2(record)),
        Ok(StreamPolicy::Bypass | StreamPolicy::Stage1 { .. }) => Some(by_stage_1(record)),
    }
}

/// The guest's own entry or tables refused the access. It does not stall: what stalls comes as
/// [`StalledTransaction`]. The second address is UNKNOWN, or a host address.
fn by_stage_1(record: EventRecord) -> EventRecord {
    let qw1 = record.qw1.with_stall(false).with_stag(0);
    EventRecord { qw1, second_address: 0, ..record }
}

/// The host's stage 2 refused an access of the SMMU or of the transaction itself.
fn by_stage_2(record: EventRecord) -> EventRecord {
    let second_address = record.second_address & EventRecord::FETCH_ADDRESS;
    match EventClass::from_bits(record.qw1.class()) {
        Some(EventClass::Cd) => EventRecord {
            second_address,
            ..EventRecord::new(EventId::CdFetch, record.stream(), record.substream())
        },
        Some(class @ EventClass::TranslationTable) => {
            EventRecord { second_address, ..with_access(EventId::WalkExternalAbort, class, record) }
        }
        Some(EventClass::Input) | None => beyond_memory(record),
    }
}

/// The access is outside guest memory: to the guest, beyond the address size.
fn beyond_memory(record: EventRecord) -> EventRecord {
    with_access(EventId::AddressSize, EventClass::Input, record)
}

/// An event `id` of stage 1 and `class`, for the access in `record`.
fn with_access(id: EventId, class: EventClass, record: EventRecord) -> EventRecord {
    let access = record.qw1;
    let qw1 = Event1::new()
        .with_pnu(access.pnu())
        .with_ind(access.ind())
        .with_rnw(access.rnw())
        .with_class(class.into_bits());
    EventRecord {
        qw1,
        input_address: record.input_address,
        ..EventRecord::new(id, record.stream(), record.substream())
    }
}

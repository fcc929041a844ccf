// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a request was blocked, and the reasons of each format of tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use crate::dma::error::DmaFaultReason;
use crate::units::engine::{self, At, Report, Request, RequestKind, Stage2Refusal};
use twostage::iommufd::{FaultSink, HostFault, ObjectId};
use twostage::spec::vtd::fault::FaultReason;

/// The device object that a fault names, and its sink.
pub(super) type SinkOfDevice = (ObjectId, Weak<dyn FaultSink>);

/// Where the faults of each requester id go. The lock is never held together with the gate.
#[derive(Debug, Default)]
pub(super) struct Sinks(Mutex<BTreeMap<u16, SinkOfDevice>>);

impl Sinks {
    /// Faults of `rid` go to `sink`; `None`: nowhere.
    pub fn set(&self, rid: u16, sink: Option<SinkOfDevice>) {
        let mut sinks = self.0.lock();
        match sink {
            Some(sink) => sinks.insert(rid, sink),
            None => sinks.remove(&rid),
        };
    }

    fn get(&self, rid: u16) -> Option<(ObjectId, Arc<dyn FaultSink>)> {
        let sinks = self.0.lock();
        sinks.get(&rid).and_then(|(dev, sink)| Some((*dev, sink.upgrade()?)))
    }
}

/// The report of a fault.
#[derive(Debug)]
struct FaultReport {
    request: Request,
    fault: Fault,
    sinks: Arc<Sinks>,
}

impl Report for FaultReport {
    fn deliver(&self) {
        let Self { request, fault, sinks } = self;
        if let Some((dev, sink)) = sinks.get(request.rid) {
            sink.dma_fault(&HostFault {
                dev,
                pasid: request.pasid,
                address: request.address,
                write: request.kind.write(),
                execute: request.kind.execute(),
                privileged: request.kind.privileged(),
                reason: fault.reason.code(),
                stage2: fault.stage2,
            });
        }
    }

    fn attached_late(&self) -> bool {
        let sink = self.sinks.get(self.request.rid);
        sink.is_some_and(|(dev, sink)| sink.attached_late(dev, self.request.pasid))
    }
}

/// A request was blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    /// The architecture's reason.
    pub reason: FaultReason,
    /// The host's stage 2 refused.
    pub stage2: bool,
}

impl Fault {
    /// The fault of tables that the user owns, or of the PASID table.
    pub fn stage1(reason: FaultReason) -> Self {
        Self { reason, stage2: false }
    }

    /// The fault of the host's stage 2.
    pub fn stage2(reason: FaultReason) -> Self {
        Self { reason, stage2: true }
    }

    /// The fault of `request`, for its port; `sinks` are those of the unit.
    pub fn of(self, request: &Request, sinks: &Arc<Sinks>) -> engine::Fault {
        let report = FaultReport { request: *request, fault: self, sinks: Arc::clone(sinks) };
        engine::Fault {
            reason: DmaFaultReason::Vtd(self.reason),
            stage2: self.stage2,
            asks_for_page: self.asks_for_page(request.kind),
            stalls: false,
            nothing_attached: self.reason == FaultReason::PasidEntryNotPresent,
            report: Some(Box::new(report)),
        }
    }

    /// Whether a device requests the page that a request of `kind` did not get: an entry is not
    /// present or does not allow it (§7.1.3). Linux serves neither supervisor nor execute requests.
    fn asks_for_page(&self, kind: RequestKind) -> bool {
        let mendable = matches!(
            self.reason,
            FaultReason::FirstStageNotPresent
                | FaultReason::FirstStageTopSecondStageDenied
                | FaultReason::FirstStageSecondStageDenied
                | FaultReason::FirstStageFlagsSecondStageDenied
                | FaultReason::SecondStageDenied
                | FaultReason::UserDenied
                | FaultReason::WriteDenied
                | FaultReason::ReadDenied
        );
        mendable && !kind.privileged() && !kind.execute()
    }
}

/// The reasons of one format.
#[derive(Debug)]
pub(super) struct Reasons {
    /// The top table is beyond what stage 2 translates.
    pub top_beyond: FaultReason,
    /// Another table is.
    pub beyond: FaultReason,
    /// Stage 2 does not allow reading the top table.
    pub top_denied: FaultReason,
    /// Stage 2 does not allow reading another table.
    pub denied: FaultReason,
    /// An entry of the top table could not be read.
    pub top_access: FaultReason,
    /// An entry of another table could not be read.
    pub access: FaultReason,
    /// Stage 2 does not allow writing the flags of an entry.
    pub flags_denied: FaultReason,
    /// The flags of an entry could not be updated: it kept changing.
    pub flags_update: FaultReason,
}

impl Reasons {
    /// Stage 2 does not allow reading a table.
    pub fn table_refused(&self, at: At, why: Stage2Refusal) -> Fault {
        Fault::stage2(match (why, at.top) {
            (Stage2Refusal::Beyond, true) => self.top_beyond,
            (Stage2Refusal::Beyond, false) => self.beyond,
            (Stage2Refusal::Absent | Stage2Refusal::Denied, true) => self.top_denied,
            (Stage2Refusal::Absent | Stage2Refusal::Denied, false) => self.denied,
        })
    }

    /// An entry could not be read.
    pub fn entry_unreadable(&self, at: At) -> Fault {
        Fault::stage1(if at.top { self.top_access } else { self.access })
    }
}

/// Stage 2 does not allow an access to a page, whatever led there.
pub(super) fn page_refused(why: Stage2Refusal) -> Fault {
    Fault::stage2(match why {
        Stage2Refusal::Beyond => FaultReason::AddressBeyondGuest,
        Stage2Refusal::Absent | Stage2Refusal::Denied => FaultReason::SecondStageDenied,
    })
}

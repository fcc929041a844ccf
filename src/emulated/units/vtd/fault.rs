// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a request was blocked, and the reasons of each format of tables.

use crate::units::engine::{At, RequestKind, Stage2Refusal};
use twostage::spec::vtd::fault::FaultReason;

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

    /// Whether a device requests the page that a request of `kind` did not get: an entry is not
    /// present or does not allow it (§7.1.3). Linux serves neither supervisor nor execute requests.
    pub fn asks_for_page(&self, kind: RequestKind) -> bool {
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

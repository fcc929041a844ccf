// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why a request was blocked.

use crate::units::engine::RequestKind;
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nested translation (§3.8) by two stages of the user's: every address in first-stage tables, and
//! the one that they lead to, goes through the second stage, and from there through the host's.
//!
//! What is cached of the second stage alone serves the walks of all PASIDs. The IOTLB's pages and
//! the cached first-stage tables are results of both stages.

use super::fault::Fault;
use super::tables::{FirstStage, SecondStage, PAGE_SHIFTS};
use crate::units::engine::{own, LowerStage, OverHost, RequestKind, Stage2Page, Trail, Walk};
use twostage::spec::vtd::fault::FaultReason;

/// The second stage as the stage below the first.
#[derive(Debug)]
pub(super) struct OverSecondStage<'a> {
    pub tables: &'a SecondStage,
    /// A walk of them.
    pub walk: Walk<'a, OverHost<'a>>,
}

impl OverSecondStage<'_> {
    fn access(&self, address: u64, write: bool) -> Result<Stage2Page, Fault> {
        self.walk.page(self.tables, &PAGE_SHIFTS, address, write)
    }
}

impl LowerStage<FirstStage> for OverSecondStage<'_> {
    fn entry(&self, _: &FirstStage, address: u64, top: bool) -> Result<Stage2Page, Fault> {
        self.access(address, false).map_err(|fault| of_table(fault, top))
    }

    fn entry_flags(&self, _: &FirstStage, address: u64, _: bool) -> Result<Stage2Page, Fault> {
        self.access(address, true).map_err(of_flags)
    }

    fn page(&self, _: &FirstStage, address: u64, kind: RequestKind) -> Result<Stage2Page, Fault> {
        // Access to the page is all that the second stage looks at (§3.8.2).
        self.access(address, kind.write())
    }

    fn quick(&self, address: u64, kind: RequestKind) -> Option<Stage2Page> {
        self.access(address, kind.write()).ok()
    }

    fn origin(&self, address: u64, write: bool) -> Option<Trail> {
        self.walk.caches.origin(self.walk.source, &PAGE_SHIFTS, address, own(write))
    }
}

/// The fault of reading a first-stage table, of which `fault` is the second stage's: SFS.5 to
/// SFS.7. Malformed second-stage entries, and those out of reach, are faults of their own. Where
/// the second stage leads beyond the host's, the host does not allow it: the table itself is not
/// beyond anything of the user's.
fn of_table(fault: Fault, top: bool) -> Fault {
    use FaultReason as R;
    let reason = match (fault.reason, top) {
        (R::AddressBeyondGuest, _) if !fault.stage2 => R::FirstStagePointerBeyond,
        (R::SecondStageDenied | R::AddressBeyondGuest, true) => R::FirstStageTopSecondStageDenied,
        (R::SecondStageDenied | R::AddressBeyondGuest, false) => R::FirstStageSecondStageDenied,
        (other, _) => other,
    };
    Fault { reason, ..fault }
}

/// The fault of setting flags of a first-stage entry: SFS.8.
fn of_flags(fault: Fault) -> Fault {
    let reason = match fault.reason {
        FaultReason::SecondStageDenied => FaultReason::FirstStageFlagsSecondStageDenied,
        other => other,
    };
    Fault { reason, ..fault }
}

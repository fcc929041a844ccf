// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! First-stage tables for the walker (§3.6, §9.7).

use super::fault::Fault;
use super::reasons::{page_refused, Reasons};
use crate::units::engine::{At, Entry, Path, RequestKind, Stage2Refusal, TableFormat};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::{index, is_canonical, page_size, FirstStageEntry};
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

/// Sizes of pages, of either stage, as powers of two: 4 KiB, 2 MiB, 1 GiB.
pub(super) const PAGE_SHIFTS: [u8; 3] = [12, 21, 30];

/// First-stage tables, as described by a PASID-table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FirstStage {
    /// GPA of the top table (FSPTPTR), in bytes, 4 KiB aligned.
    pub table: u64,
    /// 4 or 5 (FSPM).
    pub levels: u8,
    /// 1 GiB pages (CAP.FS1GP).
    pub huge_pages: bool,
    /// SRE.
    pub supervisor_requests: bool,
    /// WPE.
    pub write_protect: bool,
    /// EAFE.
    pub extended_accessed: bool,
    /// ERE.
    pub execute_requests: bool,
    /// NXE: honour XD.
    pub no_execute: bool,
}

const REASONS: Reasons = Reasons {
    top_beyond: FaultReason::FirstStagePointerBeyond,
    beyond: FaultReason::FirstStagePointerBeyond,
    top_denied: FaultReason::FirstStageTopSecondStageDenied,
    denied: FaultReason::FirstStageSecondStageDenied,
    top_access: FaultReason::FirstStageTopAccess,
    access: FaultReason::FirstStageAccess,
    flags_denied: FaultReason::FirstStageFlagsSecondStageDenied,
    flags_update: FaultReason::FirstStageFlagsUpdate,
};

impl TableFormat for FirstStage {
    type Fault = Fault;

    fn table(&self) -> u64 {
        self.table
    }

    fn levels(&self) -> u8 {
        self.levels
    }

    fn shift(&self, level: u8) -> u8 {
        page_size(level).trailing_zeros() as u8
    }

    fn index(&self, iova: u64, level: u8) -> u64 {
        index(iova, level)
    }

    fn check_request(&self, kind: RequestKind) -> Result<(), Fault> {
        if kind.execute() && !self.execute_requests {
            return Err(Fault::stage1(FaultReason::ExecuteDisabled));
        }
        if kind.privileged() && !self.supervisor_requests {
            return Err(Fault::stage1(FaultReason::SupervisorDisabled));
        }
        Ok(())
    }

    fn check_address(&self, iova: u64) -> Result<(), Fault> {
        is_canonical(iova, self.levels)
            .then_some(())
            .ok_or(Fault::stage1(FaultReason::NotCanonical))
    }

    fn decode(&self, word: u64, level: u8) -> Result<Entry, Fault> {
        let entry = FirstStageEntry::from_bits(word);
        if !entry.p() {
            return Err(Fault::stage1(FaultReason::FirstStageNotPresent));
        }
        if word & entry.reserved_bits(level, HOST_ADDRESS_WIDTH, self.huge_pages) != 0 {
            return Err(Fault::stage1(FaultReason::FirstStageReserved));
        }
        Ok(Entry {
            leaf: entry.is_leaf(level),
            address: entry.address(level),
            path: Path::new()
                .with_read(true)
                .with_write(entry.rw())
                .with_user(entry.us())
                .with_execute(!(self.no_execute && entry.xd())),
            global: false,
        })
    }

    fn flags(&self, leaf: bool, write: bool) -> u64 {
        let dirty = if leaf && write { FirstStageEntry::D } else { 0 };
        let extended = if self.extended_accessed { FirstStageEntry::EA } else { 0 };
        FirstStageEntry::A | dirty | extended
    }

    fn is_dirty(&self, word: u64) -> bool {
        word & FirstStageEntry::D != 0
    }

    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), Fault> {
        if !kind.privileged() && !path.user() {
            return Err(Fault::stage1(FaultReason::UserDenied));
        }
        if kind.write() && !path.write() && (!kind.privileged() || self.write_protect) {
            return Err(Fault::stage1(FaultReason::WriteDenied));
        }
        if kind.execute() && !path.execute() {
            return Err(Fault::stage1(FaultReason::ExecuteDenied));
        }
        Ok(())
    }

    fn table_refused(&self, at: At, why: Stage2Refusal) -> Fault {
        REASONS.table_refused(at, why)
    }

    fn entry_unreadable(&self, at: At) -> Fault {
        REASONS.entry_unreadable(at)
    }

    fn flags_refused(&self, _: At) -> Fault {
        Fault::stage2(REASONS.flags_denied)
    }

    fn flags_unsettled(&self) -> Fault {
        Fault::stage1(REASONS.flags_update)
    }

    fn page_refused(&self, _: u64, why: Stage2Refusal) -> Fault {
        page_refused(why)
    }
}

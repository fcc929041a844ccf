// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-owned second-stage tables for the walker (§3.7, §9.8).

use super::fault::Fault;
use super::reasons::{page_refused, Reasons};
use crate::units::engine::{At, Entry, Path, RequestKind, Stage2Refusal, TableFormat};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::second_stage::{index, page_size, SecondStageEntry};
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

/// Second-stage tables, as described by a PASID-table entry. Accessed and dirty flags are not
/// updated (SSADE is clear).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SecondStage {
    /// GPA of the top table (SSPTPTR), in bytes, 4 KiB aligned.
    pub table: u64,
    /// 3, 4 or 5 (AW).
    pub levels: u8,
    /// CAP.SSLPS.
    pub large_pages: u8,
}

const REASONS: Reasons = Reasons {
    top_beyond: FaultReason::SecondStageTopAccess,
    beyond: FaultReason::SecondStageAccess,
    top_denied: FaultReason::SecondStageTopAccess,
    denied: FaultReason::SecondStageAccess,
    top_access: FaultReason::SecondStageTopAccess,
    access: FaultReason::SecondStageAccess,
    // Flags are never written.
    flags_denied: FaultReason::SecondStageFlagsUpdate,
    flags_update: FaultReason::SecondStageFlagsUpdate,
};

impl TableFormat for SecondStage {
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
        // Second-stage tables ignore privilege.
        if kind.execute() {
            return Err(Fault::stage1(FaultReason::ExecuteDisabled));
        }
        Ok(())
    }

    fn check_address(&self, iova: u64) -> Result<(), Fault> {
        // An entry of the top table maps this much; the table has 512.
        let within = iova / page_size(self.levels) < 512;
        within.then_some(()).ok_or(Fault::stage1(FaultReason::AddressBeyondGuest))
    }

    fn decode(&self, word: u64, level: u8) -> Result<Entry, Fault> {
        let entry = SecondStageEntry::from_bits(word);
        if !entry.is_present() {
            return Err(Fault::stage1(FaultReason::SecondStageDenied));
        }
        let leaf = entry.is_leaf(level);
        // Snoop control is supported (ECAP.SC), so SNP is not reserved; device-TLBs are not, so TM
        // is.
        let reserved = entry.reserved_bits(level, HOST_ADDRESS_WIDTH, self.large_pages);
        if word & reserved != 0 || leaf && entry.tm() {
            return Err(Fault::stage1(FaultReason::SecondStageReserved));
        }
        Ok(Entry {
            leaf,
            address: entry.address(level),
            path: Path::new()
                .with_read(entry.r())
                .with_write(entry.w())
                .with_user(true)
                .with_execute(true),
            global: false,
        })
    }

    fn flags(&self, _leaf: bool, _write: bool) -> u64 {
        0
    }

    fn is_dirty(&self, _word: u64) -> bool {
        true
    }

    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), Fault> {
        let allowed = if kind.write() { path.write() } else { path.read() };
        allowed.then_some(()).ok_or(Fault::stage1(FaultReason::SecondStageDenied))
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

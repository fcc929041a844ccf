// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Second-stage tables that the user owns, as the walker sees them (§3.7, §9.8).
#![forbid(unsafe_code)]

use super::format::{Entry, Path, Reasons, TableFormat};
use super::rights::RequestKind;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::second_stage::{page_size, SecondStageEntry};
use crate::spec::vtd::HOST_ADDRESS_WIDTH;

/// Second-stage tables: what a PASID-table entry says of them. Accessed and dirty flags are not
/// kept (SSADE is clear).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SecondStage {
    /// GPA of the top table (SSPTPTR), in bytes, 4 KiB aligned.
    pub table: u64,
    /// 3, 4 or 5 (AW).
    pub levels: u8,
    /// CAP.SSLPS.
    pub large_pages: u8,
}

impl TableFormat for SecondStage {
    const REASONS: Reasons = Reasons {
        top_beyond: FaultReason::SecondStageTopAccess,
        beyond: FaultReason::SecondStageAccess,
        top_denied: FaultReason::SecondStageTopAccess,
        denied: FaultReason::SecondStageAccess,
        top_access: FaultReason::SecondStageTopAccess,
        access: FaultReason::SecondStageAccess,
        // No flags are ever written.
        flags_denied: FaultReason::SecondStageFlagsUpdate,
        flags_update: FaultReason::SecondStageFlagsUpdate,
    };

    fn table(&self) -> u64 {
        self.table
    }

    fn levels(&self) -> u8 {
        self.levels
    }

    fn check_request(&self, kind: RequestKind) -> Result<(), FaultReason> {
        // Privilege is nothing to second-stage tables.
        if kind.execute() {
            return Err(FaultReason::ExecuteDisabled);
        }
        Ok(())
    }

    fn check_address(&self, iova: u64) -> Result<(), FaultReason> {
        // An entry of the top table maps this much; the table has 512.
        let within = iova / page_size(self.levels) < 512;
        within.then_some(()).ok_or(FaultReason::AddressBeyondGuest)
    }

    fn decode(&self, word: u64, level: u8) -> Result<Entry, FaultReason> {
        let entry = SecondStageEntry::from_bits(word);
        if !entry.is_present() {
            return Err(FaultReason::SecondStageDenied);
        }
        let leaf = entry.is_leaf(level);
        // Snooping is controlled (ECAP.SC), so SNP is no reserved bit; device-TLBs are not served,
        // so TM is.
        let reserved = entry.reserved_bits(level, HOST_ADDRESS_WIDTH, self.large_pages);
        if word & reserved != 0 || leaf && entry.tm() {
            return Err(FaultReason::SecondStageReserved);
        }
        Ok(Entry {
            leaf,
            address: entry.address(level),
            path: Path::new()
                .with_read(entry.r())
                .with_write(entry.w())
                .with_user(true)
                .with_execute(true),
        })
    }

    fn flags(&self, _leaf: bool, _write: bool) -> u64 {
        0
    }

    fn is_dirty(&self, _word: u64) -> bool {
        true
    }

    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), FaultReason> {
        let allowed = if kind.write() { path.write() } else { path.read() };
        allowed.then_some(()).ok_or(FaultReason::SecondStageDenied)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-owned tables for the walker: of the first stage (§3.6, §9.7) and the second (§3.7, §9.8).

use super::config::{AddressWidth, VtdUnitConfig};
use super::fault::{page_refused, Fault, Reasons};
use crate::units::engine::{At, Entry, Path, RequestKind, Stage2Refusal, TableFormat};
use crate::units::hardware::UserTables;
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, HwptVtdSecondStage, VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE,
};
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::{self, is_canonical, FirstStageEntry};
use twostage::spec::vtd::second_stage::{self, SecondStageEntry};
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

/// Sizes of pages, of either stage, as powers of two: 4 KiB, 2 MiB, 1 GiB.
pub(super) const PAGE_SHIFTS: [u8; 3] = [12, 21, 30];

/// The user's tables that translate a request before stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tables {
    /// None: stage 2 only.
    None,
    /// First-stage tables.
    FirstStage(FirstStage),
    /// Second-stage tables.
    SecondStage(SecondStage),
    /// Tables that the unit cannot walk: invalid programming.
    Unsupported,
}

impl Tables {
    /// `tables` as a unit of `config` walks them.
    pub fn new(tables: Option<&UserTables>, config: &VtdUnitConfig) -> Self {
        match tables {
            None => Self::None,
            Some(UserTables::VtdFirstStage(data)) => {
                FirstStage::new(data, config).map_or(Self::Unsupported, Self::FirstStage)
            }
            Some(UserTables::VtdSecondStage(data)) => {
                SecondStage::new(data, config).map_or(Self::Unsupported, Self::SecondStage)
            }
        }
    }
}

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

impl FirstStage {
    fn new(data: &iommu_hwpt_vtd_s1, config: &VtdUnitConfig) -> Option<Self> {
        let levels = match data.addr_width {
            48 => 4,
            57 if config.address_width == AddressWidth::Bits57 => 5,
            _ => return None,
        };
        let supervisor_requests = data.flags & VTD_S1_SRE != 0;
        Some(Self {
            table: data.pgtbl_addr & !0xfff,
            levels,
            huge_pages: config.huge_pages,
            supervisor_requests,
            // WPE matters only with SRE.
            write_protect: supervisor_requests && data.flags & VTD_S1_WPE != 0,
            extended_accessed: data.flags & VTD_S1_EAFE != 0,
            // The uAPI has no flags for these two.
            execute_requests: false,
            no_execute: false,
        })
    }
}

const FIRST_STAGE_REASONS: Reasons = Reasons {
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
        first_stage::page_size(level).trailing_zeros() as u8
    }

    fn index(&self, iova: u64, level: u8) -> u64 {
        first_stage::index(iova, level)
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
        FIRST_STAGE_REASONS.table_refused(at, why)
    }

    fn entry_unreadable(&self, at: At) -> Fault {
        FIRST_STAGE_REASONS.entry_unreadable(at)
    }

    fn flags_refused(&self, _: At) -> Fault {
        Fault::stage2(FIRST_STAGE_REASONS.flags_denied)
    }

    fn flags_unsettled(&self) -> Fault {
        Fault::stage1(FIRST_STAGE_REASONS.flags_update)
    }

    fn page_refused(&self, _: u64, why: Stage2Refusal) -> Fault {
        page_refused(why)
    }
}

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

impl SecondStage {
    fn new(data: &HwptVtdSecondStage, config: &VtdUnitConfig) -> Option<Self> {
        let levels = match data.addr_width {
            39 => 3,
            48 => 4,
            57 if config.address_width == AddressWidth::Bits57 => 5,
            _ => return None,
        };
        let large_pages = config.second_stage_large_pages();
        Some(Self { table: data.pgtbl_addr & !0xfff, levels, large_pages })
    }
}

const SECOND_STAGE_REASONS: Reasons = Reasons {
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
        second_stage::page_size(level).trailing_zeros() as u8
    }

    fn index(&self, iova: u64, level: u8) -> u64 {
        second_stage::index(iova, level)
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
        let within = iova / second_stage::page_size(self.levels) < 512;
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
        SECOND_STAGE_REASONS.table_refused(at, why)
    }

    fn entry_unreadable(&self, at: At) -> Fault {
        SECOND_STAGE_REASONS.entry_unreadable(at)
    }

    fn flags_refused(&self, _: At) -> Fault {
        Fault::stage2(SECOND_STAGE_REASONS.flags_denied)
    }

    fn flags_unsettled(&self) -> Fault {
        Fault::stage1(SECOND_STAGE_REASONS.flags_update)
    }

    fn page_refused(&self, _: u64, why: Stage2Refusal) -> Fault {
        page_refused(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::engine::testing::*;
    use crate::units::vtd::tests::{Machine, Outcome, ALL};

    const READ: u64 = 1;
    const WRITE: u64 = 2;

    fn machine() -> Machine {
        Machine::new(VtdUnitConfig {
            address_width: AddressWidth::Bits57,
            ..VtdUnitConfig::default()
        })
    }

    /// Maps `iova` with entries that all have `bits`.
    fn map(machine: &Machine, root: u64, levels: u8, iova: u64, level: u8, gpa: u64) -> u64 {
        let entry = machine.entry(root, levels, iova, level, READ | WRITE);
        let large = if level > 1 { 0x80 } else { 0 };
        machine.poke(entry, gpa | READ | WRITE | large);
        entry
    }

    #[test]
    fn pages_of_every_size_through_three_to_five_levels() {
        let machine = machine();
        let mut port = machine.port();
        for levels in 3..=5 {
            for level in 1..=3 {
                let iova = 0x12_4000_0000;
                let root = machine.table();
                map(&machine, root, levels, iova, level, HIGH);
                machine.attach_second_stage(None, 1, root, levels);
                machine.poke(HIGH + 0x10, u64::from(levels));
                for _ in 0..2 {
                    assert_eq!(machine.read_u64(&mut port, PLAIN, iova + 0x10), Ok(levels.into()));
                }
                let width = 12 + 9 * u32::from(levels);
                let beyond = Err((FaultReason::AddressBeyondGuest, false));
                assert_eq!(machine.read_u64(&mut port, PLAIN, 1 << width), beyond);
                let absent = Err((FaultReason::SecondStageDenied, false));
                assert_eq!(machine.read_u64(&mut port, PLAIN, (1 << width) - 8), absent);
            }
        }
    }

    #[test]
    fn every_level_limits_and_must_be_well_formed() {
        let machine = machine();
        let mut port = machine.port();
        let iova = 0x12_3456_7000;
        let root = machine.table();
        map(&machine, root, 4, iova, 1, HIGH);
        machine.attach_second_stage(None, 1, root, 4);
        let denied = Err((FaultReason::SecondStageDenied, false));
        let reserved = Err((FaultReason::SecondStageReserved, false));
        for level in 1..=4 {
            let entry = machine.entry(root, 4, iova, level, 0);
            let good = machine.peek(entry);
            let mut check = |word: u64, read: Outcome, write: Outcome| {
                machine.poke(entry, word);
                machine.invalidate(1, ALL);
                for _ in 0..2 {
                    let context = format!("level {level}, {word:#x}");
                    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), read, "{context}");
                    assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), write, "{context}");
                }
            };
            check(good & !WRITE, Ok(0), denied);
            check(good & !READ, denied, Ok(0));
            check(good & !READ & !WRITE, denied, denied);
            // Accessed and dirty are ignored and not set.
            check(good | 0x300, Ok(0), Ok(0));
            check(good, Ok(0), Ok(0));
            assert_eq!(machine.peek(entry), good);
            match level {
                1 => check(good | 1 << 62, reserved, reserved),
                2 => check(good | 0x80 | 0x1000, reserved, reserved),
                3 => check(good | 0x80 | 0x1000_0000, reserved, reserved),
                _ => check(good | 0x80, reserved, reserved),
            }
            machine.poke(entry, good);
        }
    }

    #[test]
    fn every_pointer_goes_through_stage_2() {
        let machine = machine();
        let mut port = machine.port();
        let iova = 0x12_3456_7000;
        machine.attach_second_stage(None, 1, NOWHERE, 4);
        let top = Err((FaultReason::SecondStageTopAccess, true));
        assert_eq!(machine.read_u64(&mut port, PLAIN, iova), top);
        let root = machine.table();
        map(&machine, root, 4, iova, 1, HIGH);
        machine.attach_second_stage(None, 1, root, 4);
        for level in 1..=4 {
            let entry = machine.entry(root, 4, iova, level, 0);
            let good = machine.peek(entry);
            machine.poke(entry, NOWHERE | READ | WRITE);
            machine.invalidate(1, ALL);
            let reason = match level {
                1 => FaultReason::SecondStageDenied,
                _ => FaultReason::SecondStageAccess,
            };
            assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Err((reason, true)));
            machine.poke(entry, good);
        }
        let leaf = machine.entry(root, 4, iova, 1, 0);
        machine.poke(leaf, READ_ONLY | READ | WRITE);
        machine.invalidate(1, ALL);
        assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(0));
        let denied = Err((FaultReason::SecondStageDenied, true));
        assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), denied);
    }
}

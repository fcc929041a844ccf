// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! User-owned tables for the walker: of the first stage (§3.6, §9.7), and of the second (§3.7,
//! §9.8).

use super::config::{AddressWidth, VtdUnitConfig};
use super::fault::{page_refused, Fault, Reasons};
use crate::units::engine::{
    At, Entry, Path, PathRights, RequestKind, Rights, Stage2Refusal, TableFormat,
};
use crate::units::hardware::UserTables;
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, HwptVtdNested, HwptVtdSecondStage, VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE,
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
    /// First-stage tables over second-stage tables.
    Nested(Nested),
    /// Tables that the unit cannot walk: invalid programming.
    Unsupported,
}

impl Tables {
    /// `tables` as a unit of `config` walks them.
    pub fn new(tables: Option<&UserTables>, config: &VtdUnitConfig) -> Self {
        match tables {
            None => Self::None,
            Some(UserTables::FirstStage(data)) => {
                FirstStage::new(data, config).map_or(Self::Unsupported, Self::FirstStage)
            }
            Some(UserTables::SecondStage(data)) => {
                SecondStage::new(data, config).map_or(Self::Unsupported, Self::SecondStage)
            }
            Some(UserTables::Nested(HwptVtdNested { first, second })) => {
                let first = FirstStage::new(first, config);
                let both = first.zip(SecondStage::new(second, config));
                both.map_or(Self::Unsupported, |(first, second)| {
                    Self::Nested(Nested { first, second })
                })
            }
        }
    }
}

/// First-stage tables over second-stage tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Nested {
    /// Its addresses are those of `second`.
    pub first: FirstStage,
    pub second: SecondStage,
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
    /// By all of these.
    pub rights: PathRights,
}

impl FirstStage {
    fn new(data: &iommu_hwpt_vtd_s1, config: &VtdUnitConfig) -> Option<Self> {
        let levels = match data.addr_width {
            48 => 4,
            57 if config.address_width == AddressWidth::Bits57 => 5,
            _ => return None,
        };
        let supervisor_requests = data.flags & VTD_S1_SRE != 0;
        let tables = Self {
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
            rights: PathRights::NONE,
        };
        Some(tables.with_rights())
    }

    /// The same, with rights by all that is in it.
    pub fn with_rights(self) -> Self {
        Self { rights: PathRights::of(&self), ..self }
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

    fn used(&self, word: u64, leaf: bool, write: bool) -> u64 {
        let dirty = if leaf && write { FirstStageEntry::D } else { 0 };
        let extended = if self.extended_accessed { FirstStageEntry::EA } else { 0 };
        word | FirstStageEntry::A | dirty | extended
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

    fn rights(&self, path: Path) -> Rights {
        self.rights.get(path)
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

/// Second-stage tables, as described by a PASID-table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SecondStage {
    /// GPA of the top table (SSPTPTR), in bytes, 4 KiB aligned.
    pub table: u64,
    /// 3, 4 or 5 (AW).
    pub levels: u8,
    /// CAP.SSLPS.
    pub large_pages: u8,
    /// SSADE.
    pub accessed_dirty: bool,
    rights: PathRights,
}

impl SecondStage {
    fn new(data: &HwptVtdSecondStage, config: &VtdUnitConfig) -> Option<Self> {
        let levels = match data.addr_width {
            39 => 3,
            48 => 4,
            57 if config.address_width == AddressWidth::Bits57 => 5,
            _ => return None,
        };
        let tables = Self {
            table: data.pgtbl_addr & !0xfff,
            levels,
            large_pages: config.second_stage_large_pages(),
            accessed_dirty: data.accessed_dirty,
            rights: PathRights::NONE,
        };
        Some(Self { rights: PathRights::of(&tables), ..tables })
    }
}

const SECOND_STAGE_REASONS: Reasons = Reasons {
    top_beyond: FaultReason::SecondStageTopAccess,
    beyond: FaultReason::SecondStageAccess,
    top_denied: FaultReason::SecondStageTopAccess,
    denied: FaultReason::SecondStageAccess,
    top_access: FaultReason::SecondStageTopAccess,
    access: FaultReason::SecondStageAccess,
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
        // Snoop control is supported (ECAP.SC), so SNP is not reserved.
        if word & entry.reserved_bits(level, HOST_ADDRESS_WIDTH, self.large_pages) != 0 {
            return Err(Fault::stage1(FaultReason::SecondStageReserved));
        }
        Ok(Entry {
            leaf: entry.is_leaf(level),
            address: entry.address(level),
            path: Path::new()
                .with_read(entry.r())
                .with_write(entry.w())
                .with_user(true)
                .with_execute(true),
            global: false,
        })
    }

    fn used(&self, word: u64, leaf: bool, write: bool) -> u64 {
        match self.accessed_dirty {
            true => {
                word | SecondStageEntry::A | if leaf && write { SecondStageEntry::D } else { 0 }
            }
            false => word,
        }
    }

    fn is_dirty(&self, word: u64) -> bool {
        !self.accessed_dirty || word & SecondStageEntry::D != 0
    }

    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), Fault> {
        let allowed = if kind.write() { path.write() } else { path.read() };
        allowed.then_some(()).ok_or(Fault::stage1(FaultReason::SecondStageDenied))
    }

    fn rights(&self, path: Path) -> Rights {
        self.rights.get(path)
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

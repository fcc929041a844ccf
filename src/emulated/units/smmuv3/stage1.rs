// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage-1 tables, VMSAv8-64, for the walker (§3.4, §5.4).

use super::fault::Fault;
use crate::units::engine::{At, Entry, Path, RequestKind, Stage2Refusal, TableFormat};
use twostage::spec::smmuv3::event::{EventClass, EventId};
use twostage::spec::smmuv3::translation::{Descriptor, DescriptorKind, Granule};

/// The walker numbers levels from 1 at the pages; in the architecture pages are level 3.
const fn architectural(level: u8) -> u8 {
    4u8.saturating_sub(level)
}

/// The tables of one half of the address space, as described by a context descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stage1 {
    /// GPA of the top table (TTB0 or TTB1), in bytes.
    pub table: u64,
    /// TG0 or TG1.
    pub granule: Granule,
    /// Bits of address that the tables translate: 64 - TxSZ.
    pub input_bits: u8,
    /// They are those of TTB1: bits above are set.
    pub upper: bool,
    /// Bits of the addresses they give: the smaller of CD.IPS and IDR5.OAS.
    pub output_bits: u8,
    /// AFFD: a clear access flag is no fault.
    pub access_flag_ignored: bool,
    /// WXN: writable pages are not executable.
    pub write_no_execute: bool,
    /// PAN: privileged requests cannot access unprivileged pages.
    pub privileged_access_never: bool,
    /// R: faults are recorded.
    pub recorded: bool,
}

impl Stage1 {
    /// Sizes of IOTLB entries, as powers of two: pages of the granule, and pieces of them if stage
    /// 2 has smaller ones.
    pub const fn shifts(&self) -> &'static [u8] {
        match self.granule {
            Granule::K4 => &[12, 21, 30],
            Granule::K16 => &[14, 25, 12, 21],
            Granule::K64 => &[16, 29, 12, 21, 30],
        }
    }

    fn fault(&self, id: EventId) -> Fault {
        Fault::stage1(id, self.recorded)
    }

    fn start_level(&self) -> u8 {
        self.granule.start_level(self.input_bits.into())
    }
}

impl TableFormat for Stage1 {
    type Fault = Fault;

    fn table(&self) -> u64 {
        // The table is aligned to its size, and to 64 bytes.
        let bits = u32::from(self.input_bits);
        let index_bits = bits.saturating_sub(self.granule.level_shift(self.start_level()));
        self.table & !((1 << (index_bits + 3).max(6)) - 1)
    }

    fn levels(&self) -> u8 {
        architectural(self.start_level())
    }

    fn shift(&self, level: u8) -> u8 {
        // At most 55: the highest level of the 16K granule maps 2^47 bytes, of the 64K granule
        // 2^55.
        self.granule.level_shift(architectural(level)) as u8
    }

    fn index(&self, iova: u64, level: u8) -> u64 {
        self.granule.index(iova, architectural(level), self.input_bits.into())
    }

    fn check_request(&self, _: RequestKind) -> Result<(), Fault> {
        Ok(())
    }

    fn check_address(&self, iova: u64) -> Result<(), Fault> {
        // No shift overflows: at most 52 bits.
        let above = if self.upper { !iova } else { iova } >> self.input_bits;
        (above == 0).then_some(()).ok_or(self.fault(EventId::Translation))
    }

    fn decode(&self, word: u64, level: u8) -> Result<Entry, Fault> {
        let (descriptor, level) = (Descriptor::from_bits(word), architectural(level));
        let kind = descriptor.kind(self.granule, level, self.output_bits);
        if kind == DescriptorKind::Invalid {
            return Err(self.fault(EventId::Translation));
        }
        let address = descriptor.address(self.granule, level, kind);
        if address >> self.output_bits != 0 {
            return Err(self.fault(EventId::AddressSize));
        }
        if kind == DescriptorKind::Table {
            let limits = descriptor.table_attributes();
            let path = Path::UNLIMITED
                .with_write(!limits.ap_read_only())
                .with_user(!limits.ap_no_unprivileged())
                .with_execute(!limits.uxn_table())
                .with_execute_privileged(!limits.pxn_table());
            return Ok(Entry { leaf: false, address, path, global: false });
        }
        if !descriptor.af() && !self.access_flag_ignored {
            return Err(self.fault(EventId::Access));
        }
        let path = Path::UNLIMITED
            .with_write(!descriptor.ap_read_only())
            .with_user(descriptor.ap_unprivileged())
            .with_execute(!descriptor.uxn())
            .with_execute_privileged(!descriptor.pxn());
        Ok(Entry { leaf: true, address, path, global: !descriptor.ng() })
    }

    fn flags(&self, _: bool, _: bool) -> u64 {
        0
    }

    fn is_dirty(&self, _: u64) -> bool {
        true
    }

    fn check_path(&self, path: Path, kind: RequestKind) -> Result<(), Fault> {
        let allowed = match (kind.privileged(), kind.write(), kind.execute()) {
            (_, true, _) if !path.write() => false,
            // An instruction fetch cannot write: InD is 0 for writes.
            (false, false, true) => {
                path.execute() && !(self.write_no_execute && path.write() && path.user())
            }
            (false, _, _) => path.user(),
            (true, false, true) => {
                // What unprivileged requests may write is never executed with privilege.
                let writable = path.write() && (path.user() || self.write_no_execute);
                path.execute_privileged() && !writable
            }
            (true, _, _) => !(self.privileged_access_never && path.user()),
        };
        allowed.then_some(()).ok_or(self.fault(EventId::Permission))
    }

    fn table_refused(&self, at: At, why: Stage2Refusal) -> Fault {
        Fault::stage2(why, EventClass::TranslationTable, at.gpa.unwrap_or_default())
    }

    fn entry_unreadable(&self, at: At) -> Fault {
        let address = at.gpa.unwrap_or_default();
        Fault::fetch(EventId::WalkExternalAbort, EventClass::TranslationTable, address)
    }

    // Flags are never written: IDR0.HTTU is 0.

    fn flags_refused(&self, at: At) -> Fault {
        self.entry_unreadable(at)
    }

    fn flags_unsettled(&self) -> Fault {
        self.entry_unreadable(At { gpa: None, top: false })
    }

    fn page_refused(&self, gpa: u64, why: Stage2Refusal) -> Fault {
        Fault::stage2(why, EventClass::Input, gpa)
    }
}

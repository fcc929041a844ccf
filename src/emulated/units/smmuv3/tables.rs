// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage-1 tables, VMSAv8-64, for the walker (§3.4, §5.4).

use super::fault::{Fault, FaultModel};
use crate::units::engine::{
    size, At, Entry, Path, PathRights, RequestKind, Rights, Stage2Refusal, TableFormat,
};
use twostage::spec::smmuv3::event::{EventClass, EventId};
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::{Descriptor, DescriptorKind, Granule};

/// The walker numbers levels from 1 at the pages; in the architecture pages are level 3.
const fn architectural(level: u8) -> u8 {
    4u8.saturating_sub(level)
}

/// What follows from the granule and the size of the input addresses: for each walk, it is too slow
/// to find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Levels of tables.
    levels: u8,
    /// Size of a page, as a power of two.
    page_shift: u8,
    /// Bits of an address that index one table.
    index_bits: u8,
    /// Size of the top table, as a power of two: it is aligned to that, and to 64 bytes.
    top_shift: u8,
}

impl Shape {
    /// That of tables of `granule` for addresses of `input_bits` bits, at least one more than a
    /// page has.
    pub fn new(granule: Granule, input_bits: u8) -> Self {
        let start = granule.start_level(input_bits.into());
        let index_bits = u32::from(input_bits).saturating_sub(granule.level_shift(start));
        Self {
            levels: architectural(start),
            // These are small: at most 16.
            page_shift: granule.shift() as u8,
            index_bits: granule.index_bits() as u8,
            top_shift: (index_bits + 3).max(6) as u8,
        }
    }
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
    /// The flags that are set when descriptors are used (HA, HD).
    pub updates: Httu,
    /// WXN: writable pages are not executable.
    pub write_no_execute: bool,
    /// PAN: privileged requests cannot access unprivileged pages.
    pub privileged_access_never: bool,
    /// R and S: what becomes of faults.
    pub faults: FaultModel,
    /// By granule and input bits.
    pub shape: Shape,
    /// By all of these.
    pub rights: PathRights,
}

impl Stage1 {
    /// The same, with rights by all that is in it.
    pub fn with_rights(self) -> Self {
        Self { rights: PathRights::of(&self), ..self }
    }

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
        Fault::stage1(id, self.faults)
    }

    /// Whether a write would make the page or block dirty: it is read-only, but DBM says that it is
    /// to be written (§3.13.3).
    fn is_clean(&self, leaf: Descriptor) -> bool {
        self.updates == Httu::Dirty && leaf.dbm() && leaf.ap_read_only()
    }
}

impl TableFormat for Stage1 {
    type Fault = Fault;

    fn table(&self) -> u64 {
        self.table & !(size(self.shape.top_shift) - 1)
    }

    fn levels(&self) -> u8 {
        self.shape.levels
    }

    fn shift(&self, level: u8) -> u8 {
        // At most 55: the highest level of the 16K granule maps 2^47 bytes, of the 64K granule
        // 2^55.
        self.shape.page_shift + self.shape.index_bits * level.saturating_sub(1)
    }

    fn index(&self, iova: u64, level: u8) -> u64 {
        // Bits above do not count; at most 52 do.
        let below = iova & (size(self.input_bits) - 1);
        let index = below >> self.shift(level);
        match level < self.shape.levels {
            true => index & (size(self.shape.index_bits) - 1),
            false => index,
        }
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
        // HA has precedence over AFFD.
        if !descriptor.af() && !self.access_flag_ignored && self.updates == Httu::None {
            return Err(self.fault(EventId::Access));
        }
        // A clean page counts as writable for all permissions, also where that forbids (WXN).
        let path = Path::UNLIMITED
            .with_write(!descriptor.ap_read_only() || self.is_clean(descriptor))
            .with_user(descriptor.ap_unprivileged())
            .with_execute(!descriptor.uxn())
            .with_execute_privileged(!descriptor.pxn());
        Ok(Entry { leaf: true, address, path, global: !descriptor.ng() })
    }

    fn used(&self, word: u64, leaf: bool, write: bool) -> u64 {
        if !leaf || self.updates == Httu::None {
            return word;
        }
        let written = write && self.is_clean(Descriptor::from_bits(word));
        word & !if written { Descriptor::AP_READ_ONLY } else { 0 } | Descriptor::AF
    }

    fn is_dirty(&self, word: u64) -> bool {
        !self.is_clean(Descriptor::from_bits(word))
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

    fn rights(&self, path: Path) -> Rights {
        self.rights.get(path)
    }

    fn table_refused(&self, at: At, why: Stage2Refusal) -> Fault {
        Fault::stage2(why, EventClass::TranslationTable, at.gpa.unwrap_or_default())
    }

    fn entry_unreadable(&self, at: At) -> Fault {
        let address = at.gpa.unwrap_or_default();
        Fault::fetch(EventId::WalkExternalAbort, EventClass::TranslationTable, address)
    }

    fn flags_refused(&self, at: At) -> Fault {
        Fault::stage2_update(at.gpa.unwrap_or_default())
    }

    fn flags_unsettled(&self) -> Fault {
        self.entry_unreadable(At { gpa: None, top: false })
    }

    fn page_refused(&self, gpa: u64, why: Stage2Refusal) -> Fault {
        Fault::stage2(why, EventClass::Input, gpa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::engine::testing::*;
    use crate::units::smmuv3::tests::{stage1_event, ste, Machine, Outcome, ALL, RW, VMID};
    use crate::units::smmuv3::SmmuV3UnitConfig;
    use twostage::iommufd::Protection;
    use twostage::spec::smmuv3::context::{Cd, Cd0, CD_SIZE};
    use twostage::spec::smmuv3::stream_table::S1Format;

    const IOVA: u64 = 0x12_3456_7000;

    /// Attaches the substreams of `machine`'s device to `cd`.
    fn with_substreams(machine: &Machine, cd: &Cd) {
        let table = machine.table(0x1000);
        machine.poke_cd(table + CD_SIZE, cd);
        machine.install(None, VMID, Some(ste(table, 2, S1Format::Linear, 0)));
    }

    #[test]
    fn every_granule_has_pages_and_blocks() {
        for (granule, level) in [
            (Granule::K4, 3),
            (Granule::K4, 2),
            (Granule::K4, 1),
            (Granule::K16, 3),
            (Granule::K16, 2),
            (Granule::K64, 3),
            (Granule::K64, 2),
        ] {
            let machine = Machine::new(SmmuV3UnitConfig::default());
            let (tables, mut port) = (machine.tables(granule), machine.port());
            machine.poke(HIGH + 0x8008, 8);
            let iova = IOVA & !(granule.level_size(level) - 1);
            tables.map(iova, level, HIGH, RW);
            let offset = (HIGH & (granule.level_size(level) - 1)) + 0x8008;
            for _ in 0..2 {
                let outcome = machine.read(&mut port, PLAIN, iova + offset);
                let expected = match offset < granule.level_size(level) {
                    true => Ok(8),
                    false => stage1_event(EventId::Translation),
                };
                assert_eq!(outcome, expected, "{granule:?} {level}");
            }
        }
    }

    #[test]
    fn blocks_are_not_of_every_level() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        for (granule, level) in [(Granule::K4, 0), (Granule::K16, 1), (Granule::K64, 1)] {
            let tables = machine.tables_of(granule, 48, false);
            machine.poke(tables.entry(IOVA, level), RW.into_bits());
            let outcome = machine.read(&mut machine.port(), PLAIN, IOVA);
            assert_eq!(outcome, stage1_event(EventId::Translation), "{granule:?}");
        }
    }

    #[test]
    fn addresses_have_so_many_bits_as_txsz_says() {
        for granule in Granule::ALL {
            for input_bits in [25, 31, 32, 36, 39, 42, 47, 48] {
                let machine = Machine::new(SmmuV3UnitConfig::default());
                machine.poke(HIGH, 3);
                let lower = machine.tables_of(granule, input_bits, false);
                let last = (1 << input_bits) - granule.size();
                lower.map(last, 3, HIGH, RW);
                let mut port = machine.port();
                assert_eq!(machine.read(&mut port, PLAIN, last), Ok(3), "{granule:?} {input_bits}");
                let absent = stage1_event(EventId::Translation);
                assert_eq!(machine.read(&mut port, PLAIN, 1 << input_bits), absent);
                assert_eq!(machine.read(&mut port, PLAIN, !0xfff), absent, "EPD1");

                let upper = machine.tables_of(granule, input_bits, true);
                machine.invalidate(ALL);
                let first = u64::MAX << input_bits;
                upper.map(first, 3, HIGH, RW);
                assert_eq!(
                    machine.read(&mut port, PLAIN, first),
                    Ok(3),
                    "{granule:?} {input_bits}"
                );
                assert_eq!(machine.read(&mut port, PLAIN, first - 8), absent);
                assert_eq!(machine.read(&mut port, PLAIN, 0), absent, "EPD0");
            }
        }
    }

    #[test]
    fn both_halves_translate_at_once_and_may_have_tags() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        machine.poke(HIGH, 1);
        machine.poke(HIGH + 0x1_0000, 2);
        let lower = machine.tables_of(Granule::K4, 39, false);
        let upper = machine.tables_of(Granule::K64, 42, true);
        let (low, high) = (lower.cd(), upper.cd());
        let qw0 = low
            .qw0
            .with_epd1(false)
            .with_t1sz(high.qw0.t1sz())
            .with_tg1(high.qw0.tg1())
            .with_tbi0(true)
            .with_tbi1(true);
        machine.attach(&Cd { qw0, qw2: high.qw2, ..low });
        lower.map(IOVA, 3, HIGH, RW);
        let top = !0xffff;
        upper.map(top, 3, HIGH + 0x1_0000, RW);
        let mut port = machine.port();
        for tag in [0, 0x5a << 56, 0xff << 56] {
            let address = IOVA | tag;
            assert_eq!(machine.read(&mut port, PLAIN, address), Ok(1), "{address:#x}");
            let address = top & (u64::MAX >> 8) | tag;
            assert_eq!(machine.read(&mut port, PLAIN, address), Ok(2), "{address:#x}");
        }
    }

    #[test]
    fn addresses_of_52_bits_come_with_the_64k_granule() {
        let config = SmmuV3UnitConfig { address_width: 52, va_52: true, ..Default::default() };
        let machine = Machine::new(config);
        let far = 0x8_0000_0000_0000;
        machine.map_stage2(far, 0, 0x10_0000, Protection::READ_WRITE);
        machine.poke(far + 0x1_0000, 6);
        let tables = machine.tables_of(Granule::K64, 52, false);
        let iova = (1 << 51) | IOVA & !0xffff;
        tables.map(iova, 3, far + 0x1_0000, RW);
        let mut port = machine.port();
        assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(6));
        // A context descriptor that asks for fewer output bits (IPS) gets no more.
        let cd = tables.cd();
        machine.attach(&Cd { qw0: cd.qw0.with_ips(5), ..cd });
        machine.invalidate(ALL);
        assert_eq!(machine.read(&mut port, PLAIN, iova), stage1_event(EventId::AddressSize));
        // Blocks of 4 TiB, of which stage 2 has a piece.
        machine.attach(&cd);
        machine.invalidate(ALL);
        tables.map(0, 1, far, RW);
        assert_eq!(machine.read(&mut port, PLAIN, 0x1_0000), Ok(6));
    }

    #[test]
    fn descriptors_lead_no_further_than_ips() {
        let machine = Machine::new(SmmuV3UnitConfig { address_width: 40, ..Default::default() });
        let tables = machine.tables(Granule::K4);
        let mut port = machine.port();
        let beyond = stage1_event(EventId::AddressSize);
        tables.map(IOVA, 3, 1 << 40, RW);
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), beyond);
        let pointer = Descriptor::new().with_valid(true).with_table(true);
        let pointer = pointer.with_address(Granule::K4, 1 << 40);
        machine.poke(tables.entry(IOVA, 1), pointer.into_bits());
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), beyond);
    }

    #[test]
    fn a_clear_access_flag_is_a_fault_unless_affd() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let tables = machine.tables(Granule::K4);
        let leaf = tables.map(IOVA, 3, HIGH, RW.with_af(false).with_ap_read_only(true));
        let mut port = machine.port();
        let outcome = machine.write(&mut port, PLAIN, IOVA, 1);
        assert_eq!(outcome, stage1_event(EventId::Access), "before permissions are looked at");
        let cd = tables.cd();
        machine.attach(&Cd { qw0: cd.qw0.with_affd(true), ..cd });
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
        assert_eq!(machine.peek(leaf) & Descriptor::AF, 0, "no flag is written without HA");
    }

    #[test]
    fn permissions_are_those_of_the_page_within_those_of_the_tables() {
        type Change = fn(Descriptor) -> Descriptor;
        // For unprivileged read, write, execute; then privileged.
        let same: Change = |leaf| leaf;
        let cases: [(Change, u64, &str); 9] = [
            (same, 0, "rwxrw-"),
            (|leaf| leaf.with_ap_read_only(true), 0, "r-xr-x"),
            (|leaf| leaf.with_ap_unprivileged(false), 0, "--xrwx"),
            (|leaf| leaf.with_uxn(true), 0, "rw-rw-"),
            (|leaf| leaf.with_ap_read_only(true).with_pxn(true), 0, "r-xr--"),
            (same, 1 << 62, "r-xr-x"),
            (same, 1 << 61, "--xrwx"),
            (same, 1 << 60, "rw-rw-"),
            (|leaf| leaf.with_ap_read_only(true), 1 << 59, "r-xr--"),
        ];
        for (change, limits, expected) in cases {
            let machine = Machine::new(SmmuV3UnitConfig::default());
            let tables = machine.tables(Granule::K4);
            with_substreams(&machine, &tables.cd());
            tables.map(IOVA, 3, HIGH, change(RW));
            let pointer = tables.entry(IOVA, 1);
            machine.poke(pointer, machine.peek(pointer) | limits);
            // Twice: from the walk, and from the IOTLB.
            for _ in 0..2 {
                assert_eq!(rights(&machine), expected, "{limits:#x}");
            }
        }
    }

    /// The device's rights at [`IOVA`] with PASID 1: unprivileged, then privileged.
    fn rights(machine: &Machine) -> String {
        let mut port = machine.port();
        let allowed = |outcome: Outcome, letter| match outcome {
            Ok(_) => letter,
            Err((Some(EventId::Permission), false)) => '-',
            other => panic!("{other:?}"),
        };
        let mut text = String::new();
        for who in [pasid(1), privileged(pasid(1))] {
            text.push(allowed(machine.read(&mut port, who, IOVA), 'r'));
            text.push(allowed(machine.write(&mut port, who, IOVA, 0), 'w'));
            text.push(allowed(machine.read(&mut port, execute(who), IOVA), 'x'));
        }
        text
    }

    #[test]
    fn a_context_descriptor_may_forbid_more() {
        for (change, expected) in [
            ((|word| word.with_wxn(true)) as fn(Cd0) -> Cd0, "rw-rw-"),
            (|word| word.with_pan(true), "rwx---"),
        ] {
            let machine = Machine::new(SmmuV3UnitConfig::default());
            let tables = machine.tables(Granule::K4);
            let cd = tables.cd();
            with_substreams(&machine, &Cd { qw0: change(cd.qw0), ..cd });
            tables.map(IOVA, 3, HIGH, RW);
            assert_eq!(rights(&machine), expected);
        }
    }

    #[test]
    fn a_large_table_need_not_be_in_one_piece() {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let tables = machine.tables(Granule::K64);
        // The pages of the last table are in reverse order in memory.
        let far = 0x7000_0000;
        for page in 0..16 {
            machine.map_stage2(
                far + page * 0x1000,
                (15 - page) * 0x1000,
                0x1000,
                Protection::READ_WRITE,
            );
        }
        let pointer = Descriptor::new().with_valid(true).with_table(true);
        let pointer = pointer.with_address(Granule::K64, far).into_bits();
        machine.poke(tables.entry(IOVA, 2), pointer);
        machine.poke(HIGH + 0x20_0000, 77);
        let mut port = machine.port();
        for index in [0u64, 511, 512, 5000, 8191] {
            let iova = IOVA & !0x1fff_ffff | index << 16;
            let leaf = RW.with_table(true).with_address(Granule::K64, HIGH + 0x20_0000);
            machine.poke(far + index * 8, leaf.into_bits());
            assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(77), "{index}");
        }
    }
}

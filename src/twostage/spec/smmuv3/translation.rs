// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 1 translation tables, VMSAv8-64 (IHI 0070 §3.4, §5.4; DDI 0487, chapter D8).
//!
//! Levels are numbered from the top down, as in the architecture: level 3 has pages, whatever the
//! granule; the top level is 0 for the 4K and 16K granules, 1 for the 64K granule. 52-bit addresses
//! need the 64K granule: CD.DS is not supported.

use twostage_bits::bitfield;

/// Size of a descriptor, in bytes.
pub const DESCRIPTOR_SIZE: u64 = 8;

/// The level whose descriptors are pages.
pub const LAST_LEVEL: u8 = 3;

/// The translation granule: the size of a table and of the smallest page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granule {
    /// 4 KiB.
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl Granule {
    /// Every granule.
    pub const ALL: [Self; 3] = [Self::K4, Self::K16, Self::K64];

    /// The granule of CD.TG0 or STE.S2TG; `None` for the reserved 0b11.
    pub const fn from_tg0(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::K4),
            1 => Some(Self::K64),
            2 => Some(Self::K16),
            _ => None,
        }
    }

    /// The bits of CD.TG0 or STE.S2TG.
    pub const fn tg0(self) -> u8 {
        match self {
            Self::K4 => 0,
            Self::K64 => 1,
            Self::K16 => 2,
        }
    }

    /// The granule of CD.TG1, which is also the TG of a TLB invalidation by range; `None` for 0b00:
    /// reserved in a context descriptor, no range in a command.
    pub const fn from_tg1(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::K16),
            2 => Some(Self::K4),
            3 => Some(Self::K64),
            _ => None,
        }
    }

    /// The bits of CD.TG1.
    pub const fn tg1(self) -> u8 {
        match self {
            Self::K16 => 1,
            Self::K4 => 2,
            Self::K64 => 3,
        }
    }

    /// Binary logarithm of the granule in bytes.
    pub const fn shift(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// The granule in bytes.
    pub const fn size(self) -> u64 {
        1 << self.shift()
    }

    /// Bits of an address that index one table: 9, 11 or 13.
    pub const fn index_bits(self) -> u32 {
        self.shift() - 3
    }

    /// Binary logarithm of the bytes that a descriptor of `level` (0 to 3) maps.
    pub const fn level_shift(self, level: u8) -> u32 {
        self.shift() + self.index_bits() * LAST_LEVEL.saturating_sub(level) as u32
    }

    /// Bytes that a descriptor of `level` (0 to 3) maps: the size of a page or block there.
    pub const fn level_size(self, level: u8) -> u64 {
        1 << self.level_shift(level)
    }

    /// The level at which a walk of `input_bits` bits of address (16 to 52) starts.
    pub const fn start_level(self, input_bits: u32) -> u8 {
        let above_pages = input_bits.saturating_sub(self.shift()).saturating_sub(1);
        LAST_LEVEL.saturating_sub((above_pages / self.index_bits()) as u8)
    }

    /// The index of `address` in the table of `level`, in a walk of `input_bits` bits of address:
    /// bits above are ignored.
    pub const fn index(self, address: u64, level: u8, input_bits: u32) -> u64 {
        let below = if input_bits < 64 { address & ((1 << input_bits) - 1) } else { address };
        let index = below >> self.level_shift(level);
        if level > self.start_level(input_bits) {
            index & ((1 << self.index_bits()) - 1)
        } else {
            index
        }
    }

    /// Whether a descriptor of `level` may be a block, with output addresses of `output_bits` bits.
    pub const fn has_blocks(self, level: u8, output_bits: u8) -> bool {
        match (self, level) {
            (_, 2) => true,
            (Self::K4, 1) => true,
            // 4 TiB blocks came with 52-bit addresses.
            (Self::K64, 1) => output_bits == 52,
            _ => false,
        }
    }

    /// How many adjacent descriptors of `level` the Contiguous bit joins; 1 if it has no meaning.
    pub const fn contiguous(self, level: u8) -> u64 {
        match (self, level) {
            (Self::K4, 1..=3) => 16,
            (Self::K16, 2) => 32,
            (Self::K16, 3) => 128,
            (Self::K64, 2 | 3) => 32,
            _ => 1,
        }
    }
}

/// The type of a descriptor at its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DescriptorKind {
    /// Bit 0 is clear, or the encoding is reserved at this level: a translation fault.
    Invalid,
    /// It points to a table of the next level.
    Table,
    /// It is a block (levels above 3) or a page (level 3).
    Leaf,
}

/// A stage 1 descriptor of any level. The attributes of blocks and pages are its own fields; those
/// of tables are in [`TableAttributes`].
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Descriptor {
    /// Valid.
    pub valid: bool,
    /// Type: a table, or in level 3 a page.
    pub table: bool,
    /// AttrIndx: selects memory attributes of MAIR.
    #[bits(3)]
    pub attr_index: u8,
    /// NS: Non-secure output address.
    pub ns: bool,
    /// AP\[1\]: unprivileged requests may access.
    pub ap_unprivileged: bool,
    /// AP\[2\]: read-only.
    pub ap_read_only: bool,
    /// SH: shareability.
    #[bits(2)]
    pub sh: u8,
    /// AF: accessed.
    pub af: bool,
    /// nG: not global: the translation belongs to the ASID.
    pub ng: bool,
    /// Bits 47:12 of the output or table address; with the 64K granule bits 15:12 of the field's
    /// place are bits 51:48 of the address. See [`Descriptor::address`].
    #[bits(36)]
    pub address_bits: u64,
    #[bits(2)]
    __: u8,
    /// GP: guarded page.
    pub gp: bool,
    /// DBM: if hardware updates the dirty state, a read-only page may be written.
    pub dbm: bool,
    /// Contiguous: one of a run of descriptors that may be cached as one.
    pub contiguous: bool,
    /// PXN: privileged requests must not execute.
    pub pxn: bool,
    /// UXN: unprivileged requests must not execute.
    pub uxn: bool,
    /// Bits 58:55, for software.
    #[bits(4)]
    pub software: u8,
    /// PBHA: bits 62:59, hardware attributes.
    #[bits(4)]
    pub pbha: u8,
    __: bool,
}

impl Descriptor {
    /// The access flag in the word.
    pub const AF: u64 = 1 << 10;
    /// AP\[2\] in the word.
    pub const AP_READ_ONLY: u64 = 1 << 7;

    /// The descriptor's type in a table of `level` of a walk with output addresses of `output_bits`
    /// bits.
    pub const fn kind(self, granule: Granule, level: u8, output_bits: u8) -> DescriptorKind {
        match (self.valid(), self.table(), level) {
            (true, true, LAST_LEVEL) => DescriptorKind::Leaf,
            (true, true, _) => DescriptorKind::Table,
            (true, false, _) if granule.has_blocks(level, output_bits) => DescriptorKind::Leaf,
            _ => DescriptorKind::Invalid,
        }
    }

    /// The table that the descriptor points to, or the block or page of `level` that it is: the
    /// address in bytes, with the bits below the object cleared.
    pub const fn address(self, granule: Granule, level: u8, kind: DescriptorKind) -> u64 {
        let field = self.address_bits() << 12;
        let full = match granule {
            Granule::K64 => field & !0xf000 | (field & 0xf000) << 36,
            Granule::K4 | Granule::K16 => field,
        };
        let size = match kind {
            DescriptorKind::Leaf => granule.level_size(level),
            DescriptorKind::Table | DescriptorKind::Invalid => granule.size(),
        };
        full & !(size - 1)
    }

    /// The descriptor with the address bits of `address` (below 2^48, or below 2^52 with the 64K
    /// granule; bits beyond are dropped).
    pub const fn with_address(self, granule: Granule, address: u64) -> Self {
        let field = match granule {
            Granule::K64 => address & 0xffff_ffff_0000 | (address >> 36) & 0xf000,
            Granule::K4 | Granule::K16 => address & 0xffff_ffff_f000,
        };
        self.with_address_bits(field >> 12)
    }

    /// The attributes that the descriptor, a table, applies to everything below.
    pub const fn table_attributes(self) -> TableAttributes {
        TableAttributes::from_bits(self.into_bits())
    }
}

/// The attributes of a table descriptor: they apply to everything below, unless CD.HAD0 or CD.HAD1
/// is set.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct TableAttributes {
    #[bits(59)]
    __: u64,
    /// PXNTable: privileged requests must not execute.
    pub pxn_table: bool,
    /// UXNTable: unprivileged requests must not execute.
    pub uxn_table: bool,
    /// APTable\[0\]: unprivileged requests must not access.
    pub ap_no_unprivileged: bool,
    /// APTable\[1\]: read-only.
    pub ap_read_only: bool,
    /// NSTable: Non-secure.
    pub ns_table: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_architecture_puts_them() {
        for (bits, first, last) in [
            (Descriptor::new().with_valid(true), 0, 0),
            (Descriptor::new().with_table(true), 1, 1),
            (Descriptor::new().with_attr_index(7), 2, 4),
            (Descriptor::new().with_ns(true), 5, 5),
            (Descriptor::new().with_ap_unprivileged(true), 6, 6),
            (Descriptor::new().with_ap_read_only(true), 7, 7),
            (Descriptor::new().with_sh(3), 8, 9),
            (Descriptor::new().with_af(true), 10, 10),
            (Descriptor::new().with_ng(true), 11, 11),
            (Descriptor::new().with_address_bits(u64::MAX >> 28), 12, 47),
            (Descriptor::new().with_gp(true), 50, 50),
            (Descriptor::new().with_dbm(true), 51, 51),
            (Descriptor::new().with_contiguous(true), 52, 52),
            (Descriptor::new().with_pxn(true), 53, 53),
            (Descriptor::new().with_uxn(true), 54, 54),
            (Descriptor::new().with_software(15), 55, 58),
            (Descriptor::new().with_pbha(15), 59, 62),
        ] {
            let mask = u64::MAX >> (63 - last) & u64::MAX << first;
            assert_eq!(bits.into_bits(), mask, "{bits:?}");
        }
        assert_eq!(Descriptor::new().with_af(true).into_bits(), Descriptor::AF);
        assert_eq!(Descriptor::new().with_ap_read_only(true).into_bits(), Descriptor::AP_READ_ONLY);
        assert_eq!(TableAttributes::new().with_pxn_table(true).into_bits(), 1 << 59);
        assert_eq!(TableAttributes::new().with_uxn_table(true).into_bits(), 1 << 60);
        assert_eq!(TableAttributes::new().with_ap_no_unprivileged(true).into_bits(), 1 << 61);
        assert_eq!(TableAttributes::new().with_ap_read_only(true).into_bits(), 1 << 62);
        assert_eq!(TableAttributes::new().with_ns_table(true).into_bits(), 1 << 63);
    }

    #[test]
    fn block_sizes_by_granule_and_level() {
        assert_eq!(Granule::K4.level_size(3), 4 << 10);
        assert_eq!(Granule::K4.level_size(2), 2 << 20);
        assert_eq!(Granule::K4.level_size(1), 1 << 30);
        assert_eq!(Granule::K16.level_size(2), 32 << 20);
        assert_eq!(Granule::K64.level_size(2), 512 << 20);
        assert_eq!(Granule::K64.level_size(1), 4 << 40);
        assert!(Granule::K4.has_blocks(1, 48) && !Granule::K4.has_blocks(0, 48));
        assert!(!Granule::K16.has_blocks(1, 48));
        assert!(Granule::K64.has_blocks(1, 52) && !Granule::K64.has_blocks(1, 48));
        assert!(!Granule::K4.has_blocks(3, 48));
        assert_eq!(Granule::K16.contiguous(3) * Granule::K16.size(), 2 << 20);
        assert_eq!(Granule::K64.contiguous(3) * Granule::K64.size(), 2 << 20);
    }

    #[test]
    fn walks_start_where_the_input_size_says() {
        for (granule, input_bits, level) in [
            (Granule::K4, 48, 0),
            (Granule::K4, 40, 0),
            (Granule::K4, 39, 1),
            (Granule::K4, 30, 2),
            (Granule::K4, 25, 2),
            (Granule::K16, 48, 0),
            (Granule::K16, 47, 1),
            (Granule::K16, 36, 2),
            (Granule::K64, 52, 1),
            (Granule::K64, 48, 1),
            (Granule::K64, 42, 2),
            (Granule::K64, 29, 3),
        ] {
            assert_eq!(granule.start_level(input_bits), level, "{granule:?} {input_bits}");
        }
    }

    #[test]
    fn the_indices_make_up_the_address() {
        for granule in Granule::ALL {
            for input_bits in 25..=48 {
                let address = 0x0000_9abc_def1_2345 & ((1 << input_bits) - 1);
                let start = granule.start_level(input_bits);
                let sum: u64 = (start..=LAST_LEVEL)
                    .map(|level| {
                        granule.index(address, level, input_bits) << granule.level_shift(level)
                    })
                    .sum();
                assert_eq!(sum, address & !(granule.size() - 1), "{granule:?} {input_bits}");
            }
        }
        // The top table of 52 bits with the 64K granule has 1024 entries.
        assert_eq!(Granule::K64.index(u64::MAX, 1, 52), 1023);
        assert_eq!(Granule::K4.index(0xffff_8000_0000_0000, 0, 48), 256);
    }

    #[test]
    fn addresses_round_trip() {
        let leaf = DescriptorKind::Leaf;
        for granule in Granule::ALL {
            let address = 0x0000_fedc_ba98_7654 & !(granule.size() - 1);
            let descriptor = Descriptor::new().with_address(granule, address);
            assert_eq!(descriptor.address(granule, 3, leaf), address);
        }
        let far = Descriptor::new().with_address(Granule::K64, 0xf_1234_5678_0000);
        assert_eq!(far.address(Granule::K64, 3, DescriptorKind::Leaf), 0xf_1234_5678_0000);
        assert_eq!(far.into_bits(), 0x1234_5678_f000);
        let block = Descriptor::from_bits(0x4020_1001);
        assert_eq!(block.address(Granule::K4, 2, DescriptorKind::Leaf), 0x4020_0000);
    }

    #[test]
    fn kinds_go_by_level() {
        let (table, block) = (Descriptor::from_bits(3), Descriptor::from_bits(1));
        assert_eq!(table.kind(Granule::K4, 3, 48), DescriptorKind::Leaf);
        assert_eq!(table.kind(Granule::K4, 2, 48), DescriptorKind::Table);
        assert_eq!(block.kind(Granule::K4, 2, 48), DescriptorKind::Leaf);
        assert_eq!(block.kind(Granule::K4, 3, 48), DescriptorKind::Invalid);
        assert_eq!(block.kind(Granule::K4, 0, 48), DescriptorKind::Invalid);
        assert_eq!(Descriptor::from_bits(2).kind(Granule::K4, 3, 48), DescriptorKind::Invalid);
    }

    #[test]
    fn granules_round_trip() {
        for granule in Granule::ALL {
            assert_eq!(Granule::from_tg0(granule.tg0()), Some(granule));
            assert_eq!(Granule::from_tg1(granule.tg1()), Some(granule));
        }
        assert_eq!(Granule::from_tg0(3), None);
        assert_eq!(Granule::from_tg1(0), None);
    }
}

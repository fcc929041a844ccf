// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PASID directory entries (§9.5) and PASID table entries (§9.6).

use twostage_bits::bitfield;

use super::PAGE_SHIFT;

/// Size of a PASID directory entry, in bytes.
pub const DIRECTORY_ENTRY_SIZE: u64 = 8;
/// Size of a PASID table entry, in bytes.
pub const TABLE_ENTRY_SIZE: u64 = 64;
/// PASIDs of one PASID table: PASID bits 5:0 index the table, the bits above the directory.
pub const TABLE_ENTRIES: u32 = 64;

/// PASID directory entry (§9.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidDirectoryEntry {
    /// P: present.
    pub p: bool,
    /// FPD: faults are not recorded.
    pub fpd: bool,
    #[bits(10)]
    __: u16,
    /// SMPTBLPTR: address of the PASID table, in 4 KiB pages.
    #[bits(52)]
    pub smptblptr: u64,
}

impl PasidDirectoryEntry {
    /// Reserved with any address width.
    pub const RESERVED: u64 = 0xffc;

    /// GPA of the PASID table, in bytes.
    pub const fn pasid_table(self) -> u64 {
        self.smptblptr() << PAGE_SHIFT
    }
}

/// PASID granular translation type (PGTT).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pgtt {
    /// 001: first-stage tables only.
    FirstStage,
    /// 010: second-stage tables only.
    SecondStage,
    /// 011: first-stage tables nested on second-stage tables.
    Nested,
    /// 100: pass-through.
    PassThrough,
}

impl Pgtt {
    /// Decodes `bits`; `None` for a reserved encoding.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::FirstStage),
            2 => Some(Self::SecondStage),
            3 => Some(Self::Nested),
            4 => Some(Self::PassThrough),
            _ => None,
        }
    }

    /// The three bits of the type.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::FirstStage => 1,
            Self::SecondStage => 2,
            Self::Nested => 3,
            Self::PassThrough => 4,
        }
    }
}

/// The number of levels of first-stage tables (FSPM), which determines the width of their input
/// addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum PagingMode {
    /// 00: 4 levels, 48 bits.
    Level4,
    /// 01: 5 levels, 57 bits.
    Level5,
}

impl PagingMode {
    /// Decodes `fspm`; `None` for a reserved encoding.
    pub const fn from_bits(fspm: u8) -> Option<Self> {
        match fspm {
            0 => Some(Self::Level4),
            1 => Some(Self::Level5),
            _ => None,
        }
    }

    /// The FSPM field.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Level4 => 0,
            Self::Level5 => 1,
        }
    }

    /// Width of input addresses, in bits.
    pub const fn address_width(self) -> u8 {
        match self {
            Self::Level4 => 48,
            Self::Level5 => 57,
        }
    }
}

/// Bits 63:0 of a PASID table entry (§9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry0 {
    /// P: present.
    pub p: bool,
    /// FPD: faults are not recorded.
    pub fpd: bool,
    /// AW: width of the second-stage tables, as bits; see [`super::root::AddressWidth`].
    #[bits(3)]
    pub aw: u8,
    /// SSEE: second-stage execute permission is checked.
    pub ssee: bool,
    /// PGTT, as bits; see [`PasidEntry::translation_type`].
    #[bits(3)]
    pub pgtt: u8,
    /// SSADE: second-stage accessed and dirty flags are updated.
    pub ssade: bool,
    #[bits(2)]
    __: u8,
    /// SSPTPTR: address of the top second-stage table, in 4 KiB pages.
    #[bits(52)]
    pub ssptptr: u64,
}

/// Bits 127:64 of a PASID table entry (§9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry1 {
    /// DID: domain id.
    pub did: u16,
    #[bits(7)]
    __: u8,
    /// PWSNP: page walks snoop.
    pub pwsnp: bool,
    /// PGSNP: accesses snoop.
    pub pgsnp: bool,
    /// CD: cache disable.
    pub cd: bool,
    /// EMTE: extended memory types.
    pub emte: bool,
    /// EMT: extended memory type.
    #[bits(3)]
    pub emt: u8,
    /// PWT: page-level write-through.
    pub pwt: bool,
    /// PCD: page-level cache disable.
    pub pcd: bool,
    /// PAT: page attribute table.
    pub pat: u32,
}

/// Bits 191:128 of a PASID table entry (§9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry2 {
    /// SRE: supervisor requests are allowed.
    pub sre: bool,
    /// ERE: execute requests are allowed.
    pub ere: bool,
    /// FSPM: first-stage paging mode, as bits; see [`PagingMode::from_bits`].
    #[bits(2)]
    pub fspm: u8,
    /// WPE: supervisor writes honour R/W.
    pub wpe: bool,
    /// NXE: XD is checked.
    pub nxe: bool,
    /// SMEP: supervisors cannot execute user pages.
    pub smep: bool,
    /// EAFE: the extended accessed flag is updated.
    pub eafe: bool,
    #[bits(4)]
    __: u8,
    /// FSPTPTR: address of the top first-stage table, in 4 KiB pages.
    #[bits(52)]
    pub fsptptr: u64,
}

/// PASID table entry (§9.6): 512 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PasidEntry {
    /// Bits 63:0: presence, type, second stage.
    pub qw0: PasidEntry0,
    /// Bits 127:64: domain id, snooping, memory types.
    pub qw1: PasidEntry1,
    /// Bits 191:128: first stage.
    pub qw2: PasidEntry2,
    /// Bits 511:192: reserved.
    pub reserved: [u64; 5],
}

impl PasidEntry {
    /// Bits of each 64-bit word that are reserved with any address width and type.
    pub const RESERVED: [u64; 8] =
        [0xc00, 0x7f_0000, 0xf00, u64::MAX, u64::MAX, u64::MAX, u64::MAX, u64::MAX];

    /// Decodes `words`.
    pub const fn from_words(words: [u64; 8]) -> Self {
        let [qw0, qw1, qw2, r3, r4, r5, r6, r7] = words;
        Self {
            qw0: PasidEntry0::from_bits(qw0),
            qw1: PasidEntry1::from_bits(qw1),
            qw2: PasidEntry2::from_bits(qw2),
            reserved: [r3, r4, r5, r6, r7],
        }
    }

    /// The words of the entry.
    pub const fn to_words(self) -> [u64; 8] {
        let [r3, r4, r5, r6, r7] = self.reserved;
        [self.qw0.into_bits(), self.qw1.into_bits(), self.qw2.into_bits(), r3, r4, r5, r6, r7]
    }

    /// The translation type; `None` for a reserved encoding.
    pub const fn translation_type(&self) -> Option<Pgtt> {
        Pgtt::from_bits(self.qw0.pgtt())
    }

    /// GPA of the top second-stage table, in bytes.
    pub const fn second_stage_table(&self) -> u64 {
        self.qw0.ssptptr() << PAGE_SHIFT
    }

    /// GPA of the top first-stage table, in bytes.
    pub const fn first_stage_table(&self) -> u64 {
        self.qw2.fsptptr() << PAGE_SHIFT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(PasidDirectoryEntry::from_bits(0x1234_5001).pasid_table(), 0x1234_5000);
        assert_eq!(PasidEntry0::new().with_aw(7).into_bits(), 7 << 2);
        assert_eq!(PasidEntry0::new().with_pgtt(7).into_bits(), 7 << 6);
        assert_eq!(PasidEntry0::new().with_ssade(true).into_bits(), 1 << 9);
        assert_eq!(PasidEntry1::new().with_pwsnp(true).into_bits(), 1 << (87 - 64));
        assert_eq!(PasidEntry1::new().with_pgsnp(true).into_bits(), 1 << (88 - 64));
        assert_eq!(PasidEntry1::new().with_pat(u32::MAX).into_bits(), 0xffff_ffff << 32);
        assert_eq!(PasidEntry2::new().with_fspm(3).into_bits(), 3 << 2);
        assert_eq!(PasidEntry2::new().with_eafe(true).into_bits(), 1 << 7);
        assert_eq!(PasidEntry2::new().with_fsptptr(1).into_bits(), 1 << 12);
    }

    #[test]
    fn words_round_trip() {
        let words = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(PasidEntry::from_words(words).to_words(), words);
    }

    #[test]
    fn types_round_trip() {
        for bits in 0..8 {
            let round = Pgtt::from_bits(bits).map_or(0, Pgtt::into_bits);
            assert_eq!(round, if (1..=4).contains(&bits) { bits } else { 0 });
            let mode = PagingMode::from_bits(bits);
            assert_eq!(mode.map(PagingMode::into_bits), (bits < 2).then_some(bits));
            assert_eq!(
                mode.map(PagingMode::address_width),
                [48, 57].get(usize::from(bits)).copied()
            );
        }
    }
}

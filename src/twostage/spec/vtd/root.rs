// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Root and context entries, legacy (§9.1, §9.3) and scalable mode (§9.2, §9.4).

use twostage_bits::bitfield;

use super::PAGE_SHIFT;

/// Entries of a root table: one a bus.
pub const ROOT_ENTRIES: u64 = 256;
/// Size of a root entry, legacy or scalable mode, in bytes.
pub const ROOT_ENTRY_SIZE: u64 = 16;
/// Size of a legacy context entry, in bytes; a table has 256.
pub const CONTEXT_ENTRY_SIZE: u64 = 16;
/// Size of a scalable-mode context entry, in bytes; a table has 128.
pub const SCALABLE_CONTEXT_ENTRY_SIZE: u64 = 32;
/// Entries of a scalable-mode context table: the lower or upper half of the 256 functions.
pub const SCALABLE_CONTEXT_ENTRIES: u8 = 128;

/// One half of a root entry: a present flag and a table pointer. A legacy root entry (§9.1) has it
/// in its low half alone; a scalable-mode root entry (§9.2) has one for functions 0x00 to 0x7f and
/// one for 0x80 to 0xff.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RootHalf {
    /// P, LP or UP: present.
    pub p: bool,
    #[bits(11)]
    __: u16,
    /// CTP, LCTP or UCTP: address of the context table, in 4 KiB pages.
    #[bits(52)]
    pub ctp: u64,
}

impl RootHalf {
    /// Reserved with any address width.
    pub const RESERVED: u64 = 0xffe;

    /// GPA of the context table, in bytes.
    pub const fn context_table(self) -> u64 {
        self.ctp() << PAGE_SHIFT
    }
}

/// Translation type of a legacy context entry (TT).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContextTranslationType {
    /// 00: untranslated requests go through second-stage tables; others are blocked.
    Untranslated,
    /// 01: all requests go through second-stage tables; device-TLBs are served.
    All,
    /// 10: untranslated requests pass; others are blocked.
    PassThrough,
}

/// Low 64 bits of a legacy context entry (§9.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextLow {
    /// P: present.
    pub p: bool,
    /// FPD: faults are not recorded.
    pub fpd: bool,
    /// TT: translation type, as bits; see [`ContextLow::translation_type`].
    #[bits(2)]
    pub tt: u8,
    __: u8,
    /// SSPTPTR: address of the top second-stage table, in 4 KiB pages.
    #[bits(52)]
    pub ssptptr: u64,
}

impl ContextLow {
    /// Reserved with any address width.
    pub const RESERVED: u64 = 0xff0;

    /// The translation type; `None` for the reserved 11.
    pub const fn translation_type(self) -> Option<ContextTranslationType> {
        match self.tt() {
            0 => Some(ContextTranslationType::Untranslated),
            1 => Some(ContextTranslationType::All),
            2 => Some(ContextTranslationType::PassThrough),
            _ => None,
        }
    }

    /// GPA of the top second-stage table, in bytes.
    pub const fn second_stage_table(self) -> u64 {
        self.ssptptr() << PAGE_SHIFT
    }
}

/// High 64 bits of a legacy context entry (§9.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextHigh {
    /// AW: width of the second-stage tables, as bits; see [`AddressWidth::from_bits`].
    #[bits(3)]
    pub aw: u8,
    #[bits(5)]
    __: u8,
    /// DID: domain id.
    pub did: u16,
    #[bits(40)]
    __: u64,
}

impl ContextHigh {
    /// Reserved bits; bits 6:3 are ignored.
    pub const RESERVED: u64 = 0xffff_ffff_ff00_0080;
}

/// The input address width of second-stage tables: the encoding of AW fields (§9.3, §9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum AddressWidth {
    /// 001: 39 bits, 3 levels.
    Bits39,
    /// 010: 48 bits, 4 levels.
    Bits48,
    /// 011: 57 bits, 5 levels.
    Bits57,
}

impl AddressWidth {
    /// Every width, ascending.
    pub const ALL: [Self; 3] = [Self::Bits39, Self::Bits48, Self::Bits57];

    /// The width that an AW field names; `None` for a reserved encoding.
    pub const fn from_bits(aw: u8) -> Option<Self> {
        match aw {
            1 => Some(Self::Bits39),
            2 => Some(Self::Bits48),
            3 => Some(Self::Bits57),
            _ => None,
        }
    }

    /// The AW field, which is also the place of the width in CAP.SAGAW.
    pub const fn into_bits(self) -> u8 {
        match self {
            Self::Bits39 => 1,
            Self::Bits48 => 2,
            Self::Bits57 => 3,
        }
    }

    /// In bits.
    pub const fn bits(self) -> u8 {
        match self {
            Self::Bits39 => 39,
            Self::Bits48 => 48,
            Self::Bits57 => 57,
        }
    }
}

/// Bits 63:0 of a scalable-mode context entry (§9.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ScalableContextLow {
    /// P: present.
    pub p: bool,
    /// FPD: faults are not recorded.
    pub fpd: bool,
    /// DTE: device-TLBs are served.
    pub dte: bool,
    /// PASIDE: requests with PASID are served.
    pub paside: bool,
    /// PRE: page requests are served.
    pub pre: bool,
    #[bits(4)]
    __: u8,
    /// PDTS: the PASID directory has `2^(pdts + 7)` entries.
    #[bits(3)]
    pub pdts: u8,
    /// PASIDDIRPTR: address of the PASID directory, in 4 KiB pages.
    #[bits(52)]
    pub pasiddirptr: u64,
}

impl ScalableContextLow {
    /// Reserved with any address width.
    pub const RESERVED: u64 = 0x1e0;

    /// GPA of the PASID directory, in bytes.
    pub const fn pasid_directory(self) -> u64 {
        self.pasiddirptr() << PAGE_SHIFT
    }

    /// Entries of the PASID directory.
    pub const fn directory_entries(self) -> u32 {
        1 << (self.pdts() + 7)
    }

    /// PASIDs that the directory reaches: `0..pasids()`.
    pub const fn pasids(self) -> u32 {
        1 << (self.pdts() + 13)
    }
}

/// Bits 127:64 of a scalable-mode context entry (§9.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ScalableContextHigh {
    /// RID_PASID: the PASID of requests without.
    #[bits(20)]
    pub rid_pasid: u32,
    /// RID_PRIV: requests without PASID have supervisor privilege.
    pub rid_priv: bool,
    #[bits(43)]
    __: u64,
}

impl ScalableContextHigh {
    /// Reserved bits.
    pub const RESERVED: u64 = 0xffff_ffff_ffe0_0000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(RootHalf::from_bits(0x1234_5001).context_table(), 0x1234_5000);
        assert_eq!(ContextLow::new().with_tt(3).into_bits(), 3 << 2);
        assert_eq!(
            ContextLow::from_bits(8).translation_type(),
            Some(ContextTranslationType::PassThrough)
        );
        assert_eq!(ContextLow::from_bits(0xc).translation_type(), None);
        assert_eq!(ContextHigh::new().with_did(0xffff).into_bits(), 0xffff << 8);
        assert_eq!(ScalableContextLow::new().with_pdts(7).into_bits(), 7 << 9);
        assert_eq!(ScalableContextLow::new().with_pre(true).into_bits(), 1 << 4);
        assert_eq!(ScalableContextHigh::new().with_rid_priv(true).into_bits(), 1 << 20);
    }

    #[test]
    fn a_width_has_nine_bits_more_for_each_level() {
        for (aw, bits) in (0..8).zip([None, Some(39), Some(48), Some(57), None, None, None, None]) {
            let width = AddressWidth::from_bits(aw);
            assert_eq!(width.map(AddressWidth::bits), bits);
            assert_eq!(width.map(AddressWidth::into_bits), bits.and(Some(aw)));
            assert!(width.is_none_or(|width| AddressWidth::ALL.contains(&width)));
        }
    }

    #[test]
    fn the_directory_reaches_at_most_20_bits_of_pasid() {
        assert_eq!(ScalableContextLow::new().with_pdts(0).pasids(), 1 << 13);
        assert_eq!(ScalableContextLow::new().with_pdts(7).pasids(), 1 << 20);
        assert_eq!(ScalableContextLow::new().with_pdts(7).directory_entries(), 1 << 14);
    }
}

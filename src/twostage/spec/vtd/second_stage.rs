// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Second-stage paging entries of all levels (§9.8).
//!
//! Levels are numbered from the leaf up, as in [`super::first_stage`].

use twostage_bits::bitfield;

use super::first_stage::{address, is_leaf};

pub use super::first_stage::{index, page_size, ENTRY_SIZE, INDEX_BITS};

/// A second-stage paging entry (§9.8).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SecondStageEntry {
    /// R: readable.
    pub r: bool,
    /// W: writable.
    pub w: bool,
    /// X: executable; ignored unless SSEE.
    pub x: bool,
    /// EMT: extended memory type of a leaf.
    #[bits(3)]
    pub emt: u8,
    /// IPAT: ignore PAT, of a leaf.
    pub ipat: bool,
    /// PS: the entry is a 2 MiB or 1 GiB page; ignored in level 1.
    pub ps: bool,
    /// A: accessed; ignored unless SSADE.
    pub a: bool,
    /// D: dirty, of a leaf; ignored unless SSADE.
    pub d: bool,
    #[bits(1)]
    __: u8,
    /// SNP: snoop, of a leaf.
    pub snp: bool,
    /// Address of the table or page, in 4 KiB pages; see [`SecondStageEntry::address`].
    #[bits(40)]
    pub frame: u64,
    #[bits(12)]
    __: u16,
}

impl SecondStageEntry {
    /// The accessed flag in the word.
    pub const A: u64 = 1 << 8;
    /// The dirty flag in the word.
    pub const D: u64 = 1 << 9;

    /// Whether the entry is present: it may be read or written.
    pub const fn is_present(self) -> bool {
        self.r() || self.w()
    }

    /// Whether the entry, found at `level`, is a page and not a pointer to a table.
    pub const fn is_leaf(self, level: u8) -> bool {
        is_leaf(self.ps(), level)
    }

    /// Address of the next table, or of the page when the entry is a leaf of `level`, in bytes.
    pub const fn address(self, level: u8) -> u64 {
        address(self.frame(), self.is_leaf(level), level)
    }

    /// The bits that must be zero in this entry when it is present at `level` (1 to 5) of a unit
    /// with `host_address_width` bits of address and the large pages `sslps` (CAP.SSLPS: bit 0 is
    /// 2 MiB, bit 1 is 1 GiB). SNP is left to the caller: it depends on ECAP.SC.
    pub const fn reserved_bits(self, level: u8, host_address_width: u8, sslps: u8) -> u64 {
        let above = super::above_width(host_address_width) & ADDRESS_BITS;
        let by_level = match level {
            1 => 0,
            2 if self.ps() && sslps & 1 != 0 => 0x1f_f000,
            3 if self.ps() && sslps & 2 != 0 => 0x3fff_f000,
            2 | 3 if !self.ps() => 0,
            _ => PS,
        };
        above | by_level | TRANSIENT
    }
}

/// Bit 62: until revision 3.1 of the specification, a leaf's mapping may be transient (TM) where
/// device-TLBs are served; since 3.2, the bit is reserved in all entries.
const TRANSIENT: u64 = 1 << 62;
/// Bits 51:12.
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;
const PS: u64 = 1 << 7;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(SecondStageEntry::new().with_emt(7).into_bits(), 7 << 3);
        assert_eq!(SecondStageEntry::new().with_ps(true).into_bits(), PS);
        assert_eq!(SecondStageEntry::new().with_a(true).into_bits(), SecondStageEntry::A);
        assert_eq!(SecondStageEntry::new().with_d(true).into_bits(), SecondStageEntry::D);
        assert_eq!(SecondStageEntry::new().with_snp(true).into_bits(), 1 << 11);
        assert_eq!(SecondStageEntry::new().with_frame(1).into_bits(), 1 << 12);
        assert!(SecondStageEntry::new().with_w(true).is_present());
        assert!(!SecondStageEntry::new().with_x(true).is_present());
    }

    #[test]
    fn reserved_bits_go_by_level_and_large_pages() {
        let small = SecondStageEntry::new();
        let large = small.with_ps(true);
        assert_eq!(large.reserved_bits(1, 52, 0), TRANSIENT);
        assert_eq!(large.reserved_bits(2, 52, 0), TRANSIENT | 0x80);
        assert_eq!(large.reserved_bits(2, 52, 1), TRANSIENT | 0x1f_f000);
        assert_eq!(large.reserved_bits(3, 52, 1), TRANSIENT | 0x80);
        assert_eq!(large.reserved_bits(3, 52, 3), TRANSIENT | 0x3fff_f000);
        assert_eq!(large.reserved_bits(4, 52, 3), TRANSIENT | 0x80);
        assert_eq!(small.reserved_bits(2, 48, 0), TRANSIENT | 0x000f_0000_0000_0000);
        assert_eq!(large.address(2), 0);
    }
}

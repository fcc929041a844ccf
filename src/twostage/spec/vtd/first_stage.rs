// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! First-stage paging entries of all levels (§9.7), the x86-64 format.
//!
//! Levels are numbered from the leaf up: 1 is the page table, 2 the page directory, 3 the page
//! directory pointer table, 4 PML4, 5 PML5.

use twostage_bits::bitfield;

use super::PAGE_SHIFT;

/// Bits of an IOVA that index one table.
pub const INDEX_BITS: u32 = 9;
/// Size of an entry, in bytes.
pub const ENTRY_SIZE: u64 = 8;

/// A first-stage paging entry (§9.7).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct FirstStageEntry {
    /// P: present.
    pub p: bool,
    /// R/W: writable.
    pub rw: bool,
    /// U/S: accessible to user requests.
    pub us: bool,
    /// PWT: page-level write-through.
    pub pwt: bool,
    /// PCD: page-level cache disable.
    pub pcd: bool,
    /// A: accessed.
    pub a: bool,
    /// D: dirty; ignored in a pointer to a table.
    pub d: bool,
    /// PS: the entry is a 2 MiB or 1 GiB page; in level 1 it is the PAT bit.
    pub ps: bool,
    /// G: global; ignored.
    pub g: bool,
    #[bits(1)]
    __: u8,
    /// EA: extended accessed.
    pub ea: bool,
    #[bits(1)]
    __: u8,
    /// Address of the table or page, in 4 KiB pages; see [`FirstStageEntry::address`].
    #[bits(40)]
    pub frame: u64,
    #[bits(11)]
    __: u16,
    /// XD: execution is not allowed.
    pub xd: bool,
}

impl FirstStageEntry {
    /// The accessed flag in the word.
    pub const A: u64 = 1 << 5;
    /// The dirty flag in the word.
    pub const D: u64 = 1 << 6;
    /// The extended accessed flag in the word.
    pub const EA: u64 = 1 << 10;

    /// Whether the entry, found at `level`, is a page, not a pointer to a table.
    pub const fn is_leaf(self, level: u8) -> bool {
        is_leaf(self.ps(), level)
    }

    /// GPA of the next table, or of the page if the entry is a leaf of `level`, in bytes.
    pub const fn address(self, level: u8) -> u64 {
        address(self.frame(), self.is_leaf(level), level)
    }

    /// The bits that must be zero in a present entry at `level` (1 to 5) of a unit with
    /// `host_address_width` bits of address, with or without 1 GiB pages (CAP.FS1GP).
    pub const fn reserved_bits(self, level: u8, host_address_width: u8, fs1gp: bool) -> u64 {
        let above = super::above_width(host_address_width) & ADDRESS_BITS;
        let by_level = match level {
            1 => 0,
            // Bit 12 of a large page is its PAT bit, hence the mask from bit 13.
            2 if self.ps() => 0x1f_e000,
            3 if self.ps() && fs1gp => 0x3fff_e000,
            3 if self.ps() => PS,
            2 | 3 => 0,
            _ => PS,
        };
        above | by_level
    }
}

/// Whether an entry of either stage, found at `level`, is a page.
pub(super) const fn is_leaf(ps: bool, level: u8) -> bool {
    level == 1 || (ps && (level == 2 || level == 3))
}

/// The address in an entry of either stage: of a table, or of the page of `level`.
pub(super) const fn address(frame: u64, is_leaf: bool, level: u8) -> u64 {
    let address = frame << PAGE_SHIFT;
    if is_leaf {
        address & !(page_size(level) - 1)
    } else {
        address
    }
}

/// Bits 51:12.
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;
const PS: u64 = 1 << 7;

/// Size of what an entry of `level` maps, in bytes: 4 KiB, 2 MiB, 1 GiB, ….
pub const fn page_size(level: u8) -> u64 {
    1 << shift(level)
}

/// The index of `iova` in the table of `level`.
pub const fn index(iova: u64, level: u8) -> u64 {
    iova >> shift(level) & ((1 << INDEX_BITS) - 1)
}

const fn shift(level: u8) -> u32 {
    PAGE_SHIFT + INDEX_BITS * (level as u32 - 1)
}

/// Whether `iova` is canonical for tables of `levels` (4 or 5) levels (§3.6): bits 63 down to 47 or
/// 56 are all equal.
pub const fn is_canonical(iova: u64, levels: u8) -> bool {
    let sign = PAGE_SHIFT + INDEX_BITS * levels as u32 - 1;
    let high = (iova as i64) >> sign;
    high == 0 || high == -1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        assert_eq!(FirstStageEntry::new().with_a(true).into_bits(), FirstStageEntry::A);
        assert_eq!(FirstStageEntry::new().with_d(true).into_bits(), FirstStageEntry::D);
        assert_eq!(FirstStageEntry::new().with_ea(true).into_bits(), FirstStageEntry::EA);
        assert_eq!(FirstStageEntry::new().with_ps(true).into_bits(), PS);
        assert_eq!(FirstStageEntry::new().with_xd(true).into_bits(), 1 << 63);
        let frame = FirstStageEntry::new().with_frame((1 << 40) - 1);
        assert_eq!(frame.into_bits(), ADDRESS_BITS);
    }

    #[test]
    fn large_pages_drop_the_bits_below_them() {
        let entry = FirstStageEntry::from_bits(0x4020_1083);
        assert_eq!(entry.address(1), 0x4020_1000);
        assert_eq!(entry.address(2), 0x4020_0000);
        assert_eq!(entry.address(3), 0x4000_0000);
        assert!(!entry.is_leaf(4) && entry.is_leaf(3) && entry.is_leaf(1));
    }

    #[test]
    fn reserved_bits_go_by_level() {
        let small = FirstStageEntry::new();
        let large = small.with_ps(true);
        assert_eq!(small.reserved_bits(3, 52, true), 0);
        assert_eq!(large.reserved_bits(1, 52, true), 0);
        assert_eq!(large.reserved_bits(2, 52, true), 0x1f_e000);
        assert_eq!(large.reserved_bits(3, 52, true), 0x3fff_e000);
        assert_eq!(large.reserved_bits(3, 52, false), 0x80);
        assert_eq!(large.reserved_bits(4, 52, true), 0x80);
        assert_eq!(large.reserved_bits(5, 52, true), 0x80);
        assert_eq!(small.reserved_bits(1, 48, true), 0x000f_0000_0000_0000);
    }

    #[test]
    fn indices_and_sizes_by_level() {
        let iova = 0x00ab_cdef_1234_5678;
        assert_eq!(index(iova, 1), 0x145);
        assert_eq!(index(iova, 5), 0x0ab);
        assert_eq!((page_size(1), page_size(2), page_size(3)), (1 << 12, 1 << 21, 1 << 30));
    }

    #[test]
    fn canonical_addresses() {
        assert!(is_canonical(0x0000_7fff_ffff_ffff, 4));
        assert!(!is_canonical(0x0000_8000_0000_0000, 4));
        assert!(is_canonical(0xffff_8000_0000_0000, 4));
        assert!(is_canonical(0x0000_8000_0000_0000, 5));
        assert!(!is_canonical(0x0100_0000_0000_0000, 5));
    }
}

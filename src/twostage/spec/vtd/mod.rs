// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Intel VT-d: registers, tables, descriptors and faults.
//!
//! Source: Intel Virtualization Technology for Directed I/O, Architecture Specification, revisions
//! 4 and 5; section numbers are those of revision 4. Fields have the specification's names. All
//! words are little-endian in memory; values here are in host order.

pub mod fault;
pub mod first_stage;
pub mod interrupt;
pub mod page_request;
pub mod pasid;
pub mod qi;
pub mod regs;
pub mod root;
pub mod second_stage;

use qi::{AddressMask, DeviceTlbRange};

/// Size of a table and of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Binary logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The widest host address width (HAW) in bits: the maximum that a paging entry can hold (§9.7,
/// §9.8), so that no address bit of an entry is reserved. The virtual and the emulated VT-d both
/// have it.
pub const HOST_ADDRESS_WIDTH: u8 = 52;

/// The bits of a 64-bit word at and above `host_address_width`, up to bit 63 for table pointers:
/// reserved in each pointer to host memory.
pub const fn above_width(host_address_width: u8) -> u64 {
    if host_address_width >= 64 {
        return 0;
    }
    !((1 << host_address_width) - 1)
}

/// The page number past the last one of a 64-bit address space.
const SPACE_END: u64 = 1 << (u64::BITS - PAGE_SHIFT);

/// The pages that an invalidation names (§6.5.2.3, §6.5.2.4): a range of 4 KiB pages in a 64-bit
/// address space, not empty, and not past its end.
///
/// The type has no other values, and counts pages rather than bytes, so no operation on ranges can
/// wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// Number of the first page.
    first: u64,
    /// Number of the page past the last one: more than `first`, at most [`SPACE_END`].
    end: u64,
    leaf: bool,
}

impl PageRange {
    /// `pages` pages from that of `address`, or as many as there are. A range of 0 pages would
    /// leave its page stale: it becomes one page.
    pub const fn new(address: u64, pages: u64, leaf: bool) -> Self {
        let first = address >> PAGE_SHIFT;
        // More than 0, as every page number is below the end.
        let left = SPACE_END - first;
        let pages = match pages {
            0 => 1,
            pages if pages > left => left,
            pages => pages,
        };
        Self { first, end: first + pages, leaf }
    }

    /// The first byte: a multiple of 4096.
    pub const fn address(self) -> u64 {
        self.first << PAGE_SHIFT
    }

    /// The last byte.
    pub const fn last(self) -> u64 {
        (self.end - 1) << PAGE_SHIFT | (PAGE_SIZE - 1)
    }

    /// The number of pages, up to 2^52.
    pub const fn pages(self) -> u64 {
        self.end - self.first
    }

    /// Only leaf entries changed: paging-structure caches may stay (IH).
    pub const fn leaf(self) -> bool {
        self.leaf
    }

    /// Whether it covers the whole address space.
    pub const fn is_all(self) -> bool {
        self.pages() == SPACE_END
    }

    /// The union, if they overlap or are adjacent. Paging-structure caches may stay only if both
    /// allow it.
    pub fn join(self, other: Self) -> Option<Self> {
        (self.first <= other.end && other.first <= self.end).then(|| Self {
            first: self.first.min(other.first),
            end: self.end.max(other.end),
            leaf: self.leaf && other.leaf,
        })
    }
}

impl From<AddressMask> for PageRange {
    fn from(of: AddressMask) -> Self {
        let pages = 1 << of.mask.min(63);
        let first = (of.address >> PAGE_SHIFT) & !(pages - 1);
        Self::new(first << PAGE_SHIFT, pages, of.leaf)
    }
}

impl From<DeviceTlbRange> for PageRange {
    /// One page, or a power of two of pages: the lowest zero of the page number gives the size, and
    /// is part of the number within the range.
    fn from(of: DeviceTlbRange) -> Self {
        let page = of.address >> PAGE_SHIFT;
        let order = if of.size { page.trailing_ones() + 1 } else { 0 };
        // At most 53, as page numbers have 52 bits.
        let pages = 1 << order;
        Self::new((page & !(pages - 1)) << PAGE_SHIFT, pages, true)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bits_above_a_width() {
        assert_eq!(above_width(64), 0);
        assert_eq!(above_width(48), 0xffff_0000_0000_0000);
        assert_eq!(above_width(0), u64::MAX);
    }

    const LAST_PAGE: u64 = !0xfff;

    #[test]
    fn a_range_ends_where_addresses_do() {
        let of = |address, pages| {
            let range = PageRange::new(address, pages, true);
            (range.address(), range.pages(), range.last())
        };
        assert_eq!(of(0x1000, 2), (0x1000, 2, 0x2fff));
        assert_eq!(of(0x1fff, 1), (0x1000, 1, 0x1fff));
        assert_eq!(of(0x1000, 0), (0x1000, 1, 0x1fff));
        assert_eq!(of(LAST_PAGE, u64::MAX), (LAST_PAGE, 1, u64::MAX));
        assert_eq!(of(0x1000, u64::MAX), (0x1000, SPACE_END - 1, u64::MAX));
        assert!(PageRange::new(0xfff, SPACE_END, true).is_all());
        assert!(!PageRange::new(0x1000, u64::MAX, true).is_all());
    }

    #[test]
    fn the_lowest_zero_of_a_device_tlb_range_is_its_size() {
        let of = |address, size| {
            let range = PageRange::from(DeviceTlbRange { address, size });
            (range.address(), range.pages())
        };
        assert_eq!(of(0x5000, false), (0x5000, 1));
        assert_eq!(of(0x4000, true), (0x4000, 2));
        assert_eq!(of(0x5000, true), (0x4000, 4));
        assert_eq!(of(0x1234_ffff_f000, true), (0x1234_0000_0000, 1 << 21));
        for address in [0x7fff_ffff_ffff_f000, LAST_PAGE] {
            assert_eq!(of(address, true), (0, SPACE_END));
        }
    }

    #[test]
    fn an_address_mask_is_an_aligned_range() {
        let of = |address, mask, leaf| PageRange::from(AddressMask { address, mask, leaf });
        for leaf in [false, true] {
            let pages = |address, pages| PageRange::new(address, pages, leaf);
            assert_eq!(of(0x1234_5000, 0, leaf), pages(0x1234_5000, 1));
            assert_eq!(of(0x1234_5000, 9, leaf), pages(0x1220_0000, 512));
            assert_eq!(of(LAST_PAGE, 0, leaf), pages(LAST_PAGE, 1));
            assert_eq!(of(LAST_PAGE, 51, leaf), pages(1 << 63, 1 << 51));
            for mask in [52, 63] {
                assert!(of(LAST_PAGE, mask, leaf).is_all());
            }
        }
    }

    proptest! {
        /// In 128 bits nothing wraps by itself.
        #[test]
        fn every_page_that_there_is_is_in_the_range(address: u64, pages: u64, shift in 0u32..64) {
            let pages = pages >> shift;
            let range = PageRange::new(address, pages, true);
            prop_assert_eq!(range.address(), address & !0xfff);
            let bytes = u128::from(pages.max(1)) << 12;
            let last = u128::from(address & !0xfff) + bytes - 1;
            prop_assert_eq!(u128::from(range.last()), last.min(u64::MAX.into()));
            let length = u128::from(range.last()) - u128::from(range.address()) + 1;
            prop_assert_eq!(length, u128::from(range.pages()) << 12);
        }

        #[test]
        fn joined_ranges_are_of_the_same_pages(
            (a, b) in (0u64..20, 0u64..20),
            (of_a, of_b) in (1u64..8, 1u64..8),
            leaf_a: bool,
            leaf_b: bool,
            at_the_end: bool,
        ) {
            let base = if at_the_end { SPACE_END - 24 } else { 0 };
            let range = |page, pages, leaf| PageRange::new((base + page) << 12, pages, leaf);
            let pages = |range: PageRange| {
                let first = range.address() >> 12;
                (first..first + range.pages()).collect::<std::collections::BTreeSet<_>>()
            };
            let (one, other) = (range(a, of_a, leaf_a), range(b, of_b, leaf_b));
            let both: Vec<u64> = pages(one).union(&pages(other)).copied().collect();
            let apart = both.windows(2).any(|pair| pair[0] + 1 != pair[1]);
            let joined = one.join(other);
            prop_assert_eq!(joined, other.join(one));
            prop_assert_eq!(joined.is_none(), apart);
            if let Some(joined) = joined {
                prop_assert_eq!(Vec::from_iter(pages(joined)), both);
                prop_assert_eq!(joined.leaf(), leaf_a && leaf_b);
            }
        }
    }
}

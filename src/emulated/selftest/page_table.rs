// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The leaves of a mock page table's mapping of a range.
//!
//! A table of the mock driver contains exactly the IOAS's mappings, which determine its leaves:
//! these are computed on demand and not stored. The format is AMD's v1 with pages of 2 KiB and
//! three levels: any power of two can be a leaf.

use std::ops::RangeInclusive;

use super::abi::{MOCK_HUGE_PAGE_SIZE, MOCK_PAGE_SIZE};
use crate::ioas::PAGE_SIZE;

/// IOVA bits translated by three levels of 512 entries over 2 KiB.
const IOVA_BITS: u32 = 38;

/// The IOVAs of the format.
pub const FORMAT_APERTURE: RangeInclusive<u64> = 0..=(1 << IOVA_BITS) - 1;

/// The format's page sizes, one bit for each: every power of two up to half of an entry of the top
/// level.
pub const FORMAT_SIZES: u64 = (1 << (IOVA_BITS - 1)) - MOCK_PAGE_SIZE;

/// The page sizes of a table of the huge type.
pub const HUGE_SIZES: u64 = MOCK_HUGE_PAGE_SIZE | PAGE_SIZE;

/// The leaf that translates `iova` when `range` as a whole is mapped to `output` and what follows:
/// the largest of `sizes` (one bit for each) that both addresses are aligned to and that fits. None
/// outside of the range, and where even the smallest one does not fit.
///
/// A table filled from the lowest address on with the largest possible pages has exactly these
/// leaves: aligned blocks never overlap partially.
pub fn leaf_at(
    sizes: u64,
    range: &RangeInclusive<u64>,
    output: u64,
    iova: u64,
) -> Option<RangeInclusive<u64>> {
    let skew = output.wrapping_sub(*range.start());
    let block = |size: u64| {
        let start = iova & !(size - 1);
        start..=start + (size - 1)
    };
    let fits =
        |leaf: &RangeInclusive<u64>| range.contains(leaf.start()) && range.contains(leaf.end());
    let sizes = (0..u64::BITS).rev().map(|bit| 1 << bit).filter(|size| sizes & size != 0);
    sizes.filter(|size| skew.is_multiple_of(*size)).map(block).find(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The leaves of a table filled greedily: the largest page at the lowest address, repeatedly.
    fn filled(sizes: u64, range: RangeInclusive<u64>, output: u64) -> Vec<RangeInclusive<u64>> {
        let mut leaves = Vec::new();
        let (mut iova, mut output) = (*range.start(), output);
        while iova <= *range.end() {
            let room = *range.end() - iova + 1;
            let suits = |size: &u64| {
                sizes & size != 0 && iova % size == 0 && output % size == 0 && *size <= room
            };
            let size = (0..u64::BITS).rev().map(|bit| 1 << bit).find(suits).unwrap();
            leaves.push(iova..=iova + size - 1);
            (iova, output) = (iova + size, output + size);
        }
        leaves
    }

    #[test]
    fn sizes_of_the_formats() {
        assert_eq!(FORMAT_SIZES & MOCK_PAGE_SIZE, MOCK_PAGE_SIZE);
        assert_eq!(FORMAT_SIZES.count_ones(), 26);
        assert_eq!(
            leaf_at(HUGE_SIZES, &(0..=0x1f_ffff), 0x1000, 0x10_0000),
            Some(0x10_0000..=0x10_0fff)
        );
        assert_eq!(
            leaf_at(HUGE_SIZES, &(0..=0x1f_ffff), 0x10_0000, 0x17_0000),
            Some(0x10_0000..=0x1f_ffff)
        );
    }

    #[test]
    fn nothing_where_no_page_fits() {
        assert_eq!(leaf_at(HUGE_SIZES, &(0..=0xfff), 0x800, 0), None);
        assert_eq!(leaf_at(FORMAT_SIZES, &(0x800..=0xfff), 0, 0x1000), None);
    }

    proptest! {
        #[test]
        fn the_leaves_are_those_of_a_table_filled_in_order(
            first in 0u64..64,
            pages in 1u64..64,
            output in 0u64..64,
            sizes in prop::sample::select(vec![FORMAT_SIZES, MOCK_PAGE_SIZE, MOCK_PAGE_SIZE * 9]),
        ) {
            let range = first * MOCK_PAGE_SIZE..=(first + pages) * MOCK_PAGE_SIZE - 1;
            let output = output * MOCK_PAGE_SIZE;
            for leaf in filled(sizes, range.clone(), output) {
                for iova in [*leaf.start(), *leaf.end()] {
                    prop_assert_eq!(leaf_at(sizes, &range, output, iova), Some(leaf.clone()));
                }
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets of address ranges.

/// Addresses `first..=last`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IovaRange {
    pub first: u64,
    pub last: u64,
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// How many spans of `shift` (1 to 63) overlap it.
    pub fn spans(self, shift: u8) -> u64 {
        (self.last >> shift) - (self.first >> shift) + 1
    }
}

/// `ranges` in ascending order, with overlapping ones merged.
pub(crate) fn ascending(ranges: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_unstable_by_key(|range| range.first);
    ranges.dedup_by(|next, range| {
        let overlaps = next.first <= range.last;
        if overlaps {
            range.last = range.last.max(next.last);
        }
        overlaps
    });
    ranges
}

/// Whether one of `ranges`, as made by [`ascending`], has an address in `first..=last`.
pub(super) fn any_overlaps(ranges: &[IovaRange], first: u64, last: u64) -> bool {
    let next = ranges.partition_point(|range| range.last < first);
    ranges.get(next).is_some_and(|range| range.first <= last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_what_each_of_them_is(
            ranges in prop::collection::vec((0u64..200, 0u64..20), 0..20),
            first in 0u64..200,
            length in 0u64..20,
        ) {
            let of = |&(first, length): &(u64, u64)| IovaRange { first, last: first + length };
            let last = first + length;
            let expected = ranges.iter().map(of).any(|it| it.first <= last && it.last >= first);
            let together = ascending(ranges.iter().map(of));
            prop_assert!(together.is_sorted_by(|one, next| one.last < next.first));
            prop_assert_eq!(any_overlaps(&together, first, last), expected);
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arithmetic on ranges of addresses, both ends included.

use std::ops::RangeInclusive;

/// Whether two ranges overlap.
pub(crate) fn overlap(a: &RangeInclusive<u64>, b: &RangeInclusive<u64>) -> bool {
    a.start() <= b.end() && b.start() <= a.end()
}

/// The `length` addresses from `start` on; `None` if there are none or they pass 2^64.
pub(crate) fn range_of(start: u64, length: u64) -> Option<RangeInclusive<u64>> {
    Some(start..=start.checked_add(length.checked_sub(1)?)?)
}

/// `ranges` in ascending order, with adjacent and overlapping ones merged.
pub(crate) fn merged(mut ranges: Vec<RangeInclusive<u64>>) -> Vec<RangeInclusive<u64>> {
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end().checked_add(1).is_none_or(|next| *range.start() <= next) => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// The part of 0..=2^64-1 that is in none of `ranges`, ascending.
pub(crate) fn complement(ranges: Vec<RangeInclusive<u64>>) -> Vec<RangeInclusive<u64>> {
    let mut holes = Vec::new();
    let mut start = Some(0);
    for range in merged(ranges) {
        if let (Some(start), Some(last)) = (start, range.start().checked_sub(1)) {
            if start <= last {
                holes.push(start..=last);
            }
        }
        start = range.end().checked_add(1);
    }
    holes.extend(start.map(|start| start..=u64::MAX));
    holes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ends_of_the_address_space_are_addresses() {
        assert_eq!(complement(vec![]), [0..=u64::MAX]);
        assert_eq!(complement(vec![0..=u64::MAX]), []);
        assert_eq!(complement(vec![0..=0, u64::MAX..=u64::MAX]), [1..=u64::MAX - 1]);
        assert_eq!(range_of(u64::MAX, 1), Some(u64::MAX..=u64::MAX));
        assert_eq!(range_of(u64::MAX, 2), None);
        assert_eq!(range_of(0, 0), None);
    }

    fn ranges() -> impl Strategy<Value = Vec<RangeInclusive<u64>>> {
        // Small numbers at both ends of the address space, where arithmetic may overflow.
        let address = prop_oneof![0u64..40, (u64::MAX - 40)..=u64::MAX];
        let range = (address.clone(), address).prop_map(|(a, b)| a.min(b)..=a.max(b));
        prop::collection::vec(range, 0..8)
    }

    proptest! {
        #[test]
        fn an_address_is_in_the_complement_or_in_a_range(ranges in ranges()) {
            let holes = complement(ranges.clone());
            for address in (0..45).chain(u64::MAX - 45..=u64::MAX) {
                let covered = ranges.iter().any(|range| range.contains(&address));
                let hole = holes.iter().any(|range| range.contains(&address));
                prop_assert_ne!(covered, hole, "{:#x}", address);
            }
            prop_assert!(holes.windows(2).all(|pair| pair[0].end() + 1 < *pair[1].start()));
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ranges of addresses, both ends included, and pin counts of ranges of pages.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

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

/// A step function from page numbers to pin counts.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// The pin count from the key up to the next key. Nothing before the first key; neighbours
    /// differ.
    steps: BTreeMap<u64, u32>,
}

impl Coverage {
    /// The maximal runs of unpinned pages of `first..end`, ascending.
    pub fn gaps(&self, first: u64, end: u64) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let (mut start, mut pins) = (first, self.at(first));
        let inner = self.steps.range(first..end).map(|(page, pins)| (*page, *pins));
        for (page, next) in inner.chain([(end, 1)]) {
            if pins == 0 && start < page {
                gaps.push(start..page);
            }
            // Neighbours differ, so an unpinned run ends where the next step starts.
            (start, pins) = (page, next);
        }
        gaps
    }

    /// Adds a pin to `first..end`.
    pub fn add(&mut self, first: u64, end: u64) {
        self.change(first, end, |pins| pins.saturating_add(1));
    }

    /// Removes a pin from `first..end`.
    pub fn sub(&mut self, first: u64, end: u64) {
        self.change(first, end, |pins| pins.saturating_sub(1));
    }

    /// Pin count of `page`.
    pub fn at(&self, page: u64) -> u32 {
        self.steps.range(..=page).next_back().map_or(0, |(_, pins)| *pins)
    }

    fn change(&mut self, first: u64, end: u64, new: impl Fn(u32) -> u32) {
        if first >= end {
            return;
        }
        self.split(first);
        self.split(end);
        for (_, pins) in self.steps.range_mut(first..end) {
            *pins = new(*pins);
        }
        let starts: Vec<u64> = self.steps.range(first..=end).map(|(start, _)| *start).collect();
        for start in starts {
            self.join(start);
        }
    }

    /// Makes `page` the start of a step.
    fn split(&mut self, page: u64) {
        let pins = self.at(page);
        self.steps.entry(page).or_insert(pins);
    }

    /// Merges the steps at `page` if they are equal.
    fn join(&mut self, page: u64) {
        let before = self.steps.range(..page).next_back().map_or(0, |(_, pins)| *pins);
        if self.steps.get(&page) == Some(&before) {
            self.steps.remove(&page);
        }
    }
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

    #[test]
    fn gaps_are_the_runs_without_a_pin() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.gaps(3, 5), vec![3..5; 1]);
        coverage.add(4, 6);
        assert_eq!(coverage.gaps(3, 9), [3..4, 6..9]);
        assert_eq!(coverage.gaps(4, 6), []);
        assert_eq!(coverage.gaps(5, 5), []);
    }

    proptest! {
        #[test]
        fn coverage_counts_as_an_array_does(
            changes in prop::collection::vec((0u64..32, 1u64..16, any::<bool>()), 0..40),
            asked in (0u64..48, 0u64..16),
        ) {
            let mut coverage = Coverage::default();
            let mut counts = [0u32; 64];
            let mut pinned: Vec<(u64, u64)> = Vec::new();
            for (first, length, add) in changes {
                if add {
                    coverage.add(first, first + length);
                    pinned.push((first, first + length));
                    (first..first + length).for_each(|page| counts[page as usize] += 1);
                } else if let Some((first, end)) = pinned.pop() {
                    coverage.sub(first, end);
                    (first..end).for_each(|page| counts[page as usize] -= 1);
                }
                for (page, pins) in counts.iter().enumerate() {
                    prop_assert_eq!(coverage.at(page as u64), *pins);
                }
            }
            let (first, end) = (asked.0, asked.0 + asked.1);
            let free: Vec<u64> = coverage.gaps(first, end).into_iter().flatten().collect();
            let naive: Vec<u64> = (first..end).filter(|page| counts[*page as usize] == 0).collect();
            prop_assert_eq!(free, naive);
            for (first, end) in pinned {
                coverage.sub(first, end);
            }
            prop_assert!(coverage.steps.is_empty());
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ranges to invalidate in one HWPT, as few as possible.

use crate::iommufd::{iommu_hwpt_vtd_s1_invalidate, ObjectId, VTD_INV_FLAGS_LEAF};
use crate::spec::vtd::PageRange;
use crate::viommu::vtd::Stage;

/// More ranges than this become one flush of everything: each costs the host a descriptor of its
/// own, and refilling a cache is cheaper than that many. Far below the limit of one call
/// (`IOMMU_HWPT_INVALIDATE_ENTRY_NUM_MAX`, 2^19).
const MAX_ENTRIES: usize = 256;
/// Ranges collected before they are merged: few enough to store, and enough above [`MAX_ENTRIES`]
/// to make the amortized cost of merging small.
const MAX_RANGES: usize = 2 * MAX_ENTRIES;

/// Everything, including paging-structure caches, as the uAPI expresses it.
pub(super) const EVERYTHING: iommu_hwpt_vtd_s1_invalidate =
    iommu_hwpt_vtd_s1_invalidate { addr: 0, npages: u64::MAX, flags: 0, __reserved: 0 };

/// What to invalidate in one HWPT: some ranges, or everything. Its size is bounded, whatever is
/// added.
#[derive(Debug, Clone, Default)]
pub struct FlushSet {
    everything: bool,
    /// Many ranges do not become everything.
    exact: bool,
    ranges: Vec<PageRange>,
    added: u64,
}

impl FlushSet {
    /// An empty one whose size is bounded by what is added only: for those to whom everything costs
    /// more than many ranges.
    pub fn exact() -> Self {
        Self { exact: true, ..Self::default() }
    }

    /// Adds `range`, or everything.
    pub fn add(&mut self, range: Option<PageRange>) {
        self.added += 1;
        match range {
            Some(range) => self.push(range),
            None => self.add_everything(),
        }
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.added += other.added;
        if other.everything {
            self.add_everything();
        }
        for range in &other.ranges {
            self.push(*range);
        }
    }

    /// Adds everything, which covers all of `other`.
    pub fn extend_to_everything(&mut self, other: &Self) {
        self.added += other.added;
        self.add_everything();
    }

    /// Empties it; its memory is kept.
    pub(super) fn clear(&mut self) {
        (self.everything, self.added) = (false, 0);
        self.ranges.clear();
    }

    fn push(&mut self, range: PageRange) {
        if self.everything {
            return;
        }
        self.ranges.push(range);
        if range.is_all() || self.ranges.len() > MAX_RANGES && !self.exact {
            self.merge();
        }
    }

    /// Joins ranges that overlap or are adjacent; more than [`MAX_ENTRIES`] become everything.
    fn merge(&mut self) {
        self.ranges.sort_unstable_by_key(|range| range.address());
        self.ranges.dedup_by(|next, last| {
            let joined = last.join(*next);
            *last = joined.unwrap_or(*last);
            joined.is_some()
        });
        let too_many = self.ranges.len() > MAX_ENTRIES && !self.exact;
        if too_many || self.ranges.first().is_some_and(|all| all.is_all()) {
            self.add_everything();
        }
    }

    /// The number of ranges added so far.
    pub fn added(&self) -> u64 {
        self.added
    }

    fn add_everything(&mut self) {
        self.everything = true;
        self.ranges.clear();
    }

    /// The entries of one host call: ascending, neither overlapping nor adjacent, and not wrapping.
    /// Together they cover every range that was added, and nothing else unless there were so many
    /// that flushing everything is cheaper. An entry leaves paging-structure caches alone only if
    /// each range in it does.
    pub fn into_entries(mut self) -> Vec<iommu_hwpt_vtd_s1_invalidate> {
        let mut entries = Vec::new();
        self.write_entries(&mut entries);
        entries
    }

    /// The same as the contents of `entries`.
    pub(super) fn write_entries(&mut self, entries: &mut Vec<iommu_hwpt_vtd_s1_invalidate>) {
        self.merge();
        entries.clear();
        match self.everything {
            true => entries.push(EVERYTHING),
            false => entries.extend(self.ranges.iter().copied().map(entry)),
        }
    }
}

fn entry(range: PageRange) -> iommu_hwpt_vtd_s1_invalidate {
    iommu_hwpt_vtd_s1_invalidate {
        addr: range.address(),
        npages: range.pages(),
        flags: if range.leaf() { VTD_INV_FLAGS_LEAF } else { 0 },
        __reserved: 0,
    }
}

/// Memory that batches use one after the other, so that one takes no allocation. No part has more
/// than some hundred entries, whatever the batch.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub hwpts: Vec<ObjectId>,
    pub flush: Flush,
    pub entries: Vec<iommu_hwpt_vtd_s1_invalidate>,
}

/// What to invalidate in one HWPT, by addresses of either stage.
#[derive(Debug, Default)]
pub(super) struct Flush {
    pub first: FlushSet,
    pub second: FlushSet,
}

impl Flush {
    /// Empties both.
    pub fn clear(&mut self) {
        self.first.clear();
        self.second.clear();
    }

    /// The ranges of `stage`.
    pub fn of(&mut self, stage: Stage) -> &mut FlushSet {
        match stage {
            Stage::First => &mut self.first,
            Stage::Second => &mut self.second,
        }
    }

    /// The ranges of one call. Whatever address of the second stage is invalidated, nothing is left
    /// of the first: so only one of the two needs a call.
    pub fn ranges(&mut self) -> (Stage, &mut FlushSet) {
        if self.second.added() > 0 {
            (Stage::Second, &mut self.second)
        } else {
            (Stage::First, &mut self.first)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn range(address: u64, pages: u64, leaf: bool) -> Option<PageRange> {
        Some(PageRange::new(address, pages, leaf))
    }

    fn entries(ranges: &[Option<PageRange>]) -> Vec<(u64, u64, bool)> {
        let mut set = FlushSet::default();
        ranges.iter().for_each(|range| set.add(*range));
        let entries = set.into_entries();
        entries.iter().map(|entry| (entry.addr, entry.npages, entry.flags != 0)).collect()
    }

    const ALL: (u64, u64, bool) = (0, u64::MAX, false);

    #[test]
    fn a_set_keeps_no_more_than_its_bound() {
        let (mut added, mut extended) = (FlushSet::default(), FlushSet::default());
        for number in 0..10 * MAX_RANGES as u64 {
            // Disjoint; then, in the other set, all within a few pages.
            added.add(range(number << 13, 1, true));
            let mut one = FlushSet::default();
            one.add(range((number % 8) << 12, 1, true));
            extended.extend(&one);
            assert!(added.ranges.len() <= MAX_RANGES && extended.ranges.len() <= MAX_RANGES);
        }
        assert!(added.ranges.is_empty() && added.into_entries() == [EVERYTHING]);
        assert_eq!(extended.into_entries().len(), 1);
    }

    #[test]
    fn an_exact_set_keeps_every_range() {
        let mut set = FlushSet::exact();
        (0..4000).for_each(|number| set.add(range(number << 13, 1, true)));
        assert_eq!(set.into_entries().len(), 4000);
    }

    #[test]
    fn adjacent_and_overlapping_ranges_become_one() {
        assert_eq!(entries(&[]), []);
        let adjacent = [range(0x3000, 2, true), range(0x1000, 2, true)];
        assert_eq!(entries(&adjacent), [(0x1000, 4, true)]);
        let inside = [range(0x1000, 8, true), range(0x3000, 1, true)];
        assert_eq!(entries(&inside), [(0x1000, 8, true)]);
        let apart = [range(0x1000, 1, true), range(0x3000, 1, false)];
        assert_eq!(entries(&apart), [(0x1000, 1, true), (0x3000, 1, false)]);
    }

    #[test]
    fn the_paging_structure_caches_stay_only_if_all_agree() {
        let mixed = [range(0x1000, 1, true), range(0x2000, 1, false), range(0x3000, 1, true)];
        assert_eq!(entries(&mixed), [(0x1000, 3, false)]);
    }

    #[test]
    fn nothing_passes_the_end_of_the_address_space() {
        let last_page = !0xfffu64;
        assert_eq!(entries(&[range(last_page, u64::MAX, true)]), [(last_page, 1, true)]);
        assert_eq!(entries(&[range(last_page, 1, true)]), [(last_page, 1, true)]);
        assert_eq!(entries(&[range(0x1000, u64::MAX, true)]), [(0x1000, (1 << 52) - 1, true)]);
        assert_eq!(entries(&[range(0x1000, 0, true)]), [(0x1000, 1, true)]);
    }

    #[test]
    fn everything_absorbs_the_rest() {
        assert_eq!(entries(&[range(0x1000, 1, true), None, range(0x5000, 1, true)]), [ALL]);
        assert_eq!(entries(&[range(0, u64::MAX, true)]), [ALL]);
        assert_eq!(entries(&[range(0, 1 << 51, true), range(1 << 63, 1 << 51, true)]), [ALL]);
        let mut whole = FlushSet::default();
        whole.add(None);
        let mut some = FlushSet::default();
        some.add(range(0x1000, 1, true));
        some.extend(&whole);
        assert_eq!(some.into_entries(), [EVERYTHING]);
    }

    #[test]
    fn too_many_ranges_become_everything() {
        let scattered = |n: u64| (0..n).map(|i| range(i << 20, 1, true)).collect::<Vec<_>>();
        assert_eq!(entries(&scattered(MAX_ENTRIES as u64)).len(), MAX_ENTRIES);
        assert_eq!(entries(&scattered(MAX_ENTRIES as u64 + 1)), [ALL]);
    }

    proptest! {
        /// Against a page-by-page model: the same pages, and `leaf` only where requested.
        #[test]
        fn merged_ranges_cover_the_same_pages(
            ranges in prop::collection::vec((0u64..400, 1u64..20, any::<bool>()), 0..60),
        ) {
            let mut pages = BTreeMap::new();
            let mut set = FlushSet::default();
            for &(first, count, leaf) in &ranges {
                set.add(range(first << 12, count, leaf));
                for page in first..first + count {
                    *pages.entry(page).or_insert(true) &= leaf;
                }
            }
            let entries = set.into_entries();
            let mut covered = BTreeMap::new();
            for entry in &entries {
                for page in (entry.addr >> 12)..(entry.addr >> 12) + entry.npages {
                    prop_assert_eq!(covered.insert(page, entry.flags != 0), None);
                }
            }
            prop_assert!(covered.keys().eq(pages.keys()));
            for (page, leaf) in &covered {
                prop_assert!(!leaf || pages[page]);
            }
            for pair in entries.windows(2) {
                prop_assert!(pair[0].addr + (pair[0].npages << 12) < pair[1].addr);
            }
        }

        /// Anywhere in 64 bits: every range is covered, and no entry wraps.
        #[test]
        fn any_range_is_covered_and_none_wraps(
            ranges in prop::collection::vec((any::<u64>(), any::<u64>(), 0u32..64), 1..40),
        ) {
            let ranges: Vec<_> = ranges
                .iter()
                .map(|&(address, pages, shift)| (address & !0xfff, (pages >> shift).max(1)))
                .collect();
            let mut set = FlushSet::default();
            for &(address, pages) in &ranges {
                set.add(range(address, pages, true));
            }
            let entries = set.into_entries();
            // In 128 bits nothing wraps.
            let last =
                |address: u64, pages: u64| u128::from(address) + u128::from(pages) * 4096 - 1;
            let space = u128::from(u64::MAX);
            for entry in &entries {
                prop_assert!(*entry == EVERYTHING || last(entry.addr, entry.npages) <= space);
            }
            for &(address, pages) in &ranges {
                let needed = last(address, pages).min(space);
                prop_assert!(entries.iter().any(|entry| *entry == EVERYTHING
                    || (entry.addr <= address && last(entry.addr, entry.npages) >= needed)));
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's invalidations to the host's: one call per HWPT and batch, of few page ranges.

use std::collections::BTreeMap;

use super::nested::Nested;
use super::state::State;
use crate::iommufd::{
    iommu_hwpt_vtd_s1_invalidate, InvalidateData, InvalidateError, ObjectId, VTD_INV_FLAGS_LEAF,
};
use crate::nesting::{NestingError, Result};
use crate::spec::vtd::PageRange;
use crate::viommu::vtd::{Invalidation, Progress, Stage};

/// What an invalidation names: a domain and a PASID, each or all of them.
pub(super) type Name = (Option<u16>, Option<u32>);

/// Ranges by what they name.
pub(super) type ByName = BTreeMap<Name, FlushSet>;

/// `batch`, grouped by name before the names are looked up: so the cost is the length of the batch
/// plus the number of names in use, not their product.
pub(super) fn by_name(batch: &[Invalidation]) -> ByName {
    let mut by_name = ByName::new();
    for invalidation in batch {
        let name = (invalidation.domain, invalidation.pasid);
        by_name.entry(name).or_default().add(invalidation.range);
    }
    by_name
}

/// At most this many HWPTs are invalidated in one piece of a batch, and no further ones once the
/// ranges together reach this number: a piece stays short even if the hardware needs some time for
/// each.
const AT_ONCE: usize = 32;

/// The sets of ranges that each HWPT is to invalidate, by name.
type Plan<'a> = BTreeMap<ObjectId, Vec<(Name, &'a FlushSet)>>;

/// The next piece of a batch: HWPTs from `from`, and the first one left for the next piece.
/// Requesters that are blocked or bypass stage 1 use no nested HWPT, and have nothing cached under
/// the guest's names.
///
/// The sets are shared, as there may be many HWPTs; each is assembled when its turn comes.
fn plan<'a>(by_name: &'a ByName, nested: &Nested, from: ObjectId) -> (Plan<'a>, Option<ObjectId>) {
    let (mut plan, mut left) = (Plan::new(), None);
    // At least one of each name, so that every piece makes progress.
    let of_each = (AT_ONCE / by_name.len().max(1)).max(1);
    for (&(domain, pasid), ranges) in by_name {
        let mut named = nested.named(domain, pasid, from);
        for hwpt in named.by_ref().take(of_each) {
            plan.entry(hwpt).or_default().push(((domain, pasid), ranges));
        }
        left = [left, named.next()].into_iter().flatten().min();
    }
    let next = plan.keys().nth(AT_ONCE).copied();
    left = [left, next].into_iter().flatten().min();
    if let Some(left) = left {
        plan.retain(|hwpt, _| *hwpt < left);
    }
    (plan, left)
}

/// A batch was not done.
#[derive(Debug)]
pub(super) struct Refused {
    /// The first failure.
    pub error: NestingError,
    /// A requester could not be blocked, and may continue to use stale translations.
    pub still_reachable: bool,
}

impl State {
    /// See [`crate::viommu::vtd::VtdHostSide::invalidate`].
    pub fn invalidate(&mut self, batch: &[Invalidation]) -> Result<(), Refused> {
        let (mut progress, mut refused) = (Progress::default(), None);
        while !progress.is_done() {
            self.invalidate_some(batch, &mut progress, &mut refused);
        }
        refused.map_or(Ok(()), Err)
    }

    /// See [`crate::viommu::vtd::VtdHostSide::invalidate_some`].
    pub fn invalidate_some(
        &mut self,
        batch: &[Invalidation],
        progress: &mut Progress,
        refused: &mut Option<Refused>,
    ) {
        if self.shadow.is_some() {
            return self.follow_some(batch, progress, refused);
        }
        let from = match progress.next() {
            None => {
                self.counters.invalidations_in += batch.len() as u64;
                ObjectId(0)
            }
            // It was an id when it was stored.
            Some(next) => ObjectId(next as u32),
        };
        // A guest that waits for each of its invalidations sends one at a time. There is nothing to
        // merge then, and merging is what costs most.
        let left = if let [one] = batch {
            let mut named = self.nested.named(one.domain, one.pasid, from);
            let hwpts: Vec<_> = named.by_ref().take(AT_ONCE).collect();
            let left = named.next();
            drop(named);
            for hwpt in hwpts {
                let mut flush = Flush::default();
                match self.stage(hwpt, one) {
                    Some(stage) => flush.of(stage).add(one.range),
                    None => flush.first.add(None),
                }
                self.forget(hwpt, flush, refused);
            }
            left
        } else {
            let by_name = by_name(batch);
            let (plan, mut left) = plan(&by_name, &self.nested, from);
            let mut entries = 0;
            for (hwpt, sets) in plan {
                if entries >= AT_ONCE {
                    left = Some(hwpt);
                    break;
                }
                let mut flush = Flush::default();
                for ((domain, pasid), set) in sets {
                    match self.stage(hwpt, &Invalidation { domain, pasid, range: None }) {
                        Some(stage) => flush.of(stage).extend(set),
                        None => flush.first.extend_to_everything(set),
                    }
                }
                entries += self.forget(hwpt, flush, refused);
            }
            left
        };
        progress.go_on_at(left.map(|hwpt| hwpt.0.into()));
    }

    /// See [`Invalidation::stage`].
    pub(super) fn stage(&self, hwpt: ObjectId, invalidation: &Invalidation) -> Option<Stage> {
        self.nested.stage1(hwpt).and_then(|stage1| invalidation.stage(&stage1))
    }

    /// Does `flush` in `hwpt`; returns the number of ranges after merging. On failure, its users
    /// are blocked and `refused` records it.
    fn forget(&mut self, hwpt: ObjectId, flush: Flush, refused: &mut Option<Refused>) -> usize {
        let added = flush.first.added() + flush.second.added();
        let (stage, ranges) = flush.into_ranges();
        let entries = ranges.into_entries();
        self.counters.merged += added - entries.len() as u64;
        if let Err(error) = self.flush(hwpt, stage, &entries) {
            let refused = refused.get_or_insert(Refused { error, still_reachable: false });
            // What cannot be invalidated must not be used.
            for requester in self.nested.users(hwpt) {
                self.block(requester);
                refused.still_reachable |= self.is_reachable(requester);
            }
        }
        entries.len()
    }

    /// Flushes all of `hwpt`, of both stages if it has two.
    pub fn flush_everything(&mut self, hwpt: ObjectId) -> Result<()> {
        if self.shadow.is_some() {
            return self.follow_all(hwpt);
        }
        let stage = self.stage(hwpt, &Invalidation::ALL).unwrap_or(Stage::First);
        self.flush(hwpt, stage, &[EVERYTHING])
    }

    /// Has the host process `entries`, of addresses of `stage`. Where it stops, a flush of
    /// everything replaces the failed entry and all after it; those before it are complete.
    fn flush(
        &mut self,
        hwpt: ObjectId,
        stage: Stage,
        entries: &[iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<()> {
        let Err(stopped) = self.invalidate_hwpt(hwpt, stage, entries) else { return Ok(()) };
        log::debug!("HWPT {hwpt} is flushed completely: {stopped}");
        self.invalidate_hwpt(hwpt, stage, &[EVERYTHING]).map_err(|stopped| NestingError::Host {
            what: format!("invalidating HWPT {hwpt}"),
            source: stopped.error,
        })
    }

    fn invalidate_hwpt(
        &mut self,
        hwpt: ObjectId,
        stage: Stage,
        entries: &[iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<(), InvalidateError> {
        #[cfg(feature = "test-support")]
        if is_suppressed() {
            return Ok(());
        }
        let data = match stage {
            Stage::First => InvalidateData::VtdS1(entries),
            Stage::Second => InvalidateData::VtdSecondStage(entries),
        };
        let result = self.objects.host().hwpt_invalidate(hwpt, data);
        let done = match &result {
            Ok(()) => entries.len(),
            Err(stopped) => stopped.done.min(entries.len()),
        };
        self.counters.entries_out += done as u64;
        result
    }
}

/// For tests of sanitizers: whether this call, counted from 1, is the one that an environment
/// variable says is not to be made, though the guest is told that it was.
#[cfg(feature = "test-support")]
fn is_suppressed() -> bool {
    use std::sync::atomic::{AtomicU64, Ordering};
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let number = std::env::var("TWOSTAGE_SUPPRESSED_INVALIDATION").ok();
    number.is_some_and(|number| number == call.to_string())
}

/// More ranges than this become one flush of everything: each costs the host a descriptor of its
/// own, and refilling a cache is cheaper than that many. Far below the limit of one call
/// (`IOMMU_HWPT_INVALIDATE_ENTRY_NUM_MAX`, 2^19).
const MAX_ENTRIES: usize = 256;
/// Ranges collected before they are merged: few enough to store, and enough above [`MAX_ENTRIES`]
/// to make the amortized cost of merging small.
const MAX_RANGES: usize = 2 * MAX_ENTRIES;

/// Everything, including paging-structure caches, as the uAPI expresses it.
const EVERYTHING: iommu_hwpt_vtd_s1_invalidate =
    iommu_hwpt_vtd_s1_invalidate { addr: 0, npages: u64::MAX, flags: 0, __reserved: 0 };

/// What to invalidate in one HWPT, by addresses of either stage.
#[derive(Debug, Default)]
struct Flush {
    first: FlushSet,
    second: FlushSet,
}

impl Flush {
    fn of(&mut self, stage: Stage) -> &mut FlushSet {
        match stage {
            Stage::First => &mut self.first,
            Stage::Second => &mut self.second,
        }
    }

    /// The ranges of one call. Whatever address of the second stage is invalidated, nothing is left
    /// of the first: so only one of the two needs a call.
    fn into_ranges(self) -> (Stage, FlushSet) {
        if self.second.added() > 0 {
            (Stage::Second, self.second)
        } else {
            (Stage::First, self.first)
        }
    }
}

/// What to invalidate in one HWPT: some ranges, or everything. Its size is bounded, whatever is
/// added.
#[derive(Debug, Clone, Default)]
pub struct FlushSet {
    everything: bool,
    ranges: Vec<PageRange>,
    added: u64,
}

impl FlushSet {
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

    fn push(&mut self, range: PageRange) {
        if self.everything {
            return;
        }
        self.ranges.push(range);
        if range.is_all() || self.ranges.len() > MAX_RANGES {
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
        if self.ranges.len() > MAX_ENTRIES || self.ranges.first().is_some_and(|all| all.is_all()) {
            self.add_everything();
        }
    }

    /// The number of ranges added so far.
    pub fn added(&self) -> u64 {
        self.added
    }

    fn add_everything(&mut self) {
        self.everything = true;
        self.ranges = Vec::new();
    }

    /// The entries of one host call: ascending, neither overlapping nor adjacent, and not wrapping.
    /// Together they cover every range that was added, and nothing else unless there were so many
    /// that flushing everything is cheaper. An entry leaves paging-structure caches alone only if
    /// each range in it does.
    pub fn into_entries(mut self) -> Vec<iommu_hwpt_vtd_s1_invalidate> {
        self.merge();
        if self.everything {
            return vec![EVERYTHING];
        }
        self.ranges.into_iter().map(entry).collect()
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

#[cfg(test)]
mod tests {
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

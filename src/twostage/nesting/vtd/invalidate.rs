// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's invalidations to the host's: one call per HWPT and batch, of few page ranges.

use std::collections::BTreeMap;

use super::flush_set::{FlushSet, Scratch, EVERYTHING};
use super::nested::Nested;
use super::state::State;
use crate::iommufd::{iommu_hwpt_vtd_s1_invalidate, InvalidateData, InvalidateError, ObjectId};
use crate::nesting::{NestingError, Result};
use crate::viommu::vtd::{Invalidation, Progress, Stage};

/// What an invalidation names: a domain and a PASID, each or all of them.
pub(super) type Name = (Option<u16>, Option<u32>);

/// Ranges by what they name.
pub(super) type ByName = BTreeMap<Name, FlushSet>;

/// `batch`, grouped by name before the names are looked up: so the cost is the length of the batch
/// plus the number of names in use, not their product.
/// `exact`: see [`FlushSet::exact`].
pub(super) fn by_name(batch: &[Invalidation], exact: bool) -> ByName {
    let mut by_name = ByName::new();
    let empty = if exact { FlushSet::exact() } else { FlushSet::default() };
    for invalidation in batch {
        let name = (invalidation.domain, invalidation.pasid);
        by_name.entry(name).or_insert_with(|| empty.clone()).add(invalidation.range);
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
        let mut scratch = std::mem::take(&mut self.scratch);
        let left = match of_one_name(batch) {
            Some(name) => self.invalidate_named(name, batch, from, &mut scratch, refused),
            None => self.invalidate_mixed(batch, from, &mut scratch, refused),
        };
        self.scratch = scratch;
        progress.go_on_at(left.map(|hwpt| hwpt.0.into()));
    }

    /// A piece of a batch that names one thing only, as most do: nothing need be grouped.
    fn invalidate_named(
        &mut self,
        (domain, pasid): Name,
        batch: &[Invalidation],
        from: ObjectId,
        scratch: &mut Scratch,
        refused: &mut Option<Refused>,
    ) -> Option<ObjectId> {
        let mut hwpts = std::mem::take(&mut scratch.hwpts);
        let mut left = self.nested.name_some((domain, pasid), from, AT_ONCE, &mut hwpts);
        let mut entries = 0;
        for &hwpt in &hwpts {
            if entries >= AT_ONCE {
                left = Some(hwpt);
                break;
            }
            let flush = &mut scratch.flush;
            flush.clear();
            match self.stage(hwpt, &Invalidation { domain, pasid, range: None }) {
                Some(stage) => {
                    let set = flush.of(stage);
                    batch.iter().for_each(|invalidation| set.add(invalidation.range));
                }
                None => batch.iter().for_each(|_| flush.first.add(None)),
            }
            entries += self.forget(hwpt, scratch, refused);
        }
        scratch.hwpts = hwpts;
        left
    }

    /// A piece of any batch.
    fn invalidate_mixed(
        &mut self,
        batch: &[Invalidation],
        from: ObjectId,
        scratch: &mut Scratch,
        refused: &mut Option<Refused>,
    ) -> Option<ObjectId> {
        let by_name = by_name(batch, false);
        let (plan, mut left) = plan(&by_name, &self.nested, from);
        let mut entries = 0;
        for (hwpt, sets) in plan {
            if entries >= AT_ONCE {
                left = Some(hwpt);
                break;
            }
            let flush = &mut scratch.flush;
            flush.clear();
            for ((domain, pasid), set) in sets {
                match self.stage(hwpt, &Invalidation { domain, pasid, range: None }) {
                    Some(stage) => flush.of(stage).extend(set),
                    None => flush.first.extend_to_everything(set),
                }
            }
            entries += self.forget(hwpt, scratch, refused);
        }
        left
    }

    /// See [`Invalidation::stage`].
    pub(super) fn stage(&self, hwpt: ObjectId, invalidation: &Invalidation) -> Option<Stage> {
        self.nested.stage1(hwpt).and_then(|stage1| invalidation.stage(&stage1))
    }

    /// Does the flush of `scratch` in `hwpt`; returns the number of ranges after merging. On
    /// failure, its users are blocked and `refused` records it.
    fn forget(
        &mut self,
        hwpt: ObjectId,
        scratch: &mut Scratch,
        refused: &mut Option<Refused>,
    ) -> usize {
        let Scratch { flush, entries, .. } = scratch;
        let added = flush.first.added() + flush.second.added();
        let (stage, ranges) = flush.ranges();
        ranges.write_entries(entries);
        self.counters.merged += added - entries.len() as u64;
        if let Err(error) = self.flush(hwpt, stage, entries) {
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

/// The name of all of `batch`, if they have the same.
fn of_one_name(batch: &[Invalidation]) -> Option<Name> {
    let (first, others) = batch.split_first()?;
    let name = |of: &Invalidation| (of.domain, of.pasid);
    others.iter().all(|other| name(other) == name(first)).then(|| name(first))
}

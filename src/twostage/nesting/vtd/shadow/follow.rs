// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mirrors follow their tables: what the guest invalidates is compared and changed.

use std::ops::Range;

use super::mirror::{Change, Mirror, Piece, Wanted};
use super::{too_many, Lost, Mirrored};
use crate::iommufd::{ObjectId, Protection};
use crate::nesting::vtd::flush_set::FlushSet;
use crate::nesting::vtd::invalidate::{by_name, ByName, Refused};
use crate::nesting::vtd::state::State;
use crate::nesting::{NestingError, Result};
use crate::spec::vtd::interrupt::INTERRUPT_RANGE;
use crate::spec::vtd::PAGE_SIZE;
use crate::viommu::vtd::walk::{Leaf, Tables, TooManyTables, Walk};
use crate::viommu::vtd::{Invalidation, Progress};

/// All IOVAs.
pub(super) const EVERYTHING: Range<u64> = 0..u64::MAX;
/// Tables read at once where nobody waits.
pub(super) const AT_ONCE: u64 = 512;

/// The progress in a mirror that is replaced by one begun after the batch: no IOVA is so large.
const REMADE: (u64, u64) = (u64::MAX, 0);

/// What a batch invalidates.
#[derive(Debug)]
pub(super) struct Said {
    /// Of the batch.
    number: u32,
    by_name: ByName,
    /// Of one mirror, ascending.
    ranges: (ObjectId, Vec<Range<u64>>),
}

impl Said {
    /// What [`Progress::next`] says when the batch is to go on with the mirror `id`.
    fn at(&self, id: ObjectId) -> u64 {
        u64::from(self.number) << 32 | u64::from(id.0)
    }
}

/// How much of a comparison may still be done in one piece.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quota {
    /// Tables to read.
    pub tables: u64,
    /// Mappings to change.
    pub steps: usize,
}

impl Quota {
    /// A fraction of a millisecond.
    pub const SLICE: Self = Self { tables: 32, steps: 32 };
    /// All of it.
    pub const ALL: Self = Self { tables: u64::MAX, steps: usize::MAX };

    /// Whether the rest is for another slice.
    pub fn is_used(&self) -> bool {
        self.tables == 0 || self.steps == 0
    }

    /// There was something long: nothing is left of a slice. All of it stays more than that.
    pub fn use_up(&mut self) {
        if self.steps <= Self::SLICE.steps {
            self.steps = 0;
        }
    }
}

impl State {
    /// The tables that the comparison of one range may read, whatever they hold: each piece is in
    /// one of its own, below another, and they may be read twice.
    pub(super) fn budget(&self) -> u64 {
        self.shadow.as_ref().map_or(0, |shadow| shadow.limit.saturating_mul(4).saturating_add(4096))
    }

    /// Reads `range` of `tables`, or the part of it from its start that about `pause` tables have.
    /// Returns what was read, which has whole pieces of `mirror` and whole pages, and what that
    /// translates.
    pub(super) fn look(
        &self,
        tables: Tables,
        mirror: &Mirror,
        range: Range<u64>,
        budget: &mut u64,
        mut pause: u64,
    ) -> Result<(Range<u64>, Wanted)> {
        let shadow = self.shadow.as_ref().ok_or(NestingError::ShutDown)?;
        let mut walk = Walk::new(&*shadow.memory, tables, *budget);
        let mut range = mirror.whole(range);
        let leaves = loop {
            let mut leaves = Vec::new();
            let end = walk.leaves(range.clone(), pause, &mut |leaf| leaves.push(leaf));
            let end = end.map_err(|TooManyTables| too_many(range.start, shadow.limit))?;
            let start = leaves.first().map_or(range.start, |leaf| leaf.iova.min(range.start));
            let last = leaves.last().map_or(end, |leaf| end.max(leaf.iova + leaf.length));
            let whole = mirror.whole(start..last);
            let same = whole == (range.start..end);
            range = whole;
            if same {
                break leaves;
            }
            pause = u64::MAX;
        };
        *budget = walk.budget();
        let mut wanted = Wanted::default();
        self.add_leaves(&leaves, &mut wanted)?;
        Ok((range, wanted))
    }

    /// Adds `leaves`, as far as they are guest memory, to `wanted`.
    pub(super) fn add_leaves(&self, leaves: &[Leaf], wanted: &mut Wanted) -> Result<()> {
        let ioas = self.objects.ioas()?;
        let memory = ioas.users();
        for leaf in leaves {
            memory.mapped_parts(leaf.gpa, leaf.length, |gpa, length, writable| {
                let (read, write) = (leaf.allowed.read, leaf.allowed.write && writable);
                if read || write {
                    let iova = leaf.iova + (gpa - leaf.gpa);
                    let piece = Piece { iova, length, gpa, access: Protection { read, write } };
                    // Requests there are interrupts, whatever tables say (§3.14).
                    piece.without(&INTERRUPT_RANGE).for_each(|piece| wanted.add(piece));
                }
            });
        }
        Ok(())
    }

    /// Makes the mirror `id` as its table is now in `ranges`, which ascend, or in a part of them:
    /// then returns where to go on.
    pub(super) fn follow_ranges(
        &mut self,
        id: ObjectId,
        ranges: &[Range<u64>],
        resume: Option<(u64, u64)>,
        quota: &mut Quota,
    ) -> Result<Option<(u64, u64)>> {
        let mirrored = self.shadow.as_mut().and_then(|shadow| shadow.mirrors.remove(&id));
        let Some(mut mirrored) = mirrored else { return Ok(None) };
        if resume.is_none() {
            mirrored.failures = 0;
        }
        let mut result = self.follow_one(id, &mut mirrored, ranges, resume, quota);
        while let Err(NestingError::Host { source, .. }) = &result {
            mirrored.unsettled = true;
            mirrored.failures += 1;
            if mirrored.failures > 1 {
                break;
            }
            // Once more, with a new one: the host may have been short of memory.
            log::debug!("a mirror is made anew: {source}");
            result = self.follow_one(id, &mut mirrored, ranges, resume, quota);
        }
        // Its last user may have been blocked.
        match self.shadow.as_mut() {
            Some(shadow) if self.nested.stage1(id).is_some() => {
                let rids: Vec<_> = mirrored.hwpts.keys().copied().collect();
                shadow.mirrors.insert(id, mirrored);
                // Of those who were not attached to a new one.
                rids.into_iter().for_each(|rid| self.end_unused_of(id, rid));
            }
            _ => self.destroy_mirror(mirrored),
        }
        result
    }

    fn follow_one(
        &mut self,
        id: ObjectId,
        mirrored: &mut Mirrored,
        ranges: &[Range<u64>],
        resume: Option<(u64, u64)>,
        quota: &mut Quota,
    ) -> Result<Option<(u64, u64)>> {
        if mirrored.unsettled {
            // One that was begun after this batch has all that it names.
            let is_later = resume == Some(REMADE) || mirrored.making.is_none();
            if !self.remake_some(id, mirrored, quota)? {
                let resume = resume.unwrap_or((0, self.budget()));
                return Ok(Some(if is_later { REMADE } else { resume }));
            }
            if is_later {
                return Ok(None);
            }
        } else if resume == Some(REMADE) {
            return Ok(None);
        }
        let (mut from, mut left) = resume.map_or((0, None), |(from, budget)| (from, Some(budget)));
        for range in ranges {
            let mut range = range.start.max(from)..range.end.min(mirrored.tables.end());
            if range.is_empty() {
                continue;
            }
            // For each of its own: a guest may name many.
            let mut budget = left.take().unwrap_or_else(|| self.budget());
            while !range.is_empty() {
                if quota.is_used() {
                    return Ok(Some((range.start, budget)));
                }
                let before = budget;
                let pause = quota.tables.min(AT_ONCE);
                let Mirrored { tables, mirror, .. } = &*mirrored;
                let (compared, wanted) =
                    self.look(*tables, mirror, range.clone(), &mut budget, pause)?;
                quota.tables = quota.tables.saturating_sub(before - budget);
                match mirror.compare(&compared, wanted.pieces()) {
                    Change::InPlace(mut steps) => {
                        range.start = steps.limit(quota.steps).unwrap_or(compared.end);
                        let count = steps.unmap.len() + steps.map.len();
                        quota.steps = quota.steps.saturating_sub(count);
                        self.change(mirrored, &steps)?;
                    }
                    Change::Replace => {
                        self.counters.mirror_rebuilds += 1;
                        let done = self.remake_some(id, mirrored, quota)?;
                        return Ok((!done).then_some(REMADE));
                    }
                }
            }
            // More of it may have been compared.
            from = range.start;
        }
        Ok(None)
    }

    /// Compares all of the mirror `id` at once. If that fails, its users are lost.
    pub fn follow_all(&mut self, id: ObjectId) -> Result<()> {
        let result = self.follow_ranges(id, &[EVERYTHING], None, &mut { Quota::ALL });
        if let Err(error) = &result {
            for (requester, config) in self.configs(id) {
                match error {
                    NestingError::NotMirrored { .. } => self.starve(requester, &config, error),
                    _ => self.lose(requester, config, error),
                }
            }
        }
        result.map(drop)
    }

    /// Whether it is not certain what the mirror `id` maps, and nobody goes on with it.
    pub fn is_unsettled(&self, id: ObjectId) -> bool {
        let mirrored = self.shadow.as_ref().and_then(|shadow| shadow.mirrors.get(&id));
        mirrored.is_some_and(|mirrored| mirrored.unsettled && mirrored.making.is_none())
    }

    /// The map of guest memory has changed: compares all mirrors.
    pub fn follow_memory(&mut self) -> Result<()> {
        self.drop_prepared();
        let ids: Vec<_> = self.shadow.iter().flat_map(|it| it.mirrors.keys()).copied().collect();
        for id in ids {
            // Its users are lost then.
            let _ = self.follow_all(id);
        }
        self.starve_lost(None)
    }

    /// [`State::invalidate_some`] for mirrors.
    pub fn follow_some(
        &mut self,
        batch: &[Invalidation],
        progress: &mut Progress,
        refused: &mut Option<Refused>,
    ) {
        self.follow_slice(batch, progress, refused);
        if refused.is_some() {
            // Then the virtual IOMMU gives everybody's configuration again.
            self.take_lost();
        }
        for Lost { requester, error, .. } in self.find_lost() {
            let reachable = self.is_reachable(requester);
            refuse(refused, &error).still_reachable |= reachable;
        }
    }

    fn follow_slice(
        &mut self,
        batch: &[Invalidation],
        progress: &mut Progress,
        refused: &mut Option<Refused>,
    ) {
        let mut quota = Quota::SLICE;
        let (begins, mut said) = self.take_said(batch, progress);
        if self.feed_some(&said.by_name, begins, &mut quota, refused) {
            self.follow_said(&mut said, progress, &mut quota, refused);
        }
        if let Some(shadow) = self.shadow.as_mut().filter(|_| !progress.is_done()) {
            shadow.said = Some(said);
        }
    }

    /// What `batch` invalidates, and whether it begins. Several may be under way, each with a
    /// number in its progress; what the last one at work says need not be found out again.
    fn take_said(&mut self, batch: &[Invalidation], progress: &mut Progress) -> (bool, Said) {
        let begun = progress.next().map(|next| (next >> 32) as u32);
        if begun.is_none() {
            self.counters.invalidations_in += batch.len() as u64;
            self.drop_prepared();
        }
        let number = match (begun, self.shadow.as_mut()) {
            (Some(number), _) => number,
            (None, Some(shadow)) => {
                shadow.batches = shadow.batches.wrapping_add(1);
                shadow.batches
            }
            (None, None) => 0,
        };
        let said = self.shadow.as_mut().and_then(|shadow| shadow.said.take());
        let said = said.filter(|said| begun == Some(said.number));
        let said = said.unwrap_or_else(|| Said {
            number,
            by_name: by_name(batch, true),
            ranges: (ObjectId(0), Vec::new()),
        });
        if begun.is_none() {
            progress.go_on_at(Some(said.at(ObjectId(0))));
        }
        (begun.is_none(), said)
    }

    fn follow_said(
        &mut self,
        said: &mut Said,
        progress: &mut Progress,
        quota: &mut Quota,
        refused: &mut Option<Refused>,
    ) {
        // The lower half is an id.
        let mut from = ObjectId(progress.next().unwrap_or(0) as u32);
        let mut resume = progress.inside();
        loop {
            let first = |&(domain, pasid): &_| self.nested.named(domain, pasid, from).next();
            let Some(id) = said.by_name.keys().filter_map(first).min() else {
                return progress.go_on_at(None);
            };
            if quota.is_used() {
                return progress.go_on_at(Some(said.at(id)));
            }
            let inside = resume.take().filter(|_| id == from);
            if inside.is_none() || said.ranges.0 != id {
                said.ranges = (id, self.ranges(id, &said.by_name, inside.is_none()));
            }
            match self.follow_ranges(id, &said.ranges.1, inside, quota) {
                Ok(None) => {}
                Ok(Some(inside)) => return progress.go_on_inside(said.at(id), inside),
                Err(error) => self.give_up(id, &error, refused),
            }
            // There may be many in which nothing is named.
            quota.tables = quota.tables.saturating_sub(1);
            from = ObjectId(id.0.saturating_add(1));
        }
    }

    /// The ranges of the mirror `id` that are invalidated, ascending.
    fn ranges(&mut self, id: ObjectId, by_name: &ByName, count: bool) -> Vec<Range<u64>> {
        let mut all = FlushSet::exact();
        for (&(domain, pasid), set) in by_name {
            if self.nested.named(domain, pasid, id).next() != Some(id) {
                continue;
            }
            match self.stage(id, &Invalidation { domain, pasid, range: None }) {
                Some(_) => all.extend(set),
                None => all.extend_to_everything(set),
            }
        }
        let added = all.added();
        let entries = all.into_entries();
        if count {
            self.counters.merged += added - entries.len() as u64;
            self.counters.entries_out += entries.len() as u64;
        }
        let range = |entry: &crate::iommufd::iommu_hwpt_vtd_s1_invalidate| {
            let length = entry.npages.saturating_mul(PAGE_SIZE);
            entry.addr..entry.addr.saturating_add(length)
        };
        entries.iter().map(range).collect()
    }

    /// The mirror `id` cannot be what its table is because of `error`: blocks its users.
    fn give_up(&mut self, id: ObjectId, error: &NestingError, refused: &mut Option<Refused>) {
        let of_guest = matches!(error, NestingError::NotMirrored { .. });
        for (requester, config) in self.configs(id) {
            match of_guest {
                true => self.starve(requester, &config, error),
                false => self.block(requester),
            }
            if self.is_reachable(requester) {
                refuse(refused, error).still_reachable = true;
            }
        }
        if !of_guest {
            refuse(refused, error);
        }
    }
}

/// There was `error`.
pub(super) fn refuse<'a>(
    refused: &'a mut Option<Refused>,
    error: &NestingError,
) -> &'a mut Refused {
    refused.get_or_insert_with(|| Refused { error: error.clone(), still_reachable: false })
}

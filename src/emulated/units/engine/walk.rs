// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page walk: user-owned tables, with each pointer translated by the stage below.

use std::sync::atomic::Ordering;

use super::caches::Caches;
use super::counters::LocalCounters;
use super::entries::{CachedPage, Output, Stage2Page, Table, Target};
use super::format::{At, Entry, Path, RequestKind, Rights, Stage2Refusal, TableFormat};
use super::key::{size, Source};
use super::lower::{own, LowerStage, OverHost};
use super::memories::Place;
use super::origins::WalkOrigin;

/// How often a walk restarts because an entry changed between reading it and setting its flags. The
/// guest may change entries continuously; it must not keep a walk running.
const ATTEMPTS: u32 = 16;

/// Levels of the deepest tables.
pub(super) const MAX_LEVELS: usize = 5;

/// Size of the largest page that is cached, as a power of two: 1 GiB.
const MAX_PAGE_SHIFT: u8 = 30;

/// A walk through the tables of one context, over the stage `L`.
#[derive(Debug)]
pub(crate) struct Walk<'a, L> {
    pub caches: &'a Caches,
    /// Source of what is cached on the way.
    pub source: Source,
    /// Source of global pages.
    pub global: Source,
    pub counters: &'a LocalCounters,
    /// The stage below.
    pub lower: L,
}

/// An entry on the way of a walk.
struct Step {
    place: Place,
    at: At,
    /// The word read.
    word: u64,
    /// It is a page.
    leaf: bool,
    /// Its table.
    table: Table,
    /// What the entries above allow.
    above: Path,
}

impl Step {
    /// Whether its table is to be cached: the top table needs no caching, and a cached one still
    /// is.
    #[inline]
    fn is_new(at: At) -> bool {
        at.gpa.is_some() && !at.top
    }
}

/// Where the entries of a walk lead.
struct Descent {
    /// The combined permissions of the entries.
    path: Path,
    /// Where the IOVA leads.
    gpa: u64,
    /// Level of the leaf.
    level: u8,
    /// What was read from the leaf.
    leaf: u64,
    /// The leaf is global.
    global: bool,
    /// Some entry lacks a flag that the request sets.
    unset: bool,
    /// Some table on the way is to be cached.
    new_tables: bool,
}

impl<L> Walk<'_, L> {
    /// Translates `iova` for a request of `kind`, setting accessed and dirty flags, and caches the
    /// result.
    #[inline(always)]
    pub fn walk<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<Target, F::Fault>
    where
        L: LowerStage<F>,
    {
        self.resolve(tables, iova, kind, |output| self.cache(output, iova))
    }

    /// The page at `address` for a read or write of another walk, to which these tables are the
    /// stage below: cached as one of `shifts`, or by a walk, which is then cached.
    pub fn page<F: TableFormat>(
        &self,
        tables: &F,
        shifts: &[u8],
        address: u64,
        write: bool,
    ) -> Result<Stage2Page, F::Fault>
    where
        L: LowerStage<F>,
    {
        if let Some(page) = self.caches.page(self.source, shifts, address, own(write)) {
            return Ok(page);
        }
        self.resolve(tables, address, own(write), |output| {
            let Target { place, length } = self.cache(output, address);
            let [read, write] = [false, true].map(|write| output.rights.allow(own(write)));
            Stage2Page { place, before: output.page.before, length, read, write }
        })
    }

    /// Translates `iova` for a request of `kind`, setting accessed and dirty flags, and caches what
    /// is on the way; `result` is made of the translation.
    // Inlined, like the quick walk: what a call passes would be in memory.
    #[inline(always)]
    fn resolve<F: TableFormat, T>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
        result: impl Fn(&Output) -> T,
    ) -> Result<T, F::Fault>
    where
        L: LowerStage<F>,
    {
        self.counters.walks.count();
        tables.check_request(kind)?;
        tables.check_address(iova)?;
        match self.quick(tables, iova, kind) {
            Some(output) => Ok(result(&output)),
            None => self.thorough(tables, iova, kind, result),
        }
    }

    /// The same, with everything that may be to do on the way.
    #[cold]
    #[inline(never)]
    fn thorough<F: TableFormat, T>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
        result: impl Fn(&Output) -> T,
    ) -> Result<T, F::Fault>
    where
        L: LowerStage<F>,
    {
        let mut cached = true;
        for _ in 0..ATTEMPTS {
            if let Some(found) = self.attempt(tables, iova, kind, cached, &result)? {
                return Ok(found);
            }
            cached = false;
        }
        Err(tables.flags_unsettled())
    }

    /// Sets the flags that a request of `kind` for `iova` sets, though the stage below has no page
    /// where it leads: it is served there all the same.
    pub fn mark<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<(), F::Fault>
    where
        L: LowerStage<F>,
    {
        for attempt in 0..ATTEMPTS {
            let mut steps = [const { None }; MAX_LEVELS];
            let descent = self.descend(tables, iova, (kind, attempt == 0), &mut steps)?;
            tables.check_path(descent.path, kind)?;
            if !descent.unset || self.set_flags(tables, &mut steps, kind)? {
                return Ok(());
            }
        }
        Err(tables.flags_unsettled())
    }

    /// One walk, from the lowest cached table if `cached`; none if an entry changed during it, or
    /// if it takes a walk from the top table to set its flags.
    fn attempt<F: TableFormat, T>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
        cached: bool,
        result: impl Fn(&Output) -> T,
    ) -> Result<Option<T>, F::Fault>
    where
        L: LowerStage<F>,
    {
        let mut steps = [const { None }; MAX_LEVELS];
        let descent = self.descend(tables, iova, (kind, cached), &mut steps)?;
        let Descent { path, gpa, level, leaf, global, unset, new_tables } = descent;
        let rights = tables.rights(path);
        if !rights.allow(kind) {
            tables.check_path(path, kind)?;
        }
        let page = self.lower.page(tables, gpa, kind)?;
        // Nothing blocks the request any more.
        if unset && !self.set_flags(tables, &mut steps, kind)? {
            return Ok(None);
        }
        // Not earlier: an entry with a clear accessed flag must not be cached.
        if new_tables {
            let new = steps.iter().flatten().filter(|step| Step::is_new(step.at));
            for Step { table, above, .. } in new {
                self.caches.add_table(tables, (self.source, iova), table, *above, self.counters);
            }
        }
        // A write without a flag to set may be followed by others.
        let dirty = tables.is_dirty(tables.used(leaf, true, kind.write()));
        let rights = rights & Rights::of_access(true, dirty);
        let source = if global { self.global } else { self.source };
        let output = Output::new(page, gpa, tables.shift(level), rights, source);
        self.caches.record_origin(|origins, caches| {
            let read = steps.iter().flatten().map(|step| (step.word, step.at.gpa));
            let entries: &Vec<_> = &read.collect();
            // No overflow: there are at most 5 levels.
            let start = level + entries.iter().skip(1).count() as u8;
            let (way, page) = ((self.source, iova), output.shift.map(|shift| (source, shift)));
            let walk = WalkOrigin { way, start, entries, end: gpa, write: kind.write(), page };
            origins.record(caches, tables, &walk, |at, write| self.lower.origin(at, write));
        });
        Ok(Some(result(&output)))
    }

    /// Reads the entries from the lowest cached table if `cached`, or the top table, to the leaf,
    /// and puts them into `steps`, which are empty. (The caller's: they are large, and moving them
    /// is not free.)
    fn descend<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        (kind, cached): (RequestKind, bool),
        steps: &mut [Option<Step>; MAX_LEVELS],
    ) -> Result<Descent, F::Fault>
    where
        L: LowerStage<F>,
    {
        let cached = match cached {
            true => self.caches.cached_table(tables, self.source, iova),
            false => None,
        };
        match cached {
            Some(_) => self.counters.paging_structure_hits.count(),
            None => self.counters.paging_structure_misses.count(),
        }
        let mut level = cached.map_or(tables.levels(), |(table, _)| table.level);
        let mut path = cached.map_or(Path::UNLIMITED, |(_, path)| path);
        let mut cached = cached.map(|(table, _)| table);
        let mut table_gpa = tables.table();
        let (mut unset, mut new_tables) = (false, false);
        for slot in steps {
            let index = tables.index(iova, level);
            let top = level == tables.levels();
            let (at, table) = match cached.take() {
                Some(table) => (At { gpa: None, top }, table),
                None => {
                    let at = At { gpa: Some(table_gpa + index * 8), top };
                    (at, self.locate(tables, table_gpa, index, level, top)?)
                }
            };
            let place = table.entry(index).ok_or_else(|| tables.entry_unreadable(at))?;
            let entry = self.caches.word(place).ok_or_else(|| tables.entry_unreadable(at))?;
            let word = u64::from_le(entry.load(Ordering::Acquire));
            let Entry { leaf, address, path: allowed, global } = tables.decode(word, level)?;
            let above = path;
            path = path & allowed;
            unset |= tables.used(word, leaf, kind.write()) != word;
            new_tables |= Step::is_new(at);
            *slot = Some(Step { place, at, word, leaf, table, above });
            if leaf {
                let gpa = address | iova & (size(tables.shift(level)) - 1);
                return Ok(Descent { path, gpa, level, leaf: word, global, unset, new_tables });
            }
            // Not below level 1: an entry of that level is a leaf.
            (level, table_gpa) = (level - 1, address);
        }
        // Not reached: there are no more levels than steps, and the last has leaves only.
        Err(tables.entry_unreadable(At { gpa: None, top: false }))
    }

    /// Caches what can be cached of `output`, the translation of `iova`; returns where it leads.
    // Inlined, as a `Target` that is stored in pieces and then copied is slow.
    #[inline(always)]
    fn cache(&self, output: &Output, iova: u64) -> Target {
        let Output { page, length, shift, whole, rights, source } = *output;
        if let Some(shift) = shift {
            let cached = CachedPage { place: page.place, shift, whole, rights };
            let source = (source, source != self.source);
            self.caches.add_translation(source, iova, &cached, self.counters);
        }
        Target { place: page.place, length }
    }

    /// The address of the table of `level` at `gpa`, as far as it is contiguous with its entry
    /// number `index`.
    fn locate<F: TableFormat>(
        &self,
        tables: &F,
        gpa: u64,
        index: u64,
        level: u8,
        top: bool,
    ) -> Result<Table, F::Fault>
    where
        L: LowerStage<F>,
    {
        let entry_at = index * 8;
        let page = self.lower.entry(tables, gpa + entry_at, top)?;
        // The page of the lower stage may start in the middle of a large table.
        let skipped = entry_at.saturating_sub(page.before);
        let at = At { gpa: Some(gpa + entry_at), top };
        let place = page.place.back(entry_at - skipped);
        let place = place.ok_or_else(|| tables.entry_unreadable(at))?;
        let length = page.length + (entry_at - skipped);
        Ok(Table { place, level, skipped, length, writable: page.write })
    }

    /// Sets the flags that a request of `kind` sets in the entries of `steps`. Returns `false` if
    /// that takes another walk: an entry has changed since it was read, or its address is unknown,
    /// as its table is a cached one that may not be written like this.
    fn set_flags<F: TableFormat>(
        &self,
        tables: &F,
        steps: &mut [Option<Step>],
        kind: RequestKind,
    ) -> Result<bool, F::Fault>
    where
        L: LowerStage<F>,
    {
        for step in steps.iter_mut().flatten() {
            let wanted = tables.used(step.word, step.leaf, kind.write());
            if wanted == step.word {
                continue;
            }
            let (old, new) = (step.word.to_le(), wanted.to_le());
            // It was there when it was read.
            let entry = self.caches.word(step.place);
            let entry = entry.ok_or_else(|| tables.entry_unreadable(step.at))?;
            if !step.table.writable {
                let Some(gpa) = step.at.gpa else { return Ok(false) };
                // Another walk may find that nothing is to be set.
                if entry.load(Ordering::Acquire) != old {
                    return Ok(false);
                }
                let page = self.lower.entry_flags(tables, gpa, step.at.top)?;
                if page.place != step.place {
                    return Ok(false);
                }
                step.table.writable = page.write;
            }
            if entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Walk<'_, OverHost<'_>> {
    /// Translates `gpa` for a request of `kind` by stage 2 only, which serves `served`, and caches
    /// the result.
    pub fn stage2_only(
        &self,
        gpa: u64,
        kind: RequestKind,
        served: Rights,
    ) -> Result<Target, Stage2Refusal> {
        let page = self.lower.access(gpa, kind)?;
        let output = Output::new(page, gpa, MAX_PAGE_SHIFT, served, self.source);
        Ok(self.cache(&output, gpa))
    }
}

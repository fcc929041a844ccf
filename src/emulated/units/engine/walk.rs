// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page walk: user-owned tables, with each pointer translated by stage 2.

use std::sync::atomic::Ordering;

use super::caches::{CachedPage, Caches, Stage2Page, Table, Target};
use super::counters::LocalCounters;
use super::format::{At, Entry, Path, RequestKind, Rights, Stage2Refusal, TableFormat};
use super::host_stage2::HostStage2;
use super::key::{size, Source};
use super::memories::Place;
use crate::units::stage2::DirtyLog;

/// How often a walk restarts because an entry changed between reading it and setting its flags. The
/// guest may change entries continuously; it must not keep a walk running.
const ATTEMPTS: u32 = 16;

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// Size of the largest page that is cached, as a power of two: 1 GiB.
const MAX_PAGE_SHIFT: u8 = 30;

/// Granularity of marking writes when dirty pages are tracked, as a power of two.
const DIRTY_SHIFT: u8 = 12;

/// The translation of an IOVA by both stages.
#[derive(Clone, Copy)]
struct Output {
    /// Stage 2's translation of stage 1's GPA.
    page: Stage2Page,
    /// Bytes from the requested one to the end of what is contiguous in both stages.
    length: u64,
    /// Size of the page that is contiguous in both stages, as a power of two; none if it is smaller
    /// than 4 KiB.
    shift: Option<u8>,
    /// Size of the page of stage 1, as a power of two.
    whole: u8,
    /// The requests that both stages allow, without a further walk.
    rights: Rights,
    /// Source of the page.
    source: Source,
}

impl Output {
    /// `page` is stage 2's translation of `gpa`, which stage 1 has in a page of `shift` with
    /// `rights`.
    fn new(page: Stage2Page, gpa: u64, shift: u8, rights: Rights, source: Source) -> Self {
        Self {
            page,
            length: page.length.min(size(shift) - (gpa & (size(shift) - 1))),
            shift: page.shift.map(|page_shift| page_shift.min(shift)),
            whole: shift,
            rights: Rights::of(|kind| rights.allow(kind) && page.allows(kind)),
            source,
        }
    }
}

/// A walk through the tables of one context.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    pub caches: &'a Caches,
    /// Source of what is cached on the way.
    pub source: Source,
    /// Source of global pages.
    pub global: Source,
    pub host: &'a HostStage2,
    pub counters: &'a LocalCounters,
    /// The log of written stage-2 pages, if tracking is on.
    pub dirty: Option<&'a DirtyLog>,
}

/// An entry on the way of a walk.
struct Step {
    place: Place,
    at: At,
    /// The word read.
    word: u64,
    /// It is a page.
    leaf: bool,
    /// Stage 2 allows writing it.
    writable: bool,
    /// Its table and what is allowed so far, if that can be cached.
    table: Option<(Table, Path)>,
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
}

impl Walk<'_> {
    /// Translates `iova` for a request of `kind`, setting accessed and dirty flags, and caches the
    /// result.
    pub fn walk<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<Target, F::Fault> {
        self.counters.walks.count();
        tables.check_request(kind)?;
        tables.check_address(iova)?;
        for _ in 0..ATTEMPTS {
            if let Some(target) = self.attempt(tables, iova, kind)? {
                return Ok(target);
            }
        }
        Err(tables.flags_unsettled())
    }

    /// One walk; none if an entry changed during it.
    fn attempt<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<Option<Target>, F::Fault> {
        let mut steps = [const { None }; MAX_LEVELS];
        let Descent { path, gpa, level, leaf, global } = self.descend(tables, iova, &mut steps)?;
        tables.check_path(path, kind)?;
        let page = self.page(gpa, kind).map_err(|why| tables.page_refused(gpa, why))?;
        // Nothing blocks the request any more.
        if !self.set_flags(tables, &steps, kind)? {
            return Ok(None);
        }
        // Not earlier: an entry with a clear accessed flag must not be cached.
        for (table, path) in steps.iter().flatten().filter_map(|step| step.table) {
            self.caches.add_table(tables, (self.source, iova), &table, path, self.counters);
        }
        let leaf = leaf | tables.flags(true, kind.write());
        let rights = Rights::of(|kind| {
            tables.check_request(kind).is_ok()
                && tables.check_path(path, kind).is_ok()
                && (!kind.write() || tables.is_dirty(leaf))
        });
        let source = if global { self.global } else { self.source };
        let output = Output::new(page, gpa, tables.shift(level), rights, source);
        let output = self.track(output, gpa, kind);
        let read = || steps.iter().flatten().map(|step| step.word);
        // No overflow: there are at most 5 levels.
        let start = level + read().skip(1).count() as u8;
        let page = output.shift.map(|shift| (source, shift));
        self.caches.record_origin(tables, (self.source, iova), start, read(), page);
        Ok(Some(self.cache(&output, iova)))
    }

    /// Reads the entries from the lowest cached table, or the top table, to the leaf, and puts them
    /// into `steps`, which are empty. (The caller's: they are large, and moving them is not free.)
    fn descend<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        steps: &mut [Option<Step>; MAX_LEVELS],
    ) -> Result<Descent, F::Fault> {
        let cached = match self.dirty {
            None => self.caches.table(tables, self.source, iova, self.counters),
            // Setting an entry's flags makes the page of its table dirty, so its address must be
            // known.
            Some(_) => None,
        };
        let mut level = cached.map_or(tables.levels(), |(table, _)| table.level);
        let mut path = cached.map_or(Path::UNLIMITED, |(_, path)| path);
        let mut cached = cached.map(|(table, _)| table);
        let mut table_gpa = tables.table();
        for slot in steps {
            let index = tables.index(iova, level);
            let top = level == tables.levels();
            let (at, table) = match cached.take() {
                Some(table) => (At { gpa: None, top }, table),
                None => {
                    let at = At { gpa: Some(table_gpa + index * 8), top };
                    (at, self.locate(tables, table_gpa, index, level, at)?)
                }
            };
            let place = table.entry(index).ok_or_else(|| tables.entry_unreadable(at))?;
            let entry = self.caches.word(place).ok_or_else(|| tables.entry_unreadable(at))?;
            let word = u64::from_le(entry.load(Ordering::Acquire));
            let Entry { leaf, address, path: allowed, global } = tables.decode(word, level)?;
            let above = path;
            path = path & allowed;
            // The top table needs no caching, and a cached one still is.
            let table_found = (at.gpa.is_some() && !top).then_some((table, above));
            let writable = table.writable;
            *slot = Some(Step { place, at, word, leaf, writable, table: table_found });
            if leaf {
                let gpa = address | iova & (size(tables.shift(level)) - 1);
                return Ok(Descent { path, gpa, level, leaf: word, global });
            }
            // Not below level 1: an entry of that level is a leaf.
            (level, table_gpa) = (level - 1, address);
        }
        // Not reached: there are no more levels than steps, and the last has leaves only.
        Err(tables.entry_unreadable(At { gpa: None, top: false }))
    }

    /// Translates `gpa` for a request of `kind` by stage 2 only, which serves `served`, and caches
    /// the result.
    pub fn stage2_only(
        &self,
        gpa: u64,
        kind: RequestKind,
        served: Rights,
    ) -> Result<Target, Stage2Refusal> {
        let page = self.page(gpa, kind)?;
        let output = Output::new(page, gpa, MAX_PAGE_SHIFT, served, self.source);
        Ok(self.cache(&self.track(output, gpa, kind), gpa))
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

    /// Restricts `output`, of a request of `kind` to `gpa`, when dirty pages are tracked: to a page
    /// of 4 KiB, which is marked by a write; after a read, the first write must walk again.
    fn track(&self, output: Output, gpa: u64, kind: RequestKind) -> Output {
        let Some(log) = self.dirty else { return output };
        let rights = output.rights;
        if kind.write() {
            log.mark(gpa..=gpa);
        }
        Output {
            length: output.length.min(size(DIRTY_SHIFT) - (gpa & (size(DIRTY_SHIFT) - 1))),
            shift: output.shift.map(|_| DIRTY_SHIFT),
            rights: Rights::of(|other| rights.allow(other) && (kind.write() || !other.write())),
            ..output
        }
    }

    /// The page that a request of `kind` accesses at `gpa`.
    fn page(&self, gpa: u64, kind: RequestKind) -> Result<Stage2Page, Stage2Refusal> {
        let page = self.caches.stage2(self.host, gpa, self.counters)?;
        page.allows(kind).then_some(page).ok_or(Stage2Refusal::Denied)
    }

    /// The address of the table of `level` at `gpa`, as far as it is contiguous with its entry
    /// number `index`.
    fn locate<F: TableFormat>(
        &self,
        tables: &F,
        gpa: u64,
        index: u64,
        level: u8,
        at: At,
    ) -> Result<Table, F::Fault> {
        let entry_at = index * 8;
        match self.caches.stage2(self.host, gpa + entry_at, self.counters) {
            Ok(page) if page.read => {
                // The page of stage 2 may start in the middle of a large table.
                let before = page.shift.map_or(0, |shift| (gpa + entry_at) & (size(shift) - 1));
                let skipped = entry_at.saturating_sub(before);
                let place = page.place.back(entry_at - skipped);
                let place = place.ok_or_else(|| tables.entry_unreadable(at))?;
                let length = page.length + (entry_at - skipped);
                Ok(Table { place, level, skipped, length, writable: page.write })
            }
            Ok(_) => Err(tables.table_refused(at, Stage2Refusal::Denied)),
            Err(why) => Err(tables.table_refused(at, why)),
        }
    }

    /// Sets the flags that a request of `kind` sets in the entries of `steps`. Returns `false` if
    /// an entry has changed since it was read.
    fn set_flags<F: TableFormat>(
        &self,
        tables: &F,
        steps: &[Option<Step>],
        kind: RequestKind,
    ) -> Result<bool, F::Fault> {
        for step in steps.iter().flatten() {
            let wanted = step.word | tables.flags(step.leaf, kind.write());
            if wanted == step.word {
                continue;
            }
            if !step.writable {
                return Err(tables.flags_refused(step.at));
            }
            let (old, new) = (step.word.to_le(), wanted.to_le());
            if let (Some(log), Some(gpa)) = (self.dirty, step.at.gpa) {
                log.mark(gpa..=gpa);
            }
            // It was there when it was read.
            let entry = self.caches.word(step.place);
            let entry = entry.ok_or_else(|| tables.entry_unreadable(step.at))?;
            if entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

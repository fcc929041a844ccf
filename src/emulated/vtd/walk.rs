// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page walk: user-owned tables, each of whose pointers goes through stage 2.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};

use super::caches::{Caches, Stage2Miss, Stage2Page, Table};
use super::context::Context;
use super::counters::LocalCounters;
use super::format::{Path, TableFormat};
use super::rights::{Fault, RequestKind, Rights};
use crate::emulated::dirty::DirtyLog;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::first_stage::{index, page_size};

/// How often a walk starts again because an entry changed between its being read and its flags
/// being set. The guest changes entries at will; it must not keep a walk going at will.
const ATTEMPTS: u32 = 16;

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// Level of the largest page: 1 GiB.
const MAX_PAGE_LEVEL: u8 = 3;

/// What both stages make of an IOVA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Output {
    /// What stage 2 makes of the GPA that stage 1 gives.
    pub page: Stage2Page,
    /// Bytes from the one asked for to the end of what is contiguous in both stages.
    pub length: u64,
    /// Level of the page that is contiguous in both stages; none when not even 4 KiB are.
    pub level: Option<u8>,
    /// The requests that both stages allow, without a further walk.
    pub rights: Rights,
}

impl Output {
    /// `page` is what stage 2 makes of `gpa`, which stage 1 has in a page of `level` with `rights`.
    fn new(page: Stage2Page, gpa: u64, level: u8, rights: Rights) -> Self {
        Self {
            page,
            length: page.length.min(page_size(level) - (gpa & (page_size(level) - 1))),
            level: page.level.map(|page_level| page_level.min(level)),
            rights: Rights::of(|kind| rights.allow(kind) && page.allows(kind)),
        }
    }
}

/// A walk through the tables of one context.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    pub caches: &'a Caches,
    pub context: &'a Context,
    pub counters: &'a LocalCounters,
    /// Where pages of stage 2 that are written are marked, if they are to be.
    pub dirty: Option<&'a DirtyLog>,
}

/// An entry that a walk came through.
struct Step<'a> {
    entry: &'a AtomicU64,
    /// Where stage 2 has it; not known when its table was cached.
    gpa: Option<u64>,
    /// What was read from it.
    word: u64,
    /// Stage 2 lets it be written.
    writable: bool,
    /// The table that it points to and what is allowed so far, unless it is a leaf.
    below: Option<(Table, Path)>,
}

/// All that a walk came through, and where it ended.
struct Descent<'a> {
    steps: [Option<Step<'a>>; MAX_LEVELS],
    /// What the entries allow together.
    path: Path,
    /// Where the IOVA leads.
    gpa: u64,
    /// Level of the leaf.
    level: u8,
    /// What was read from the leaf.
    leaf: u64,
}

impl Walk<'_> {
    /// Translates `iova` for a request of `kind`, setting accessed and dirty flags.
    pub fn walk<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<Output, Fault> {
        self.counters.walks.count();
        tables.check_request(kind).map_err(Fault::stage1)?;
        tables.check_address(iova).map_err(Fault::stage1)?;
        for _ in 0..ATTEMPTS {
            if let Some(output) = self.attempt(tables, iova, kind)? {
                return Ok(output);
            }
        }
        Err(Fault::stage1(F::REASONS.flags_update))
    }

    /// One walk; none when an entry changed under it.
    fn attempt<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Result<Option<Output>, Fault> {
        let Descent { steps, path, gpa, level, leaf } = self.descend(tables, iova)?;
        tables.check_path(path, kind).map_err(Fault::stage1)?;
        let page = self.page(gpa, kind)?;
        // Nothing stands in the way of the request any more.
        if !self.set_flags(tables, &steps, kind)? {
            return Ok(None);
        }
        // Only now: an entry whose accessed flag is clear must not be cached.
        for (table, path) in steps.iter().flatten().filter_map(|step| step.below) {
            self.caches.add_table(self.context.source, iova, &table, path, self.counters);
        }
        let leaf = leaf | tables.flags(true, kind.write());
        let rights = Rights::of(|kind| {
            tables.check_request(kind).is_ok()
                && tables.check_path(path, kind).is_ok()
                && (!kind.write() || tables.is_dirty(leaf))
        });
        let output = self.track(Output::new(page, gpa, level, rights), gpa, kind);
        let read = || steps.iter().flatten().map(|step| step.word);
        // No overflow: there are at most 5 levels.
        let start = level + read().skip(1).count() as u8;
        self.caches.record_origin((self.context.source, iova), start, read(), output.level);
        Ok(Some(output))
    }

    /// Reads the entries from the lowest table that is cached, or the top table, to the leaf.
    fn descend<F: TableFormat>(&self, tables: &F, iova: u64) -> Result<Descent<'_>, Fault> {
        let cached = match self.dirty {
            None => self.caches.table(self.context.source, iova, tables.levels(), self.counters),
            // The page of a table whose entries get their flags set is dirty, so its address
            // must be known.
            Some(_) => None,
        };
        let mut table_gpa = cached.is_none().then(|| tables.table());
        let (mut table, mut path) = match cached {
            Some(start) => start,
            None => {
                let reasons = (F::REASONS.top_beyond, F::REASONS.top_denied);
                (self.locate(tables.table(), tables.levels(), reasons)?, Path::UNLIMITED)
            }
        };
        let mut steps: [Option<Step>; MAX_LEVELS] = Default::default();
        for number in 0..MAX_LEVELS {
            let level = table.level;
            let top = level == tables.levels();
            let access = if top { F::REASONS.top_access } else { F::REASONS.access };
            let entry =
                self.caches.entry(&table, index(iova, level)).ok_or(Fault::stage1(access))?;
            let word = u64::from_le(entry.load(Ordering::Acquire));
            let decoded = tables.decode(word, level).map_err(Fault::stage1)?;
            path = path & decoded.path;
            let writable = table.writable;
            let gpa = table_gpa.map(|gpa| gpa + index(iova, level) * 8);
            let below = if decoded.leaf {
                None
            } else {
                // Not below level 1: an entry of that level is a leaf.
                let reasons = (F::REASONS.beyond, F::REASONS.denied);
                table = self.locate(decoded.address, level - 1, reasons)?;
                table_gpa = Some(decoded.address);
                Some((table, path))
            };
            // In bounds: counted to the length.
            steps[number] = Some(Step { entry, gpa, word, writable, below });
            if decoded.leaf {
                let gpa = decoded.address | iova & (page_size(level) - 1);
                return Ok(Descent { steps, path, gpa, level, leaf: word });
            }
        }
        // Not reached: there are no more levels than steps, and the last has leaves only.
        Err(Fault::stage1(F::REASONS.access))
    }

    /// Translates `gpa` for a request of `kind`, by stage 2 alone.
    pub fn stage2_only(&self, gpa: u64, kind: RequestKind) -> Result<Output, Fault> {
        if kind.execute() {
            return Err(Fault::stage1(FaultReason::ExecuteDisabled));
        }
        let page = self.page(gpa, kind)?;
        let output = Output::new(page, gpa, MAX_PAGE_LEVEL, Rights::of(|kind| !kind.execute()));
        Ok(self.track(output, gpa, kind))
    }

    /// What becomes of `output`, of a request of `kind` to `gpa`, when dirty pages are tracked: it
    /// is of one page of 4 KiB, which is marked if it is written, and otherwise leaves the first
    /// write to a walk.
    fn track(&self, output: Output, gpa: u64, kind: RequestKind) -> Output {
        let Some(log) = self.dirty else { return output };
        let rights = output.rights;
        if kind.write() {
            log.mark(gpa..=gpa);
        }
        Output {
            length: output.length.min(page_size(1) - (gpa & (page_size(1) - 1))),
            level: output.level.map(|_| 1),
            rights: Rights::of(|other| rights.allow(other) && (kind.write() || !other.write())),
            ..output
        }
    }

    /// The page that a request of `kind` accesses at `gpa`.
    fn page(&self, gpa: u64, kind: RequestKind) -> Result<Stage2Page, Fault> {
        match self.caches.stage2(self.context, gpa, self.counters) {
            Ok(page) if page.allows(kind) => Ok(page),
            Err(Stage2Miss::Beyond) => Err(Fault::stage2(FaultReason::AddressBeyondGuest)),
            Ok(_) | Err(Stage2Miss::Absent) => Err(Fault::stage2(FaultReason::SecondStageDenied)),
        }
    }

    /// Where the table of `level` at `gpa` is; `reasons` for one beyond stage 2 and one that stage
    /// 2 does not let be read.
    fn locate(
        &self,
        gpa: u64,
        level: u8,
        (beyond, denied): (FaultReason, FaultReason),
    ) -> Result<Table, Fault> {
        match self.caches.stage2(self.context, gpa, self.counters) {
            Ok(page) if page.read => {
                Ok(Table { place: page.place, level, length: page.length, writable: page.write })
            }
            Err(Stage2Miss::Beyond) => Err(Fault::stage2(beyond)),
            Ok(_) | Err(Stage2Miss::Absent) => Err(Fault::stage2(denied)),
        }
    }

    /// Sets the flags that a request of `kind` leaves in the entries of `steps`. Whether it could:
    /// not when an entry has changed since it was read.
    fn set_flags<F: TableFormat>(
        &self,
        tables: &F,
        steps: &[Option<Step<'_>>],
        kind: RequestKind,
    ) -> Result<bool, Fault> {
        for step in steps.iter().flatten() {
            let leaf = step.below.is_none();
            let wanted = step.word | tables.flags(leaf, kind.write());
            if wanted == step.word {
                continue;
            }
            if !step.writable {
                return Err(Fault::stage2(F::REASONS.flags_denied));
            }
            let (old, new) = (step.word.to_le(), wanted.to_le());
            if let (Some(log), Some(gpa)) = (self.dirty, step.gpa) {
                log.mark(gpa..=gpa);
            }
            if step.entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

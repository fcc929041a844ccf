// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is cached of the host's stages 2.
//!
//! A walk asks stage 2 for every table, and for the page. Guest memory is a few large mappings, so
//! a stage 2 that has few of them is cached as whole mappings, which are compared one after the
//! other; of any other, pieces are cached, in sizes of pages. Either stays until
//! [`Stage2Cache::drop_gone`]: the host drops what it changes.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use super::cache::Cache;
use super::counters::LocalCounters;
use super::entries::Stage2Page;
use super::host_stage2::HostStage2;
use super::key::{size, Key, Source};
use super::memories::{CachedPlace, Memories, Place};
use crate::units::stage2::{Mapping, Stage2};

/// Sizes of the pieces that are cached, as powers of two: 4 KiB, 2 MiB, 1 GiB.
const SHIFTS: [u8; 3] = [12, 21, 30];

/// The largest of them.
const MAX_SHIFT: u8 = 30;

/// Maximum number of mappings that are cached as a whole.
const FEW: usize = 8;

/// Stages 2 that are cached as a whole, if they have few mappings: those whose tag is below. Tags
/// are the lowest numbers that are free.
const STAGES2: usize = 64;

/// Flags of a cached piece.
const READ: u16 = 1;
const WRITE: u16 = 2;

/// See the [module's documentation](self).
#[derive(Debug)]
pub(super) struct Stage2Cache {
    /// The last address that a guest can have.
    last: u64,
    /// By tag; empty if nothing is cached.
    wholes: Box<[OnceLock<Box<[Whole]>>]>,
    pieces: Cache,
}

/// A whole mapping, as far as a guest's addresses go.
#[derive(Debug)]
pub(crate) struct Whole {
    /// First address.
    start: u64,
    /// Bytes from it to the last one.
    reach: u64,
    /// Where the first one is.
    place: Place,
    read: bool,
    write: bool,
}

impl Whole {
    /// `mapping` up to `end`, if `memories` has room for its memory.
    fn of(mapping: &Mapping, end: u64, memories: &Memories) -> Option<Self> {
        let Mapping { start, last, memory, protection } = mapping;
        Some(Self {
            start: *start,
            reach: (*last).min(end).checked_sub(*start)?,
            place: Place { memory: memories.number(memory)?, offset: mapping.target(*start) },
            read: protection.read,
            write: protection.write,
        })
    }

    /// The page at `gpa`, if it is in the mapping.
    #[inline]
    pub fn page(&self, gpa: u64) -> Option<Stage2Page> {
        let before = gpa.wrapping_sub(self.start);
        (before <= self.reach).then(|| Stage2Page {
            place: Place { offset: self.place.offset + before, ..self.place },
            before,
            // Does not overflow: addresses have fewer than 64 bits.
            length: self.reach - before + 1,
            read: self.read,
            write: self.write,
        })
    }
}

impl Stage2Cache {
    /// An empty cache of `entries` pieces, and of whole mappings unless that is 0, for guest
    /// addresses up to `last`.
    pub fn new(entries: usize, last: u64) -> Self {
        let stages2 = if entries == 0 { 0 } else { STAGES2 };
        let wholes = (0..stages2).map(|_| OnceLock::new()).collect();
        Self { last, wholes, pieces: Cache::new(entries) }
    }

    /// What is cached as whole mappings of the stage 2 of `host`: a walk asks it for each table,
    /// before [`Stage2Cache::get`].
    #[inline]
    pub fn wholes(&self, host: &HostStage2) -> &[Whole] {
        let wholes = self.wholes.get(host.source.tag() as usize).and_then(OnceLock::get);
        wholes.map_or(&[], |wholes| wholes)
    }

    /// The translation of `gpa` by the stage 2 of `host`, if there is one.
    #[inline(never)]
    pub fn get(
        &self,
        memories: &Memories,
        host: &HostStage2,
        gpa: u64,
        counters: &LocalCounters,
    ) -> Option<Stage2Page> {
        let whole = self.wholes(host).iter().find_map(|whole| whole.page(gpa));
        if let Some(page) = whole.or_else(|| self.piece(host.source, gpa)) {
            counters.stage2_hits.count();
            return Some(page);
        }
        counters.stage2_misses.count();
        let page = now(memories, &host.stage2, gpa)?;
        self.add_piece(host.source, gpa, &page, counters);
        if let Some(wholes) = self.wholes.get(host.source.tag() as usize) {
            wholes.get_or_init(|| {
                let mappings = host.stage2.few(FEW);
                let whole = |mapping| Whole::of(mapping, self.last, memories);
                mappings.iter().filter_map(whole).collect()
            });
        }
        Some(page)
    }

    fn piece(&self, source: Source, gpa: u64) -> Option<Stage2Page> {
        // The largest first.
        SHIFTS.into_iter().rev().find_map(|shift| {
            let value = self.pieces.get(Key::new(source, gpa, shift), |_| true)?;
            let (value, before) = (CachedPlace::from_bits(value), gpa & (size(shift) - 1));
            Some(Stage2Page {
                place: value.place(before),
                before,
                length: size(shift) - before,
                read: value.flags() & READ != 0,
                write: value.flags() & WRITE != 0,
            })
        })
    }

    fn add_piece(&self, source: Source, gpa: u64, page: &Stage2Page, counters: &LocalCounters) {
        let Some(shift) = page.shift(gpa, MAX_SHIFT) else { return };
        let read = if page.read { READ } else { 0 };
        let write = if page.write { WRITE } else { 0 };
        let start = page.place.back(gpa & (size(shift) - 1));
        let value = start.and_then(|start| CachedPlace::of(start, read | write));
        let turn = counters.stage2_evictions.get();
        let evicted = value.is_some_and(|value| {
            self.pieces.insert(Key::new(source, gpa, shift), value.into_bits(), turn)
        });
        counters.stage2_evictions.add(evicted.into());
    }

    /// Drops what is cached of the stage 2 of `tag`, if there is one, and adds the numbers of the
    /// memories that the rest refers to to `wanted`; returns the number of entries.
    pub fn drop_gone(&mut self, tag: Option<u32>, wanted: &mut BTreeSet<u16>) -> u64 {
        for (number, wholes) in (0..).zip(&mut self.wholes) {
            if Some(number) == tag {
                wholes.take();
            }
            let kept = wholes.get().into_iter().flatten();
            wanted.extend(kept.map(|whole| whole.place.memory));
        }
        self.pieces.drop_entries(|key, value| {
            let dropped = Some(key.source().tag()) == tag;
            if !dropped {
                wanted.insert(CachedPlace::from_bits(value).place(0).memory);
            }
            dropped
        })
    }
}

/// The translation of `gpa` by `stage2`, bypassing the cache.
pub(super) fn now(memories: &Memories, stage2: &Stage2, gpa: u64) -> Option<Stage2Page> {
    let mapping = stage2.lookup(gpa)?;
    Whole::of(&mapping, u64::MAX, memories)?.page(gpa)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What cache entries were made from: table entries, as they were read from memory.

use std::collections::HashMap;
use twostage::sync::Mutex;

use super::cache::Cache;
use super::format::TableFormat;
use super::key::{Key, Source};

/// For each cache entry, the table entries that it was made from. Those of evicted entries are
/// removed when there are twice as many as the cache has entries.
#[derive(Debug, Default)]
struct Ways(HashMap<Key, Trail>);

impl Ways {
    fn insert(&mut self, cache: &Cache, key: Key, trail: Trail) {
        if self.0.len() >= 2 * cache.entries() {
            self.0.retain(|key, _| cache.get(*key, |_| true).is_some());
        }
        self.0.insert(key, trail);
    }
}

/// What cache entries were made from.
#[derive(Debug, Default)]
pub(crate) struct Origins(Mutex<Both>);

#[derive(Debug, Default)]
struct Both {
    pages: Ways,
    tables: Ways,
}

/// The caches that entries are in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CachesOfWalk<'a> {
    pub iotlb: &'a Cache,
    pub paging_structures: &'a Cache,
}

/// A walk that ended at a page.
#[derive(Debug)]
pub(crate) struct WalkOrigin<'a> {
    /// Source of what it cached on the way, and the address that it translated.
    pub way: (Source, u64),
    /// Level of the first entry that it read.
    pub start: u8,
    /// The entries that it read, the last of which is the page, with their addresses, if known:
    /// those in a cached table have none.
    pub entries: &'a [(u64, Option<u64>)],
    /// Where the page leads.
    pub end: u64,
    /// The request that it was for is a write.
    pub write: bool,
    /// Source and size of the cached page, if it was cached.
    pub page: Option<(Source, u8)>,
}

impl Origins {
    /// Records what the cache entries of a walk of `tables` were made from. `below` gives what the
    /// stage below has for an address, and for reads or writes of it, if it has entries.
    pub fn record<F: TableFormat>(
        &self,
        caches: CachesOfWalk<'_>,
        tables: &F,
        walk: &WalkOrigin<'_>,
        below: impl Fn(u64, bool) -> Option<Trail>,
    ) {
        let WalkOrigin { way: (source, iova), start, entries, end, write, page } = *walk;
        // Before the lock, which `below` takes.
        let read = entries.iter().map(|(_, address)| (*address, false));
        let ends = read.chain([(Some(end), write)]);
        let ends: Vec<_> = ends.map(|(at, write)| Some((at?, below(at?, write)?.own))).collect();
        let mut both = self.0.lock();
        // The entries above `start` were not read: the table came from the cache.
        let above = (start < tables.levels())
            .then(|| Key::new(source, iova, tables.shift(start.saturating_add(1))));
        let above = above.and_then(|above| both.tables.0.get(&above));
        let mut trail = above.cloned().unwrap_or_default();
        let mut ends = ends.into_iter();
        trail.set_below(start, ends.next().flatten());
        let mut level = start;
        for (number, (word, _)) in entries.iter().enumerate() {
            let leaf = number + 1 == entries.len();
            trail.own.set(level, *word);
            trail.set_below(
                if leaf { PAGE } else { level.saturating_sub(1) },
                ends.next().flatten(),
            );
            if !leaf {
                let key = Key::new(source, iova, tables.shift(level));
                both.tables.insert(caches.paging_structures, key, trail.clone());
                level = level.saturating_sub(1);
            }
        }
        if let Some((source, shift)) = page {
            both.pages.insert(caches.iotlb, Key::new(source, iova, shift), trail);
        }
    }

    /// What the IOTLB's entry of `shift` for `iova` was made from.
    pub fn page(&self, source: Source, iova: u64, shift: u8) -> Option<Trail> {
        let both = self.0.lock();
        both.pages.0.get(&Key::new(source, iova, shift)).cloned()
    }
}

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// Stands for the page at the end of a way, where other numbers are levels of tables.
pub(crate) const PAGE: u8 = 0;

/// What was read on the way to one IOVA.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Trail {
    /// The entries of its tables.
    pub own: Words,
    /// What the stage below had for the table of each level, and for the page ([`PAGE`]); none if
    /// it has no entries.
    below: Option<Box<[Option<Below>; MAX_LEVELS + 1]>>,
}

/// An address, aligned to 4 KiB, and the entries of the stage below on the way there.
pub(crate) type Below = (u64, Words);

impl Trail {
    /// What the stage below had for the table of `level`, or the page.
    pub fn below(&self, level: u8) -> Option<&Below> {
        self.below.as_ref()?.get(usize::from(level))?.as_ref()
    }

    /// Records what the stage below has for the table of `level` or the page, if it is known.
    pub fn set_below(&mut self, level: u8, below: Option<Below>) {
        let Some((address, words)) = below else { return };
        if let Some(slot) = self.below.get_or_insert_default().get_mut(usize::from(level)) {
            *slot = Some((address & !0xfff, words));
        }
    }
}

/// The words of the entries on the way to one address, by level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Words([Option<u64>; MAX_LEVELS]);

impl Words {
    /// The entry of `level` (from 1, the lowest), if it was read.
    pub fn word(&self, level: u8) -> Option<u64> {
        *self.0.get(usize::from(level).checked_sub(1)?)?
    }

    /// Records that the entry of `level` was read as `word`.
    pub fn set(&mut self, level: u8, word: u64) {
        if let Some(slot) = usize::from(level).checked_sub(1).and_then(|at| self.0.get_mut(at)) {
            *slot = Some(word);
        }
    }

    /// The highest level whose entry differs in `other`, ignoring accessed, dirty and ignored bits.
    pub fn difference<F: TableFormat>(&self, other: &Self, tables: &F) -> Option<u8> {
        (1..=tables.levels()).rev().find(|&level| self.differs(other, tables, level))
    }

    /// Whether the entry of `level` differs like this.
    pub fn differs<F: TableFormat>(&self, other: &Self, tables: &F, level: u8) -> bool {
        let says = |words: &Self| words.word(level).map(|word| tables.decode(word, level));
        says(self) != says(other)
    }

    /// Whether the lowest entry on the way is that of `level`.
    pub fn ends_at(&self, level: u8) -> bool {
        self.word(level).is_some() && (1..level).all(|below| self.word(below).is_none())
    }
}

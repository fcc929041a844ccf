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

impl Origins {
    /// A walk for `iova` started at the table of level `start` and read `words`, the last of which
    /// is a page. `page` has the source and size of the cached page, if it was cached.
    pub fn record<F: TableFormat>(
        &self,
        caches: CachesOfWalk<'_>,
        tables: &F,
        (source, iova): (Source, u64),
        start: u8,
        words: &[u64],
        page: Option<(Source, u8)>,
    ) {
        let mut both = self.0.lock();
        // The entries above `start` were not read: the table came from the cache.
        let above = (start < tables.levels())
            .then(|| Key::new(source, iova, tables.shift(start.saturating_add(1))));
        let mut trail =
            above.and_then(|above| both.tables.0.get(&above).copied()).unwrap_or_default();
        let Some((leaf, pointers)) = words.split_last() else { return };
        let mut level = start;
        for &word in pointers {
            trail.set(level, word);
            let key = Key::new(source, iova, tables.shift(level));
            both.tables.insert(caches.paging_structures, key, trail);
            level = level.saturating_sub(1);
        }
        trail.set(level, *leaf);
        if let Some((source, shift)) = page {
            both.pages.insert(caches.iotlb, Key::new(source, iova, shift), trail);
        }
    }

    /// What the IOTLB's entry of `shift` for `iova` was made from.
    pub fn page(&self, source: Source, iova: u64, shift: u8) -> Option<Trail> {
        let both = self.0.lock();
        both.pages.0.get(&Key::new(source, iova, shift)).copied()
    }
}

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// The words of the entries on the way to one IOVA, by level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Trail([Option<u64>; MAX_LEVELS]);

impl Trail {
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
        (1..=tables.levels()).rev().find(|&level| {
            let says = |trail: &Self| trail.word(level).map(|word| tables.decode(word, level));
            says(self) != says(other)
        })
    }

    /// Whether the lowest entry on the way is that of `level`.
    pub fn ends_at(&self, level: u8) -> bool {
        self.word(level).is_some() && (1..level).all(|below| self.word(below).is_none())
    }
}

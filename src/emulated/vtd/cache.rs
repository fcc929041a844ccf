// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set-associative cache of translations: IOTLB, paging-structure cache, stage-2 cache.
//!
//! Threads that do DMA look up and fill at the same time, without locks; only dropping needs the
//! cache to oneself. Every entry is a sequence lock: a number that is odd while the entry is being
//! filled, and three words. Who fills an entry makes the number odd by compare-exchange (and goes
//! without, if another thread is at it), stores the words behind a release fence, and makes the
//! number even by a release store. Who looks up takes the words for one entry only when the number
//! was even before, read with acquire, and is the same after, read behind an acquire fence. All
//! words are atomics, so a torn read is no data race, merely a miss.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{fence, AtomicU64, AtomicUsize, Ordering};

use crate::spec::vtd::first_stage::page_size;

/// Entries that one key can be in.
const WAYS: usize = 4;

/// What an entry is found by: the span that it translates, and whose it is.
///
/// `level` gives the size of the span: 1 is 4 KiB, 2 is 2 MiB, 3 is 1 GiB, and so on as
/// [`page_size`] has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// First address of the span with the level in the bits below, never zero.
    span: u64,
    /// Tag and PASID.
    source: Source,
}

/// Whose an entry is: a tag, and the PASID of the requests that it serves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Source(u64);

impl Source {
    /// Entries of `tag` for requests with `pasid`.
    pub fn new(tag: u32, pasid: u32) -> Self {
        Self(u64::from(tag) << 32 | u64::from(pasid))
    }

    /// The tag.
    pub fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({}, PASID {})", self.tag(), self.0 as u32)
    }
}

impl Key {
    /// The span of `level` (1 to 5) that `address` lies in.
    #[inline]
    pub fn new(source: Source, address: u64, level: u8) -> Self {
        Self { span: address & !(page_size(level) - 1) | u64::from(level), source }
    }

    fn level(self) -> u8 {
        (self.span & LEVEL) as u8
    }

    fn first(self) -> u64 {
        self.span & !LEVEL
    }

    /// Whether the span has an address in `first..=last`.
    fn overlaps(self, first: u64, last: u64) -> bool {
        self.first() <= last && self.first() | (page_size(self.level()) - 1) >= first
    }
}

/// Bits of [`Key::span`] that hold the level.
const LEVEL: u64 = 7;

/// One entry; empty while `span` is zero.
#[derive(Default)]
#[repr(align(32))]
struct Entry {
    sequence: AtomicU64,
    span: AtomicU64,
    source: AtomicU64,
    value: AtomicU64,
}

impl Entry {
    /// The value, when the entry holds `key`.
    #[inline]
    fn get(&self, key: Key) -> Option<u64> {
        let sequence = self.sequence.load(Ordering::Acquire);
        if self.span.load(Ordering::Relaxed) != key.span
            || self.source.load(Ordering::Relaxed) != key.source.0
        {
            return None;
        }
        let value = self.value.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (sequence & 1 == 0 && self.sequence.load(Ordering::Relaxed) == sequence).then_some(value)
    }

    /// Makes the entry hold `key`, unless another thread fills it right now.
    fn set(&self, key: Key, value: u64) -> bool {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let busy = sequence | 1;
        if sequence == busy
            || self
                .sequence
                .compare_exchange(sequence, busy, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return false;
        }
        fence(Ordering::Release);
        self.span.store(key.span, Ordering::Relaxed);
        self.source.store(key.source.0, Ordering::Relaxed);
        self.value.store(value, Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
        true
    }

    /// What the entry holds.
    fn occupant(&mut self) -> Option<(Key, u64)> {
        let (span, source) = (*self.span.get_mut(), Source(*self.source.get_mut()));
        (span != 0).then(|| (Key { span, source }, *self.value.get_mut()))
    }

    fn clear(&mut self) {
        *self.span.get_mut() = 0;
    }
}

/// The entries a key can be in.
#[derive(Default)]
struct Set([Entry; WAYS]);

/// See the [module's documentation](self).
pub(super) struct Cache {
    /// A power of two of sets, or none: a cache that caches nothing.
    sets: Box<[Set]>,
    /// How far a hash is shifted to leave the index of a set.
    shift: u32,
    /// Counts evictions, to take the ways in turn.
    turn: AtomicUsize,
}

impl Cache {
    /// A cache of at least `entries` entries; none for 0.
    pub fn new(entries: usize) -> Self {
        let sets = if entries == 0 { 0 } else { entries.div_ceil(WAYS).next_power_of_two().max(2) };
        Self {
            sets: (0..sets).map(|_| Set::default()).collect(),
            shift: u64::BITS - sets.checked_ilog2().unwrap_or(1),
            turn: AtomicUsize::new(0),
        }
    }

    /// How many entries there can be.
    pub fn entries(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// The index of the set of `key`. The PASID is left out, so that an invalidation finds the
    /// entries of every PASID of a tag in one set.
    #[inline]
    fn index(&self, key: Key) -> usize {
        // Fibonacci hashing: odd multipliers near 2^64 divided by the golden ratio and its like.
        let hash = (key.span.rotate_right(12) ^ u64::from(key.source.tag()) << 40)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> self.shift) as usize
    }

    /// The value under `key`, when there is one and `accept` takes it.
    #[inline]
    pub fn get(&self, key: Key, accept: impl Fn(u64) -> bool) -> Option<u64> {
        let Set(ways) = self.sets.get(self.index(key))?;
        ways.iter().find_map(|entry| entry.get(key).filter(|&value| accept(value)))
    }

    /// Caches `value` under `key`, in place of what was there or of some other entry. Whether
    /// another entry had to go.
    pub fn insert(&self, key: Key, value: u64) -> bool {
        let Some(Set(ways)) = self.sets.get(self.index(key)) else { return false };
        let held = ways.iter().find(|entry| entry.get(key).is_some());
        let empty = || ways.iter().find(|entry| entry.span.load(Ordering::Relaxed) == 0);
        if let Some(entry) = held.or_else(empty) {
            entry.set(key, value);
            return false;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        ways.iter().cycle().nth(turn % WAYS).is_some_and(|victim| victim.set(key, value))
    }

    /// Drops every entry for which `condemned` holds; gives how many.
    pub fn drop_where(&mut self, mut condemned: impl FnMut(Source, u64) -> bool) -> u64 {
        self.drop_entries(|key, value| condemned(key.source, value))
    }

    /// Drops the entries of `tag`, of every PASID, that translate an address in `first..=last`
    /// (bytes) and are of one of `levels`; gives how many.
    pub fn drop_range(&mut self, tag: u32, first: u64, last: u64, levels: &[u8]) -> u64 {
        // The spans of one level in the range; probing each is cheaper than looking at all entries
        // while there are fewer of them than sets.
        let sets = self.sets.len() as u64;
        let spans = |level: u8| (last / page_size(level)) - (first / page_size(level)) + 1;
        if levels.iter().any(|&level| spans(level) > sets) {
            return self.drop_entries(|key, _| {
                key.source.tag() == tag
                    && key.overlaps(first, last)
                    && levels.contains(&key.level())
            });
        }
        let mut dropped = 0;
        for &level in levels {
            for number in 0..spans(level) {
                // Cannot overflow: it is at most `last` rounded down.
                let address = (first / page_size(level) + number) * page_size(level);
                dropped += self.drop_span(Key::new(Source::new(tag, 0), address, level));
            }
        }
        dropped
    }

    /// Drops the entries of `key`'s span and tag, whatever their PASID.
    fn drop_span(&mut self, key: Key) -> u64 {
        let index = self.index(key);
        let Some(Set(ways)) = self.sets.get_mut(index) else { return 0 };
        let mut dropped = 0;
        for entry in ways {
            if entry.occupant().is_some_and(|(held, _)| {
                held.span == key.span && held.source.tag() == key.source.tag()
            }) {
                entry.clear();
                dropped += 1;
            }
        }
        dropped
    }

    fn drop_entries(&mut self, mut condemned: impl FnMut(Key, u64) -> bool) -> u64 {
        let mut dropped = 0;
        for entry in self.sets.iter_mut().flat_map(|Set(ways)| ways) {
            if entry.occupant().is_some_and(|(key, value)| condemned(key, value)) {
                entry.clear();
                dropped += 1;
            }
        }
        dropped
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("entries", &self.entries()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    fn key(tag: u32, pasid: u32, address: u64, level: u8) -> Key {
        Key::new(Source::new(tag, pasid), address, level)
    }

    fn any(_: u64) -> bool {
        true
    }

    #[test]
    fn an_entry_is_found_by_span_size_tag_and_pasid() {
        let cache = Cache::new(64);
        cache.insert(key(1, 2, 0x20_0000, 2), 7);
        assert_eq!(cache.get(key(1, 2, 0x3f_ffff, 2), any), Some(7));
        assert_eq!(cache.get(key(1, 2, 0x3f_ffff, 2), |value| value != 7), None);
        for other in [
            key(1, 2, 0x20_0000, 1),
            key(1, 2, 0x40_0000, 2),
            key(2, 2, 0x20_0000, 2),
            key(1, 3, 0x20_0000, 2),
        ] {
            assert_eq!(cache.get(other, any), None);
        }
        cache.insert(key(1, 2, 0x20_0000, 2), 8);
        assert_eq!(cache.get(key(1, 2, 0x20_0000, 2), any), Some(8));
    }

    #[test]
    fn a_full_cache_evicts_and_stays_in_bounds() {
        let mut cache = Cache::new(16);
        let evicted =
            (0..1000).filter(|page| cache.insert(key(1, 0, page << 12, 1), *page)).count();
        let held = cache.drop_where(|_, _| true);
        assert!(held <= 16);
        assert_eq!(held + evicted as u64, 1000);
    }

    #[test]
    fn a_cache_of_nothing_holds_nothing() {
        let mut cache = Cache::new(0);
        assert!(!cache.insert(key(1, 0, 0, 1), 1));
        assert_eq!(cache.get(key(1, 0, 0, 1), any), None);
        assert_eq!(cache.drop_range(1, 0, u64::MAX, &[1, 2, 3]), 0);
    }

    proptest! {
        #[test]
        fn a_range_drops_what_overlaps_it_and_no_more(
            entries in prop::collection::vec((0u32..3, 0u32..3, 0u64..1 << 33, 1u8..=3), 1..64),
            tag in 0u32..3,
            first in prop_oneof![0u64..1 << 33, Just(0)],
            // Short ranges are probed, long ones scanned.
            length in prop_oneof![1u64..1 << 14, 1u64..1 << 34],
            levels in prop::sample::subsequence(vec![1u8, 2, 3], 0..=3),
        ) {
            // Large enough for nothing to be evicted, but for rare accidents that are no matter.
            let mut cache = Cache::new(1 << 12);
            let last = first + length - 1;
            for &(tag, pasid, address, level) in &entries {
                cache.insert(key(tag, pasid, address, level), 1);
            }
            let before: Vec<_> = entries
                .iter()
                .map(|&(tag, pasid, address, level)| key(tag, pasid, address, level))
                .filter(|&key| cache.get(key, any).is_some())
                .collect();
            cache.drop_range(tag, first, last, &levels);
            for held in before {
                let gone = held.source.tag() == tag
                    && levels.contains(&held.level())
                    && held.first() <= last
                    && held.first() + page_size(held.level()) > first;
                prop_assert_eq!(cache.get(held, any).is_none(), gone, "{:?}", held);
            }
        }
    }

    #[test]
    fn the_last_page_of_the_address_space_can_be_dropped() {
        for entries in [64, 1 << 12] {
            let mut cache = Cache::new(entries);
            cache.insert(key(1, 0, u64::MAX, 1), 1);
            cache.insert(key(1, 0, u64::MAX, 3), 1);
            assert_eq!(cache.drop_range(1, u64::MAX - 0xfff, u64::MAX, &[1, 2, 3]), 2);
            cache.insert(key(1, 0, u64::MAX, 3), 1);
            assert_eq!(cache.drop_range(1, 0, u64::MAX, &[1, 2, 3]), 1);
        }
    }

    #[test]
    fn concurrent_fills_never_mix_entries() {
        // One set; each key has one value, so that a mixture of two entries shows.
        let cache = Cache::new(8);
        let done = AtomicBool::new(false);
        let value_of = |page: u64, pasid: u32| page << 32 | u64::from(pasid);
        thread::scope(|scope| {
            for seed in 0..2u64 {
                let (cache, done) = (&cache, &done);
                scope.spawn(move || {
                    let mut random = seed;
                    for _ in 0..200_000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                        let (page, pasid) = (random >> 40 & 7, (random >> 50 & 3) as u32);
                        cache.insert(key(1, pasid, page << 12, 1), value_of(page, pasid));
                    }
                    done.store(true, Ordering::Relaxed);
                });
            }
            let mut hits = 0;
            while !done.load(Ordering::Relaxed) || hits == 0 {
                for page in 0..8 {
                    for pasid in 0..4 {
                        if let Some(value) = cache.get(key(1, pasid, page << 12, 1), any) {
                            assert_eq!(value, value_of(page, pasid));
                            hits += 1;
                        }
                    }
                }
            }
        });
    }
}

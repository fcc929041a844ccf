// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set-associative cache of translations: IOTLB, paging-structure cache, stage-2 cache.
//!
//! Threads that do DMA look up and fill concurrently, without locks; only dropping entries needs
//! exclusive access. Every entry is a seqlock: a number that is odd while the entry is being
//! filled, and three words. A writer makes the number odd by compare-exchange (and gives up if
//! another thread is filling the entry), stores the words after a release fence, and makes the
//! number even by a release store. A reader uses the words only if the number was even before,
//! loaded with acquire, and is the same afterwards, loaded after an acquire fence. All words are
//! atomics, so a torn read is not a data race, merely a miss.

use std::fmt;
use std::sync::atomic::{fence, AtomicU64, Ordering};

use super::key::{IovaRange, Key, Scope, Source};

/// Entries that one key can be in.
const WAYS: usize = 4;

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

    /// Makes the entry hold `key`, unless another thread is filling it.
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
pub(crate) struct Cache {
    /// A power of two of sets; empty for a cache that caches nothing.
    sets: Box<[Set]>,
    /// How far a hash is shifted to leave the index of a set.
    shift: u32,
    /// A bit for each shift that some entry may have: most caches have pages of one size only, and
    /// need not be searched for others.
    shifts: AtomicU64,
    /// How many sets were searched for entries to drop.
    #[cfg(test)]
    pub(super) looks: u64,
}

impl Cache {
    /// A cache of at least `entries` entries; none for 0.
    pub fn new(entries: usize) -> Self {
        let sets = if entries == 0 { 0 } else { entries.div_ceil(WAYS).next_power_of_two().max(2) };
        Self {
            sets: (0..sets).map(|_| Set::default()).collect(),
            shift: u64::BITS - sets.checked_ilog2().unwrap_or(1),
            shifts: AtomicU64::new(0),
            #[cfg(test)]
            looks: 0,
        }
    }

    /// Capacity in entries.
    pub fn entries(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// The set of `key`. It does not depend on the address space, so that an invalidation finds the
    /// entries of all of a tag's address spaces in one set.
    #[inline]
    fn index(&self, key: Key) -> usize {
        // Fibonacci hashing: odd multipliers near 2^64 divided by the golden ratio and similar.
        let hash = (key.span.rotate_right(12) ^ u64::from(key.source.tag()) << 40)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (hash >> self.shift) as usize
    }

    /// Whether there may be entries of `shift` (below 64).
    #[inline]
    pub fn may_have(&self, shift: u8) -> bool {
        // Whatever the order: a thread that does not see the bit yet has a miss.
        self.shifts.load(Ordering::Relaxed) >> shift & 1 != 0
    }

    /// The value of `key`, if there is one that `accept` accepts.
    #[inline]
    pub fn get(&self, key: Key, accept: impl Fn(u64) -> bool) -> Option<u64> {
        let Set(ways) = self.sets.get(self.index(key))?;
        ways.iter().find_map(|entry| entry.get(key).filter(|&value| accept(value)))
    }

    /// Caches `value` under `key`, in place of its old value or of another entry. Returns whether
    /// another entry was evicted: that is the one whose turn it is, by a number of the thread's
    /// own, which counts evictions or the like.
    #[inline]
    pub fn insert(&self, key: Key, value: u64, turn: u64) -> bool {
        let Some(Set(ways)) = self.sets.get(self.index(key)) else { return false };
        if !self.may_have(key.shift()) {
            self.shifts.fetch_or(1 << key.shift(), Ordering::Relaxed);
        }
        let held = ways.iter().find(|entry| entry.get(key).is_some());
        let empty = || ways.iter().find(|entry| entry.span.load(Ordering::Relaxed) == 0);
        if let Some(entry) = held.or_else(empty) {
            entry.set(key, value);
            return false;
        }
        let victim = ways.get(turn as usize % WAYS);
        victim.is_some_and(|victim| victim.set(key, value))
    }

    /// Drops the entries of `scope` that translate an address in one of `ranges`, as made by
    /// [`ascending`](super::key::ascending), and have one of `shifts`; returns their number.
    /// However many ranges there are, no more sets are searched than the cache has.
    pub fn drop_ranges(&mut self, scope: Scope, ranges: &[IovaRange], shifts: &[u8]) -> u64 {
        let present = *self.shifts.get_mut();
        let shifts = || shifts.iter().copied().filter(|shift| present >> shift & 1 != 0);
        if shifts().next().is_none() {
            return 0;
        }
        // Probing each span of a shift in a range is cheaper than looking at all entries while
        // there are fewer of them than sets.
        let mut spans: u64 = 0;
        let sets = self.sets.len() as u64;
        for range in ranges {
            for shift in shifts() {
                spans = spans.saturating_add(range.spans(shift));
            }
            if spans > sets {
                return self.drop_entries(|key, _| {
                    scope.has(key.source)
                        && shifts().any(|shift| shift == key.shift())
                        && key.overlaps_any(0, ranges)
                });
            }
        }
        let mut dropped = 0;
        for range in ranges {
            for shift in shifts() {
                for number in 0..range.spans(shift) {
                    // Cannot overflow: it is at most `last` rounded down.
                    let address = ((range.first >> shift) + number) << shift;
                    dropped += self.drop_span(scope, address, shift);
                }
            }
        }
        dropped
    }

    /// Drops the entries of `scope` for the span of `shift` around `address`.
    fn drop_span(&mut self, scope: Scope, address: u64, shift: u8) -> u64 {
        let key = Key::new(Source::new(scope.tag, 0), address, shift);
        let index = self.index(key);
        #[cfg(test)]
        (self.looks += 1);
        let Some(Set(ways)) = self.sets.get_mut(index) else { return 0 };
        let mut dropped = 0;
        for entry in ways {
            if entry
                .occupant()
                .is_some_and(|(held, _)| held.span == key.span && scope.has(held.source))
            {
                entry.clear();
                dropped += 1;
            }
        }
        dropped
    }

    /// Drops every entry for which `condemned` holds; returns their number.
    pub fn drop_entries(&mut self, mut condemned: impl FnMut(Key, u64) -> bool) -> u64 {
        #[cfg(test)]
        (self.looks += self.sets.len() as u64);
        let (mut dropped, mut shifts) = (0, 0);
        for entry in self.sets.iter_mut().flat_map(|Set(ways)| ways) {
            let Some((key, value)) = entry.occupant() else { continue };
            if condemned(key, value) {
                entry.clear();
                dropped += 1;
            } else {
                shifts |= 1 << key.shift();
            }
        }
        *self.shifts.get_mut() = shifts;
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
    use super::super::key::{ascending, size, Spaces};
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    fn key(tag: u32, space: u32, address: u64, shift: u8) -> Key {
        Key::new(Source::new(tag, space), address, shift)
    }

    const SHIFTS: [u8; 3] = [12, 21, 30];
    /// All of tag 1.
    const ONE: Scope = Scope { tag: 1, spaces: Spaces::UpTo(u32::MAX) };

    fn spaces() -> impl Strategy<Value = Spaces> {
        prop_oneof![
            (0u32..3).prop_map(Spaces::UpTo),
            (0u32..3).prop_map(Spaces::One),
            (0u32..3, 0u32..3).prop_map(|(one, two)| Spaces::Two(one, two)),
        ]
    }

    fn any(_: u64) -> bool {
        true
    }

    #[test]
    fn an_entry_is_found_by_span_size_tag_and_space() {
        let cache = Cache::new(64);
        cache.insert(key(1, 2, 0x20_0000, 21), 7, 0);
        assert_eq!(cache.get(key(1, 2, 0x3f_ffff, 21), any), Some(7));
        assert_eq!(cache.get(key(1, 2, 0x3f_ffff, 21), |value| value != 7), None);
        for other in [
            key(1, 2, 0x20_0000, 12),
            key(1, 2, 0x40_0000, 21),
            key(2, 2, 0x20_0000, 21),
            key(1, 3, 0x20_0000, 21),
        ] {
            assert_eq!(cache.get(other, any), None);
        }
        cache.insert(key(1, 2, 0x20_0000, 21), 8, 0);
        assert_eq!(cache.get(key(1, 2, 0x20_0000, 21), any), Some(8));
    }

    #[test]
    fn a_full_cache_evicts_and_stays_in_bounds() {
        let mut cache = Cache::new(16);
        let evicted =
            (0..1000).filter(|page| cache.insert(key(1, 0, page << 12, 12), *page, *page)).count();
        let held = cache.drop_entries(|_, _| true);
        assert!(held <= 16);
        assert_eq!(held + evicted as u64, 1000);
    }

    #[test]
    fn a_cache_of_nothing_holds_nothing() {
        let mut cache = Cache::new(0);
        assert!(!cache.insert(key(1, 0, 0, 12), 1, 0));
        assert_eq!(cache.get(key(1, 0, 0, 12), any), None);
        assert_eq!(cache.drop_ranges(ONE, &[IovaRange::ALL], &SHIFTS), 0);
    }

    proptest! {
        #[test]
        fn a_range_drops_what_overlaps_it_and_no_more(
            entries in prop::collection::vec(
                (0u32..3, 0u32..3, 0u64..1 << 33, prop::sample::select(&SHIFTS)), 1..64),
            tag in 0u32..3,
            spaces in spaces(),
            // A few short ranges are probed, long ones and many scanned.
            ranges in prop::collection::vec(
                (0u64..1 << 33, prop_oneof![1u64..1 << 14, 1u64..1 << 34]), 0..5),
            shifts in prop::sample::subsequence(SHIFTS.to_vec(), 0..=3),
        ) {
            // Large enough that evictions are rare; they do not matter here.
            let mut cache = Cache::new(1 << 12);
            let range = |&(first, length)| IovaRange { first, last: first + length - 1 };
            for &(tag, space, address, shift) in &entries {
                cache.insert(key(tag, space, address, shift), 1, address);
            }
            let before: Vec<_> = entries
                .iter()
                .map(|&(tag, space, address, shift)| key(tag, space, address, shift))
                .filter(|&key| cache.get(key, any).is_some())
                .collect();
            let together = ascending(ranges.iter().map(range));
            cache.drop_ranges(Scope { tag, spaces }, &together, &shifts);
            for held in before {
                let space = held.source.space();
                let meant = match spaces {
                    Spaces::UpTo(last) => space <= last,
                    Spaces::One(one) => space == one,
                    Spaces::Two(one, two) => [one, two].contains(&space),
                };
                let gone = meant
                    && held.source.tag() == tag
                    && shifts.contains(&held.shift())
                    && ranges.iter().map(range).any(|range| {
                        held.first() <= range.last
                            && held.first() + size(held.shift()) > range.first
                    });
                prop_assert_eq!(cache.get(held, any).is_none(), gone, "{:?}", held);
            }
        }
    }

    #[test]
    fn many_ranges_are_one_look_at_each_set() {
        // Too wide to be probed, and with as many spans as there are sets, and with few.
        for pages in [1 << 11, 1 << 10, 2] {
            let mut cache = Cache::new(1 << 12);
            let ranges = (0..256u64).map(|at| at << 30);
            let ranges = ranges.map(|first| IovaRange { first, last: first + (pages << 12) - 1 });
            (0..256).for_each(|at| assert!(!cache.insert(key(1, 0, at << 30, 12), 1, at)));
            let ranges = ascending(ranges);
            assert_eq!(cache.drop_ranges(ONE, &ranges, &SHIFTS), 256);
            assert!(cache.looks <= 1 << 10, "{pages} pages: {} sets", cache.looks);
        }
    }

    #[test]
    fn the_last_page_of_the_address_space_can_be_dropped() {
        for entries in [64, 1 << 12] {
            let mut cache = Cache::new(entries);
            let page = IovaRange { first: u64::MAX - 0xfff, last: u64::MAX };
            cache.insert(key(1, 0, u64::MAX, 12), 1, 0);
            cache.insert(key(1, 0, u64::MAX, 30), 1, 0);
            assert_eq!(cache.drop_ranges(ONE, &[page], &SHIFTS), 2);
            cache.insert(key(1, 0, u64::MAX, 30), 1, 0);
            assert_eq!(cache.drop_ranges(ONE, &[IovaRange::ALL], &SHIFTS), 1);
        }
    }

    #[test]
    fn concurrent_fills_never_mix_entries() {
        // One set; each key has one value, so a mixture of two entries would show.
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
                        cache.insert(key(1, pasid, page << 12, 12), value_of(page, pasid), random);
                    }
                    done.store(true, Ordering::Relaxed);
                });
            }
            let mut hits = 0;
            while !done.load(Ordering::Relaxed) || hits == 0 {
                for page in 0..8 {
                    for pasid in 0..4 {
                        if let Some(value) = cache.get(key(1, pasid, page << 12, 12), any) {
                            assert_eq!(value, value_of(page, pasid));
                            hits += 1;
                        }
                    }
                }
            }
        });
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Values by PASID, of which there may be 2^20: memory use depends on how often neighbouring values
//! differ.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// log2 of the number of keys of a block. Inserting a run moves at most one block, and 2^20 keys
/// have few blocks.
const BLOCK_BITS: u32 = 12;

/// Adjacent keys of one block with the same value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run<T> {
    first: u16,
    last: u16,
    value: T,
}

/// A map from `u32` to small values that stores adjacent keys with the same value as one run.
#[derive(Debug, Clone)]
pub struct Runs<T> {
    /// By the upper bits of their keys; the runs of each ascend, and adjacent runs differ. No block
    /// is empty.
    blocks: BTreeMap<u32, Vec<Run<T>>>,
}

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self { blocks: BTreeMap::new() }
    }
}

/// The block of `key`, and its index in it.
fn split(key: u32) -> (u32, u16) {
    // Fits: it is masked to fewer bits.
    (key >> BLOCK_BITS, (key & ((1 << BLOCK_BITS) - 1)) as u16)
}

fn join(block: u32, at: u16) -> u32 {
    block << BLOCK_BITS | u32::from(at)
}

impl<T: Copy + PartialEq> Runs<T> {
    /// The value of `key`.
    pub fn get(&self, key: u32) -> Option<T> {
        let (block, at) = split(key);
        let runs = self.blocks.get(&block)?;
        let run = runs.get(runs.partition_point(|run| run.last < at))?;
        (run.first <= at).then_some(run.value)
    }

    /// Sets or removes the value of `key`.
    pub fn set(&mut self, key: u32, value: Option<T>) {
        let (block, at) = split(key);
        if value.is_none() && !self.blocks.contains_key(&block) {
            return;
        }
        let runs = self.blocks.entry(block).or_default();
        set_in(runs, at, value);
        if runs.is_empty() {
            self.blocks.remove(&block);
        }
    }

    /// The first key from `from` on with a value.
    pub fn next(&self, from: u32) -> Option<u32> {
        let (first, at) = split(from);
        self.blocks.range(first..).find_map(|(&block, runs)| {
            let at = if block == first { at } else { 0 };
            let run = runs.get(runs.partition_point(|run| run.last < at))?;
            Some(join(block, run.first.max(at)))
        })
    }

    /// All keys with their values, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, T)> + '_ {
        self.ranges().flat_map(|(keys, value)| keys.map(move |key| (key, value)))
    }

    /// Runs of adjacent keys with the same value, and the value.
    pub fn ranges(&self) -> impl Iterator<Item = (RangeInclusive<u32>, T)> + '_ {
        self.ranges_in(0..=u32::MAX)
    }

    /// The same, limited to `keys`.
    pub fn ranges_in(
        &self,
        keys: RangeInclusive<u32>,
    ) -> impl Iterator<Item = (RangeInclusive<u32>, T)> + '_ {
        let (start, end) = keys.into_inner();
        let (first, last) = (split(start), split(end));
        let blocks = self.blocks.range(first.0..=last.0);
        let mut runs = blocks
            .flat_map(move |(&block, runs)| {
                let from = if block == first.0 { first.1 } else { 0 };
                let to = if block == last.0 { last.1 } else { u16::MAX };
                let runs = runs.get(runs.partition_point(|run| run.last < from)..);
                let runs = runs.into_iter().flatten().take_while(move |run| run.first <= to);
                runs.map(move |run| {
                    let keys = join(block, run.first.max(from))..=join(block, run.last.min(to));
                    (keys, run.value)
                })
            })
            .peekable();
        // Merges runs across blocks.
        std::iter::from_fn(move || {
            let (keys, value) = runs.next()?;
            let mut last = *keys.end();
            let continues = |last: u32, (keys, of): &(RangeInclusive<u32>, T)| {
                last.checked_add(1) == Some(*keys.start()) && *of == value
            };
            while let Some((keys, _)) = runs.next_if(|next| continues(last, next)) {
                last = *keys.end();
            }
            Some((*keys.start()..=last, value))
        })
    }

    /// Whether no key has a value.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Changes every value, once for each run.
    pub fn for_each_value(&mut self, mut change: impl FnMut(&mut T)) {
        for runs in self.blocks.values_mut() {
            runs.iter_mut().for_each(|run| change(&mut run.value));
            runs.dedup_by(|run, before| {
                let same = before.last + 1 == run.first && before.value == run.value;
                if same {
                    before.last = run.last;
                }
                same
            });
        }
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.blocks.values().map(Vec::len).sum()
    }

    /// Bytes of the runs, including spare capacity.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.values().map(|runs| runs.capacity() * size_of::<Run<T>>()).sum()
    }
}

/// [`Runs::set`] within one block.
fn set_in<T: Copy + PartialEq>(runs: &mut Vec<Run<T>>, at: u16, value: Option<T>) {
    let mut from = runs.partition_point(|run| run.last < at);
    let held = runs.get(from).filter(|run| run.first <= at).copied();
    if held.map(|run| run.value) == value {
        return;
    }
    let mut to = from + usize::from(held.is_some());
    let before = held.filter(|run| run.first < at).map(|run| Run { last: at - 1, ..run });
    let after = held.filter(|run| run.last > at).map(|run| Run { first: at + 1, ..run });
    let mut own = value.map(|value| Run { first: at, last: at, value });
    if let Some(own) = &mut own {
        let left = from.checked_sub(1).filter(|_| before.is_none()).and_then(|left| runs.get(left));
        if let Some(left) = left.filter(|left| left.last + 1 == at && left.value == own.value) {
            own.first = left.first;
            from -= 1;
        }
        let right = runs.get(to).filter(|_| after.is_none());
        if let Some(right) = right.filter(|right| right.first == at + 1 && right.value == own.value)
        {
            own.last = right.last;
            to += 1;
        }
    }
    let pieces = [before, own, after].into_iter().flatten();
    if runs.capacity() < runs.len() + 2 {
        // In small steps: spare capacity is wasted.
        runs.reserve_exact(runs.len() / 8 + 4);
    }
    runs.splice(from..to, pieces);
    if runs.capacity() > 2 * runs.len() + 8 {
        runs.shrink_to(runs.len() + runs.len() / 8);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAST: u32 = (1 << 20) - 1;

    /// Keys near the edges of blocks.
    fn key() -> impl Strategy<Value = u32> {
        let near = (0u32..12).prop_map(|key| key);
        prop_oneof![near, 4090u32..4102, LAST - 3..=LAST]
    }

    proptest! {
        /// Compared with a map that has every key.
        #[test]
        fn runs_say_what_was_set(
            changes in prop::collection::vec((key(), prop::option::of(0u8..3)), 0..80),
            added in 0u8..2,
        ) {
            let (mut runs, mut naive) = (Runs::default(), BTreeMap::new());
            for (key, value) in changes {
                runs.set(key, value);
                match value {
                    Some(value) => naive.insert(key, value),
                    None => naive.remove(&key),
                };
                prop_assert_eq!(runs.get(key), value);
            }
            // Some become equal.
            runs.for_each_value(|value| *value = (*value + added) / 2);
            naive.values_mut().for_each(|value| *value = (*value + added) / 2);
            prop_assert_eq!(runs.iter().collect::<Vec<_>>(), Vec::from_iter(naive.clone()));
            prop_assert_eq!(runs.is_empty(), naive.is_empty());
            for keys in [0..=0, 3..=8, 2..=4097, 4094..=LAST - 1] {
                let ranges: Vec<_> = runs.ranges_in(keys.clone()).collect();
                let flat = ranges
                    .iter()
                    .flat_map(|(keys, value)| keys.clone().map(|key| (key, *value)));
                let within = naive.range(keys).map(|(key, value)| (*key, *value));
                prop_assert_eq!(flat.collect::<Vec<_>>(), within.collect::<Vec<_>>());
                for pair in ranges.windows(2) {
                    let [(one, of), (two, other)] = pair else { unreachable!() };
                    prop_assert!(one.end() + 1 < *two.start() || of != other);
                }
            }
            for from in [0, 1, 5, 4095, 4096, 4100, LAST - 1, LAST] {
                let next = naive.range(from..).next().map(|(key, _)| *key);
                prop_assert_eq!(runs.next(from), next);
                prop_assert_eq!(runs.get(from), naive.get(&from).copied());
            }
            let mut expected = 0;
            let mut before = None;
            for (&key, &value) in &naive {
                let new_block = key % (1 << BLOCK_BITS) == 0;
                let equal = key.checked_sub(1).map(|key| (key, value));
                expected += usize::from(new_block || before != equal);
                before = Some((key, value));
            }
            prop_assert_eq!(runs.runs(), expected);
        }
    }

    #[test]
    fn a_run_costs_four_bytes_besides_its_value() {
        assert_eq!((size_of::<Run<u32>>(), size_of::<Run<[u32; 3]>>()), (8, 16));
    }

    #[test]
    fn equal_values_cost_a_run_a_block() {
        let mut runs = Runs::default();
        (0..=LAST).for_each(|key| runs.set(key, Some(7u32)));
        assert_eq!(runs.runs(), 1 << (20 - BLOCK_BITS));
        (0..=LAST).for_each(|key| runs.set(key, Some(8)));
        assert_eq!(runs.runs(), 1 << (20 - BLOCK_BITS));
        (0..=LAST).for_each(|key| runs.set(key, None));
        assert!(runs.is_empty());
    }

    #[test]
    fn distinct_values_cost_little_more_than_themselves() {
        let mut runs = Runs::default();
        // From both ends of each block, and in between.
        for key in 0..8192u32 {
            runs.set(key ^ 0xa5a, Some(key));
        }
        assert_eq!(runs.runs(), 8192);
        let least = 8192 * size_of::<Run<u32>>();
        assert!(runs.bytes() < least + least / 6, "{} of {least}", runs.bytes());
        (0..8192).filter(|key| key % 64 != 0).for_each(|key| runs.set(key, None));
        assert!(runs.bytes() < 8192 / 64 * size_of::<Run<u32>>() * 3, "{}", runs.bytes());
    }
}

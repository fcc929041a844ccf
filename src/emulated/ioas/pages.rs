// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The pages behind mappings: shared by every mapping copied from the first, pinned and accounted
//! once.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::PAGE_SIZE;
use crate::iommufd::{UserMemory, UserMemoryError};

/// How many bytes are pinned, over all [`Pages`] that share the account.
#[derive(Debug, Default)]
pub(crate) struct PinAccount {
    bytes: AtomicU64,
}

impl PinAccount {
    /// Bytes pinned now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// What one `IOAS_MAP` named: memory, who may ever write to it, and which of it is pinned.
#[derive(Debug)]
pub(crate) struct Pages {
    memory: UserMemory,
    writable: bool,
    account: Arc<PinAccount>,
    pins: Mutex<Coverage>,
}

impl Pages {
    /// The pages of `memory`, none pinned. `writable`: the mapping they come from is writable.
    pub fn new(memory: UserMemory, writable: bool, account: Arc<PinAccount>) -> Self {
        Self { memory, writable, account, pins: Mutex::default() }
    }

    /// Whether a mapping of these pages may be writable.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// The uAPI's `user_va` of the byte at `offset`.
    pub fn user_va(&self, offset: u64) -> u64 {
        self.memory.user_va() + offset
    }

    /// The memory of `length` bytes at `offset`.
    ///
    /// # Errors
    /// When the piece does not lie in the pages.
    pub fn piece(&self, offset: u64, length: u64) -> Result<UserMemory, UserMemoryError> {
        if offset.checked_add(length).is_none_or(|end| end > self.memory.length()) {
            // The region may be larger than the pages, so its own check does not suffice.
            return UserMemory::new(self.memory.region().clone(), u64::MAX, length);
        }
        UserMemory::new(self.memory.region().clone(), self.memory.offset() + offset, length)
    }

    /// Pins the pages under `length` bytes at `offset`; those pinned already are not accounted
    /// again.
    pub fn pin(&self, offset: u64, length: u64) {
        let (first, end) = self.page_numbers(offset, length);
        let new = self.pins.lock().unwrap_or_else(PoisonError::into_inner).add(first, end);
        self.account.bytes.fetch_add(new * PAGE_SIZE, Ordering::Relaxed);
    }

    /// Takes one pin from the pages under `length` bytes at `offset`, as given to [`Self::pin`].
    pub fn unpin(&self, offset: u64, length: u64) {
        let (first, end) = self.page_numbers(offset, length);
        let gone = self.pins.lock().unwrap_or_else(PoisonError::into_inner).sub(first, end);
        self.account.bytes.fetch_sub(gone * PAGE_SIZE, Ordering::Relaxed);
    }

    /// Pages from the one the memory starts in: first, and one past the last.
    fn page_numbers(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = self.memory.user_va() % PAGE_SIZE + offset;
        (start / PAGE_SIZE, (start + length).div_ceil(PAGE_SIZE))
    }
}

/// How often each page is pinned: a step function, by where it changes.
#[derive(Debug, Default)]
struct Coverage {
    /// From the key on, up to the next key, pages have that many pins. Nothing before the first
    /// key; neighbours differ.
    steps: BTreeMap<u64, u32>,
}

impl Coverage {
    /// One pin more on `first..end`; returns how many pages had none before.
    fn add(&mut self, first: u64, end: u64) -> u64 {
        self.change(first, end, |pins| pins.saturating_add(1), |before, _| before == 0)
    }

    /// One pin less on `first..end`; returns how many pages have none now.
    fn sub(&mut self, first: u64, end: u64) -> u64 {
        self.change(first, end, |pins| pins.saturating_sub(1), |_, after| after == 0)
    }

    fn change(
        &mut self,
        first: u64,
        end: u64,
        new: impl Fn(u32) -> u32,
        counts: impl Fn(u32, u32) -> bool,
    ) -> u64 {
        if first >= end {
            return 0;
        }
        self.split(first);
        self.split(end);
        let mut counted = 0;
        let starts: Vec<u64> = self.steps.range(first..end).map(|(start, _)| *start).collect();
        for (index, &start) in starts.iter().enumerate() {
            let stop = starts.get(index + 1).copied().unwrap_or(end);
            if let Some(pins) = self.steps.get_mut(&start) {
                let before = std::mem::replace(pins, new(*pins));
                if counts(before, *pins) {
                    counted += stop - start;
                }
            }
        }
        for start in starts {
            self.join(start);
        }
        self.join(end);
        counted
    }

    fn at(&self, page: u64) -> u32 {
        self.steps.range(..=page).next_back().map_or(0, |(_, pins)| *pins)
    }

    /// Makes `page` the start of a step.
    fn split(&mut self, page: u64) {
        let pins = self.at(page);
        self.steps.entry(page).or_insert(pins);
    }

    /// Drops the step at `page` if it is none.
    fn join(&mut self, page: u64) {
        let before = self.steps.range(..page).next_back().map_or(0, |(_, pins)| *pins);
        if self.steps.get(&page) == Some(&before) {
            self.steps.remove(&page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    fn memory(offset: u64, length: u64) -> UserMemory {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x10000, None).unwrap());
        UserMemory::new(region, offset, length).unwrap()
    }

    #[test]
    fn pages_are_accounted_once() {
        let account = Arc::new(PinAccount::default());
        let pages = Pages::new(memory(0x1000, 0x4000), true, account.clone());
        pages.pin(0, 0x4000);
        pages.pin(0x1000, 0x1000);
        assert_eq!(account.bytes(), 0x4000);
        pages.unpin(0, 0x4000);
        assert_eq!(account.bytes(), 0x1000);
        pages.unpin(0x1000, 0x1000);
        assert_eq!(account.bytes(), 0);
    }

    #[test]
    fn whole_pages_are_pinned() {
        let account = Arc::new(PinAccount::default());
        let pages = Pages::new(memory(0x1800, 0x1000), true, account.clone());
        pages.pin(0, 0x1000);
        assert_eq!(account.bytes(), 0x2000);
        pages.pin(0x800, 0x10);
        assert_eq!(account.bytes(), 0x2000);
    }

    #[test]
    fn a_piece_lies_in_the_pages_not_only_in_their_region() {
        let pages = Pages::new(memory(0x1000, 0x2000), true, Arc::default());
        assert_eq!(pages.piece(0x1000, 0x1000).unwrap().offset(), 0x2000);
        assert!(pages.piece(0x1000, 0x1001).is_err());
        assert!(pages.piece(u64::MAX, 2).is_err());
    }

    proptest! {
        #[test]
        fn coverage_counts_as_an_array_does(
            changes in prop::collection::vec((0u64..32, 1u64..16, any::<bool>()), 0..40),
        ) {
            let mut coverage = Coverage::default();
            let mut counts = [0u32; 64];
            let mut pinned: Vec<(u64, u64)> = Vec::new();
            for (first, length, add) in changes {
                if add {
                    let range = (first, first + length);
                    let naive = counts[range.0 as usize..range.1 as usize]
                        .iter_mut()
                        .map(|pins| { *pins += 1; u64::from(*pins == 1) })
                        .sum::<u64>();
                    prop_assert_eq!(coverage.add(range.0, range.1), naive);
                    pinned.push(range);
                } else if let Some(range) = pinned.pop() {
                    let naive = counts[range.0 as usize..range.1 as usize]
                        .iter_mut()
                        .map(|pins| { *pins -= 1; u64::from(*pins == 0) })
                        .sum::<u64>();
                    prop_assert_eq!(coverage.sub(range.0, range.1), naive);
                }
                for (page, pins) in counts.iter().enumerate() {
                    prop_assert_eq!(coverage.at(page as u64), *pins);
                }
            }
            for (first, end) in pinned {
                coverage.sub(first, end);
            }
            prop_assert!(coverage.steps.is_empty());
        }
    }
}

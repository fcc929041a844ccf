// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Entries of a guest's queue that are read together, and counted together: a look at guest memory,
//! and one more in a counter that other threads read, each cost as much as the rest of an entry.

use super::TableMemory;
use crate::counters::Counter;

/// Bytes that are read together, at most.
const BYTES: usize = 1024;

/// Entries read ahead of their turn, during one slice. The guest no longer writes what is before
/// the tail; what it writes after an error is read in another slice.
pub(super) struct Ahead {
    /// Offset in the queue of the first, in bytes.
    start: u64,
    /// How many bytes there are.
    length: usize,
    bytes: [u8; BYTES],
}

impl Default for Ahead {
    fn default() -> Self {
        Self { start: 0, length: 0, bytes: [0; BYTES] }
    }
}

impl Ahead {
    /// The entry of `size` bytes at `offset` of the queue at `base`, in which entries up to `until`
    /// may be read; none if it is not in memory. All in bytes.
    pub fn entry(
        &mut self,
        memory: &dyn TableMemory,
        base: u64,
        offset: u64,
        until: u64,
        size: usize,
    ) -> Option<&[u8]> {
        if self.held(offset, size).is_none() {
            self.fill(memory, base.checked_add(offset)?, until.saturating_sub(offset), size)?;
            self.start = offset;
        }
        self.held(offset, size)
    }

    fn held(&self, offset: u64, size: usize) -> Option<&[u8]> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(..self.length)?.get(at..)?.get(..size)
    }

    /// Reads `wanted` bytes at `address`, as far as there is room, or only `size` bytes, if the
    /// rest is no memory.
    fn fill(
        &mut self,
        memory: &dyn TableMemory,
        address: u64,
        wanted: u64,
        size: usize,
    ) -> Option<()> {
        let wanted = wanted.min(BYTES as u64) as usize;
        self.length = 0;
        for length in [wanted.max(size), size] {
            let bytes = self.bytes.get_mut(..length)?;
            if memory.read(address, bytes).is_ok() {
                self.length = length;
                return Some(());
            }
        }
        None
    }
}

/// Counts entries of one kind after the other, and adds each number once.
#[derive(Default)]
pub(super) struct Tally<'a> {
    counter: Option<&'a Counter>,
    number: u64,
}

impl<'a> Tally<'a> {
    /// One more for `counter`.
    pub fn count(&mut self, counter: &'a Counter) {
        if !self.counter.is_some_and(|before| std::ptr::eq(before, counter)) {
            self.settle();
            self.counter = Some(counter);
        }
        self.number += 1;
    }

    fn settle(&mut self) {
        if let Some(counter) = self.counter.take() {
            counter.add(std::mem::take(&mut self.number));
        }
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::viommu::BadAddress;

    /// Memory of 4 KiB, in which each byte is the number of its 16; counts reads.
    #[derive(Debug, Default)]
    struct Numbers(AtomicU64);

    impl TableMemory for Numbers {
        fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let length = bytes.len() as u64;
            if address + length > 0x1000 {
                return Err(BadAddress { address, length });
            }
            (address..).zip(bytes).for_each(|(at, byte)| *byte = (at / 16) as u8);
            Ok(())
        }

        fn write(&self, address: u64, _: &[u8]) -> Result<(), BadAddress> {
            Err(BadAddress { address, length: 0 })
        }

        fn store_u32(&self, address: u64, _: u32) -> Result<(), BadAddress> {
            Err(BadAddress { address, length: 4 })
        }

        fn load_u64(&self, address: u64) -> Result<u64, BadAddress> {
            Err(BadAddress { address, length: 8 })
        }

        fn compare_exchange_u64(&self, address: u64, _: u64, _: u64) -> Result<bool, BadAddress> {
            Err(BadAddress { address, length: 8 })
        }
    }

    #[test]
    fn entries_are_read_together_and_each_is_right() {
        let (memory, mut ahead) = (Numbers::default(), Ahead::default());
        for index in 0..128u64 {
            let entry = ahead.entry(&memory, 0, index * 16, 128 * 16, 16);
            assert_eq!(entry, Some(&[index as u8; 16][..]));
        }
        assert_eq!(memory.0.load(Ordering::Relaxed), 2);
        // The queue has wrapped: the start is read again.
        assert_eq!(ahead.entry(&memory, 0, 0, 16, 16), Some(&[0; 16][..]));
        assert_eq!(ahead.entry(&memory, 0, 16, 16, 16), Some(&[1; 16][..]), "not read before");
    }

    #[test]
    fn an_entry_before_the_end_of_memory_is_there() {
        let (memory, mut ahead) = (Numbers::default(), Ahead::default());
        for (offset, there) in [(0xfe0, true), (0xff0, true), (0x1000, false), (0xff0, true)] {
            let entry = ahead.entry(&memory, 0, offset, 0x2000, 16);
            assert_eq!(entry.is_some(), there, "{offset:#x}");
        }
        assert_eq!(ahead.entry(&memory, u64::MAX, 16, 32, 16), None);
    }

    #[test]
    fn each_is_counted_once() {
        let (one, two) = (Counter::default(), Counter::default());
        let mut tally = Tally::default();
        for counter in [&one, &one, &two, &one] {
            tally.count(counter);
        }
        drop(tally);
        assert_eq!((one.get(), two.get()), (3, 1));
    }
}

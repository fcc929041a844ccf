// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A queue that the SMMU writes: of events, or of page requests (§3.5, §7.2, §8).

use crate::spec::smmuv3::queue::{OutputCons, OutputProd, QueueBase, QueueLayout};
use crate::viommu::TableMemory;

/// The registers of the event queue, or of the PRI queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct OutputQueue {
    /// CR0.EVENTQEN or CR0.PRIQEN, as in effect.
    pub enabled: bool,
    /// EVENTQ_BASE, PRIQ_BASE.
    pub base: QueueBase,
    /// EVENTQ_PROD, PRIQ_PROD.
    pub prod: OutputProd,
    /// EVENTQ_CONS, PRIQ_CONS.
    pub cons: OutputCons,
}

/// What happened to an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    /// It is in the queue; `first` if that was empty before.
    Yes { first: bool },
    /// The queue is disabled.
    Disabled,
    /// The queue is full.
    Full,
    /// The queue is outside guest memory.
    NoMemory,
}

impl OutputQueue {
    /// Writes an entry of `words` to the queue, which has at most `2^max_log2size` of them.
    pub(super) fn push<const WORDS: usize>(
        &mut self,
        memory: &dyn TableMemory,
        max_log2size: u8,
        words: [u64; WORDS],
    ) -> Pushed {
        if !self.enabled {
            return Pushed::Disabled;
        }
        let queue = self.layout::<WORDS>(max_log2size);
        let (prod, cons) = (self.prod.wr(), self.cons.rd());
        if queue.is_full(prod, cons) {
            return Pushed::Full;
        }
        let bytes = words.map(u64::to_le_bytes);
        if memory.write(queue.address(prod), bytes.as_flattened()).is_err() {
            return Pushed::NoMemory;
        }
        self.prod.set_wr(queue.next(prod));
        Pushed::Yes { first: queue.is_empty(prod, cons) }
    }

    /// An entry was lost. Returns `false` if that is already being reported.
    pub(super) fn overflow(&mut self) -> bool {
        if self.has_overflow() {
            return false;
        }
        self.prod.set_ovflg(!self.cons.ovackflg());
        true
    }

    /// Whether there is anything that software has not seen, in a queue of entries of `WORDS`.
    pub(super) fn has_news<const WORDS: usize>(&self, max_log2size: u8) -> bool {
        let queue = self.layout::<WORDS>(max_log2size);
        self.enabled && (self.has_overflow() || !queue.is_empty(self.prod.wr(), self.cons.rd()))
    }

    /// Whether entries were lost that software has not acknowledged.
    pub(super) fn has_overflow(&self) -> bool {
        self.prod.ovflg() != self.cons.ovackflg()
    }

    /// Software writes `*_PROD`, which the SMMU owns while the queue is enabled.
    pub(super) fn write_prod(&mut self, value: u32) {
        if !self.enabled {
            let prod = OutputProd::from_bits(value);
            self.prod = OutputProd::new().with_wr(prod.wr()).with_ovflg(prod.ovflg());
        }
    }

    /// Software writes `*_CONS`.
    pub(super) fn write_cons(&mut self, value: u32) {
        let cons = OutputCons::from_bits(value);
        self.cons = OutputCons::new().with_rd(cons.rd()).with_ovackflg(cons.ovackflg());
    }

    fn layout<const WORDS: usize>(&self, max_log2size: u8) -> QueueLayout {
        self.base.layout(WORDS as u64 * 8, max_log2size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    /// Four entries at 0x100.
    fn queue() -> OutputQueue {
        OutputQueue { enabled: true, base: QueueBase::from_bits(0x102), ..Default::default() }
    }

    fn entry(number: u64) -> [u64; 4] {
        [number, number + 1, number + 2, number + 3]
    }

    #[test]
    fn entries_stand_in_memory_and_the_index_wraps() {
        let memory = memory();
        let written = MmapRegion::bitmap(memory.iter().next().unwrap());
        let mut queue = queue();
        for number in 0..10 {
            let pushed = queue.push(&memory, 19, entry(number));
            assert_eq!(pushed, Pushed::Yes { first: true });
            assert_eq!(written.get_and_reset(), [1], "the page is marked");
            let place = GuestAddress(0x100 + 32 * (number % 4));
            assert_eq!(memory.read_obj::<[u64; 4]>(place).unwrap(), entry(number));
            assert!(queue.has_news::<4>(19));
            queue.cons.set_rd(queue.prod.wr());
            assert!(!queue.has_news::<4>(19));
        }
        assert_eq!(queue.prod.wr(), 10 % 8);
        assert_eq!(queue.push(&memory, 19, entry(0)), Pushed::Yes { first: true });
        assert_eq!(queue.push(&memory, 19, entry(1)), Pushed::Yes { first: false });
    }

    #[test]
    fn entries_of_page_requests_are_smaller() {
        let (memory, mut queue) = (memory(), queue());
        for number in 0..3 {
            queue.push(&memory, 19, [number, 7]);
        }
        let place = GuestAddress(0x100 + 32);
        assert_eq!(memory.read_obj::<[u64; 2]>(place).unwrap(), [2, 7]);
    }

    #[test]
    fn an_overflow_is_told_once_until_it_is_acknowledged() {
        let memory = memory();
        let mut queue = queue();
        (0..4).for_each(|number| {
            queue.push(&memory, 19, entry(number));
        });
        assert_eq!(queue.push(&memory, 19, entry(4)), Pushed::Full);
        assert!(queue.overflow() && !queue.overflow());
        assert_eq!(queue.prod.into_bits(), 1 << 31 | 4);
        // There is space again before the acknowledgement.
        queue.write_cons(1);
        assert_eq!(queue.push(&memory, 19, entry(6)), Pushed::Yes { first: false });
        queue.write_cons(1 << 31 | 1);
        assert!(!queue.has_overflow());
        assert_eq!(queue.push(&memory, 19, entry(7)), Pushed::Full);
        assert!(queue.overflow() && !queue.prod.ovflg());
    }

    #[test]
    fn no_more_entries_than_the_smmu_has() {
        let mut queue = queue();
        queue.base.set_log2size(31);
        let memory = memory();
        assert_eq!(queue.push(&memory, 1, entry(0)), Pushed::Yes { first: true });
        assert_eq!(queue.push(&memory, 1, entry(0)), Pushed::Yes { first: false });
        assert_eq!(queue.push(&memory, 1, entry(0)), Pushed::Full);
    }

    #[test]
    fn a_queue_that_is_disabled_or_no_memory_takes_nothing() {
        let mut queue = OutputQueue { enabled: false, ..queue() };
        assert_eq!(queue.push(&memory(), 19, entry(0)), Pushed::Disabled);
        queue.enabled = true;
        queue.base = QueueBase::from_bits(0x10_0002);
        assert_eq!(queue.push(&memory(), 19, entry(0)), Pushed::NoMemory);
        assert_eq!(queue.prod, OutputProd::new());
        queue.write_prod(3);
        assert_eq!(queue.prod, OutputProd::new(), "the SMMU's");
    }
}

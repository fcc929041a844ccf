// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The event queue in guest memory (§3.5, §7.2).

use crate::spec::smmuv3::event::{EventRecord, EVENT_SIZE};
use crate::spec::smmuv3::queue::{OutputCons, OutputProd, QueueBase, QueueLayout};
use crate::viommu::TableMemory;

/// Registers of the event queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EventQueue {
    /// CR0.EVENTQEN, as in effect.
    pub enabled: bool,
    /// EVENTQ_BASE.
    pub base: QueueBase,
    /// EVENTQ_PROD.
    pub prod: OutputProd,
    /// EVENTQ_CONS.
    pub cons: OutputCons,
}

/// What happened to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::smmuv3) enum Recorded {
    /// It is in the queue; `first` if that was empty before.
    Yes { first: bool },
    /// The queue is disabled.
    Disabled,
    /// The queue is full. `news` unless an overflow is already being reported.
    Full { news: bool },
    /// The queue is outside guest memory, or was and the guest has not acknowledged that yet.
    NoMemory,
}

impl EventQueue {
    /// Writes `record` to the queue, which has at most `2^max_log2size` entries.
    pub(in crate::viommu::smmuv3) fn push(
        &mut self,
        memory: &dyn TableMemory,
        max_log2size: u8,
        record: EventRecord,
    ) -> Recorded {
        if !self.enabled {
            return Recorded::Disabled;
        }
        let queue = self.layout(max_log2size);
        let (prod, cons) = (self.prod.wr(), self.cons.rd());
        if queue.is_full(prod, cons) {
            return Recorded::Full { news: self.overflow() };
        }
        let mut bytes = [0; EVENT_SIZE as usize];
        for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(record.to_words()) {
            *place = word.to_le_bytes();
        }
        if memory.write(queue.address(prod), &bytes).is_err() {
            return Recorded::NoMemory;
        }
        self.prod.set_wr(queue.next(prod));
        Recorded::Yes { first: queue.is_empty(prod, cons) }
    }

    /// An event was lost. Returns `false` if that is already being reported.
    pub(in crate::viommu::smmuv3) fn overflow(&mut self) -> bool {
        if self.has_overflow() {
            return false;
        }
        self.prod.set_ovflg(!self.cons.ovackflg());
        true
    }

    /// Whether there is anything that software has not seen.
    pub(in crate::viommu::smmuv3) fn has_news(&self, max_log2size: u8) -> bool {
        let queue = self.layout(max_log2size);
        self.enabled && (self.has_overflow() || !queue.is_empty(self.prod.wr(), self.cons.rd()))
    }

    fn has_overflow(&self) -> bool {
        self.prod.ovflg() != self.cons.ovackflg()
    }

    fn layout(&self, max_log2size: u8) -> QueueLayout {
        self.base.layout(EVENT_SIZE, max_log2size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::smmuv3::event::EventId;
    use crate::spec::smmuv3::StreamId;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
    }

    /// Four entries at 0x100.
    fn queue() -> EventQueue {
        EventQueue { enabled: true, base: QueueBase::from_bits(0x102), ..Default::default() }
    }

    fn record(stream: u32) -> EventRecord {
        EventRecord::new(EventId::BadSte, StreamId(stream), None)
    }

    #[test]
    fn records_stand_in_memory_and_the_index_wraps() {
        let memory = memory();
        let mut queue = queue();
        for number in 0..10 {
            let recorded = queue.push(&memory, 19, record(number));
            assert_eq!(recorded, Recorded::Yes { first: true });
            let place = GuestAddress(0x100 + 32 * u64::from(number % 4));
            assert_eq!(memory.read_obj::<[u64; 4]>(place).unwrap(), record(number).to_words());
            assert!(queue.has_news(19));
            queue.cons.set_rd(queue.prod.wr());
            assert!(!queue.has_news(19));
        }
        assert_eq!(queue.prod.wr(), 10 % 8);
        assert_eq!(queue.push(&memory, 19, record(0)), Recorded::Yes { first: true });
        assert_eq!(queue.push(&memory, 19, record(1)), Recorded::Yes { first: false });
    }

    #[test]
    fn a_full_queue_overflows_once_until_it_is_acknowledged() {
        let memory = memory();
        let mut queue = queue();
        (0..4).for_each(|number| {
            queue.push(&memory, 19, record(number));
        });
        assert_eq!(queue.push(&memory, 19, record(4)), Recorded::Full { news: true });
        assert_eq!(queue.push(&memory, 19, record(5)), Recorded::Full { news: false });
        assert_eq!(queue.prod.into_bits(), 1 << 31 | 4);
        // There is space again before the acknowledgement.
        queue.cons.set_rd(1);
        assert_eq!(queue.push(&memory, 19, record(6)), Recorded::Yes { first: false });
        queue.cons.set_ovackflg(true);
        assert!(!queue.has_overflow());
        assert_eq!(queue.push(&memory, 19, record(7)), Recorded::Full { news: true });
        assert!(!queue.prod.ovflg());
    }

    #[test]
    fn no_more_entries_than_the_smmu_has() {
        let mut queue = queue();
        queue.base.set_log2size(31);
        let memory = memory();
        assert_eq!(queue.push(&memory, 1, record(0)), Recorded::Yes { first: true });
        assert_eq!(queue.push(&memory, 1, record(0)), Recorded::Yes { first: false });
        assert_eq!(queue.push(&memory, 1, record(0)), Recorded::Full { news: true });
    }

    #[test]
    fn a_queue_that_is_disabled_or_no_memory_takes_nothing() {
        let mut queue = EventQueue { enabled: false, ..queue() };
        assert_eq!(queue.push(&memory(), 19, record(0)), Recorded::Disabled);
        queue.enabled = true;
        queue.base = QueueBase::from_bits(0x10_0002);
        assert_eq!(queue.push(&memory(), 19, record(0)), Recorded::NoMemory);
        assert_eq!(queue.prod, OutputProd::new());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the SMMU reports to software on its own: the event queue in guest memory and global errors,
//! and the interrupts of both (§3.5, §3.18, §7.2, §7.5).
//!
//! It has a separate lock, taken after the model's, because events come from any thread.

use crate::spec::smmuv3::event::{EventRecord, EVENT_SIZE};
use crate::spec::smmuv3::queue::{OutputCons, OutputProd, QueueBase, QueueLayout};
use crate::spec::smmuv3::regs::{Gerror, Idr0, Idr1, IrqCfg0, IrqCtrl};
use crate::viommu::registers::pair;
use crate::viommu::TableMemory;

/// The event queue, the global errors and their interrupts, as the guest sees them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct FaultLog {
    /// IRQ_CTRL and IRQ_CTRLACK, which are always equal.
    pub irq_ctrl: IrqCtrl,
    /// GERROR, GERRORN.
    pub errors: GlobalErrors,
    /// GERROR_IRQ_CFG0 to 2.
    pub errors_interrupt: InterruptConfig,
    /// Registers of the event queue.
    pub events: EventQueue,
    /// EVENTQ_IRQ_CFG0 to 2.
    pub events_interrupt: InterruptConfig,
}

/// The identification register fields that matter here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offered {
    /// IDR0.MSI.
    pub msi: bool,
    /// IDR1.EVENTQS.
    pub eventqs: u8,
}

impl Offered {
    pub fn new(idr0: Idr0, idr1: Idr1) -> Self {
        Self { msi: idr0.msi(), eventqs: idr1.eventqs() }
    }
}

impl FaultLog {
    /// Records an event. Returns also the interrupt to send.
    pub(super) fn record(
        &mut self,
        offered: Offered,
        memory: &dyn TableMemory,
        record: EventRecord,
    ) -> (Recorded, Option<Signal>) {
        // After an aborted write nothing is written until software acknowledges it (§7.2.1).
        let recorded = if self.errors.active().eventq_abt_err() {
            Recorded::NoMemory
        } else {
            self.events.push(memory, offered.eventqs, record)
        };
        let signal = match recorded {
            Recorded::Yes { first: true } | Recorded::Full { news: true } => {
                self.events_signal(offered)
            }
            Recorded::Yes { first: false } | Recorded::Full { news: false } => None,
            Recorded::Disabled => None,
            Recorded::NoMemory => self.raise(offered, Gerror::new().with_eventq_abt_err(true)),
        };
        (recorded, signal)
    }

    /// Events were lost on their way here: an overflow.
    pub(super) fn lose(&mut self, offered: Offered) -> Option<Signal> {
        (self.events.enabled && self.events.overflow())
            .then(|| self.events_signal(offered))
            .flatten()
    }

    /// Makes `errors` active. Returns the interrupt, if that is a change.
    pub(super) fn raise(&mut self, offered: Offered, errors: Gerror) -> Option<Signal> {
        self.errors.raise(errors).then(|| self.errors_signal(offered)).flatten()
    }

    /// Software writes IRQ_CTRL. Conditions that arose while an interrupt was disabled are
    /// signalled when it is enabled, so that software does not wait for ever.
    pub(super) fn write_irq_ctrl(
        &mut self,
        offered: Offered,
        value: IrqCtrl,
    ) -> [Option<Signal>; 2] {
        let before = self.irq_ctrl;
        self.irq_ctrl = IrqCtrl::new()
            .with_eventq_irqen(value.eventq_irqen())
            .with_gerror_irqen(value.gerror_irqen());
        let events = !before.eventq_irqen() && self.events.has_news(offered.eventqs);
        let errors = !before.gerror_irqen() && self.errors.active() != Gerror::new();
        [
            events.then(|| self.events_signal(offered)).flatten(),
            errors.then(|| self.errors_signal(offered)).flatten(),
        ]
    }

    fn events_signal(&self, offered: Offered) -> Option<Signal> {
        let signal = self.events_interrupt.signal(SmmuInterrupt::EventQueue, offered.msi);
        self.irq_ctrl.eventq_irqen().then_some(signal)
    }

    fn errors_signal(&self, offered: Offered) -> Option<Signal> {
        let signal = self.errors_interrupt.signal(SmmuInterrupt::GlobalError, offered.msi);
        self.irq_ctrl.gerror_irqen().then_some(signal)
    }
}

/// Registers of the event queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
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
pub(super) enum Recorded {
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
    fn push(
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
    fn overflow(&mut self) -> bool {
        if self.has_overflow() {
            return false;
        }
        self.prod.set_ovflg(!self.cons.ovackflg());
        true
    }

    /// Whether there is anything that software has not seen.
    fn has_news(&self, max_log2size: u8) -> bool {
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

/// GERROR and GERRORN (§7.5): an error is active while its bits in them differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct GlobalErrors {
    /// GERROR: toggled by the SMMU.
    pub gerror: Gerror,
    /// GERRORN: toggled by software.
    pub gerrorn: Gerror,
}

impl GlobalErrors {
    /// The unacknowledged errors.
    pub fn active(self) -> Gerror {
        Gerror::from_bits(self.gerror.into_bits() ^ self.gerrorn.into_bits())
    }

    /// Makes `errors` active. Returns `false` if all of them were.
    fn raise(&mut self, errors: Gerror) -> bool {
        let new = errors.into_bits() & !self.active().into_bits();
        self.gerror = Gerror::from_bits(self.gerror.into_bits() ^ new);
        new != 0
    }

    /// Software writes GERRORN. Only active errors can be acknowledged: other bits are ignored.
    pub(super) fn acknowledge(&mut self, value: u32) {
        let toggled = (value ^ self.gerrorn.into_bits()) & self.active().into_bits();
        self.gerrorn = Gerror::from_bits(self.gerrorn.into_bits() ^ toggled);
    }
}

/// An interrupt of an SMMU, by purpose, named as in device trees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SmmuInterrupt {
    /// `eventq`: the event queue is no longer empty, or has lost events.
    EventQueue,
    /// `gerror`: a global error is active.
    GlobalError,
    /// `cmdq-sync`: a CMD_SYNC that requests an interrupt is complete.
    CommandSync,
}

/// The sink of an SMMU's interrupts. It must not block, and must not call the SMMU.
pub trait SmmuInterrupts: Send + Sync {
    /// Writes the message `data` to `address`, outside guest memory. Returns `false` if nothing
    /// accepts it: the guest then sees a global error.
    fn message(&self, address: u64, data: u32) -> bool;

    /// Raises an edge on a wire. Used only by an SMMU that offers no messages, or whose guest has
    /// not set them up.
    fn wire(&self, interrupt: SmmuInterrupt);
}

/// The registers of one interrupt: `*_IRQ_CFG0` to `*_IRQ_CFG2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct InterruptConfig {
    /// CFG0: the address of the message.
    pub address: IrqCfg0,
    /// CFG1: its data.
    pub data: u32,
    /// CFG2: memory attributes of the message, without effect.
    pub attributes: u32,
}

impl InterruptConfig {
    /// The writable bits of CFG2: SH, MemAttr.
    pub(super) const ATTRIBUTES: u32 = 0x3f;

    /// CFG1 and CFG2 as one 64-bit value.
    pub(super) fn message_words(self) -> u64 {
        pair(self.data, self.attributes)
    }

    /// The signal for `interrupt`; `msi` says whether messages are offered.
    fn signal(self, interrupt: SmmuInterrupt, msi: bool) -> Signal {
        Signal::new(interrupt, self.address.address().filter(|_| msi), self.data)
    }
}

/// An interrupt on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Signal {
    pub interrupt: SmmuInterrupt,
    /// Address and data of a message; `None` for a wire.
    pub message: Option<(u64, u32)>,
}

impl Signal {
    /// `interrupt` as a message with `data`, if there is an address.
    pub fn new(interrupt: SmmuInterrupt, address: Option<u64>, data: u32) -> Self {
        Self { interrupt, message: address.map(|address| (address, data)) }
    }

    /// The global error of a message that could not be written.
    pub const fn abort_error(self) -> Gerror {
        let none = Gerror::new();
        match self.interrupt {
            SmmuInterrupt::EventQueue => none.with_msi_eventq_abt_err(true),
            SmmuInterrupt::GlobalError => none.with_msi_gerror_abt_err(true),
            SmmuInterrupt::CommandSync => none.with_msi_cmdq_abt_err(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::smmuv3::event::EventId;
    use crate::spec::smmuv3::StreamId;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap()
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
        let written = MmapRegion::bitmap(memory.iter().next().unwrap());
        let mut queue = queue();
        for number in 0..10 {
            let recorded = queue.push(&memory, 19, record(number));
            assert_eq!(recorded, Recorded::Yes { first: true });
            assert_eq!(written.get_and_reset(), [1], "the page is marked");
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

    #[test]
    fn errors_toggle_and_are_acknowledged() {
        let command = Gerror::new().with_cmdq_err(true);
        let abort = Gerror::new().with_eventq_abt_err(true);
        let mut errors = GlobalErrors::default();
        assert!(errors.raise(command));
        assert!(!errors.raise(command));
        assert_eq!(errors.active(), command);
        assert!(errors.raise(abort));
        errors.acknowledge(1);
        assert_eq!(errors.active(), abort);
        // Again: the bit toggles back.
        assert!(errors.raise(command));
        assert_eq!(errors.gerror, abort);
        // Inactive bits do not become active.
        errors.acknowledge(u32::MAX);
        assert_eq!((errors.gerrorn.into_bits(), errors.active().into_bits()), (5, 1));
        errors.acknowledge(errors.gerror.into_bits());
        assert_eq!(errors.active(), Gerror::new());
    }

    #[test]
    fn a_message_needs_an_address_and_the_feature() {
        let config =
            InterruptConfig { address: IrqCfg0::from_bits(0x808_0040), data: 3, attributes: 0 };
        let of =
            |config: InterruptConfig, msi| config.signal(SmmuInterrupt::EventQueue, msi).message;
        assert_eq!(of(config, true), Some((0x808_0040, 3)));
        assert_eq!(of(config, false), None);
        assert_eq!(of(InterruptConfig::default(), true), None);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the SMMU reports to software on its own: the queues of events and of page requests in guest
//! memory and global errors, and the interrupts of all (§3.5, §3.18, §7.2, §7.5, §8).
//!
//! It has a separate lock, taken after the model's, because events come from any thread.

use super::output_queue::{OutputQueue, Pushed};
use crate::spec::smmuv3::event::{EventRecord, EVENT_WORDS};
use crate::spec::smmuv3::page_request::PageRequest;
use crate::spec::smmuv3::regs::{Gerror, Idr0, Idr1, IrqCfg0, IrqCtrl, PRIQ_LAST_ONLY};
use crate::viommu::registers::pair;
use crate::viommu::TableMemory;

/// The queues that the SMMU writes, the global errors and their interrupts, as the guest sees them.
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
    pub events: OutputQueue,
    /// EVENTQ_IRQ_CFG0 to 2.
    pub events_interrupt: InterruptConfig,
    /// Registers of the PRI queue.
    pub pages: OutputQueue,
    /// PRIQ_IRQ_CFG0 to 2, with LO.
    pub pages_interrupt: InterruptConfig,
}

/// The identification register fields that matter here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offered {
    /// IDR0.MSI.
    pub msi: bool,
    /// IDR1.EVENTQS.
    pub eventqs: u8,
    /// IDR0.PRI.
    pub pri: bool,
    /// IDR1.PRIQS.
    pub priqs: u8,
}

/// Words of an entry of the PRI queue.
const PAGE_REQUEST_WORDS: usize = 2;

impl Offered {
    pub fn new(idr0: Idr0, idr1: Idr1) -> Self {
        let (msi, pri) = (idr0.msi(), idr0.pri());
        Self { msi, eventqs: idr1.eventqs(), pri, priqs: idr1.priqs() }
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
        let pushed = match self.errors.active().eventq_abt_err() {
            true => Pushed::NoMemory,
            false => self.events.push(memory, offered.eventqs, record.to_words()),
        };
        let stalled = record.qw1.stall();
        let signal = match pushed {
            Pushed::Yes { first } => first.then(|| self.events_signal(offered)).flatten(),
            // What is not lost is no overflow (§7.4).
            Pushed::Full if !stalled && self.events.overflow() => self.events_signal(offered),
            Pushed::Full | Pushed::Disabled => None,
            Pushed::NoMemory => self.raise(offered, Gerror::new().with_eventq_abt_err(true)),
        };
        let recorded = match pushed {
            Pushed::Yes { .. } => Recorded::Yes,
            _ if stalled => Recorded::Held,
            Pushed::Disabled => Recorded::Disabled,
            Pushed::Full | Pushed::NoMemory => Recorded::Lost,
        };
        (recorded, signal)
    }

    /// Adds a page request to the PRI queue (§8.1, §8.2). Returns also the interrupt to send.
    pub(super) fn ask(
        &mut self,
        offered: Offered,
        memory: &dyn TableMemory,
        request: &PageRequest,
    ) -> (Asked, Option<Signal>) {
        if self.errors.active().priq_abt_err() {
            return (Asked::Refused, None);
        }
        let last_only = self.pages_interrupt.attributes & PRIQ_LAST_ONLY != 0;
        let last = last_only && request.last;
        // Unlike events, none is written before the overflow is acknowledged.
        let pushed = match self.pages.enabled && self.pages.has_overflow() {
            true => Pushed::Full,
            false => self.pages.push(memory, offered.priqs, request.encode()),
        };
        let (asked, interrupt) = match pushed {
            Pushed::Yes { first } => (Asked::Queued, if last_only { last } else { first }),
            Pushed::Full => {
                self.pages.overflow();
                (Asked::Overflow, last)
            }
            Pushed::Disabled => (Asked::Refused, false),
            Pushed::NoMemory => {
                let error = Gerror::new().with_priq_abt_err(true);
                return (Asked::Refused, self.raise(offered, error));
            }
        };
        (asked, interrupt.then(|| self.pages_signal(offered)).flatten())
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
    ) -> [Option<Signal>; 3] {
        let before = self.irq_ctrl;
        self.irq_ctrl = IrqCtrl::new()
            .with_eventq_irqen(value.eventq_irqen())
            .with_priq_irqen(value.priq_irqen() && offered.pri)
            .with_gerror_irqen(value.gerror_irqen());
        let events = !before.eventq_irqen() && self.events.has_news::<EVENT_WORDS>(offered.eventqs);
        let pages =
            !before.priq_irqen() && self.pages.has_news::<PAGE_REQUEST_WORDS>(offered.priqs);
        let errors = !before.gerror_irqen() && self.errors.active() != Gerror::new();
        [
            events.then(|| self.events_signal(offered)).flatten(),
            pages.then(|| self.pages_signal(offered)).flatten(),
            errors.then(|| self.errors_signal(offered)).flatten(),
        ]
    }

    fn events_signal(&self, offered: Offered) -> Option<Signal> {
        let signal = self.events_interrupt.signal(SmmuInterrupt::EventQueue, offered.msi);
        self.irq_ctrl.eventq_irqen().then_some(signal)
    }

    fn pages_signal(&self, offered: Offered) -> Option<Signal> {
        let signal = self.pages_interrupt.signal(SmmuInterrupt::PageQueue, offered.msi);
        self.irq_ctrl.priq_irqen().then_some(signal)
    }

    fn errors_signal(&self, offered: Offered) -> Option<Signal> {
        let signal = self.errors_interrupt.signal(SmmuInterrupt::GlobalError, offered.msi);
        self.irq_ctrl.gerror_irqen().then_some(signal)
    }
}

/// What happened to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    /// It is in the queue.
    Yes,
    /// The queue is disabled.
    Disabled,
    /// It is lost: the queue is full, or outside guest memory, or was and the guest has not
    /// acknowledged that yet.
    Lost,
    /// It is that of a stalled transaction, which the queue cannot take now, and is not lost.
    Held,
}

/// What happened to a page request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// It is in the queue.
    Queued,
    /// The queue is full, or was.
    Overflow,
    /// The queue is disabled or outside guest memory, or was that and the guest has not
    /// acknowledged it.
    Refused,
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
    /// `priq`: the PRI queue is no longer empty, or has the last request of a group.
    PageQueue,
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
    /// CFG2: memory attributes of the message, without effect, and LO.
    pub attributes: u32,
}

impl InterruptConfig {
    /// The writable bits of CFG2: SH, MemAttr. That of the PRI queue has LO, too.
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
            SmmuInterrupt::PageQueue => none.with_msi_priq_abt_err(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the SMMU reports to software on its own: the event queue and global errors, and the
//! interrupts of both (§7.2, §7.5).
//!
//! It has a separate lock, taken after the model's, because events come from any thread.

use super::eventq::{EventQueue, Recorded};
use super::gerror::GlobalErrors;
use super::interrupts::{InterruptConfig, Signal, SmmuInterrupt};
use crate::spec::smmuv3::event::EventRecord;
use crate::spec::smmuv3::regs::{Gerror, Idr0, Idr1, IrqCtrl};
use crate::viommu::TableMemory;

/// The event queue, the global errors and their interrupts, as the guest sees them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
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
pub(in crate::viommu::smmuv3) struct Offered {
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
    pub(in crate::viommu::smmuv3) fn record(
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
    pub(in crate::viommu::smmuv3) fn lose(&mut self, offered: Offered) -> Option<Signal> {
        (self.events.enabled && self.events.overflow())
            .then(|| self.events_signal(offered))
            .flatten()
    }

    /// Makes `errors` active. Returns the interrupt, if that is a change.
    pub(in crate::viommu::smmuv3) fn raise(
        &mut self,
        offered: Offered,
        errors: Gerror,
    ) -> Option<Signal> {
        self.errors.raise(errors).then(|| self.errors_signal(offered)).flatten()
    }

    /// Software writes IRQ_CTRL. Conditions that arose while an interrupt was disabled are
    /// signalled when it is enabled, so that software does not wait for ever.
    pub(in crate::viommu::smmuv3) fn write_irq_ctrl(
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

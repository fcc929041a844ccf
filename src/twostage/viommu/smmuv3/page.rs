// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest ([`RegisterPage`]): the first 4 KiB of page 0, without
//! the indices of the event and PRI queues, which are in page 1.
//!
//! What a guest writes while it has the page is applied in an order in which nothing is enabled
//! half-way: addresses first, then the index of the command queue, CR0 last. No error is active
//! while the page is lent, so that there is none to acknowledge in GERRORN: that is forgotten.

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::fault_log::FaultLog;
use super::registers::fault_slot;
use super::state::Registers;
use super::{Locked, Smmu};
use crate::counters::Counter;
use crate::spec::smmuv3::queue::CmdqProd;
use crate::spec::smmuv3::regs::{self, Gerror};
use crate::viommu::paged::Paged;
use crate::viommu::register_page::{Places, Show};
use crate::viommu::registers::SlotAccess;
use crate::viommu::RegisterPage;

/// Registers that events of the SMMU and writes of the guest change.
const REGISTERS: [u64; 7] = [
    regs::CMDQ_PROD,
    regs::CMDQ_BASE,
    regs::STRTAB_BASE,
    regs::STRTAB_BASE_CFG,
    regs::STATUSR,
    regs::CR1,
    regs::CR0,
];
const FAULTS: [u64; 10] = [
    regs::EVENTQ_BASE,
    regs::EVENTQ_IRQ_CFG0,
    regs::EVENTQ_IRQ_CFG1,
    regs::GERROR_IRQ_CFG0,
    regs::GERROR_IRQ_CFG1,
    regs::PRIQ_BASE,
    regs::PRIQ_IRQ_CFG0,
    regs::PRIQ_IRQ_CFG1,
    regs::IRQ_CTRL,
    regs::GERROR,
];

/// Registers to be applied in this order, if the guest wrote to them in memory.
const ORDER: [u64; 16] = [
    regs::CR1,
    regs::STRTAB_BASE_CFG,
    regs::STRTAB_BASE,
    regs::CMDQ_BASE,
    regs::EVENTQ_BASE,
    regs::EVENTQ_IRQ_CFG0,
    regs::EVENTQ_IRQ_CFG1,
    regs::GERROR_IRQ_CFG0,
    regs::GERROR_IRQ_CFG1,
    regs::PRIQ_BASE,
    regs::PRIQ_IRQ_CFG0,
    regs::PRIQ_IRQ_CFG1,
    regs::CMDQ_PROD,
    regs::STATUSR,
    regs::IRQ_CTRL,
    regs::CR0,
];

/// CMDQ_CONS is the upper half of its slot; nothing of the first page that changes is behind
/// PRIQ_IRQ_CFG1.
const PLACES: Places = Places {
    head: regs::CMDQ_PROD + 4,
    tail: regs::CMDQ_PROD,
    tail_size: 4,
    command: None,
    acknowledged: None,
    end: regs::PRIQ_IRQ_CFG1 + 8,
};

impl Show<Registers> for Smmu {
    fn show(&self, registers: &Registers) {
        let Some(page) = self.page.get() else { return };
        for slot in REGISTERS {
            page.show(&PLACES, slot, self.register_slot(registers, slot).unwrap_or(0));
        }
    }
}

impl Show<FaultLog> for Smmu {
    fn show(&self, log: &FaultLog) {
        let Some(page) = self.page.get() else { return };
        for slot in FAULTS {
            page.show(&PLACES, slot, fault_slot(log, slot));
        }
    }
}

impl Paged for Smmu {
    type Registers = Registers;

    fn page(&self) -> &OnceLock<Arc<RegisterPage>> {
        &self.page
    }

    fn places(&self) -> Places {
        PLACES
    }

    fn order(&self) -> impl Iterator<Item = u64> {
        ORDER.into_iter()
    }

    fn registers(&self) -> Locked<'_, Registers> {
        self.lock()
    }

    fn idle_registers(&self) -> Locked<'_, Registers> {
        self.lock()
    }

    fn quiet(&self, registers: &Registers) -> Option<impl Sized> {
        let faults = self.fault_log();
        let quiet = is_quiet(registers) && faults.errors.active() == Gerror::new();
        (quiet && !self.is_halted()).then_some(faults)
    }

    fn set_tail(&self, registers: &mut Registers, tail: u32) {
        registers.cmdq_prod = CmdqProd::new().with_wr(CmdqProd::from_bits(tail).wr());
    }

    fn apply(&self, registers: &mut Registers, access: SlotAccess, value: u64) {
        self.write_slot(registers, access, value);
    }

    /// None: software changes an interrupt only while that is disabled, and waits until IRQ_CTRLACK
    /// says so (§6.3.13), which is after the write has been applied.
    fn apply_others(&self) {}

    fn keep(&self, registers: &Registers) {
        let Some(page) = self.page.get() else { return };
        let faults = self.fault_log();
        let value = |slot| {
            let register = self.register_slot(registers, slot);
            register.unwrap_or_else(|| fault_slot(&faults, slot))
        };
        page.keep((0..PLACES.end).step_by(8).map(|slot| (slot, value(slot))));
    }

    fn drain(&self) {
        // What the guest wrote may let the event queue take what it could not.
        self.record_held();
        self.drain_queue();
    }

    fn writes(&self) -> &Counter {
        &self.counters.register_writes
    }

    fn observe_write(&self, offset: u64, size: usize, value: u64) {
        self.observe_access(offset, size, value, true);
    }

    fn mistake(&self, what: fmt::Arguments<'_>) {
        self.guest_error(what);
    }
}

/// Nothing is pending, and the guest uses the command queue.
fn is_quiet(registers: &Registers) -> bool {
    registers.cr0ack == registers.cr0
        && registers.cr0.smmuen()
        && registers.cr0.cmdqen()
        && !registers.gbpa.update()
        && !registers.unanswered
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest ([`RegisterPage`]): the first 4 KiB of page 0, without
//! the indices of the event queue, which are in page 1.
//!
//! What a guest writes while it has the page is applied in an order in which nothing is enabled
//! half-way: addresses first, then the index of the command queue, CR0 last. No error is active
//! while the page is lent, so that there is none to acknowledge in GERRORN: that is forgotten.

use std::sync::Arc;

use super::fault_log::FaultLog;
use super::registers::fault_slot;
use super::state::Registers;
use super::Smmu;
use crate::spec::smmuv3::queue::CmdqProd;
use crate::spec::smmuv3::regs::{self, Gerror};
use crate::viommu::register_page::{
    Look, PageLender, PagedRegisters, Places, Recall, Show, Written,
};
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
const FAULTS: [u64; 7] = [
    regs::EVENTQ_BASE,
    regs::EVENTQ_IRQ_CFG0,
    regs::EVENTQ_IRQ_CFG1,
    regs::GERROR_IRQ_CFG0,
    regs::GERROR_IRQ_CFG1,
    regs::IRQ_CTRL,
    regs::GERROR,
];

/// Registers to be applied in this order, if the guest wrote to them in memory.
const ORDER: [u64; 13] = [
    regs::CR1,
    regs::STRTAB_BASE_CFG,
    regs::STRTAB_BASE,
    regs::CMDQ_BASE,
    regs::EVENTQ_BASE,
    regs::EVENTQ_IRQ_CFG0,
    regs::EVENTQ_IRQ_CFG1,
    regs::GERROR_IRQ_CFG0,
    regs::GERROR_IRQ_CFG1,
    regs::CMDQ_PROD,
    regs::STATUSR,
    regs::IRQ_CTRL,
    regs::CR0,
];

/// CMDQ_CONS is the upper half of its slot; nothing of the first page that changes is behind
/// EVENTQ_IRQ_CFG1.
const PLACES: Places = Places {
    head: regs::CMDQ_PROD + 4,
    tail: regs::CMDQ_PROD,
    command: None,
    end: regs::EVENTQ_IRQ_CFG1 + 8,
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

impl PagedRegisters for Smmu {
    fn keep_page(&self, page: Arc<RegisterPage>) {
        if self.page.set(page).is_ok() {
            self.keep(&self.lock());
        }
    }

    fn tail_register(&self) -> (u64, u64) {
        (regs::CMDQ_PROD, 4)
    }

    fn write_tail(&self, offset: u64, data: &[u8]) {
        // The caller works through the queue.
        self.apply_written();
        self.counters.register_writes.count();
        let access = SlotAccess::new(offset, data.len(), PLACES.end);
        let Some(access) = access.filter(|access| access.slot == PLACES.tail) else {
            self.guest_error(format_args!("a {} byte write at {offset:#x}", data.len()));
            return;
        };
        let value = access.place(data);
        let mut registers = self.lock();
        self.observe_access(offset, data.len(), access.extract(value), true);
        self.write_slot(&mut registers, access, value);
    }

    fn work_through_queue(&self) {
        self.drain_queue();
    }

    fn lend_page(&self, lender: Arc<dyn PageLender>) -> bool {
        self.settle();
        let Some(page) = self.page.get() else { return false };
        let registers = self.lock();
        let faults = self.fault_log();
        let quiet = is_quiet(&registers) && faults.errors.active() == Gerror::new();
        let unlock = || drop(faults);
        !self.is_halted() && quiet && page.lend(&PLACES, lender, unlock)
    }

    fn look_at_page(&self) -> Look {
        let Some(page) = self.page.get() else { return Look::NotLent };
        if page.is_lent() && page.has_tail(&PLACES) {
            let mut registers = self.lock();
            // What the guest wrote before it is done before it: all of that is in the memory.
            if page.has_other_register(&PLACES) {
                page.recall(Recall::Written);
            } else if let Some(tail) = page.take_tail(&PLACES) {
                self.counters.register_writes.count();
                self.observe_access(PLACES.tail, 4, tail.into(), true);
                registers.cmdq_prod = CmdqProd::new().with_wr(CmdqProd::from_bits(tail).wr());
            }
            drop(registers);
            if page.is_lent() {
                self.drain_queue();
                return Look::Tail;
            }
        }
        if page.is_lent() && page.has_others(&PLACES) {
            let registers = self.lock();
            if page.has_any_other(&PLACES) {
                page.recall(Recall::Written);
            }
            drop(registers);
        }
        if page.is_lent() {
            return Look::Nothing;
        }
        self.settle();
        Look::NotLent
    }

    fn take_page_back(&self) {
        if let Some(page) = self.page.get() {
            page.recall(Recall::Asked);
            self.settle();
        }
    }
}

impl Smmu {
    /// Does what the guest wrote to the page before that was recalled, if anything. Every access
    /// begins with this.
    pub(super) fn settle(&self) {
        if self.apply_written() {
            self.drain_queue();
        }
    }

    /// The same, but the queue is left to [`Smmu::drain_queue`]. Returns whether there was
    /// anything.
    fn apply_written(&self) -> bool {
        let Some(page) = self.page.get().filter(|page| page.is_recalled()) else { return false };
        let mut registers = self.lock();
        // Another thread may have done it.
        if !page.is_recalled() {
            return false;
        }
        for slot in ORDER {
            let Some(written) = page.written(&PLACES, slot) else { continue };
            let Written { offset, size, access, value } = written;
            self.counters.register_writes.count();
            self.observe_access(offset, size, access.extract(value), true);
            self.write_slot(&mut registers, access, value);
        }
        self.keep(&registers);
        true
    }

    /// Fills the page, which the SMMU keeps from now on.
    fn keep(&self, registers: &Registers) {
        let Some(page) = self.page.get() else { return };
        let faults = self.fault_log();
        let value = |slot| {
            let register = self.register_slot(registers, slot);
            register.unwrap_or_else(|| fault_slot(&faults, slot))
        };
        page.keep((0..PLACES.end).step_by(8).map(|slot| (slot, value(slot))));
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

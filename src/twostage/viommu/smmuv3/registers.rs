// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register pages: reads, and writes with their effects (§6.2, §6.3).
//!
//! Reserved registers, and accesses other than aligned 32- or 64-bit ones, read as zero; writes to
//! both are ignored. So are writes to registers that are fixed while the part they concern is
//! enabled.

use super::fault_log::{FaultLog, InterruptConfig};
use super::output_queue::OutputQueue;
use super::state::Registers;
use super::Smmu;
use crate::spec::smmuv3::queue::{CmdqCons, CmdqProd, QueueBase};
use crate::spec::smmuv3::regs::{
    self, Cr0, Cr1, Cr2, Gbpa, IrqCfg0, IrqCtrl, StrtabBase, StrtabBaseCfg, PRIQ_LAST_ONLY,
};
use crate::viommu::paged::Paged;
use crate::viommu::registers::{pair, SlotAccess};
use crate::viommu::RegisterAccess;

impl Smmu {
    /// The guest reads `data.len()` bytes at `offset` of the register pages.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.counters.register_reads.count();
        data.fill(0);
        let size = data.len();
        let Some(access) = SlotAccess::new(offset, size, regs::SIZE) else { return };
        self.settle();
        let registers = self.lock();
        let value = access.extract(self.read_slot(&registers, access.slot));
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
        self.observe_access(offset, size, value, false);
    }

    /// The guest writes `data` at `offset` of the register pages. Its effect is complete when this
    /// returns, or the registers do not say that it is.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.counters.register_writes.count();
        let Some(access) = SlotAccess::new(offset, data.len(), regs::SIZE) else {
            self.guest_error(format_args!("a {} byte write at {offset:#x}", data.len()));
            return;
        };
        self.settle();
        let value = access.place(data);
        let mut registers = self.lock();
        self.observe_access(offset, data.len(), access.extract(value), true);
        self.write_slot(&mut registers, access, value);
        drop(registers);
        // What lets the event queue take what it could not: it has space, or is enabled, or an
        // error was acknowledged.
        if matches!(access.slot, regs::CR0 | regs::GERROR | regs::EVENTQ_PROD) {
            self.record_held();
        }
        // What lets the queue continue: it is enabled, has more commands, or an error was
        // acknowledged.
        if matches!(access.slot, regs::CR0 | regs::GERROR | regs::CMDQ_PROD) {
            self.drain_queue();
        }
    }

    pub(super) fn observe_access(&self, offset: u64, size: usize, value: u64, write: bool) {
        if let Some(observer) = &self.observer {
            let name = regs::name(offset);
            // `SlotAccess::new` accepts 4 or 8.
            let size = size as u8;
            observer.register(&RegisterAccess { name, offset, size, value, write });
        }
    }

    fn read_slot(&self, registers: &Registers, slot: u64) -> u64 {
        let register = self.register_slot(registers, slot);
        register.unwrap_or_else(|| fault_slot(&self.fault_log(), slot))
    }

    /// The slot of a register that has nothing to do with events and errors.
    pub(super) fn register_slot(&self, registers: &Registers, slot: u64) -> Option<u64> {
        let caps = &self.caps;
        Some(match slot {
            regs::IDR0 => pair(caps.idr0.into_bits(), caps.idr1.into_bits()),
            regs::IDR2 => pair(0, caps.idr3.into_bits()),
            regs::IDR4 => pair(0, caps.idr5.into_bits()),
            regs::IIDR => pair(caps.iidr.into_bits(), caps.aidr.into_bits()),
            regs::CR0 => pair(registers.cr0.into_bits(), registers.cr0ack.into_bits()),
            regs::CR1 => pair(registers.cr1.into_bits(), registers.cr2.into_bits()),
            regs::STATUSR => pair(0, registers.gbpa.into_bits()),
            regs::STRTAB_BASE => registers.strtab_base.into_bits(),
            regs::STRTAB_BASE_CFG => pair(registers.strtab_base_cfg.into_bits(), 0),
            regs::CMDQ_BASE => registers.cmdq_base.into_bits(),
            regs::CMDQ_PROD => {
                pair(registers.cmdq_prod.into_bits(), registers.cmdq_cons.into_bits())
            }
            _ => return None,
        })
    }

    /// `value` has the bits of the access at their place in the slot.
    pub(super) fn write_slot(&self, registers: &mut Registers, access: SlotAccess, value: u64) {
        let (low, high) = access.halves(value);
        match access.slot {
            regs::CR0 => {
                if let Some(low) = low {
                    self.write_cr0(registers, Cr0::from_bits(low));
                }
            }
            regs::CR1 => {
                if let Some(low) = low {
                    self.write_cr1(registers, Cr1::from_bits(low));
                }
                if let Some(high) = high {
                    self.write_cr2(registers, Cr2::from_bits(high));
                }
            }
            regs::STATUSR => {
                if let Some(high) = high {
                    self.write_gbpa(registers, Gbpa::from_bits(high));
                }
            }
            regs::STRTAB_BASE | regs::STRTAB_BASE_CFG if registers.smmu_in_use() => {
                self.guest_error(format_args!("the stream table is moved while SMMUEN is set"));
            }
            regs::STRTAB_BASE => {
                let old = registers.strtab_base.into_bits();
                let new = access.merge(old, value, StrtabBase::WRITABLE);
                registers.strtab_base = StrtabBase::from_bits(new);
            }
            regs::STRTAB_BASE_CFG => {
                if let Some(low) = low {
                    let new = low & StrtabBaseCfg::WRITABLE;
                    registers.strtab_base_cfg = StrtabBaseCfg::from_bits(new);
                }
            }
            regs::CMDQ_BASE if registers.cr0.cmdqen() => {
                self.guest_error(format_args!("the command queue is moved while CMDQEN is set"));
            }
            regs::CMDQ_BASE => {
                let new = access.merge(registers.cmdq_base.into_bits(), value, QueueBase::WRITABLE);
                registers.cmdq_base = QueueBase::from_bits(new);
            }
            regs::CMDQ_PROD => {
                if let Some(low) = low {
                    let wr = CmdqProd::from_bits(low).wr();
                    registers.cmdq_prod = CmdqProd::new().with_wr(wr);
                }
                // Owned by the SMMU while the queue is enabled.
                if let Some(high) = high.filter(|_| !registers.cr0.cmdqen()) {
                    let cons = CmdqCons::from_bits(high);
                    registers.cmdq_cons = CmdqCons::new().with_rd(cons.rd()).with_err(cons.err());
                }
            }
            _ => self.write_fault_slot(access, value),
        }
    }

    fn write_fault_slot(&self, access: SlotAccess, value: u64) {
        let (low, high) = access.halves(value);
        let mut log = self.fault_log();
        let irq_ctrl = log.irq_ctrl;
        match access.slot {
            regs::IRQ_CTRL => {
                if let Some(low) = low {
                    let signals = log.write_irq_ctrl(self.offered, IrqCtrl::from_bits(low));
                    drop(log);
                    signals.into_iter().for_each(|signal| self.send(signal));
                }
            }
            regs::GERROR => {
                if let Some(high) = high {
                    log.errors.acknowledge(high);
                }
            }
            // The target of a message is fixed while it may be on its way.
            regs::GERROR_IRQ_CFG0 | regs::GERROR_IRQ_CFG1 if !irq_ctrl.gerror_irqen() => {
                self.write_message(&mut log.errors_interrupt, access, value, 0);
            }
            regs::EVENTQ_IRQ_CFG0 | regs::EVENTQ_IRQ_CFG1 if !irq_ctrl.eventq_irqen() => {
                self.write_message(&mut log.events_interrupt, access, value, 0);
            }
            regs::EVENTQ_BASE => write_base(&mut log.events, access, value),
            regs::EVENTQ_PROD => write_indices(&mut log.events, access, value),
            _ if !self.offered.pri => {}
            regs::PRIQ_IRQ_CFG0 | regs::PRIQ_IRQ_CFG1 if !irq_ctrl.priq_irqen() => {
                self.write_message(&mut log.pages_interrupt, access, value, PRIQ_LAST_ONLY);
            }
            regs::PRIQ_BASE => write_base(&mut log.pages, access, value),
            regs::PRIQ_PROD => write_indices(&mut log.pages, access, value),
            _ => {}
        }
    }

    /// Writes the registers of a message: reserved if there are no messages.
    /// `more` are the bits that CFG2 has besides attributes.
    fn write_message(
        &self,
        config: &mut InterruptConfig,
        access: SlotAccess,
        value: u64,
        more: u32,
    ) {
        if !self.offered.msi {
            return;
        }
        if matches!(
            access.slot,
            regs::GERROR_IRQ_CFG0 | regs::EVENTQ_IRQ_CFG0 | regs::PRIQ_IRQ_CFG0
        ) {
            let new = access.merge(config.address.into_bits(), value, IrqCfg0::WRITABLE);
            config.address = IrqCfg0::from_bits(new);
            return;
        }
        let (data, attributes) = access.halves(value);
        config.data = data.unwrap_or(config.data);
        config.attributes = attributes
            .map_or(config.attributes, |bits| bits & (InterruptConfig::ATTRIBUTES | more));
    }
}

/// Software writes `*_BASE`, which is fixed while the queue is enabled.
fn write_base(queue: &mut OutputQueue, access: SlotAccess, value: u64) {
    if !queue.enabled {
        let new = access.merge(queue.base.into_bits(), value, QueueBase::WRITABLE);
        queue.base = QueueBase::from_bits(new);
    }
}

/// Software writes `*_PROD` and `*_CONS`.
fn write_indices(queue: &mut OutputQueue, access: SlotAccess, value: u64) {
    let (low, high) = access.halves(value);
    if let Some(low) = low {
        queue.write_prod(low);
    }
    if let Some(high) = high {
        queue.write_cons(high);
    }
}

/// The slot of a register of events and errors.
pub(super) fn fault_slot(log: &FaultLog, slot: u64) -> u64 {
    match slot {
        regs::IRQ_CTRL => {
            let irq_ctrl = log.irq_ctrl.into_bits();
            pair(irq_ctrl, irq_ctrl)
        }
        regs::GERROR => {
            let errors = log.errors;
            pair(errors.gerror.into_bits(), errors.gerrorn.into_bits())
        }
        regs::GERROR_IRQ_CFG0 => log.errors_interrupt.address.into_bits(),
        regs::GERROR_IRQ_CFG1 => log.errors_interrupt.message_words(),
        regs::EVENTQ_BASE => log.events.base.into_bits(),
        regs::EVENTQ_IRQ_CFG0 => log.events_interrupt.address.into_bits(),
        regs::EVENTQ_IRQ_CFG1 => log.events_interrupt.message_words(),
        regs::EVENTQ_PROD => pair(log.events.prod.into_bits(), log.events.cons.into_bits()),
        // Zero unless page requests are offered.
        regs::PRIQ_BASE => log.pages.base.into_bits(),
        regs::PRIQ_IRQ_CFG0 => log.pages_interrupt.address.into_bits(),
        regs::PRIQ_IRQ_CFG1 => log.pages_interrupt.message_words(),
        regs::PRIQ_PROD => pair(log.pages.prod.into_bits(), log.pages.cons.into_bits()),
        _ => 0,
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page: reads, and writes with their effects (§11.4).

use super::config::MMIO_SIZE;
use super::fault_log::FaultLog;
use super::page_requests::PageQueue;
use super::queue::Slice;
use super::state::Registers;
use super::VtdIommu;
use crate::spec::vtd::regs::{
    self, Ccmd, Gcmd, Ics, IotlbReg, Iqa, Irta, Iva, QueuePointer, Rtaddr, FRCD_SIZE,
};
use crate::viommu::paged::Paged;
use crate::viommu::register_page::Show;
use crate::viommu::registers::{pair, SlotAccess};
use crate::viommu::RegisterAccess;

/// The architecture version in VER: 4.0.
const VERSION: u32 = 0x40;

/// The slots whose upper halves are FSTS, ICS and PRS; their lower halves are reserved.
pub(super) const FSTS_SLOT: u64 = regs::FSTS - 4;
pub(super) const ICS_SLOT: u64 = regs::ICS - 4;
pub(super) const PRS_SLOT: u64 = regs::PRS - 4;

impl VtdIommu {
    /// The guest reads `data.len()` bytes at `offset` of the register page. Aligned 32- and 64-bit
    /// reads return registers; any other returns all ones.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.counters.register_reads.count();
        let size = data.len();
        let Some(access) = SlotAccess::new(offset, size, MMIO_SIZE) else {
            data.fill(0xff);
            return;
        };
        self.settle();
        let registers = self.lock();
        let value = access.extract(self.read_slot(&registers, access.slot));
        for (byte, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = from;
        }
        self.observe_access(offset, size, value, false);
    }

    /// The guest writes `data` at `offset` of the register page. Aligned 32- and 64-bit writes take
    /// effect before this returns; any other is ignored.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.counters.register_writes.count();
        let Some(access) = SlotAccess::new(offset, data.len(), MMIO_SIZE) else {
            self.guest_error(format_args!("a {} byte write at {offset:#x}", data.len()));
            return;
        };
        self.settle();
        let value = access.place(data);
        let command = self.is_command(access.slot);
        // One command at a time.
        let mut registers = if command { self.lock_idle() } else { self.lock() };
        self.observe_access(offset, data.len(), access.extract(value), true);
        self.write_slot(&mut registers, access, value);
        let slice = if command { self.run_command(&mut registers) } else { Slice::Done };
        drop(registers);
        if slice == Slice::More {
            drop(self.lock_idle());
        }
        // What lets the queue continue: it is enabled, has a new tail, or an error was cleared.
        if matches!(access.slot, regs::GCMD | FSTS_SLOT | regs::IQT) {
            self.drain_queue();
        }
    }

    pub(super) fn observe_access(&self, offset: u64, size: usize, value: u64, write: bool) {
        if let Some(observer) = &self.observer {
            let name = regs::name(offset, self.caps.cap, self.caps.ecap);
            // `SlotAccess::new` accepts 4 or 8.
            let size = size as u8;
            observer.register(&RegisterAccess { name, offset, size, value, write });
        }
    }

    fn read_slot(&self, registers: &Registers, slot: u64) -> u64 {
        self.register_slot(registers, slot)
            .or_else(|| page_slot(&self.pages().queue, slot))
            .or_else(|| self.fault_slot(&self.fault_log(), slot))
            .unwrap_or(0)
    }

    /// The slot of a register that is neither of faults nor of page requests.
    pub(super) fn register_slot(&self, registers: &Registers, slot: u64) -> Option<u64> {
        let event = &registers.invalidation_event;
        Some(match slot {
            regs::VER => pair(VERSION, 0),
            regs::CAP => self.caps.cap.into_bits(),
            regs::ECAP => self.caps.ecap.into_bits(),
            regs::GCMD => pair(0, registers.gsts.into_bits()),
            regs::RTADDR => registers.rtaddr.into_bits(),
            regs::CCMD => registers.ccmd.into_bits(),
            regs::IQH => registers.iqh.into_bits(),
            regs::IQT => registers.iqt.into_bits(),
            regs::IQA => registers.iqa.into_bits(),
            ICS_SLOT => pair(0, registers.ics.into_bits()),
            regs::IECTL => pair(event.control.into_bits(), event.data),
            regs::IEADDR => pair(event.address, event.upper_address),
            regs::IQERCD => registers.iqercd.into_bits(),
            regs::IRTA => registers.irta.into_bits(),
            slot if slot == self.iva_slot() => registers.iva.into_bits(),
            slot if slot == self.iotlb_slot() => registers.iotlb.into_bits(),
            _ => return None,
        })
    }

    /// The slot of a register of faults.
    pub(super) fn fault_slot(&self, log: &FaultLog, slot: u64) -> Option<u64> {
        let event = &log.event;
        Some(match slot {
            FSTS_SLOT => pair(0, log.status.into_bits()),
            regs::FECTL => pair(event.control.into_bits(), event.data),
            regs::FEADDR => pair(event.address, event.upper_address),
            slot => log.record_word(self.fault_record_word(slot)?),
        })
    }

    /// `value` has the bits of the access at their place in the slot.
    pub(super) fn write_slot(&self, registers: &mut Registers, access: SlotAccess, value: u64) {
        let (low, high) = access.halves(value);
        let event = &mut registers.invalidation_event;
        match access.slot {
            regs::GCMD => {
                if let Some(command) = low {
                    self.global_command(registers, Gcmd::from_bits(command));
                }
            }
            regs::RTADDR => {
                let new = access.merge(registers.rtaddr.into_bits(), value, Rtaddr::WRITABLE);
                registers.rtaddr = Rtaddr::from_bits(new);
            }
            regs::CCMD => {
                let new = access.merge(registers.ccmd.into_bits(), value, Ccmd::WRITABLE);
                registers.ccmd = Ccmd::from_bits(new);
                if registers.ccmd.icc() {
                    self.context_command(registers);
                }
            }
            FSTS_SLOT => {
                if let Some(value) = high {
                    self.fault_log().write_status(value);
                }
            }
            regs::FECTL => {
                let msi = self.fault_log().event.write_control(low, high);
                self.send(msi);
            }
            regs::FEADDR => self.fault_log().event.write_address(low, high),
            regs::IQT => {
                let new = access.merge(registers.iqt.into_bits(), value, QueuePointer::WRITABLE);
                registers.iqt = QueuePointer::from_bits(new);
            }
            regs::IQA if registers.gsts.qies() => {
                self.guest_error(format_args!("IQA written while the queue is enabled"));
            }
            regs::IQA => {
                let new = access.merge(registers.iqa.into_bits(), value, Iqa::WRITABLE);
                registers.iqa = Iqa::from_bits(new);
            }
            ICS_SLOT => {
                if high.is_some_and(|value| Ics::from_bits(value).iwc()) {
                    registers.ics.set_iwc(false);
                    event.clear();
                }
            }
            regs::IECTL => {
                let msi = event.write_control(low, high);
                self.show(registers);
                self.send(msi);
            }
            regs::IEADDR => event.write_address(low, high),
            regs::IRTA => {
                let new = access.merge(registers.irta.into_bits(), value, Irta::WRITABLE);
                registers.irta = Irta::from_bits(new);
            }
            slot if slot == self.iva_slot() => {
                let new = access.merge(registers.iva.into_bits(), value, Iva::WRITABLE);
                registers.iva = Iva::from_bits(new);
            }
            slot if slot == self.iotlb_slot() => {
                let new = access.merge(registers.iotlb.into_bits(), value, IotlbReg::WRITABLE);
                registers.iotlb = IotlbReg::from_bits(new);
                if registers.iotlb.ivt() {
                    self.iotlb_command(registers);
                }
            }
            regs::PQH | regs::PQT | regs::PQA | PRS_SLOT | regs::PECTL | regs::PEADDR => {
                if self.caps.ecap.prs() {
                    let msi = self.pages().queue.write(access, value);
                    self.send(msi);
                }
            }
            // Read-only and reserved registers, and fault records.
            slot => {
                if let Some(word) = self.fault_record_word(slot) {
                    self.fault_log().write_record_word(word, access.masked(value));
                }
            }
        }
    }

    /// Whether writing the slot may start a command.
    pub(super) fn is_command(&self, slot: u64) -> bool {
        matches!(slot, regs::GCMD | regs::CCMD) || slot == self.iotlb_slot()
    }

    pub(super) fn iva_slot(&self) -> u64 {
        self.caps.ecap.iotlb_offset() + regs::IVA
    }

    pub(super) fn iotlb_slot(&self) -> u64 {
        self.caps.ecap.iotlb_offset() + regs::IOTLB
    }

    /// The 64-bit word of the fault recording registers at `slot`.
    fn fault_record_word(&self, slot: u64) -> Option<usize> {
        let offset = slot.checked_sub(self.caps.cap.fault_record_offset())?;
        let inside = offset < self.caps.cap.fault_records() * FRCD_SIZE;
        inside.then_some(offset as usize / 8)
    }
}

/// The slot of a register of page requests: as after reset where they are not offered.
pub(super) fn page_slot(queue: &PageQueue, slot: u64) -> Option<u64> {
    let event = &queue.event;
    Some(match slot {
        regs::PQH => queue.head.into_bits(),
        regs::PQT => queue.tail.into_bits(),
        regs::PQA => queue.address.into_bits(),
        PRS_SLOT => pair(0, queue.status.into_bits()),
        regs::PECTL => pair(event.control.into_bits(), event.data),
        regs::PEADDR => pair(event.address, event.upper_address),
        _ => return None,
    })
}

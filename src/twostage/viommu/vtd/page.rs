// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest ([`RegisterPage`]).
//!
//! What a guest writes while it has the page is applied in an order in which nothing is enabled
//! half-way: addresses and data first, then the tail, then commands, of which GCMD is the last.
//! Bits that are cleared by writing 1 are all 0 while the page is lent, so writes to them had no
//! effect, and are forgotten.

use std::sync::Arc;

use super::fault_log::FaultLog;
use super::page_requests::PageRequests;
use super::queue::Slice;
use super::registers::{page_slot, FSTS_SLOT, ICS_SLOT, PRS_SLOT};
use super::state::Registers;
use super::VtdIommu;
use crate::spec::vtd::regs::{self, Prs, QueuePointer, FRCD_SIZE};
use crate::viommu::register_page::{
    Look, PageLender, PagedRegisters, Places, Recall, Show, Written,
};
use crate::viommu::registers::SlotAccess;
use crate::viommu::RegisterPage;

/// Registers that events of the unit and writes of the guest change, in the order in which the
/// guest may see them change.
const REGISTERS: [u64; 11] = [
    regs::IQH,
    regs::IQT,
    regs::IQA,
    regs::IQERCD,
    regs::RTADDR,
    regs::IRTA,
    ICS_SLOT,
    regs::IEADDR,
    regs::IECTL,
    regs::CCMD,
    regs::GCMD,
];
const PAGE_REQUESTS: [u64; 6] =
    [regs::PQA, regs::PQT, regs::PQH, regs::PEADDR, regs::PECTL, PRS_SLOT];
const FAULTS: [u64; 3] = [regs::FEADDR, regs::FECTL, FSTS_SLOT];

/// Registers to be applied in this order, if the guest wrote to them in memory; IVA and IOTLB are
/// between these and [`LAST`].
const FIRST: [u64; 11] = [
    regs::RTADDR,
    regs::IRTA,
    regs::FEADDR,
    regs::IEADDR,
    regs::PEADDR,
    regs::FECTL,
    regs::IECTL,
    regs::PECTL,
    regs::PQA,
    regs::PQH,
    regs::IQT,
];
const LAST: [u64; 4] = [regs::PQT, regs::CCMD, regs::IQA, regs::GCMD];

impl Show<Registers> for VtdIommu {
    fn show(&self, registers: &Registers) {
        let Some(page) = self.page.get() else { return };
        let places = self.places();
        for slot in REGISTERS.into_iter().chain([self.iva_slot(), self.iotlb_slot()]) {
            page.show(&places, slot, self.register_slot(registers, slot).unwrap_or(0));
        }
    }
}

impl Show<PageRequests> for VtdIommu {
    fn show(&self, requests: &PageRequests) {
        let Some(page) = self.page.get() else { return };
        for slot in PAGE_REQUESTS {
            page.show(&self.places(), slot, page_slot(&requests.queue, slot).unwrap_or(0));
        }
    }
}

impl Show<FaultLog> for VtdIommu {
    fn show(&self, log: &FaultLog) {
        let Some(page) = self.page.get() else { return };
        for slot in self.record_slots().chain(FAULTS) {
            page.show(&self.places(), slot, self.fault_slot(log, slot).unwrap_or(0));
        }
    }
}

impl PagedRegisters for VtdIommu {
    fn keep_page(&self, page: Arc<RegisterPage>) {
        if self.page.set(page).is_ok() {
            self.keep(&self.lock());
        }
    }

    fn tail_register(&self) -> (u64, u64) {
        (regs::IQT, 8)
    }

    fn write_tail(&self, offset: u64, data: &[u8]) {
        // The caller works through the queue.
        self.apply_written();
        self.counters.register_writes.count();
        let places = self.places();
        let access = SlotAccess::new(offset, data.len(), places.end);
        let Some(access) = access.filter(|access| access.slot == places.tail) else {
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
        let registers = self.lock_idle();
        let (requests, faults) = (self.pages(), self.fault_log());
        let quiet = is_quiet(&registers) && no_request(&requests) && no_fault(&faults);
        let unlock = || drop((requests, faults));
        !self.is_halted() && quiet && page.lend(&self.places(), lender, unlock)
    }

    fn look_at_page(&self) -> Look {
        let Some(page) = self.page.get() else { return Look::NotLent };
        let places = self.places();
        if page.is_lent() && page.has_tail(&places) {
            let mut registers = self.lock();
            // What the guest wrote before it is done before it: all of that is in the memory.
            if page.has_other_register(&places) {
                page.recall(Recall::Written);
            } else if let Some(tail) = page.take_tail(&places) {
                self.counters.register_writes.count();
                self.observe_access(places.tail, 4, tail.into(), true);
                registers.iqt = QueuePointer::from_bits(u64::from(tail) & QueuePointer::WRITABLE);
            }
            drop(registers);
            if page.is_lent() {
                self.drain_queue();
                return Look::Tail;
            }
        }
        if page.is_lent() && page.has_others(&places) {
            let registers = self.lock();
            if page.has_any_other(&places) {
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

impl VtdIommu {
    fn places(&self) -> Places {
        let records =
            self.caps.cap.fault_record_offset() + self.caps.cap.fault_records() * FRCD_SIZE;
        Places {
            head: regs::IQH,
            tail: regs::IQT,
            command: Some(regs::GCMD),
            end: records.max(self.iotlb_slot() + 8),
        }
    }

    /// The slots of the fault recording registers; the one with F is the last of each.
    fn record_slots(&self) -> impl Iterator<Item = u64> {
        let start = self.caps.cap.fault_record_offset();
        (start..start + self.caps.cap.fault_records() * FRCD_SIZE).step_by(8)
    }

    /// Does what the guest wrote to the page before that was recalled, if anything. Every access
    /// begins with this.
    pub(super) fn settle(&self) {
        if self.apply_written() {
            self.drain_queue();
        }
    }

    /// The same, but what takes its time is left to [`VtdIommu::drain_queue`]. Returns whether
    /// there was anything.
    fn apply_written(&self) -> bool {
        let Some(page) = self.page.get().filter(|page| page.is_recalled()) else { return false };
        let mut registers = self.lock_idle();
        // Another thread may have done it.
        if !page.is_recalled() {
            return false;
        }
        let places = self.places();
        let order = FIRST.into_iter().chain([self.iva_slot(), self.iotlb_slot()]).chain(LAST);
        for slot in order {
            let Some(written) = page.written(&places, slot) else { continue };
            let Written { offset, size, access, value } = written;
            self.counters.register_writes.count();
            self.observe_access(offset, size, access.extract(value), true);
            // One command at a time; the last of them may end after this.
            while self.is_command(slot) && self.run_command(&mut registers) == Slice::More {}
            self.write_slot(&mut registers, access, value);
        }
        self.keep(&registers);
        true
    }

    /// Fills the page, which the unit keeps from now on.
    fn keep(&self, registers: &Registers) {
        let Some(page) = self.page.get() else { return };
        let (requests, faults) = (self.pages(), self.fault_log());
        let value = |slot| {
            let register = self.register_slot(registers, slot);
            let request = || page_slot(&requests.queue, slot);
            register.or_else(request).or_else(|| self.fault_slot(&faults, slot)).unwrap_or(0)
        };
        page.keep((0..self.places().end).step_by(8).map(|slot| (slot, value(slot))));
    }
}

/// Nothing is pending, and the guest uses the queue.
fn is_quiet(registers: &Registers) -> bool {
    registers.gsts.tes()
        && registers.gsts.qies()
        && registers.unanswered.is_none()
        && !registers.ccmd.icc()
        && !registers.iotlb.ivt()
        && !registers.ics.iwc()
        && !registers.invalidation_event.control.ip()
}

fn no_request(requests: &PageRequests) -> bool {
    requests.queue.status == Prs::new() && !requests.queue.event.control.ip()
}

fn no_fault(log: &FaultLog) -> bool {
    let status = log.status;
    let errors = status.pfo() || status.ppf() || status.iqe() || status.ice() || status.ite();
    !errors && !log.event.control.ip()
}

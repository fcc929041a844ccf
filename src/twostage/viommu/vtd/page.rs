// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page as memory of the guest ([`RegisterPage`]).
//!
//! What a guest writes while it has the page is applied in an order in which nothing is enabled
//! half-way: addresses and data first, then the tail, then commands, of which GCMD is the last.
//! Bits that are cleared by writing 1 are all 0 while the page is lent, so writes to them had no
//! effect, and are forgotten.

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::fault_log::{EventRegisters, FaultLog};
use super::page_requests::PageRequests;
use super::queue::Slice;
use super::registers::{page_slot, FSTS_SLOT, ICS_SLOT, PRS_SLOT};
use super::state::Registers;
use super::{Locked, VtdIommu};
use crate::counters::Counter;
use crate::spec::vtd::regs::{self, Gsts, Prs, QueuePointer, FRCD_SIZE};
use crate::viommu::paged::Paged;
use crate::viommu::register_page::{Places, Recall, Show, Written};
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
const FIRST: [u64; 5] = [regs::RTADDR, regs::IRTA, regs::IEADDR, regs::IECTL, regs::IQT];
const LAST: [u64; 3] = [regs::CCMD, regs::IQA, regs::GCMD];
/// The same of page requests.
const OF_PAGE_REQUESTS: [u64; 5] = [regs::PEADDR, regs::PECTL, regs::PQA, regs::PQH, regs::PQT];

/// What SRTP and SIRTP set.
const POINTERS_SET: Gsts = Gsts::new().with_rtps(true).with_irtps(true);

/// The registers of an event: where its message goes, and with what, which sends it.
type Event = [u64; 2];
const FAULT_EVENT: Event = [regs::FEADDR, regs::FECTL];
const INVALIDATION_EVENT: Event = [regs::IEADDR, regs::IECTL];

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

impl Paged for VtdIommu {
    type Registers = Registers;

    fn page(&self) -> &OnceLock<Arc<RegisterPage>> {
        &self.page
    }

    fn places(&self) -> Places {
        let records =
            self.caps.cap.fault_record_offset() + self.caps.cap.fault_records() * FRCD_SIZE;
        Places {
            head: regs::IQH,
            tail: regs::IQT,
            tail_size: 8,
            command: Some(regs::GCMD),
            acknowledged: Some((regs::GSTS, POINTERS_SET.into_bits())),
            end: records.max(self.iotlb_slot() + 8),
        }
    }

    fn order(&self) -> impl Iterator<Item = u64> {
        FIRST.into_iter().chain([self.iva_slot(), self.iotlb_slot()]).chain(LAST)
    }

    fn registers(&self) -> Locked<'_, Registers> {
        self.lock()
    }

    fn idle_registers(&self) -> Locked<'_, Registers> {
        self.lock_idle()
    }

    fn quiet(&self, registers: &Registers) -> Option<impl Sized> {
        let (requests, faults) = (self.pages(), self.fault_log());
        let quiet = is_quiet(registers) && no_request(&requests) && no_fault(&faults);
        (quiet && !self.is_halted()).then_some((requests, faults))
    }

    fn set_tail(&self, registers: &mut Registers, tail: u32) {
        registers.iqt = QueuePointer::from_bits(u64::from(tail) & QueuePointer::WRITABLE);
    }

    fn apply(&self, registers: &mut Registers, access: SlotAccess, value: u64) {
        // One command at a time; the last of them may end after this.
        while self.is_command(access.slot) && self.run_command(registers) == Slice::More {}
        self.write_slot(registers, access, value);
    }

    fn apply_others(&self) {
        drop(self.pages_for_event());
        drop(self.fault_log_for_event());
    }

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

    fn drain(&self) {
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

impl VtdIommu {
    /// The slots of the fault recording registers; the one with F is the last of each.
    fn record_slots(&self) -> impl Iterator<Item = u64> {
        let start = self.caps.cap.fault_record_offset();
        (start..start + self.caps.cap.fault_records() * FRCD_SIZE).step_by(8)
    }

    /// The fault log, to raise the fault event. Before that, the page is taken back: the guest may
    /// have masked the event there, or changed its message.
    pub(super) fn fault_log_for_event(&self) -> Locked<'_, FaultLog> {
        let mut log = self.fault_log();
        self.prepare_event(FAULT_EVENT, &mut log.event);
        log
    }

    /// The same for the end of invalidations.
    pub(super) fn prepare_invalidation_event(&self, registers: &mut Registers) {
        self.prepare_event(INVALIDATION_EVENT, &mut registers.invalidation_event);
    }

    /// The same for page requests, and for where they go.
    pub(super) fn pages_for_event(&self) -> Locked<'_, PageRequests> {
        let mut pages = self.pages();
        self.recall_for_event();
        for slot in OF_PAGE_REQUESTS {
            let Some(Written { access, value, .. }) = self.take_written(slot) else { continue };
            if self.caps.ecap.prs() {
                // Nothing was pending while the page was lent, so there is nothing to send.
                let _none = pages.queue.write(access, value);
            }
        }
        pages
    }

    /// Takes the page back, and what the guest wrote to the registers of `event` there; nothing
    /// else, as the caller has no other lock than theirs.
    fn prepare_event(&self, slots: Event, event: &mut EventRegisters) {
        self.recall_for_event();
        let [address, control] = slots.map(|slot| self.take_written(slot));
        if let Some(Written { access, value, .. }) = address {
            let (low, high) = access.halves(value);
            event.write_address(low, high);
        }
        if let Some(Written { access, value, .. }) = control {
            let (low, high) = access.halves(value);
            // Nothing was pending, as above.
            let _none = event.write_control(low, high);
        }
    }

    fn recall_for_event(&self) {
        if let Some(page) = self.page.get() {
            page.recall(Recall::Changed);
        }
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

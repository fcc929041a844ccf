// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fault log: fault status, fault records and the fault event (§7.2, §7.3, §11.4.7); and the
//! registers of any event (§11.4.9).
//!
//! The log has a separate lock, taken after the model's, because faults come from any thread.

use super::host_side::DmaFault;
use crate::spec::pci::Bdf;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::page_request::PageRequest;
use crate::spec::vtd::regs::{EventControl, FaultRecord, FaultRecordHigh, FaultRecordLow, Fsts};
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::{MsiMessage, Requester};

/// Fault status and records, as the guest sees them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct FaultLog {
    /// FSTS.
    pub status: Fsts,
    /// FECTL, FEDATA, FEADDR, FEUADDR.
    pub event: EventRegisters,
    /// FRCD, one for each fault recording register.
    pub records: Vec<FaultRecord>,
    /// The record for the next fault.
    pub next: u8,
}

/// An error of the invalidation queue (§6.5.2.10 and FSTS).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueError {
    /// IQE: the descriptor at the head is wrong.
    Queue,
    /// ITE: a device did not answer.
    TimeOut,
}

impl FaultLog {
    /// An empty log with `records` fault recording registers (1 to 256).
    pub(super) fn new(records: u16) -> Self {
        Self {
            status: Fsts::new(),
            event: EventRegisters::default(),
            records: vec![FaultRecord::default(); usize::from(records)],
            next: 0,
        }
    }

    /// Records a DMA fault with `reason`. Returns `false` if there was no space: the overflow bit
    /// is then set.
    pub(super) fn record(
        &mut self,
        fault: &DmaFault,
        reason: FaultReason,
    ) -> (bool, Option<MsiMessage>) {
        self.add(dma_record(fault, reason))
    }

    /// Records a fault of an interrupt that `source` sent, like [`FaultLog::record`].
    pub(super) fn record_interrupt(
        &mut self,
        source: Bdf,
        index: u16,
        reason: FaultReason,
    ) -> (bool, Option<MsiMessage>) {
        let high =
            FaultRecordHigh::new().with_sid(source.raw()).with_fr(reason.code()).with_f(true);
        self.add(FaultRecord { low: FaultRecordLow::of_interrupt(index), high })
    }

    /// Records a fault of a page request, like [`FaultLog::record`].
    pub(super) fn record_page_request(
        &mut self,
        request: &PageRequest,
        reason: FaultReason,
    ) -> (bool, Option<MsiMessage>) {
        let PageRequest { rid, pasid, address, write, execute, privileged, .. } = *request;
        let requester = Requester { rid, pasid };
        let reported = None;
        let fault = DmaFault {
            requester,
            address,
            write,
            execute,
            privileged,
            reason: reported,
            stage2: false,
        };
        let mut record = dma_record(&fault, reason);
        record.high = record.high.with_t1(false).with_t2(true);
        self.add(record)
    }

    fn add(&mut self, record: FaultRecord) -> (bool, Option<MsiMessage>) {
        if self.status.pfo() {
            return (false, None);
        }
        let next = self.next;
        let records = self.records.len();
        // `next` is kept below the number of records, which is never 0.
        let Some(slot) = self.records.get_mut(usize::from(next)) else { return (false, None) };
        if slot.high.f() {
            self.status.set_pfo(true);
            return (false, None);
        }
        *slot = record;
        self.next = ((usize::from(next) + 1) % records) as u8;
        let raise = !self.condition();
        if !self.status.ppf() {
            self.status.set_ppf(true);
            self.status.set_fri(next);
        }
        (true, if raise { self.event.raise() } else { None })
    }

    /// The invalidation queue stops with `error`.
    pub(super) fn queue_error(&mut self, error: QueueError) -> Option<MsiMessage> {
        let raise = !self.condition();
        match error {
            QueueError::Queue => self.status.set_iqe(true),
            QueueError::TimeOut => self.status.set_ite(true),
        }
        if raise {
            self.event.raise()
        } else {
            None
        }
    }

    /// Whether an error stops the invalidation queue.
    pub(super) fn holds_queue(&self) -> bool {
        self.status.iqe() || self.status.ite()
    }

    /// The guest writes FSTS: writing 1 clears a bit.
    pub(super) fn write_status(&mut self, value: u32) {
        let clear = Fsts::from_bits(value);
        self.status.set_pfo(self.status.pfo() && !clear.pfo());
        self.status.set_iqe(self.status.iqe() && !clear.iqe());
        self.status.set_ice(self.status.ice() && !clear.ice());
        self.status.set_ite(self.status.ite() && !clear.ite());
        self.end_event();
    }

    /// The 64-bit word `word` (two per record) of the fault recording registers.
    pub(super) fn record_word(&self, word: usize) -> u64 {
        self.records.get(word / 2).map_or(0, |record| record.to_words()[word % 2])
    }

    /// The guest writes `value` to that word: 1 clears F, everything else is read-only.
    pub(super) fn write_record_word(&mut self, word: usize, value: u64) {
        if word.is_multiple_of(2) || !FaultRecordHigh::from_bits(value).f() {
            return;
        }
        if let Some(record) = self.records.get_mut(word / 2) {
            record.high.set_f(false);
        }
        if !self.records.iter().any(|record| record.high.f()) {
            self.status.set_ppf(false);
        }
        self.end_event();
    }

    /// Whether any cause of the fault event is set.
    fn condition(&self) -> bool {
        let status = self.status;
        status.ppf() || status.iqe() || status.ice() || status.ite()
    }

    /// No event stays pending without its cause.
    fn end_event(&mut self) {
        if !self.condition() {
            self.event.clear();
        }
    }
}

fn dma_record(fault: &DmaFault, reason: FaultReason) -> FaultRecord {
    let mut high = FaultRecordHigh::new()
        .with_sid(fault.requester.rid.raw())
        .with_fr(reason.code())
        .with_t1(!fault.write)
        .with_f(true);
    if let Some(pasid) = fault.requester.pasid {
        high = high
            .with_pp(true)
            .with_pv(pasid.raw())
            .with_exe(fault.execute)
            .with_privileged(fault.privileged);
    }
    FaultRecord { low: FaultRecordLow::new().with_fi(fault.address >> PAGE_SHIFT), high }
}

/// The four registers of one event: control, data, address, upper address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct EventRegisters {
    /// FECTL, IECTL, PECTL.
    pub control: EventControl,
    /// FEDATA, IEDATA, PEDATA.
    pub data: u32,
    /// FEADDR, IEADDR, PEADDR.
    pub address: u32,
    /// FEUADDR, IEUADDR, PEUADDR.
    pub upper_address: u32,
}

impl Default for EventRegisters {
    /// The state after reset: masked.
    fn default() -> Self {
        let control = EventControl::new().with_im(true);
        Self { control, data: 0, address: 0, upper_address: 0 }
    }
}

impl EventRegisters {
    /// The condition of the event became true: returns the message, unless it is masked and so
    /// pending.
    pub(super) fn raise(&mut self) -> Option<MsiMessage> {
        self.control.set_ip(true);
        self.deliver()
    }

    /// The guest cleared every status bit of the condition.
    pub(super) fn clear(&mut self) {
        self.control.set_ip(false);
    }

    /// The guest writes the control register, the data register or both; unmasking sends a pending
    /// message, with the data written at the same time.
    pub(super) fn write_control(
        &mut self,
        control: Option<u32>,
        data: Option<u32>,
    ) -> Option<MsiMessage> {
        self.data = data.unwrap_or(self.data);
        self.control.set_im(EventControl::from_bits(control?).im());
        self.deliver()
    }

    /// The guest writes the address register, the upper address register or both.
    pub(super) fn write_address(&mut self, address: Option<u32>, upper: Option<u32>) {
        self.address = address.map_or(self.address, |address| address & !0x3);
        self.upper_address = upper.unwrap_or(self.upper_address);
    }

    fn deliver(&mut self) -> Option<MsiMessage> {
        if self.control.im() || !self.control.ip() {
            return None;
        }
        self.control.set_ip(false);
        let address = u64::from(self.upper_address) << 32 | u64::from(self.address);
        Some(MsiMessage { address, data: self.data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::pci::Pasid;

    fn fault(address: u64) -> DmaFault {
        DmaFault {
            requester: Requester::rid(Bdf::from_raw(0x0108)),
            address,
            write: false,
            execute: true,
            privileged: true,
            reason: None,
            stage2: false,
        }
    }

    fn unmasked(records: u16) -> FaultLog {
        let mut log = FaultLog::new(records);
        assert_eq!(log.event.write_control(Some(0), Some(0x41)), None);
        log
    }

    const REASON: FaultReason = FaultReason::FirstStageNotPresent;
    const MSI: Option<MsiMessage> = Some(MsiMessage { address: 0, data: 0x41 });

    #[test]
    fn a_record_tells_who_what_and_where() {
        let mut log = FaultLog::new(2);
        assert_eq!(log.record(&fault(0x1234_5678), REASON), (true, None));
        let record = log.records[0];
        assert_eq!(record.address(), 0x1234_5000);
        assert_eq!((record.high.sid(), record.high.fr()), (0x0108, 0x71));
        assert!(record.high.f() && record.high.t1() && !record.high.t2());
        // Privilege and execute bits have no meaning without a PASID.
        assert!(!record.high.pp() && !record.high.exe() && !record.high.privileged());
        let pasid = Pasid::new(0xabcde);
        let requester = Requester { pasid, ..fault(0).requester };
        assert!(log.record(&DmaFault { requester, write: true, ..fault(0) }, REASON).0);
        let high = log.records[1].high;
        assert!(high.pp() && high.exe() && high.privileged() && !high.t1());
        assert_eq!(high.pv(), 0xabcde);
    }

    #[test]
    fn the_event_is_raised_once_until_all_is_cleared() {
        let mut log = unmasked(4);
        assert_eq!(log.record(&fault(0), REASON), (true, MSI));
        assert_eq!(log.record(&fault(0), REASON), (true, None));
        assert_eq!(log.queue_error(QueueError::Queue), None);
        log.write_record_word(1, 1 << 63);
        assert!(log.status.ppf());
        log.write_record_word(3, 1 << 63);
        assert!(!log.status.ppf());
        // IQE is still set: a new fault is not a new condition.
        assert_eq!(log.record(&fault(0), REASON), (true, None));
        log.write_status(1 << 4);
        log.write_record_word(5, 1 << 63);
        assert_eq!(log.record(&fault(0), REASON), (true, MSI));
        assert_eq!(log.status.fri(), 3);
    }

    #[test]
    fn a_full_log_overflows_until_the_overflow_is_cleared() {
        let mut log = unmasked(2);
        for _ in 0..2 {
            assert!(log.record(&fault(0), REASON).0);
        }
        assert!(!log.status.pfo());
        assert!(!log.record(&fault(0), REASON).0);
        assert!(log.status.pfo());
        // Free space alone is not enough.
        log.write_record_word(1, 1 << 63);
        assert!(!log.record(&fault(0), REASON).0);
        log.write_status(1);
        assert!(log.record(&fault(0x9000), REASON).0);
        assert_eq!(log.records[0].address(), 0x9000);
    }

    #[test]
    fn a_masked_event_is_pending_until_cleared() {
        let mut log = FaultLog::new(1);
        assert_eq!(log.queue_error(QueueError::TimeOut), None);
        assert!(log.event.control.ip() && log.holds_queue());
        log.write_status(1 << 6);
        assert!(!log.event.control.ip() && !log.holds_queue());
    }

    #[test]
    fn only_f_can_be_written() {
        let mut log = FaultLog::new(1);
        assert!(log.record(&fault(0x5000), REASON).0);
        let before = log.records[0];
        log.write_record_word(0, u64::MAX);
        log.write_record_word(1, !(1 << 63));
        log.write_record_word(7, u64::MAX);
        assert_eq!(log.records[0], before);
        assert_eq!((log.record_word(0), log.record_word(2)), (0x5000, 0));
    }

    #[test]
    fn a_masked_event_waits_for_the_unmask() {
        let mut event = EventRegisters::default();
        event.write_address(Some(0xfee0_1003), Some(1));
        assert_eq!(event.raise(), None);
        assert!(event.control.ip());
        assert_eq!(event.write_control(Some(1 << 31), Some(0x40)), None);
        let msi = MsiMessage { address: 0x1_fee0_1000, data: 0x41 };
        assert_eq!(event.write_control(None, None), None);
        assert_eq!(event.write_control(Some(0), Some(0x41)), Some(msi));
        assert!(!event.control.ip());
        assert_eq!(event.write_control(Some(0), None), None);
        assert_eq!(event.raise(), Some(msi));
    }

    #[test]
    fn a_cleared_event_is_not_pending() {
        let mut event = EventRegisters::default();
        assert_eq!(event.raise(), None);
        event.clear();
        assert_eq!(event.write_control(Some(0), None), None);
    }
}

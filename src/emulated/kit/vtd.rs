// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's driver of a VT-d unit.

use std::ops::Deref;

use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::{index, FirstStageEntry, ENTRY_SIZE};
use twostage::spec::vtd::interrupt::{Irte, IRTE_SIZE};
use twostage::spec::vtd::page_request::{PageRequest, PageResponse, PAGE_REQUEST_SIZE};
use twostage::spec::vtd::pasid::{
    PasidDirectoryEntry, PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2, Pgtt,
    DIRECTORY_ENTRY_SIZE, TABLE_ENTRIES, TABLE_ENTRY_SIZE,
};
use twostage::spec::vtd::qi::{Descriptor, PasidCacheScope, StatusWrite};
use twostage::spec::vtd::regs::{
    self, Cap, FaultRecord, Fsts, Gcmd, Gsts, Iqa, Irta, Pqa, QueuePointer, Rtaddr,
};
use twostage::spec::vtd::root::{
    ContextHigh, ContextLow, RootHalf, ScalableContextHigh, ScalableContextLow, CONTEXT_ENTRY_SIZE,
    ROOT_ENTRY_SIZE, SCALABLE_CONTEXT_ENTRIES, SCALABLE_CONTEXT_ENTRY_SIZE,
};
use twostage::spec::vtd::second_stage::SecondStageEntry;

use super::{Mmio, Pages, PAGE};

/// Where the second stage of nested tables has guest memory: the address of its byte 0. So an
/// address that the second stage should have translated, and did not, is nowhere.
pub const BELOW: u64 = 1 << 40;

/// The status a wait descriptor stores.
const DONE: u32 = 0x600d;

/// A driver with a root table, and a queue of one page of 256-bit descriptors. Every guest address
/// is a GPA, in bytes.
///
/// Tables that do not exist are made when they are needed. Nothing is invalidated unless a method
/// says so.
#[derive(Debug)]
pub struct Driver<M> {
    /// The guest's memory.
    pub pages: Pages,
    /// The unit's registers.
    pub registers: M,
    root: u64,
    queue: u64,
    status: u64,
}

/// A PASID table entry, or a context entry of legacy mode.
#[derive(Debug, Clone, Copy)]
pub enum Entry {
    /// Blocks.
    NotPresent,
    /// First-stage tables.
    FirstStage {
        /// The top table.
        table: u64,
        /// The domain ID.
        domain: u16,
    },
    /// Second-stage tables.
    SecondStage {
        /// The top table.
        table: u64,
        /// The domain ID.
        domain: u16,
    },
    /// Addresses are GPAs.
    PassThrough {
        /// The domain ID.
        domain: u16,
    },
    /// First-stage tables over second-stage tables; see [`Driver::map_nested`].
    Nested {
        /// The first stage's top table, as a GPA.
        first: u64,
        /// The second stage's top table.
        second: u64,
        /// The domain ID.
        domain: u16,
        /// Accessed and dirty flags in second-stage tables (SSADE).
        accessed_dirty: bool,
    },
}

/// The queue's response.
#[derive(Debug, PartialEq, Eq)]
pub enum Completion {
    /// The wait descriptor stored its status.
    Done,
    /// It did not; the contents of FSTS.
    Stopped(Fsts),
}

impl<M> Deref for Driver<M> {
    type Target = Pages;

    fn deref(&self) -> &Pages {
        &self.pages
    }
}

impl<M: Mmio> Driver<M> {
    /// A driver with an empty root table. It does not touch the unit.
    pub fn new(pages: Pages, registers: M) -> Self {
        let [root, queue, status] = [(); 3].map(|()| pages.page());
        Self { pages, registers, root, queue, status }
    }

    /// The same driver on a copy of its memory, with the registers of another unit.
    pub fn moved<N>(&self, pages: Pages, registers: N) -> Driver<N> {
        let Self { root, queue, status, .. } = *self;
        Driver { pages, registers, root, queue, status }
    }

    /// GSTS.
    pub fn status(&self) -> Gsts {
        Gsts::from_bits(self.registers.read32(regs::GSTS))
    }

    /// Sets the root table (scalable mode), starts the queue and enables translation.
    pub fn enable(&self) {
        self.set_root(1);
        self.start_queue();
        self.registers.write32(regs::GCMD, Gcmd::new().with_qie(true).with_te(true).into_bits());
        assert!(self.status().tes());
    }

    /// Sets the root table (legacy mode), starts the queue if it is to be used, and enables
    /// translation.
    pub fn enable_legacy(&self, queue: bool) {
        self.set_root(0);
        if queue {
            self.start_queue();
        }
        self.registers.write32(regs::GCMD, Gcmd::new().with_qie(queue).with_te(true).into_bits());
        assert!(self.status().tes());
    }

    /// Sets the root table, in the translation table mode `ttm`.
    fn set_root(&self, ttm: u8) {
        let rtaddr = Rtaddr::new().with_ttm(ttm).with_rta(self.root / PAGE);
        self.registers.write64(regs::RTADDR, rtaddr.into_bits());
        self.registers.write32(regs::GCMD, Gcmd::new().with_srtp(true).into_bits());
        assert!(self.status().rtps());
    }

    fn start_queue(&self) {
        self.registers.write64(regs::IQT, 0);
        let iqa = Iqa::new().with_dw(true).with_iqa(self.queue / PAGE);
        self.registers.write64(regs::IQA, iqa.into_bits());
        self.registers.write32(regs::GCMD, Gcmd::new().with_qie(true).into_bits());
        assert!(self.status().qies());
    }

    /// Disables translation; the queue stays enabled.
    pub fn disable(&self) {
        self.registers.write32(regs::GCMD, Gcmd::new().with_qie(true).into_bits());
        assert!(!self.status().tes());
    }

    /// Enables interrupt remapping by the table at `table`, which has 256 entries for extended
    /// interrupt mode. Other methods that write GCMD disable it, so it is enabled last.
    pub fn enable_remapping(&self, table: u64) {
        let irta = Irta::new().with_s(7).with_eime(true).with_addr(table / PAGE);
        self.registers.write64(regs::IRTA, irta.into_bits());
        let status = self.status();
        let now = Gcmd::new().with_te(status.tes()).with_qie(status.qies());
        self.registers.write32(regs::GCMD, now.with_sirtp(true).into_bits());
        self.registers.write32(regs::GCMD, now.with_ire(true).into_bits());
        assert!(self.status().irtps() && self.status().ires());
    }

    /// Writes entry `index` of the interrupt remapping table at `table`.
    pub fn set_interrupt(&self, table: u64, index: u16, entry: Irte) {
        let at = table + u64::from(index) * IRTE_SIZE;
        self.store_words(at, &[entry.low.into_bits(), entry.high.into_bits()]);
    }

    /// Puts `descriptors` and a wait into the queue, and writes the tail.
    pub fn submit(&self, descriptors: &[Descriptor]) -> Completion {
        let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
        self.submit_words(&words)
    }

    /// As [`Self::submit`], with descriptors of any contents.
    pub fn submit_words(&self, descriptors: &[[u64; 4]]) -> Completion {
        self.ring(self.put_words(descriptors))
    }

    /// Puts `descriptors` and a wait into the queue, for [`Self::ring`] with the result.
    pub fn put_words(&self, descriptors: &[[u64; 4]]) -> QueuePointer {
        self.store(self.status, 0);
        let wait = Descriptor::Wait {
            status: Some(StatusWrite { address: self.status, data: DONE }),
            interrupt: false,
            fence: false,
            drain_page_requests: false,
        };
        let mut tail = self.registers.read64(regs::IQT);
        for descriptor in descriptors.iter().chain([&wait.encode()]) {
            self.store_words(self.queue + tail, descriptor);
            tail = (tail + 32) % PAGE;
        }
        QueuePointer::from_offset(tail)
    }

    /// Writes the tail.
    pub fn ring(&self, tail: QueuePointer) -> Completion {
        self.registers.write64(regs::IQT, tail.into_bits());
        self.completion()
    }

    /// Clears an error of the queue: the unit resumes at the descriptor where it stopped.
    pub fn resume(&self) -> Completion {
        self.registers.write32(regs::FSTS, Fsts::new().with_iqe(true).into_bits());
        self.completion()
    }

    /// As [`Self::resume`], after it replaced the descriptor at which the unit stopped.
    pub fn replace_and_resume(&self, descriptor: Descriptor) -> Completion {
        let head = self.queue + self.registers.read64(regs::IQH);
        self.store_words(head, &descriptor.encode());
        self.resume()
    }

    fn completion(&self) -> Completion {
        match self.load(self.status) as u32 {
            DONE => Completion::Done,
            _ => Completion::Stopped(self.faults()),
        }
    }

    /// Invalidates the PASID cache of all domains.
    pub fn flush_pasid_cache(&self) -> Completion {
        self.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)])
    }

    /// Starts the page request queue, of one page: the queue's address.
    pub fn start_page_queue(&self) -> u64 {
        let queue = self.page();
        self.registers.write64(regs::PQH, 0);
        self.registers.write64(regs::PQT, 0);
        self.registers.write64(regs::PQA, Pqa::new().with_pqa(queue / PAGE).into_bits());
        queue
    }

    /// Takes the oldest page request from the queue.
    ///
    /// # Panics
    /// What is in the queue is not one.
    pub fn take_page_request(&self) -> Option<PageRequest> {
        let head = self.registers.read64(regs::PQH);
        if head == self.registers.read64(regs::PQT) {
            return None;
        }
        let pqa = Pqa::from_bits(self.registers.read64(regs::PQA));
        let words = [0, 8, 16, 24].map(|word| self.load(pqa.base() + head + word));
        self.registers.write64(regs::PQH, (head + PAGE_REQUEST_SIZE) % pqa.size());
        Some(PageRequest::decode(words).expect("a page request"))
    }

    /// Responds to the group of `request`, its last one.
    pub fn respond(&self, request: &PageRequest, response: PageResponse) -> Completion {
        let PageRequest { rid: requester, pasid, group, .. } = *request;
        let code = response.code();
        self.submit(&[Descriptor::PageGroupResponse { requester, pasid, group, code }])
    }

    /// FSTS.
    pub fn faults(&self) -> Fsts {
        Fsts::from_bits(self.registers.read32(regs::FSTS))
    }

    /// Takes the oldest fault record, with its reason. While PPF is set, FRI is the index of the
    /// first one when there was none before; the others follow.
    pub fn take_fault(&self) -> Option<(FaultRecord, Option<FaultReason>)> {
        let status = self.faults();
        if !status.ppf() {
            return None;
        }
        let cap = Cap::from_bits(self.registers.read64(regs::CAP));
        let records = (0..cap.fault_records()).map(|index| {
            let index = (u64::from(status.fri()) + index) % cap.fault_records();
            let at = cap.fault_record_offset() + index * regs::FRCD_SIZE;
            (
                at,
                FaultRecord::from_words([self.registers.read64(at), self.registers.read64(at + 8)]),
            )
        });
        let (at, record) = records.into_iter().find(|(_, record)| record.high.f())?;
        // F is RW1C, in the top 32 bits.
        self.registers.write32(at + 12, 1 << 31);
        Some((record, FaultReason::from_code(record.high.fr())))
    }

    /// Writes the PASID table entry of `rid`'s `pasid`, creating missing tables.
    pub fn set_entry(&self, rid: Bdf, pasid: u32, entry: Entry) {
        let slot = self.pasid_slot(rid, pasid);
        let (pgtt, domain, first, second, ssade) = match entry {
            Entry::NotPresent => {
                self.store(slot, 0);
                return;
            }
            Entry::FirstStage { table, domain } => (Pgtt::FirstStage, domain, table, 0, false),
            Entry::SecondStage { table, domain } => (Pgtt::SecondStage, domain, 0, table, false),
            Entry::PassThrough { domain } => (Pgtt::PassThrough, domain, 0, 0, false),
            Entry::Nested { first, second, domain, accessed_dirty } => {
                (Pgtt::Nested, domain, BELOW + first, second, accessed_dirty)
            }
        };
        // AW: 48 bits, required for pass-through, too.
        let qw0 = PasidEntry0::new().with_p(true).with_aw(2).with_pgtt(pgtt.into_bits());
        let qw0 = qw0.with_ssade(ssade).with_ssptptr(second / PAGE);
        let qw1 = PasidEntry1::new().with_did(domain);
        let qw2 = PasidEntry2::new().with_fsptptr(first / PAGE);
        let entry = PasidEntry { qw0, qw1, qw2, reserved: [0; 5] };
        self.store_words(slot, &entry.to_words());
    }

    /// Writes the context entry of `rid` in legacy mode: second-stage table, untranslated, or not
    /// present.
    pub fn set_legacy_entry(&self, rid: Bdf, entry: Entry) {
        let root = self.root + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
        let table = self
            .table_at(root, |page| RootHalf::new().with_p(true).with_ctp(page / PAGE).into_bits());
        let context = table + u64::from(rid.devfn()) * CONTEXT_ENTRY_SIZE;
        let low = ContextLow::new().with_p(true);
        let (low, domain) = match entry {
            Entry::NotPresent => return self.store(context, 0),
            Entry::SecondStage { table, domain } => (low.with_ssptptr(table / PAGE), domain),
            Entry::PassThrough { domain } => (low.with_tt(2), domain),
            Entry::FirstStage { .. } | Entry::Nested { .. } => {
                panic!("legacy mode has no first-stage tables")
            }
        };
        // AW: 48 bits, required for pass-through, too. The word with P last.
        self.store(context + 8, ContextHigh::new().with_aw(2).with_did(domain).into_bits());
        self.store(context, low.into_bits());
    }

    /// Has the context entry of `rid`, whose tables exist, say that it may have a device-TLB (DTE),
    /// or not.
    pub fn set_device_tlb(&self, rid: Bdf, enabled: bool) {
        let context = self.context_slot(rid);
        let low = ScalableContextLow::from_bits(self.load(context));
        self.store(context, low.with_dte(enabled).into_bits());
    }

    /// Has the context entry of `rid`, whose tables exist, say that it may have a device-TLB (DTE)
    /// and make page requests (PRE), or not.
    pub fn set_page_requests(&self, rid: Bdf, enabled: bool) {
        let context = self.context_slot(rid);
        let low = ScalableContextLow::from_bits(self.load(context));
        self.store(context, low.with_dte(enabled).with_pre(enabled).into_bits());
    }

    /// The GPA of the context entry of `rid`.
    fn context_slot(&self, rid: Bdf) -> u64 {
        assert!(rid.devfn() < SCALABLE_CONTEXT_ENTRIES, "the upper context table is not used");
        let root = self.root + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
        let table = self
            .table_at(root, |page| RootHalf::new().with_p(true).with_ctp(page / PAGE).into_bits());
        table + u64::from(rid.devfn()) * SCALABLE_CONTEXT_ENTRY_SIZE
    }

    fn pasid_slot(&self, rid: Bdf, pasid: u32) -> u64 {
        let context = self.context_slot(rid);
        self.store(context + 8, ScalableContextHigh::new().with_rid_pasid(0).into_bits());
        let directory = self.table_at(context, |page| {
            let low = ScalableContextLow::new().with_p(true).with_paside(true);
            low.with_pasiddirptr(page / PAGE).into_bits()
        });
        let entry = directory + u64::from(pasid / TABLE_ENTRIES) * DIRECTORY_ENTRY_SIZE;
        let table = self.table_at(entry, |page| {
            PasidDirectoryEntry::new().with_p(true).with_smptblptr(page / PAGE).into_bits()
        });
        table + u64::from(pasid % TABLE_ENTRIES) * TABLE_ENTRY_SIZE
    }

    /// Maps one page of `level` (1: 4 KiB, 2: 2 MiB) in the 4-level first-stage table `top`.
    pub fn map(&self, top: u64, iova: u64, gpa: u64, level: u8, writable: bool) {
        let user = FirstStageEntry::new().with_p(true).with_us(true);
        let mut table = top;
        for above in (level + 1..=4).rev() {
            let entry = table + index(iova, above) * ENTRY_SIZE;
            table =
                self.table_at(entry, |page| user.with_rw(true).with_frame(page / PAGE).into_bits());
        }
        let leaf = user.with_rw(writable).with_ps(level > 1).with_frame(gpa / PAGE);
        self.store(table + index(iova, level) * ENTRY_SIZE, leaf.into_bits());
    }

    /// Maps one 4 KiB page in the 4-level second-stage table `top`.
    pub fn map_second_stage(&self, top: u64, iova: u64, gpa: u64, writable: bool) {
        let readable = SecondStageEntry::new().with_r(true);
        let mut table = top;
        for above in (2..=4).rev() {
            let entry = table + index(iova, above) * ENTRY_SIZE;
            table = self
                .table_at(entry, |page| readable.with_w(true).with_frame(page / PAGE).into_bits());
        }
        let leaf = readable.with_w(writable).with_frame(gpa / PAGE);
        self.store(table + index(iova, 1) * ENTRY_SIZE, leaf.into_bits());
    }

    /// Maps one 4 KiB page in the 4-level first-stage table `first`, and in the 4-level
    /// second-stage table `second` that page and every table on the way, each at its GPA above
    /// [`BELOW`].
    pub fn map_nested(&self, first: u64, second: u64, iova: u64, gpa: u64, writable: bool) {
        let below = |page| {
            self.map_second_stage(second, BELOW + page, page, true);
            FirstStageEntry::new().with_p(true).with_us(true).with_frame((BELOW + page) / PAGE)
        };
        below(first);
        let mut table = first;
        for above in (2..=4).rev() {
            let entry = table + index(iova, above) * ENTRY_SIZE;
            table = self.table_at(entry, |page| below(page).with_rw(true).into_bits()) & !BELOW;
            // One that was there may be new to this second stage.
            below(table);
        }
        let entry = table + index(iova, 1) * ENTRY_SIZE;
        self.store(entry, below(gpa).with_rw(writable).into_bits());
    }

    /// Unmaps a 4 KiB page, in tables of any kind.
    pub fn unmap(&self, top: u64, iova: u64) {
        self.store(self.entry_at(top, iova, 1), 0);
    }

    /// The GPA of the entry of `level` for `iova`, whose table exists, in tables of any kind.
    pub fn entry_at(&self, top: u64, iova: u64, level: u8) -> u64 {
        let mut table = top;
        for above in (level + 1..=4).rev() {
            let word = self.load(table + index(iova, above) * ENTRY_SIZE);
            table = word & 0x000f_ffff_ffff_f000 & !BELOW;
        }
        table + index(iova, level) * ENTRY_SIZE
    }

    /// The table that the entry at `entry` points to; a new one if there is none.
    fn table_at(&self, entry: u64, pointer: impl Fn(u64) -> u64) -> u64 {
        let word = self.load(entry);
        if word & 1 != 0 {
            return word & 0x000f_ffff_ffff_f000;
        }
        let page = self.page();
        self.store(entry, pointer(page));
        page
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's IOMMU driver: builds tables in guest memory, and programs the unit by registers.

use std::ops::Deref;

use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::{index, FirstStageEntry, ENTRY_SIZE};
use twostage::spec::vtd::pasid::{
    PasidDirectoryEntry, PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2, Pgtt,
    DIRECTORY_ENTRY_SIZE, TABLE_ENTRIES, TABLE_ENTRY_SIZE,
};
use twostage::spec::vtd::qi::{Descriptor, PasidCacheScope, StatusWrite};
use twostage::spec::vtd::regs::{
    self, Cap, FaultRecord, Fsts, Gcmd, Gsts, Iqa, QueuePointer, Rtaddr,
};
use twostage::spec::vtd::root::{
    ContextHigh, ContextLow, RootHalf, ScalableContextHigh, ScalableContextLow, CONTEXT_ENTRY_SIZE,
    ROOT_ENTRY_SIZE, SCALABLE_CONTEXT_ENTRIES, SCALABLE_CONTEXT_ENTRY_SIZE,
};
use twostage::spec::vtd::second_stage::SecondStageEntry;

use crate::common::{Memory, PAGE};

/// The status a wait descriptor stores.
const DONE: u32 = 0x600d;

/// The register page, for the guest's loads and stores.
pub trait Registers {
    fn read(&self, offset: u64, bytes: &mut [u8]);
    fn write(&self, offset: u64, bytes: &[u8]);
}

/// The driver. Every guest address is a GPA, in bytes.
pub struct Guest<R> {
    pub memory: Memory,
    pub registers: R,
    root: u64,
    queue: u64,
    status: u64,
}

/// A PASID table entry.
#[derive(Debug, Clone, Copy)]
pub enum Entry {
    NotPresent,
    FirstStage {
        table: u64,
        domain: u16,
    },
    SecondStage {
        table: u64,
        domain: u16,
    },
    PassThrough {
        domain: u16,
    },
    /// First-stage tables on second-stage ones, both the guest's.
    Nested {
        domain: u16,
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

impl<R> Deref for Guest<R> {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.memory
    }
}

impl<R: Registers> Guest<R> {
    /// A driver with an empty root table, and a queue of one page of 256-bit descriptors.
    pub fn new(memory: Memory, registers: R) -> Self {
        let [root, queue, status] = [(); 3].map(|()| memory.page());
        Self { memory, registers, root, queue, status }
    }

    /// The same driver on a copy of its memory.
    pub fn moved<S>(&self, memory: Memory, registers: S) -> Guest<S> {
        let Self { root, queue, status, .. } = *self;
        Guest { memory, registers, root, queue, status }
    }

    pub fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn read64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.registers.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn write32(&self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    pub fn status(&self) -> Gsts {
        Gsts::from_bits(self.read32(regs::GSTS))
    }

    /// Sets the root table (scalable mode), starts the queue and enables translation.
    pub fn enable(&self) {
        self.set_root(1);
        self.start_queue();
        self.write32(regs::GCMD, Gcmd::new().with_qie(true).with_te(true).into_bits());
        assert!(self.status().tes());
    }

    /// Sets the root table (legacy mode), starts the queue if it is to be used, and enables
    /// translation.
    pub fn enable_legacy(&self, queue: bool) {
        self.set_root(0);
        if queue {
            self.start_queue();
        }
        self.write32(regs::GCMD, Gcmd::new().with_qie(queue).with_te(true).into_bits());
        assert!(self.status().tes());
    }

    /// Sets the root table, in the translation table mode `ttm`.
    fn set_root(&self, ttm: u8) {
        let rtaddr = Rtaddr::new().with_ttm(ttm).with_rta(self.root / PAGE);
        self.write64(regs::RTADDR, rtaddr.into_bits());
        self.write32(regs::GCMD, Gcmd::new().with_srtp(true).into_bits());
        assert!(self.status().rtps());
    }

    fn start_queue(&self) {
        self.write64(regs::IQT, 0);
        let iqa = Iqa::new().with_dw(true).with_iqa(self.queue / PAGE);
        self.write64(regs::IQA, iqa.into_bits());
        self.write32(regs::GCMD, Gcmd::new().with_qie(true).into_bits());
        assert!(self.status().qies());
    }

    /// Disables translation; the queue stays enabled.
    pub fn disable(&self) {
        self.write32(regs::GCMD, Gcmd::new().with_qie(true).into_bits());
        assert!(!self.status().tes());
    }

    /// Puts `descriptors` and a wait into the queue, and writes the tail.
    pub fn submit(&self, descriptors: &[Descriptor]) -> Completion {
        let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
        self.submit_words(&words)
    }

    /// As [`Self::submit`], with descriptors of any contents.
    pub fn submit_words(&self, descriptors: &[[u64; 4]]) -> Completion {
        self.store(self.status, 0);
        let wait = Descriptor::Wait {
            status: Some(StatusWrite { address: self.status, data: DONE }),
            interrupt: false,
            fence: false,
            drain_page_requests: false,
        };
        let mut tail = self.read64(regs::IQT);
        for descriptor in descriptors.iter().chain([&wait.encode()]) {
            for (word, value) in descriptor.iter().enumerate() {
                self.store(self.queue + tail + 8 * word as u64, *value);
            }
            tail = (tail + 32) % PAGE;
        }
        self.write64(regs::IQT, QueuePointer::from_offset(tail).into_bits());
        self.completion()
    }

    /// Clears an error of the queue: the unit resumes at the descriptor where it stopped.
    pub fn resume(&self) -> Completion {
        self.write32(regs::FSTS, Fsts::new().with_iqe(true).into_bits());
        self.completion()
    }

    /// As [`Self::resume`], after it replaced the descriptor at which the unit stopped.
    pub fn replace_and_resume(&self, descriptor: Descriptor) -> Completion {
        let head = self.queue + self.read64(regs::IQH);
        for (word, value) in descriptor.encode().iter().enumerate() {
            self.store(head + 8 * word as u64, *value);
        }
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

    pub fn faults(&self) -> Fsts {
        Fsts::from_bits(self.read32(regs::FSTS))
    }

    /// Takes the oldest fault record, with its reason. While PPF is set, FRI is the index of the
    /// first one when there was none before; the others follow.
    pub fn take_fault(&self) -> Option<(FaultRecord, Option<FaultReason>)> {
        let status = self.faults();
        if !status.ppf() {
            return None;
        }
        let cap = Cap::from_bits(self.read64(regs::CAP));
        let records = (0..cap.fault_records()).map(|index| {
            let index = (u64::from(status.fri()) + index) % cap.fault_records();
            let at = cap.fault_record_offset() + index * regs::FRCD_SIZE;
            (at, FaultRecord::from_words([self.read64(at), self.read64(at + 8)]))
        });
        let (at, record) = records.into_iter().find(|(_, record)| record.high.f())?;
        // F is RW1C, in the top 32 bits.
        self.write32(at + 12, 1 << 31);
        Some((record, FaultReason::from_code(record.high.fr())))
    }

    /// Writes the PASID table entry of `rid`'s `pasid`, creating missing tables.
    pub fn set_entry(&self, rid: Bdf, pasid: u32, entry: Entry) {
        let slot = self.pasid_slot(rid, pasid);
        let (pgtt, domain, table) = match entry {
            Entry::NotPresent => {
                self.store(slot, 0);
                return;
            }
            Entry::FirstStage { table, domain } => (Pgtt::FirstStage, domain, table),
            Entry::SecondStage { table, domain } => (Pgtt::SecondStage, domain, table),
            Entry::PassThrough { domain } => (Pgtt::PassThrough, domain, 0),
            Entry::Nested { domain } => (Pgtt::Nested, domain, 0),
        };
        // AW: 48 bits, required for pass-through, too.
        let qw0 = PasidEntry0::new().with_p(true).with_aw(2).with_pgtt(pgtt.into_bits());
        let qw1 = PasidEntry1::new().with_did(domain);
        let (qw0, qw2) = match pgtt {
            Pgtt::FirstStage => (qw0, PasidEntry2::new().with_fsptptr(table / PAGE)),
            _ => (qw0.with_ssptptr(table / PAGE), PasidEntry2::new()),
        };
        let entry = PasidEntry { qw0, qw1, qw2, reserved: [0; 5] };
        // The word with P last.
        for (word, value) in entry.to_words().iter().enumerate().rev() {
            self.store(slot + 8 * word as u64, *value);
        }
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

    fn pasid_slot(&self, rid: Bdf, pasid: u32) -> u64 {
        assert!(rid.devfn() < SCALABLE_CONTEXT_ENTRIES, "the upper context table is not used");
        let root = self.root + u64::from(rid.bus()) * ROOT_ENTRY_SIZE;
        let table = self
            .table_at(root, |page| RootHalf::new().with_p(true).with_ctp(page / PAGE).into_bits());
        let context = table + u64::from(rid.devfn()) * SCALABLE_CONTEXT_ENTRY_SIZE;
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

    /// Unmaps a 4 KiB page.
    pub fn unmap(&self, top: u64, iova: u64) {
        let mut table = top;
        for above in (2..=4).rev() {
            table = self.load(table + index(iova, above) * ENTRY_SIZE) & !0xfff;
        }
        self.store(table + index(iova, 1) * ENTRY_SIZE, 0);
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's driver of an SMMUv3.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use twostage::spec::pci::{Bdf, PageResponse, Pasid};
use twostage::spec::smmuv3::command::{Command, SyncSignal, RANGE_ALL};
use twostage::spec::smmuv3::context::{Cd, Cd0, Cd1};
use twostage::spec::smmuv3::event::{EventRecord, EVENT_SIZE};
use twostage::spec::smmuv3::page_request::{pri_resp, PageRequest, Resume, PAGE_REQUEST_SIZE};
use twostage::spec::smmuv3::queue::{
    CmdqCons, CmdqProd, CommandError, OutputCons, OutputProd, QueueBase, QueueLayout, COMMAND_SIZE,
};
use twostage::spec::smmuv3::regs::{
    self, Cr0, Gerror, IrqCfg0, IrqCtrl, StrtabBase, StrtabBaseCfg,
};
use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig, STE_SIZE};
use twostage::spec::smmuv3::translation::{Descriptor, Granule};
use twostage::spec::smmuv3::StreamId;
use twostage::sync::Mutex;

use super::{Mmio, Pages, PAGE};

/// Each table and queue is one page.
const STREAM_BITS: u8 = 6;
const COMMAND_BITS: u8 = 8;
const EVENT_BITS: u8 = 7;
const PAGE_REQUEST_BITS: u8 = 8;
/// Virtual and physical addresses.
const ADDRESS_BITS: u32 = 48;
/// IPS of as many bits.
const IPS_48: u8 = 5;
const GRANULE: Granule = Granule::K4;

/// A stream table entry.
#[derive(Debug, Clone, Copy)]
pub enum Entry {
    /// Refuses everything, without an event.
    Abort,
    /// Addresses are GPAs.
    Bypass,
    /// Stage 1, without substreams.
    Stage1 {
        /// The context descriptor.
        cd: u64,
    },
}

/// The queue's response.
#[derive(Debug, PartialEq, Eq)]
pub enum Completion {
    /// CMDQ_CONS reached the end.
    Done,
    /// It stopped after this many commands, for this reason.
    Stopped(usize, CommandError),
}

/// A driver with a linear stream table of 64 entries, and queues of one page each. Every guest
/// address is a GPA, in bytes.
///
/// Tables that do not exist are made when they are needed. Nothing is invalidated unless a method
/// says so.
#[derive(Debug)]
pub struct Driver<M> {
    /// The guest's memory.
    pub pages: Pages,
    /// The unit's registers.
    pub registers: M,
    streams: u64,
    commands: u64,
    events: u64,
    page_requests: u64,
    /// The PRI queue is in use.
    serves_pages: AtomicBool,
    /// Context descriptors, by their table and ASID.
    contexts: Mutex<HashMap<(u64, u16), u64>>,
    /// CMDQ_PROD before the last commands.
    submitted: Mutex<u32>,
}

impl<M> Deref for Driver<M> {
    type Target = Pages;

    fn deref(&self) -> &Pages {
        &self.pages
    }
}

impl<M: Mmio> Driver<M> {
    /// A driver with a stream table that aborts everything. It does not touch the unit.
    pub fn new(pages: Pages, registers: M) -> Self {
        let [streams, commands, events, page_requests] = [(); 4].map(|()| pages.page());
        let (contexts, submitted) = (Mutex::default(), Mutex::default());
        let serves_pages = AtomicBool::new(false);
        let driver = Self {
            pages,
            registers,
            streams,
            commands,
            events,
            page_requests,
            serves_pages,
            contexts,
            submitted,
        };
        for stream in 0..1 << STREAM_BITS {
            driver.set_entry(StreamId(stream), Entry::Abort);
        }
        driver
    }

    /// The same driver on a copy of its memory, with the registers of another unit.
    pub fn moved<N>(&self, pages: Pages, registers: N) -> Driver<N> {
        let Self { streams, commands, events, page_requests, .. } = *self;
        let contexts = Mutex::new(self.contexts.lock().clone());
        let submitted = Mutex::new(*self.submitted.lock());
        let serves_pages = AtomicBool::new(self.serves_pages.load(Ordering::Relaxed));
        Driver {
            pages,
            registers,
            streams,
            commands,
            events,
            page_requests,
            serves_pages,
            contexts,
            submitted,
        }
    }

    /// Resets the SMMU like a driver: tables and queues, full invalidation, then translation.
    pub fn enable(&self) {
        let queues = self.queues();
        if Cr0::from_bits(self.registers.read32(regs::CR0)) != queues {
            self.registers.write64(
                regs::STRTAB_BASE,
                StrtabBase::new().with_addr(self.streams >> 6).into_bits(),
            );
            let config = StrtabBaseCfg::new().with_log2size(STREAM_BITS);
            self.registers.write32(regs::STRTAB_BASE_CFG, config.into_bits());
            self.registers.write64(regs::CMDQ_BASE, base(self.commands, COMMAND_BITS).into_bits());
            self.registers.write64(regs::EVENTQ_BASE, base(self.events, EVENT_BITS).into_bits());
            let pages = base(self.page_requests, PAGE_REQUEST_BITS);
            self.registers.write64(regs::PRIQ_BASE, pages.into_bits());
            self.set_cr0(queues);
        }
        let reset =
            [Command::CfgiSteRange { stream: StreamId(0), range: RANGE_ALL }, Command::TlbiNsnhAll];
        self.submit_all(&reset);
        self.set_cr0(queues.with_smmuen(true));
    }

    /// Disables translation; the queues stay enabled.
    pub fn disable(&self) {
        self.set_cr0(self.queues());
    }

    /// CR0 with all queues that are in use.
    fn queues(&self) -> Cr0 {
        let pages = self.serves_pages.load(Ordering::Relaxed);
        Cr0::new().with_cmdqen(true).with_eventqen(true).with_priqen(pages)
    }

    /// The next time that it is enabled, the SMMU has a PRI queue.
    pub fn start_page_queue(&self) {
        self.serves_pages.store(true, Ordering::Relaxed);
    }

    fn set_cr0(&self, cr0: Cr0) {
        self.registers.write32(regs::CR0, cr0.into_bits());
        // A host failure delays the acknowledgement; a waiting driver writes again.
        for _ in 0..3 {
            if self.registers.read32(regs::CR0ACK) == cr0.into_bits() {
                return;
            }
            self.registers.write32(regs::CR0, cr0.into_bits());
        }
        panic!("CR0 {cr0:?} is not acknowledged");
    }

    fn command_queue(&self) -> QueueLayout {
        base(self.commands, COMMAND_BITS).layout(COMMAND_SIZE, COMMAND_BITS)
    }

    /// Puts `commands` and a CMD_SYNC into the queue, and writes CMDQ_PROD.
    pub fn submit(&self, commands: &[Command]) -> Completion {
        let words: Vec<_> = commands.iter().map(Command::encode).collect();
        self.submit_words(&words)
    }

    /// As [`Self::submit`], with commands of any contents.
    pub fn submit_words(&self, commands: &[[u64; 2]]) -> Completion {
        let queue = self.command_queue();
        let start = CmdqProd::from_bits(self.registers.read32(regs::CMDQ_PROD)).wr();
        let sync = Command::Sync { signal: SyncSignal::None };
        let mut prod = start;
        for command in commands.iter().chain([&sync.encode()]) {
            self.store_words(queue.address(prod), command);
            prod = queue.next(prod);
        }
        *self.submitted.lock() = start;
        self.registers.write32(regs::CMDQ_PROD, CmdqProd::new().with_wr(prod).into_bits());
        self.completion()
    }

    /// As [`Self::submit`], and resumes after host failures.
    pub fn submit_all(&self, commands: &[Command]) {
        let mut completion = self.submit(commands);
        for _ in 0..3 {
            if completion == Completion::Done {
                return;
            }
            completion = self.resume();
        }
        panic!("the queue stands: {completion:?}");
    }

    /// Acknowledges an error of the queue: the unit resumes at the command where it stopped.
    pub fn resume(&self) -> Completion {
        self.registers.write32(regs::GERRORN, self.registers.read32(regs::GERROR));
        self.completion()
    }

    /// As [`Self::resume`], after it replaced the command at which the unit stopped.
    pub fn replace_and_resume(&self, command: Command) -> Completion {
        let cons = CmdqCons::from_bits(self.registers.read32(regs::CMDQ_CONS));
        let at = self.command_queue().address(cons.rd());
        self.store_words(at, &command.encode());
        self.resume()
    }

    fn completion(&self) -> Completion {
        let queue = self.command_queue();
        let cons = CmdqCons::from_bits(self.registers.read32(regs::CMDQ_CONS));
        if cons.rd() == CmdqProd::from_bits(self.registers.read32(regs::CMDQ_PROD)).wr() {
            return Completion::Done;
        }
        let active = self.registers.read32(regs::GERROR) ^ self.registers.read32(regs::GERRORN);
        assert!(Gerror::from_bits(active).cmdq_err(), "the queue stands, and nobody is told");
        let error = CommandError::from_code(cons.err()).expect("a queue that stops says why");
        let done = queue.used(cons.rd(), *self.submitted.lock());
        Completion::Stopped(done as usize, error)
    }

    /// Changes a stream table entry, without invalidation.
    pub fn set_entry(&self, stream: StreamId, entry: Entry) {
        let low = Ste0::new().with_v(true);
        let high = Ste1::new().with_shcfg(1);
        let (low, high) = match entry {
            Entry::Abort => (low.with_config(StreamConfig::Abort.into_bits()), high),
            Entry::Bypass => (low.with_config(StreamConfig::Bypass.into_bits()), high),
            Entry::Stage1 { cd } => (
                low.with_config(StreamConfig::Stage1.into_bits()).with_s1contextptr(cd >> 6),
                high.with_s1cir(1).with_s1cor(1).with_s1csh(3),
            ),
        };
        self.set_raw_entry(stream, [low.into_bits(), high.into_bits()]);
    }

    /// Writes words 0 and 1 of a stream table entry, V last.
    pub fn set_raw_entry(&self, stream: StreamId, words: [u64; 2]) {
        let at = self.streams + u64::from(stream.raw()) * STE_SIZE;
        self.store_words(at, &words);
    }

    /// Invalidates the entries of these streams.
    pub fn flush_entries(&self, rids: &[Bdf]) -> Completion {
        let of = |rid: &Bdf| Command::CfgiSte { stream: (*rid).into(), leaf: true };
        self.submit(&rids.iter().map(of).collect::<Vec<_>>())
    }

    /// The context descriptor of the stage 1 at `table` with `asid`, created on first use.
    pub fn context(&self, table: u64, asid: u16) -> u64 {
        let mut contexts = self.contexts.lock();
        *contexts.entry((table, asid)).or_insert_with(|| {
            let at = self.page();
            self.write_context(at, table, asid);
            at
        })
    }

    /// Writes a context descriptor, V last.
    pub fn write_context(&self, at: u64, table: u64, asid: u16) {
        let low = Cd0::new()
            .with_t0sz(64 - ADDRESS_BITS as u8)
            .with_tg0(GRANULE.tg0())
            .with_ir0(1)
            .with_or0(1)
            .with_sh0(3)
            .with_epd1(true)
            .with_v(true)
            .with_ips(IPS_48)
            .with_aa64(true)
            .with_r(true)
            .with_a(true)
            .with_aset(true)
            .with_asid(asid);
        let qw1 = Cd1::new().with_ttb0(table >> 4);
        let cd = Cd { qw0: low, qw1, mair: 0xff, ..Cd::default() };
        self.store_words(at, &cd.to_words());
    }

    /// Sets whether transactions that fault by the context descriptor at `at` stall (CD.S), without
    /// invalidation.
    pub fn set_stalls(&self, at: u64, stalls: bool) {
        self.store(at, Cd0::from_bits(self.load(at)).with_s(stalls).into_bits());
    }

    /// Maps one page (`level` 3) or block of 2 MiB (`level` 2) in the stage 1 at `table`.
    pub fn map(&self, table: u64, va: u64, gpa: u64, level: u8, writable: bool) {
        let mut table = table;
        for above in 0..level {
            table = self.table_at(descriptor_at(table, va, above));
        }
        let leaf = Descriptor::new()
            .with_valid(true)
            .with_table(level == 3)
            .with_sh(3)
            .with_af(true)
            .with_ng(true)
            .with_ap_unprivileged(true)
            .with_ap_read_only(!writable)
            .with_address(GRANULE, gpa);
        self.store(descriptor_at(table, va, level), leaf.into_bits());
    }

    /// Unmaps a page.
    pub fn unmap(&self, table: u64, va: u64) {
        let mut table = table;
        for above in 0..3 {
            table = self.table_at(descriptor_at(table, va, above));
        }
        self.store(descriptor_at(table, va, 3), 0);
    }

    /// The table that the descriptor at `at` points to; a new one if there is none.
    fn table_at(&self, at: u64) -> u64 {
        let descriptor = Descriptor::from_bits(self.load(at));
        if descriptor.valid() {
            return descriptor.address_bits() * PAGE;
        }
        let page = self.page();
        let table = Descriptor::new().with_valid(true).with_table(true);
        self.store(at, table.with_address(GRANULE, page).into_bits());
        page
    }

    /// Takes the oldest event out of the queue.
    pub fn take_event(&self) -> Option<EventRecord> {
        let queue = base(self.events, EVENT_BITS).layout(EVENT_SIZE, EVENT_BITS);
        let prod = OutputProd::from_bits(self.registers.read32(regs::EVENTQ_PROD));
        let cons = OutputCons::from_bits(self.registers.read32(regs::EVENTQ_CONS));
        if queue.is_empty(prod.wr(), cons.rd()) {
            return None;
        }
        let at = queue.address(cons.rd());
        let words = [0, 8, 16, 24].map(|offset| self.load(at + offset));
        let next = cons.with_rd(queue.next(cons.rd())).with_ovackflg(prod.ovflg());
        self.registers.write32(regs::EVENTQ_CONS, next.into_bits());
        Some(EventRecord::from_words(words))
    }

    /// Takes the oldest page request out of the queue.
    pub fn take_page_request(&self) -> Option<PageRequest> {
        let queue = base(self.page_requests, PAGE_REQUEST_BITS);
        let queue = queue.layout(PAGE_REQUEST_SIZE, PAGE_REQUEST_BITS);
        let prod = OutputProd::from_bits(self.registers.read32(regs::PRIQ_PROD));
        let cons = OutputCons::from_bits(self.registers.read32(regs::PRIQ_CONS));
        if queue.is_empty(prod.wr(), cons.rd()) {
            return None;
        }
        let at = queue.address(cons.rd());
        let request = PageRequest::decode([0, 8].map(|offset| self.load(at + offset)));
        let next = cons.with_rd(queue.next(cons.rd())).with_ovackflg(prod.ovflg());
        self.registers.write32(regs::PRIQ_CONS, next.into_bits());
        Some(request)
    }

    /// Responds to the group of `request`.
    pub fn respond(&self, request: &PageRequest, response: PageResponse) -> Completion {
        let PageRequest { stream, substream, group, .. } = *request;
        let response = pri_resp(response);
        self.submit(&[Command::PriResp { stream, substream, group, response }])
    }

    /// Says what becomes of the stalled transaction of `event`.
    pub fn resume_stalled(&self, event: &EventRecord, resume: Resume) -> Completion {
        let (stream, stag) = (event.stream(), event.qw1.stag());
        self.submit(&[Command::Resume { stream, stag, response: resume.into_bits() }])
    }

    /// Makes the event interrupt send `data` to `address`.
    pub fn enable_event_interrupt(&self, address: u64, data: u32) {
        let address = IrqCfg0::from_bits(address & IrqCfg0::WRITABLE);
        self.registers.write64(regs::EVENTQ_IRQ_CFG0, address.into_bits());
        self.registers.write32(regs::EVENTQ_IRQ_CFG1, data);
        self.registers.write32(regs::IRQ_CTRL, IrqCtrl::new().with_eventq_irqen(true).into_bits());
    }
}

/// CMD_CFGI_CD of `rid` without substreams.
pub fn cfgi_cd(rid: Bdf) -> Command {
    let substream = Pasid::new(0).expect("0 is a substream");
    Command::CfgiCd { stream: rid.into(), substream, leaf: true }
}

fn base(address: u64, log2size: u8) -> QueueBase {
    QueueBase::new().with_log2size(log2size).with_addr(address >> 5)
}

fn descriptor_at(table: u64, va: u64, level: u8) -> u64 {
    table + GRANULE.index(va, level, ADDRESS_BITS) * 8
}

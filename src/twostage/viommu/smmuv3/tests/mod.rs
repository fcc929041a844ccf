// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The SMMU driven by a guest, on a recording host.

mod configuration;
mod faults;
mod linux;
mod page;
mod page_requests;
mod properties;
mod queue;
mod registers;
mod restore;
mod specification;
mod stalls;

use crate::sync::Mutex;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::spec::pci::PageResponse;
use crate::spec::smmuv3::command::{AddressRange, Command, SyncSignal, Words};
use crate::spec::smmuv3::event::{EventId, EventRecord};
use crate::spec::smmuv3::queue::{CmdqCons, CommandError};
use crate::spec::smmuv3::regs;
use crate::viommu::testing::{guest_memory, GuestAccess, Refusals, MEMORY_SIZE};
use crate::viommu::{HostSideError, PageTicket};

/// Host calls.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Configure(StreamId, StreamPolicy),
    Invalidate(Vec<Command>),
}

/// A host that records its calls, and CMDQ_CONS at the time.
#[derive(Debug, Default)]
struct FakeHost {
    calls: Mutex<Vec<Call>>,
    refusals: Refusals,
    /// The index of the refused command in a refused batch.
    refused: Mutex<usize>,
    /// A refused batch is replaced with a flush of everything.
    flushes: AtomicBool,
    /// No device answers.
    silent: AtomicBool,
    /// What page requests and stalled transactions were answered.
    answers: Mutex<Vec<(PageTicket, PageResponse)>>,
    /// Stalled transactions that it has not given.
    unread: Mutex<Vec<(StalledTransaction, PageTicket)>>,
    /// How often it was asked for them.
    looks: Mutex<u32>,
    /// An SMMU that is halted during every call.
    halting: Mutex<Option<Arc<Smmu>>>,
    /// An SMMU that gets an event of [`STREAM`] during every call.
    faulting: Mutex<Option<Arc<Smmu>>>,
}

impl FakeHost {
    fn record(&self, call: Call) -> Result<(), HostSideError> {
        self.calls.lock().push(call);
        if let Some(smmu) = &*self.faulting.lock() {
            smmu.event(translation_fault(STREAM).to_words());
        }
        if let Some(smmu) = &*self.halting.lock() {
            smmu.halt();
        }
        self.refusals.next_call()
    }
}

impl SmmuHostSide for FakeHost {
    fn configure(&self, stream: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError> {
        self.record(Call::Configure(stream, *policy))
    }

    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError> {
        let refused = *self.refused.lock();
        let flushed = self.flushes.load(Ordering::Relaxed);
        self.record(Call::Invalidate(commands.to_vec()))
            .map_err(|error| SmmuInvalidateError::new(refused, flushed, error))?;
        let of_device = |command: &Command| matches!(command, Command::AtcInv { .. });
        match self.silent.load(Ordering::Relaxed) && commands.iter().any(of_device) {
            true => Err(SmmuInvalidateError::unanswered(silence())),
            false => Ok(()),
        }
    }

    fn respond(&self, _: StreamId, ticket: PageTicket, response: PageResponse) {
        self.answers.lock().push((ticket, response));
    }

    fn take_unread(&self) -> Vec<(StalledTransaction, PageTicket)> {
        *self.looks.lock() += 1;
        std::mem::take(&mut *self.unread.lock())
    }
}

/// The interrupts received; messages are accepted at [`DOORBELL`] only.
#[derive(Debug, Default)]
struct FakeInterrupts(Mutex<Vec<Interrupt>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Interrupt {
    Message(u32),
    Wire(SmmuInterrupt),
}

impl SmmuInterrupts for FakeInterrupts {
    fn message(&self, address: u64, data: u32) -> bool {
        if address == DOORBELL {
            self.0.lock().push(Interrupt::Message(data));
        }
        address == DOORBELL
    }

    fn wire(&self, interrupt: SmmuInterrupt) {
        self.0.lock().push(Interrupt::Wire(interrupt));
    }
}

/// Linear, 16 entries.
const STREAM_TABLE: u64 = 0x4000;
const CONTEXTS: u64 = 0x6000;
/// 256 commands.
const COMMANDS: u64 = 0x8000;
/// 16 records.
const EVENTS: u64 = 0xa000;
/// A word of memory that a CMD_SYNC may write.
const WORD: u64 = 0xc000;
const DOORBELL: u64 = 0x808_0040;

const STREAM: StreamId = StreamId(3);
const OTHER: StreamId = StreamId(4);

struct Guest {
    memory: GuestMemoryMmap,
    host: Arc<FakeHost>,
    interrupts: Arc<FakeInterrupts>,
    smmu: Arc<Smmu>,
}

impl GuestAccess for Guest {
    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.smmu.mmio_read(offset, data);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.smmu.mmio_write(offset, data);
    }
}

impl Guest {
    /// An SMMU with [`STREAM`] and [`OTHER`] behind it, after reset.
    fn new(config: &SmmuConfig) -> Self {
        Self::observed(config, None)
    }

    fn observed(config: &SmmuConfig, observer: Option<Arc<dyn Observer>>) -> Self {
        let memory = guest_memory();
        let host = Arc::new(FakeHost::default());
        let interrupts = Arc::new(FakeInterrupts::default());
        let smmu =
            Smmu::new(config, Arc::new(memory.clone()), host.clone(), interrupts.clone(), observer)
                .unwrap();
        smmu.add_device(STREAM).unwrap();
        smmu.add_device(OTHER).unwrap();
        let guest = Self { memory, host, interrupts, smmu };
        guest.calls();
        guest
    }

    /// A default SMMU with translation enabled: [`STREAM`] uses stage 1, [`OTHER`] is blocked; with
    /// queues and interrupts.
    fn running() -> Self {
        let guest = Self::new(&SmmuConfig::default());
        guest.start();
        guest
    }

    fn start(&self) {
        self.write_entry(STREAM, stage1_entry(CONTEXTS));
        self.write_entry(OTHER, [1, 0]);
        self.write_table_registers();
        self.write_queue_registers();
        self.write32(regs::CR0, 0b1100);
        self.set_interrupts();
        self.write32(regs::CR0, 0b1101);
        assert_eq!(self.read32(regs::CR0ACK), 0b1101);
        self.calls();
    }

    fn write_table_registers(&self) {
        self.write32(regs::CR2, 0b110);
        self.write64(regs::STRTAB_BASE, STREAM_TABLE);
        self.write32(regs::STRTAB_BASE_CFG, 4);
    }

    fn write_queue_registers(&self) {
        self.write64(regs::CMDQ_BASE, COMMANDS | 8);
        self.write64(regs::EVENTQ_BASE, EVENTS | 4);
    }

    /// Message 1 for events, 2 for global errors.
    fn set_interrupts(&self) {
        self.write64(regs::EVENTQ_IRQ_CFG0, DOORBELL);
        self.write32(regs::EVENTQ_IRQ_CFG1, 1);
        self.write64(regs::GERROR_IRQ_CFG0, DOORBELL);
        self.write32(regs::GERROR_IRQ_CFG1, 2);
        self.write32(regs::IRQ_CTRL, 0b101);
        assert_eq!(self.read32(regs::IRQ_CTRLACK), 0b101);
    }

    /// The first two words of a stream table entry.
    fn write_entry(&self, stream: StreamId, words: [u64; 2]) {
        self.write(STREAM_TABLE + 64 * u64::from(stream.0), &words);
    }

    /// Writes commands behind CMDQ_PROD without moving it; returns the new index.
    fn queue_words(&self, commands: &[Words]) -> u32 {
        let mut prod = self.read32(regs::CMDQ_PROD);
        for words in commands {
            self.write(COMMANDS + 16 * u64::from(prod & 0xff), words);
            prod = (prod + 1) & 0x1ff;
        }
        prod
    }

    fn submit_words(&self, commands: &[Words]) {
        let prod = self.queue_words(commands);
        self.write32(regs::CMDQ_PROD, prod);
    }

    fn submit(&self, commands: &[Command]) {
        let words: Vec<_> = commands.iter().map(Command::encode).collect();
        self.submit_words(&words);
    }

    /// CMDQ_CONS: the index, and the error if the queue is stopped.
    fn consumed(&self) -> (u32, Option<CommandError>) {
        let cons = CmdqCons::from_bits(self.read32(regs::CMDQ_CONS));
        let active = self.errors() & 1 != 0;
        (cons.rd(), CommandError::from_code(cons.err()).filter(|_| active))
    }

    /// The active global errors.
    fn errors(&self) -> u32 {
        self.read32(regs::GERROR) ^ self.read32(regs::GERRORN)
    }

    fn acknowledge_errors(&self) {
        self.write32(regs::GERRORN, self.read32(regs::GERROR));
    }

    /// Host calls since the last time.
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.host.calls.lock())
    }

    fn refuse(&self, refuse: bool) {
        self.host.refusals.everything(refuse);
    }

    /// The host refuses everything, including blocking; or nothing any more.
    fn fail_to_block(&self, fail: bool) {
        self.refuse(fail);
        self.host.refusals.block_nothing(fail);
    }

    /// Interrupts since the last time.
    fn interrupts(&self) -> Vec<Interrupt> {
        std::mem::take(&mut self.interrupts.0.lock())
    }

    /// Takes the next record from the event queue, like a driver.
    fn take_event(&self) -> Option<EventRecord> {
        let cons = self.read32(regs::EVENTQ_CONS);
        if (self.read32(regs::EVENTQ_PROD) ^ cons) & 0x1f == 0 {
            return None;
        }
        let address = EVENTS + 32 * u64::from(cons & 0xf);
        let record = EventRecord::from_words(self.memory.read_obj(GuestAddress(address)).unwrap());
        self.write32(regs::EVENTQ_CONS, cons & 1 << 31 | (cons + 1) & 0x1f);
        Some(record)
    }

    /// The event that the guest sees for a translation fault of `stream` reported by the host.
    fn told(&self, stream: StreamId) -> Option<EventId> {
        assert_eq!(self.take_event(), None);
        self.smmu.event(translation_fault(stream).to_words());
        self.take_event().map(|record| {
            assert_eq!(record.stream(), stream);
            record.id().unwrap()
        })
    }
}

/// An entry with context descriptors at `contexts`, without substreams.
fn stage1_entry(contexts: u64) -> [u64; 2] {
    [contexts | 5 << 1 | 1, 0]
}

fn stage1(contexts: u64) -> StreamPolicy {
    StreamPolicy::Stage1 { ste: stage1_entry(contexts) }
}

const BYPASS_ENTRY: [u64; 2] = [4 << 1 | 1, 0];
/// Stage 2 only, which is not offered.
const BAD_ENTRY: [u64; 2] = [6 << 1 | 1, 0];

/// A write that faulted in stage 1.
fn translation_fault(stream: StreamId) -> EventRecord {
    let record = EventRecord::new(EventId::Translation, stream, None);
    EventRecord { input_address: 0x1234_5678, ..record }
}

const SYNC: Command = Command::Sync { signal: SyncSignal::None };
const CFGI_ALL: Command = Command::CfgiSteRange { stream: StreamId(0), range: 31 };

fn cfgi_ste(stream: StreamId) -> Command {
    Command::CfgiSte { stream, leaf: true }
}

fn cfgi_cd_all(stream: StreamId) -> Command {
    Command::CfgiCdAll { stream }
}

/// The invalidation of one page of `asid`.
fn tlbi(asid: u16) -> Command {
    let range = AddressRange::at(u64::from(asid) << 12);
    Command::TlbiNhVa { vmid: 0, asid, range }
}

/// No device has answered.
fn silence() -> HostSideError {
    HostSideError::new("invalidating", false, Arc::new(std::io::Error::other("silence")))
}

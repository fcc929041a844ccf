// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The unit driven by a guest, on a recording host.

mod control;
mod faults;
mod late;
mod page;
mod page_events;
mod page_requests;
mod policies;
mod properties;
mod queue;
mod races;
mod registers;
mod remapping;
mod restore;
mod slices;
mod translation;

use crate::sync::Mutex;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::spec::pci::Pasid;
use crate::spec::vtd::page_request::PageResponse;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::qi::Descriptor;
use crate::spec::vtd::regs::{self, FaultRecord};
use crate::spec::vtd::PageRange;
use crate::viommu::testing::{guest_memory, GuestAccess, Refusals, MEMORY_SIZE};
use crate::viommu::vtd::host_side::{Invalidation, Progress, RequesterConfig, Stage1};
use crate::viommu::HostSideError;

/// Host calls.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Call {
    Configure(Requester, Policy),
    Invalidate(Vec<Invalidation>),
    DeviceTlb(Bdf, Option<u32>, PageRange),
}

/// A host that records its calls, and the word at [`STATUS`] at the time.
#[derive(Debug)]
struct FakeHost {
    memory: GuestMemoryMmap,
    calls: Mutex<Vec<Call>>,
    status_then: Mutex<Vec<u32>>,
    refusals: Refusals,
    /// It invalidates a batch in this many pieces; the call is recorded with the last one.
    pieces: Mutex<u64>,
    /// So often it says that something is left to prepare.
    unprepared: Mutex<u64>,
    /// A unit that is halted during every call.
    halting: Mutex<Option<Arc<VtdIommu>>>,
    /// A unit whose first device faults during every call.
    faulting: Mutex<Option<Arc<VtdIommu>>>,
    /// Responses to page requests.
    answers: Mutex<Vec<(Bdf, PageTicket, PageResponse)>>,
    /// Times that page requests were drained.
    drains: Mutex<u64>,
    /// So often they are not yet.
    undrained: Mutex<u64>,
    /// A device that does not answer invalidations of its TLB.
    silent: Mutex<Option<Bdf>>,
}

impl FakeHost {
    fn new(memory: GuestMemoryMmap) -> Arc<Self> {
        Arc::new(Self {
            memory,
            calls: Mutex::default(),
            status_then: Mutex::default(),
            refusals: Refusals::default(),
            pieces: Mutex::default(),
            unprepared: Mutex::default(),
            halting: Mutex::default(),
            faulting: Mutex::default(),
            answers: Mutex::default(),
            drains: Mutex::default(),
            undrained: Mutex::default(),
            silent: Mutex::default(),
        })
    }

    fn record(&self, call: Call) -> Result<(), HostSideError> {
        self.calls.lock().push(call);
        let status = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        self.status_then.lock().push(status);
        if let Some(iommu) = &*self.faulting.lock() {
            iommu.dma_fault(&fault(Requester::rid(RID)));
        }
        if let Some(iommu) = &*self.halting.lock() {
            iommu.halt();
        }
        self.refusals.next_call()
    }
}

impl VtdHostSide for FakeHost {
    fn prepare(&self, _: Requester, _: &RequesterConfig) -> bool {
        let mut unprepared = self.unprepared.lock();
        let is_prepared = *unprepared == 0;
        *unprepared = unprepared.saturating_sub(1);
        is_prepared
    }

    fn configure(
        &self,
        requester: Requester,
        config: &RequesterConfig,
    ) -> Result<(), HostSideError> {
        self.record(Call::Configure(requester, config.policy))
    }

    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError> {
        self.record(Call::Invalidate(batch.to_vec()))
    }

    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        let piece = progress.next().unwrap_or(0) + 1;
        let left = piece < *self.pieces.lock();
        progress.go_on_at(left.then_some(piece));
        if left {
            return Ok(());
        }
        self.invalidate(batch)
    }

    fn respond(&self, rid: Bdf, ticket: PageTicket, response: PageResponse) {
        self.answers.lock().push((rid, ticket, response));
    }

    fn drain_page_requests(&self, progress: &mut Progress, _: Duration) {
        let mut undrained = self.undrained.lock();
        let left = *undrained > 0;
        *undrained = undrained.saturating_sub(1);
        progress.go_on_at(left.then_some(7));
        if !left {
            *self.drains.lock() += 1;
        }
    }

    fn invalidate_device_tlb(&self, rid: Bdf, pasid: Option<u32>, range: PageRange) -> bool {
        self.record(Call::DeviceTlb(rid, pasid, range)).unwrap();
        *self.silent.lock() != Some(rid)
    }
}

#[derive(Default)]
struct FakeSink(Mutex<Vec<(u64, u32)>>);

impl InterruptSink for FakeSink {
    fn send_msi(&self, address: u64, data: u32) {
        self.0.lock().push((address, data));
    }
}

const ROOT: u64 = 0x1000;
const CONTEXT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const PASID_TABLE: u64 = 0x4000;
const FIRST_STAGE: u64 = 0x5000;
const QUEUE: u64 = 0x8000;
const STATUS: u64 = 0x7000;
/// 01:01.0
const RID: Bdf = Bdf::from_raw(0x0108);
/// 01:10.0, in the upper half of the root entry.
const UPPER_RID: Bdf = Bdf::from_raw(0x0180);
const DOMAIN: u16 = 0x17;

struct Guest {
    memory: GuestMemoryMmap,
    host: Arc<FakeHost>,
    sink: Arc<FakeSink>,
    iommu: Arc<VtdIommu>,
}

impl GuestAccess for Guest {
    fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.iommu.mmio_read(offset, data);
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        self.iommu.mmio_write(offset, data);
    }
}

impl Guest {
    /// A unit with one device, after reset.
    fn new(config: VtdConfig) -> Self {
        let memory = guest_memory();
        Self::reading(config, memory.clone(), Arc::new(memory))
    }

    /// The same, with `read` as the unit's access to the guest's `memory`.
    fn reading(config: VtdConfig, memory: GuestMemoryMmap, read: Arc<dyn TableMemory>) -> Self {
        let host = FakeHost::new(memory.clone());
        let sink = Arc::new(FakeSink::default());
        let iommu = VtdIommu::new(&config, read, host.clone(), sink.clone(), None).unwrap();
        iommu.add_device(RID).unwrap();
        let guest = Self { memory, host, sink, iommu };
        guest.calls();
        guest
    }

    /// A default unit with well-formed scalable-mode tables, a running 256-bit queue and
    /// translation enabled.
    fn running() -> Self {
        let guest = Self::new(VtdConfig::default());
        guest.write_tables();
        guest.set_root(0x400);
        guest.enable_queue(0x800);
        guest.enable_translation();
        guest.calls();
        guest
    }

    /// Root, context, PASID directory and PASID table for [`RID`], with first-stage tables for
    /// its requests without PASID.
    fn write_tables(&self) {
        self.write(ROOT + 0x10, &[CONTEXT | 1, 0]);
        self.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 3 | 1, 0, 0, 0]);
        self.write(DIRECTORY, &[PASID_TABLE | 1]);
        self.write_pasid(0, FIRST_STAGE);
    }

    /// A first-stage PASID table entry.
    fn write_pasid(&self, pasid: u64, table: u64) {
        self.write(PASID_TABLE + 64 * pasid, &[1 << 6 | 1, u64::from(DOMAIN), table]);
    }

    fn head(&self) -> u64 {
        self.read64(regs::IQH)
    }

    fn status(&self) -> u32 {
        self.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }

    /// A global command as drivers write it: the enabled bits, and one change.
    fn command(&self, change: impl FnOnce(u32) -> u32) {
        let enabled = self.read32(regs::GSTS) & 0x96ff_ffff;
        self.write32(regs::GCMD, change(enabled));
    }

    /// Sets the root table, with `flags` in the low bits (TTM).
    fn set_root(&self, flags: u64) {
        self.write64(regs::RTADDR, ROOT | flags);
        self.command(|enabled| enabled | 1 << 30);
    }

    fn enable_translation(&self) {
        self.command(|enabled| enabled | 1 << 31);
    }

    fn disable_translation(&self) {
        self.command(|enabled| enabled & !(1 << 31));
    }

    /// Enables a queue of one page, with `flags` in the low bits of IQA (DW, QS).
    fn enable_queue(&self, flags: u64) {
        self.write64(regs::IQT, 0);
        self.write64(regs::IQA, QUEUE | flags);
        self.command(|enabled| enabled | 1 << 26);
    }

    /// Writes raw 256-bit descriptors behind the tail without moving it; returns the new tail.
    fn queue_words(&self, descriptors: &[[u64; 4]]) -> u64 {
        let mut tail = self.read64(regs::IQT);
        for words in descriptors {
            self.write(QUEUE + tail, words);
            tail = (tail + 32) % 0x1000;
        }
        tail
    }

    fn submit_words(&self, descriptors: &[[u64; 4]]) {
        let tail = self.queue_words(descriptors);
        self.write64(regs::IQT, tail);
    }

    fn submit(&self, descriptors: &[Descriptor]) {
        let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
        self.submit_words(&words);
    }

    /// Host calls since the last time.
    fn calls(&self) -> Vec<Call> {
        self.host.status_then.lock().clear();
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

    /// Messages sent since the last time.
    fn messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.sink.0.lock())
    }

    fn fault_record(&self, index: u64) -> FaultRecord {
        let offset = 0x220 + 16 * index;
        FaultRecord::from_words([self.read64(offset), self.read64(offset + 8)])
    }

    /// The recorded reason of a DMA fault of `requester`, whatever the host says; `None` if it is
    /// not recorded.
    fn reason(&self, requester: Requester) -> Option<u8> {
        self.iommu.dma_fault(&fault(requester));
        let record = self.fault_record(0);
        let recorded = record.high.f().then_some(record.high.fr());
        let index = self.iommu.snapshot().unwrap().faults.next;
        // Back to the first record for the next time.
        if index != 0 {
            self.iommu.fault_log().next = 0;
            self.write64(0x228, 1 << 63);
        }
        recorded
    }
}

/// A write that faulted, without a reason from the host.
fn fault(requester: Requester) -> DmaFault {
    DmaFault {
        requester,
        address: 0x1234_5678,
        write: true,
        execute: false,
        privileged: false,
        reason: None,
        stage2: false,
    }
}

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).unwrap()
}

fn with_pasid(value: u32) -> Requester {
    Requester { rid: RID, pasid: Some(pasid(value)) }
}

/// The policy of tables at `table`, as written by [`Guest::write_pasid`].
fn first_stage(table: u64) -> Policy {
    Policy::Stage1(Stage1::VtdFirstStage(crate::viommu::vtd::VtdFirstStage {
        table,
        paging_mode: PagingMode::Level4,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
    }))
}

fn blocked(reason: u8) -> Policy {
    Policy::Blocked(FaultReason::from_code(reason).unwrap())
}

fn wait(data: u32) -> Descriptor {
    Descriptor::Wait {
        status: Some(crate::spec::vtd::qi::StatusWrite { address: STATUS, data }),
        interrupt: false,
        fence: false,
        drain_page_requests: false,
    }
}

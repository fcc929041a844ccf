// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The invalidation queue, from the tail write to the wait's status: the whole stack in one
//! process, on the emulated host; the lower bound is a register access. And the command queue of
//! the SMMUv3 on a host that does nothing: the cost of the virtual SMMU itself.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{AddressRange, Command, SyncSignal};
use twostage::spec::smmuv3::{regs as smmu_regs, StreamId};
use twostage::spec::vtd::qi::{AddressMask, Descriptor};
use twostage::spec::vtd::regs;
use twostage::viommu::smmuv3::{
    Smmu, SmmuConfig, SmmuHostSide, SmmuInterrupt, SmmuInterrupts, SmmuInvalidateError,
    StreamPolicy,
};
use twostage::viommu::{HostSideError, TableMemory};
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::kit::Mmio;
use vm_memory::{GuestAddress, GuestMemoryMmap};

#[allow(dead_code)] // The tests use all of these, the bench a part.
#[path = "../tests/two_stages/common.rs"]
mod common;
#[allow(dead_code)]
#[path = "../tests/two_stages/vtd/machine.rs"]
mod machine;

use common::{A, PAGE};
use machine::Machine;

const DOMAIN: u16 = 1;
const IOVA: u64 = 0x4000_0000;

/// A machine whose device `A` is on first-stage tables that map a page at `IOVA`.
fn machine() -> Machine {
    let machine = Machine::new();
    let table = machine.guest.page();
    machine.guest.map(table, IOVA, machine.guest.page(), 1, true);
    machine.guest.enable();
    machine.guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    assert_eq!(machine.guest.flush_pasid_cache(), Completion::Done);
    machine.read(A, None, IOVA).expect("the page is mapped");
    machine
}

fn page(number: u64) -> Descriptor {
    let address = IOVA + number * PAGE;
    let pasid = Pasid::new(0).expect("0 fits in 20 bits");
    let range = Some(AddressMask { address, mask: 0, leaf: true });
    Descriptor::PasidIotlb { domain: DOMAIN, pasid, range }
}

fn tail_to_status(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("descriptors from tail write to wait status");
    for (name, stride) in [("adjacent pages", 1), ("scattered pages", 2)] {
        // One fewer than the queue of 128 holds, including the wait.
        for count in [1, 16, 120] {
            let machine = machine();
            let descriptors: Vec<_> =
                (0..count).map(|number| page(number * stride).encode()).collect();
            group.throughput(Throughput::Elements(count));
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                // What the guest does to write descriptors is its own affair.
                bencher.iter_custom(|iterations| {
                    let mut time = Duration::ZERO;
                    for _ in 0..iterations {
                        let tail = machine.guest.put_words(black_box(&descriptors));
                        let start = Instant::now();
                        let completion = machine.guest.ring(tail);
                        time += start.elapsed();
                        assert_eq!(completion, Completion::Done);
                    }
                    time
                });
            });
        }
    }
    group.finish();
}

/// The cost of a driver's read of a status register.
fn register_read(criterion: &mut Criterion) {
    let machine = machine();
    criterion.bench_function("register read", |bencher| {
        bencher.iter(|| machine.guest.registers.read32(black_box(regs::FSTS)));
    });
}

/// The SMMUv3's command queue: its address, and the binary logarithm of its number of entries.
const QUEUE: u64 = 0x1_0000;
const LOG2SIZE: u64 = 8;
/// Indices have one more bit: the wrap.
const INDICES: u64 = (2 << LOG2SIZE) - 1;
const ENTRIES: u64 = (1 << LOG2SIZE) - 1;

/// A host that does nothing.
#[derive(Debug)]
struct Idle;

impl SmmuHostSide for Idle {
    fn configure(&self, _: StreamId, _: &StreamPolicy) -> Result<(), HostSideError> {
        Ok(())
    }

    fn invalidate(&self, _: &[Command]) -> Result<(), SmmuInvalidateError> {
        Ok(())
    }
}

impl SmmuInterrupts for Idle {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}

/// The SMMU, and the guest that drives it.
struct SmmuMachine {
    memory: GuestMemoryMmap,
    smmu: Arc<Smmu>,
}

impl SmmuMachine {
    /// With the queue enabled.
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let idle = Arc::new(Idle);
        let config = SmmuConfig::default();
        let smmu = Smmu::new(&config, Arc::new(memory.clone()), idle.clone(), idle, None).unwrap();
        smmu.add_device(StreamId(8)).unwrap();
        smmu.mmio_write(smmu_regs::CMDQ_BASE, &(QUEUE | LOG2SIZE).to_le_bytes());
        smmu.mmio_write(smmu_regs::CR0, &(1u32 << 3).to_le_bytes());
        Self { memory, smmu }
    }

    /// Invalidates `pages` pages, and waits for CMDQ_CONS.
    fn invalidate(&self, pages: u64) {
        let mut prod = u64::from(self.read(smmu_regs::CMDQ_PROD));
        let mut push = |command: Command| {
            let words = command.encode().map(u64::to_le_bytes);
            let entry = QUEUE + 16 * (prod & ENTRIES);
            TableMemory::write(&self.memory, entry, words.as_flattened()).unwrap();
            prod = (prod + 1) & INDICES;
        };
        for page in 0..pages {
            push(Command::TlbiNhVa { vmid: 0, asid: 1, range: AddressRange::at(page << 12) });
        }
        push(Command::Sync { signal: SyncSignal::None });
        self.smmu.mmio_write(smmu_regs::CMDQ_PROD, &(prod as u32).to_le_bytes());
        assert_eq!(u64::from(self.read(smmu_regs::CMDQ_CONS)), prod);
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.smmu.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

fn smmu_commands(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("SMMUv3 commands from CMDQ_PROD write to CMD_SYNC");
    for count in [1, 16, 120] {
        let machine = SmmuMachine::new();
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| machine.invalidate(black_box(count)));
        });
    }
    group.finish();
}

criterion_group!(benches, tail_to_status, register_read, smmu_commands);
criterion_main!(benches);

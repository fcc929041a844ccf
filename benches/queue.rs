// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The invalidation queue, from the tail write to the wait's status: the whole stack in one
//! process, on the emulated host; the lower bound is a register access. And the command queue of
//! the SMMUv3 on a host that does nothing: the cost of the virtual SMMU itself.

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::spec::pci::Pasid;
use twostage::spec::vtd::qi::{AddressMask, Descriptor};
use twostage::spec::vtd::regs;

#[path = "queue/smmu.rs"]
mod smmu;

#[allow(dead_code)] // The tests use all of these, the bench a part.
#[path = "../tests/two_stages/common.rs"]
mod common;
#[allow(dead_code)]
#[path = "../tests/two_stages/vtd/guest.rs"]
mod guest;
#[allow(dead_code)]
#[path = "../tests/two_stages/vtd/machine.rs"]
mod machine;

use common::{A, PAGE};
use guest::{Completion, Entry};
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
            let descriptors: Vec<_> = (0..count).map(|number| page(number * stride)).collect();
            group.throughput(Throughput::Elements(count));
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter(|| {
                    let completion = machine.guest.submit(black_box(&descriptors));
                    assert_eq!(completion, Completion::Done);
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
        bencher.iter(|| machine.guest.read32(black_box(regs::FSTS)));
    });
}

fn smmu_commands(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("SMMUv3 commands from CMDQ_PROD write to CMD_SYNC");
    for count in [1, 16, 120] {
        let machine = smmu::Machine::new();
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| machine.invalidate(black_box(count)));
        });
    }
    group.finish();
}

criterion_group!(benches, tail_to_status, register_read, smmu_commands);
criterion_main!(benches);

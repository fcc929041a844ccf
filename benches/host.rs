// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of the emulated host's verbs while a guest runs: attach and replace, and invalidation
//! in batches. The kernel's figures for the same calls are in docs/benchmarks.md.

use std::sync::Arc;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, HostIommu, HwptAlloc, HwptData, HwptFlags,
    InvalidateData, MapTarget, ObjectId, Protection, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::{GuestAddress, GuestRegionMmap};

const PAGE: u64 = 4 << 10;
const MEMORY: usize = 16 << 20;

/// A device that is attached to the nesting parent of an IOAS.
struct Machine {
    host: Arc<EmulatedHost>,
    dev: ObjectId,
    parent: ObjectId,
}

impl Machine {
    fn new() -> Self {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        host.add_device("edu0", unit, Bdf::from_raw(0x20), DeviceConfig::default())
            .expect("a new name and id");
        let dev = host.device_bind("edu0").expect("it is there");
        let ioas = host.ioas_alloc().expect("ids are left");
        let region =
            GuestRegionMmap::<()>::from_range(GuestAddress(0), MEMORY, None).expect("memory");
        let memory = UserMemory::whole(Arc::new(region));
        host.ioas_map(ioas, &memory, MapTarget::Fixed(0), Protection::READ_WRITE).expect("empty");
        let flags = HwptFlags::new().with_nest_parent(true);
        let parent = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault: None };
        let parent = host.hwpt_alloc(&parent).expect("the unit nests");
        host.device_attach(dev, None, parent).expect("they fit");
        Self { host, dev, parent }
    }

    /// A nested HWPT of tables at `table`.
    fn nested(&self, table: u64) -> ObjectId {
        let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: table, addr_width: 48, ..Default::default() };
        let data = HwptData::VtdS1(tables);
        let (flags, dev, pt) = (HwptFlags::new(), self.dev, self.parent);
        let alloc = HwptAlloc { flags, dev, pt, data, fault: None };
        self.host.hwpt_alloc(&alloc).expect("the parent nests")
    }

    fn attach(&self, pt: ObjectId) {
        self.host.device_attach(self.dev, None, pt).expect("they fit");
    }
}

fn attach(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attach");
    let machine = Machine::new();
    let (one, other) = (machine.nested(PAGE), machine.nested(2 * PAGE));
    group.bench_function("detach and attach", |bencher| {
        bencher.iter(|| {
            machine.host.device_detach(machine.dev, None).expect("it is attached");
            machine.attach(one);
        });
    });
    let replacements = [("bypass by nested and back", machine.parent), ("nested by nested", other)];
    for (name, second) in replacements {
        group.bench_function(format!("replace {name}"), |bencher| {
            bencher.iter(|| {
                machine.attach(second);
                machine.attach(one);
            });
        });
    }
    group.bench_function("HWPT_ALLOC, replace, DESTROY of the old", |bencher| {
        let mut old = machine.nested(3 * PAGE);
        machine.attach(old);
        bencher.iter(|| {
            let new = machine.nested(3 * PAGE);
            machine.attach(new);
            machine.host.destroy(old).expect("nobody uses it");
            old = new;
        });
    });
    group.finish();
}

fn invalidate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("HWPT_INVALIDATE");
    let machine = Machine::new();
    let nested = machine.nested(PAGE);
    machine.attach(nested);
    for batch in [1, 256, 4096u64] {
        let entry = |number| iommu_hwpt_vtd_s1_invalidate {
            // Not adjacent, so that they cannot be merged.
            addr: number * 2 * PAGE,
            npages: 1,
            ..Default::default()
        };
        let entries: Vec<_> = (0..batch).map(entry).collect();
        group.throughput(Throughput::Elements(batch));
        group.bench_function(BenchmarkId::from_parameter(batch), |bencher| {
            bencher.iter(|| {
                let data = InvalidateData::VtdS1(&entries);
                machine.host.hwpt_invalidate(nested, data).expect("every entry is legal");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, attach, invalidate);
criterion_main!(benches);

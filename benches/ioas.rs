// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of mapping guest memory into the emulated host: pieces from 4 KiB to a sparse 1 TiB,
//! and one more page with many others mapped.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion};
use twostage::iommufd::{
    HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId, Protection, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

const PAGE: u64 = 4 << 10;
const GIB: u64 = 1 << 30;

/// `length` bytes of address space, sparse and never touched.
fn sparse(length: u64) -> UserMemory {
    let region = MmapRegionBuilder::<()>::new(length as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .expect("address space is plenty");
    let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("no wrap at zero");
    UserMemory::whole(Arc::new(region))
}

/// A host with one device attached to a nesting parent on the IOAS.
fn host() -> (Arc<EmulatedHost>, ObjectId) {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("edu0", unit, Bdf::from_raw(0x20), DeviceConfig::default())
        .expect("a new name and id");
    let dev = host.device_bind("edu0").expect("it is there");
    let ioas = host.ioas_alloc().expect("ids are left");
    let parent = HwptAlloc {
        flags: HwptFlags::new().with_nest_parent(true),
        dev,
        pt: ioas,
        data: HwptData::None,
        fault: None,
    };
    let parent = host.hwpt_alloc(&parent).expect("the unit nests");
    host.device_attach(dev, None, parent).expect("they fit");
    (host, ioas)
}

fn map_and_unmap(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("IOAS map and unmap");
    for (name, length) in
        [("4 KiB", PAGE), ("2 MiB", 2 << 20), ("1 GiB", GIB), ("1 TiB, sparse", GIB << 10)]
    {
        let (host, ioas) = host();
        let memory = sparse(length);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let target = MapTarget::Fixed(4 * GIB);
                host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).expect("it is free");
                host.ioas_unmap(ioas, 4 * GIB, black_box(length)).expect("it is mapped")
            });
        });
    }
    group.finish();
}

fn beside_many(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("IOAS map and unmap 4 KiB beside");
    for areas in [0, 1_000, 100_000u64] {
        let (host, ioas) = host();
        let memory = sparse(PAGE);
        for area in 0..areas {
            let target = MapTarget::Fixed(8 * GIB + area * 2 * PAGE);
            host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).expect("it is free");
        }
        let middle = 8 * GIB + (areas / 2) * 2 * PAGE + PAGE;
        group.bench_function(BenchmarkId::from_parameter(areas), |bencher| {
            bencher.iter(|| {
                let target = MapTarget::Fixed(middle);
                host.ioas_map(ioas, &memory, target, Protection::READ_WRITE).expect("it is free");
                host.ioas_unmap(ioas, middle, black_box(PAGE)).expect("it is mapped")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, map_and_unmap, beside_many);
criterion_main!(benches);

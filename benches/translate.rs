// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of a DMA translation: hits and misses, compared with `vm_memory`'s `Iotlb` behind a
//! lock, and with the bare chain of loads that a walk needs; and the cost of copying a whole buffer
//! by the port and by `vm_memory`'s `IommuMemory`.
//!
//! Every translation figure is for a random page among so many, including the critical section.
//! Addresses come from a precomputed table.

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, Protection, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAccess, DmaAttributes, DmaPort, EmulatedHost, VtdUnit, VtdUnitConfig,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, IommuMemory, Iotlb, MemoryRegionAddress,
    Permissions,
};

const PAGE: u64 = 0x1000;
/// IOVA of the first page.
const IOVA: u64 = 0x12_0000_0000;
/// Offset of the first table, after the mapped pages.
const TABLES: u64 = 0x2000_0000;
const MEMORY: usize = 0x2800_0000;
/// Numbers of pages that translations are spread over.
const SPREADS: [u64; 3] = [64, 1 << 10, 64 << 10];

/// A host with one nested device, with `pages` IOVAs mapped in a shuffled order.
struct Machine {
    unit: Arc<VtdUnit>,
    rid: Bdf,
    memory: Arc<GuestRegionMmap>,
    _host: Arc<EmulatedHost>,
}

impl Machine {
    fn new(pages: u64, config: VtdUnitConfig) -> Self {
        let host = EmulatedHost::new();
        let unit = VtdUnit::new(config);
        let unit_id = host.add_unit(Arc::clone(&unit));
        let rid = Bdf::new(0, 3, 0).unwrap();
        host.add_device("device", unit_id, rid, DeviceConfig::default()).unwrap();
        let dev = host.device_bind("device").unwrap();
        let memory = GuestRegionMmap::<()>::from_range(GuestAddress(0), MEMORY, None).unwrap();
        let memory = Arc::new(memory);
        build_tables(&memory, pages);
        let ioas = host.ioas_alloc().unwrap();
        let whole = UserMemory::whole(memory.clone());
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        let alloc = |flags, pt, data| {
            host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None }).unwrap()
        };
        let parent = alloc(HwptFlags::new().with_nest_parent(true), ioas, HwptData::None);
        let data = iommu_hwpt_vtd_s1 { pgtbl_addr: TABLES, addr_width: 48, ..Default::default() };
        let nested = alloc(HwptFlags::new(), parent, HwptData::VtdS1(data));
        host.device_attach(dev, None, nested).unwrap();
        Self { unit, rid, memory, _host: host }
    }

    fn port(&self) -> DmaPort {
        self.unit.port(self.rid.raw())
    }
}

/// First-stage tables at [`TABLES`] for `pages` 4 KiB pages from [`IOVA`] on.
fn build_tables(memory: &GuestRegionMmap, pages: u64) {
    let store = |offset: u64, word: u64| {
        memory.store(word.to_le(), MemoryRegionAddress(offset), Ordering::Relaxed).unwrap();
    };
    let index = |iova: u64, level: u64| iova >> (12 + 9 * (level - 1)) & 0x1ff;
    // One table for each of the upper levels, then as many as the pages need.
    let leaf_table = |page: u64| TABLES + (3 + page / 512) * PAGE;
    store(TABLES + index(IOVA, 4) * 8, (TABLES + PAGE) | 0x27);
    store(TABLES + PAGE + index(IOVA, 3) * 8, (TABLES + 2 * PAGE) | 0x27);
    for page in 0..pages {
        let iova = IOVA + page * PAGE;
        if page.is_multiple_of(512) {
            store(TABLES + 2 * PAGE + index(iova, 2) * 8, leaf_table(page) | 0x27);
        }
        store(leaf_table(page) + index(iova, 1) * 8, (shuffled(page, pages) * PAGE) | 0x67);
    }
}

/// A permutation of pages, so that neighbours are not contiguous and cannot be merged.
fn shuffled(page: u64, pages: u64) -> u64 {
    page.wrapping_mul(0x9e37_79b1) % pages
}

/// Addresses in a random order, each an 8-byte word of a page.
fn addresses(pages: u64) -> Vec<u64> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    (0..1 << 16)
        .map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            IOVA + random % pages * PAGE + (random >> 40 & 0xff8)
        })
        .collect()
}

#[inline]
fn translate(port: &mut DmaPort, iova: u64) {
    let plain = DmaAttributes::default();
    let translated = port.translate(plain, iova, 8, DmaAccess::Read).unwrap();
    black_box(translated.slice().len());
}

/// The time for `threads` threads to do `iterations` of `work` each, concurrently.
fn on_threads<T: Send>(
    iterations: u64,
    states: Vec<T>,
    work: impl Fn(&mut T, u64) + Sync,
) -> Duration {
    let barrier = Barrier::new(states.len());
    let (barrier, work) = (&barrier, &work);
    thread::scope(|scope| {
        let threads: Vec<_> = states
            .into_iter()
            .map(|mut state| {
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    for iteration in 0..iterations {
                        work(&mut state, iteration);
                    }
                    start.elapsed()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap_or_default()
    })
}

fn hits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hit");
    for pages in SPREADS {
        let config = VtdUnitConfig::default().with_iotlb_entries(256 << 10);
        let machine = Machine::new(pages, config);
        let addresses = addresses(pages);
        let mut port = machine.port();
        for page in 0..pages {
            translate(&mut port, IOVA + page * PAGE);
        }
        let at = |iteration: u64| addresses[iteration as usize & 0xffff];
        for threads in [1, 2] {
            let id = BenchmarkId::new(format!("{threads} thread(s), pages"), pages);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|iterations| {
                    let ports = (0..threads).map(|_| machine.port()).collect();
                    on_threads(iterations, ports, |port, it| translate(port, at(it)))
                });
            });
        }
    }
    let machine = Machine::new(1, VtdUnitConfig::default());
    let mut port = machine.port();
    group.bench_function("the same page", |bencher| {
        bencher.iter(|| translate(&mut port, black_box(IOVA)));
    });
    let machine = Machine::new(1, VtdUnitConfig::default().with_device_tlb(true));
    let mut port = machine.port();
    port.control().set_device_tlb(true);
    group.bench_function("the same page, in the device TLB", |bencher| {
        bencher.iter(|| translate(&mut port, black_box(IOVA)));
    });
    group.finish();
}

fn misses(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("miss");
    for (name, paging_structure_entries) in [("warm", 4096), ("cold", 0)] {
        for pages in SPREADS {
            // Without an IOTLB every request walks.
            let machine = Machine::new(
                pages,
                VtdUnitConfig::default()
                    .with_iotlb_entries(0)
                    .with_paging_structure_entries(paging_structure_entries),
            );
            let addresses = addresses(pages);
            let at = |iteration: u64| addresses[iteration as usize & 0xffff];
            for threads in [1, 2] {
                let name = format!("{name} paging structures, {threads} thread(s), pages");
                group.bench_function(BenchmarkId::new(name, pages), |bencher| {
                    bencher.iter_custom(|iterations| {
                        let ports = (0..threads).map(|_| machine.port()).collect();
                        on_threads(iterations, ports, |port, it| translate(port, at(it)))
                    });
                });
            }
        }
    }
    group.finish();
}

/// Only the loads of a walk: each address depends on the word loaded before, and the last one is in
/// a table with as many leaves as there are pages.
fn dependent_loads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dependent loads");
    for pages in SPREADS {
        let leaves: Vec<u64> = (0..pages).map(|page| shuffled(page, pages)).collect();
        let upper: Vec<u64> = vec![0; 3 * 512];
        let addresses = addresses(pages);
        let (mut iteration, mut found) = (0, 0);
        group.bench_function(BenchmarkId::new("4 loads, pages", pages), |bencher| {
            bencher.iter(|| {
                iteration += 1;
                // The address depends on the previous walk, otherwise walks would overlap.
                let iova = addresses[(iteration ^ found as usize) & 0xffff] - IOVA;
                let mut base = 0;
                for level in [2, 1, 0] {
                    let index = base + level * 512 + (iova >> (21 + 9 * level) & 0x1ff);
                    base = black_box(upper[index as usize]);
                }
                found = leaves[(base + iova / PAGE) as usize];
            });
        });
    }
    group.finish();
}

fn vm_memory_iotlb(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vm_memory Iotlb in a RwLock");
    for pages in SPREADS {
        let mut iotlb = Iotlb::new();
        for page in 0..pages {
            let to = GuestAddress(shuffled(page, pages) * PAGE);
            let from = GuestAddress(IOVA + page * PAGE);
            iotlb.set_mapping(from, to, PAGE as usize, Permissions::ReadWrite).unwrap();
        }
        let iotlb = RwLock::new(iotlb);
        let addresses = addresses(pages);
        let lookup = |iova: u64| {
            let guard = iotlb.read().unwrap();
            let found = Iotlb::lookup(guard, GuestAddress(iova), 8, Permissions::Read).unwrap();
            black_box(found.map(|range| range.base.0).sum::<u64>());
        };
        for threads in [1, 2] {
            let id = BenchmarkId::new(format!("{threads} thread(s), entries"), pages);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|iterations| {
                    on_threads(iterations, vec![(); threads], |(), it| {
                        lookup(addresses[it as usize & 0xffff]);
                    })
                });
            });
        }
    }
    group.finish();
}

/// Device buffers of discontiguous pages, which the device reads like the virtio disk does: at most
/// 128 KiB at a time. All translations are cached.
fn buffers(criterion: &mut Criterion) {
    const AT_ONCE: usize = 128 << 10;
    let mut group = criterion.benchmark_group("buffer");
    for (name, length) in [("4 KiB", 4 << 10), ("1 MiB", 1 << 20)] {
        group.throughput(Throughput::Bytes(length as u64));
        let machine = Machine::new(length as u64 / PAGE, VtdUnitConfig::default());
        let memory = GuestMemoryMmap::from_arc_regions(vec![machine.memory.clone()]).unwrap();
        let (mut port, mut data) = (machine.port(), vec![0; length]);
        let pieces = || (IOVA..).step_by(AT_ONCE);
        group.bench_function(BenchmarkId::new("by the port", name), |bencher| {
            bencher.iter(|| {
                for (iova, piece) in pieces().zip(data.chunks_mut(AT_ONCE)) {
                    port.read(DmaAttributes::default(), iova, black_box(piece)).unwrap();
                }
            });
        });
        group.bench_function(BenchmarkId::new("by IommuMemory", name), |bencher| {
            bencher.iter(|| {
                for (iova, piece) in pieces().zip(data.chunks_mut(AT_ONCE)) {
                    let section = port.section(DmaAttributes::default());
                    let memory = IommuMemory::new(memory.clone(), section, true, ());
                    memory.read_slice(black_box(piece), GuestAddress(iova)).unwrap();
                }
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = hits, misses, dependent_loads, vm_memory_iotlb, buffers
}
criterion_main!(benches);

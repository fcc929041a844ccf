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

use criterion::measurement::WallTime;
use criterion::{
    criterion_group, criterion_main, BenchmarkGroup, BenchmarkId, Criterion, Throughput,
};
use twostage::iommufd::{
    iommu_hwpt_arm_smmuv3, iommu_hwpt_vtd_s1, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget,
    ObjectId, Protection, UserMemory, ViommuKind,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAccess, DmaAttributes, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig,
    UnitId, VtdUnit, VtdUnitConfig,
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, IommuMemory, Iotlb, MemoryRegionAddress,
    Permissions,
};

const PAGE: u64 = 0x1000;
/// IOVA of the first page.
const IOVA: u64 = 0x12_0000_0000;
/// Where the guest has its memory: below, an SMMU's host reserves addresses.
const BASE: u64 = 0x4000_0000;
/// Offset of the first table, after the mapped pages.
const TABLES: u64 = 0x2000_0000;
const MEMORY: usize = 0x2800_0000;
/// Offset of the SMMUv3's context descriptor, before the tables.
const CONTEXT: u64 = TABLES - PAGE;
/// Numbers of pages that translations are spread over.
const SPREADS: [u64; 3] = [64, 1 << 10, 64 << 10];

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// The IOMMU of a machine, with the entries of its IOTLB and its paging-structure cache.
#[derive(Clone, Copy)]
enum Unit {
    Vtd { iotlb: usize, tables: usize },
    SmmuV3 { iotlb: usize, tables: usize },
}

/// A host with one nested device, with `pages` IOVAs mapped in a shuffled order.
struct Machine {
    memory: Arc<GuestRegionMmap>,
    host: Arc<EmulatedHost>,
}

impl Machine {
    fn new(pages: u64, unit: Unit) -> Self {
        match unit {
            Unit::Vtd { iotlb, tables } => {
                let config = VtdUnitConfig::default()
                    .with_iotlb_entries(iotlb)
                    .with_paging_structure_entries(tables);
                Self::vtd(pages, config)
            }
            Unit::SmmuV3 { iotlb, tables } => {
                let config = SmmuV3UnitConfig::default()
                    .with_iotlb_entries(iotlb)
                    .with_paging_structure_entries(tables);
                let machine = Self::of(|host| host.add_unit(SmmuV3Unit::new(config)));
                // Pages of an ASID, with AF.
                machine.build_tables(pages, 3, 0xc43);
                machine.nest_smmuv3();
                machine
            }
        }
    }

    fn vtd(pages: u64, config: VtdUnitConfig) -> Self {
        let machine = Self::of(|host| host.add_unit(VtdUnit::new(config)));
        machine.build_tables(pages, 0x27, 0x67);
        let (dev, parent) = machine.parent();
        let data =
            iommu_hwpt_vtd_s1 { pgtbl_addr: BASE + TABLES, addr_width: 48, ..Default::default() };
        machine.attach(dev, parent, HwptData::VtdS1(data));
        machine
    }

    /// A host with the unit that `add` adds, and its device.
    fn of(add: impl FnOnce(&Arc<EmulatedHost>) -> UnitId) -> Self {
        let host = EmulatedHost::new();
        let unit = add(&host);
        let rid = Bdf::new(0, 3, 0).unwrap();
        host.add_device("device", unit, rid, DeviceConfig::default()).unwrap();
        let memory = GuestRegionMmap::<()>::from_range(GuestAddress(BASE), MEMORY, None).unwrap();
        Self { memory: Arc::new(memory), host }
    }

    /// The device object, and a nesting parent with all of the memory.
    fn parent(&self) -> (ObjectId, ObjectId) {
        let dev = self.host.device_bind("device").unwrap();
        let ioas = self.host.ioas_alloc().unwrap();
        let whole = UserMemory::whole(self.memory.clone());
        self.host.ioas_map(ioas, &whole, MapTarget::Fixed(BASE), Protection::READ_WRITE).unwrap();
        let flags = HwptFlags::new().with_nest_parent(true);
        let parent = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault: None };
        (dev, self.host.hwpt_alloc(&parent).unwrap())
    }

    fn attach(&self, dev: ObjectId, pt: ObjectId, data: HwptData) {
        let nested = HwptAlloc { flags: HwptFlags::new(), dev, pt, data, fault: None };
        let nested = self.host.hwpt_alloc(&nested).unwrap();
        self.host.device_attach(dev, None, nested).unwrap();
    }

    fn nest_smmuv3(&self) {
        const ASID: u64 = 7;
        // T0SZ is 16, EPD1, V, IPS is 48 bits, AA64, R and A.
        let cd = 16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45 | ASID << 48;
        self.store(CONTEXT, cd);
        self.store(CONTEXT + 8, BASE + TABLES);
        let (dev, parent) = self.parent();
        let viommu = self.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent).unwrap();
        self.host.vdevice_alloc(viommu, dev, 0x18).unwrap();
        // V, stage 1 only.
        let ste = [1 | 5 << 1 | (BASE + CONTEXT), 0];
        self.attach(dev, viommu, HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste }));
    }

    fn port(&self) -> DmaPort {
        self.host.dma_port("device").unwrap()
    }

    fn store(&self, offset: u64, word: u64) {
        self.memory.store(word.to_le(), MemoryRegionAddress(offset), Ordering::Relaxed).unwrap();
    }

    /// Four levels of tables at [`TABLES`] for `pages` 4 KiB pages from [`IOVA`] on, with these
    /// bits in entries of tables and of pages.
    fn build_tables(&self, pages: u64, table: u64, page: u64) {
        let (of_table, of_page) = (table, page);
        let index = |iova: u64, level: u64| iova >> (12 + 9 * (level - 1)) & 0x1ff;
        // One table for each of the upper levels, then as many as the pages need.
        let leaf_table = |page: u64| TABLES + (3 + page / 512) * PAGE;
        self.store(TABLES + index(IOVA, 4) * 8, (BASE + TABLES + PAGE) | of_table);
        self.store(TABLES + PAGE + index(IOVA, 3) * 8, (BASE + TABLES + 2 * PAGE) | of_table);
        for page in 0..pages {
            let iova = IOVA + page * PAGE;
            if page.is_multiple_of(512) {
                let to = (BASE + leaf_table(page)) | of_table;
                self.store(TABLES + 2 * PAGE + index(iova, 2) * 8, to);
            }
            let to = BASE + shuffled(page, pages) * PAGE;
            self.store(leaf_table(page) + index(iova, 1) * 8, to | of_page);
        }
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
    let vtd = Unit::Vtd { iotlb: 256 << 10, tables: 1024 };
    let smmu = Unit::SmmuV3 { iotlb: 256 << 10, tables: 1024 };
    for (name, unit) in [("hit", vtd), ("SMMUv3 hit", smmu)] {
        let mut group = criterion.benchmark_group(name);
        for pages in SPREADS {
            let machine = Machine::new(pages, unit);
            let mut port = machine.port();
            for page in 0..pages {
                translate(&mut port, IOVA + page * PAGE);
            }
            random_pages(&mut group, "", &machine, pages);
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("hit");
    let machine = Machine::vtd(1, VtdUnitConfig::default());
    let mut port = machine.port();
    group.bench_function("the same page", |bencher| {
        bencher.iter(|| translate(&mut port, black_box(IOVA)));
    });
    let machine = Machine::vtd(1, VtdUnitConfig::default().with_device_tlb(true));
    let mut port = machine.port();
    port.control().set_device_tlb(true);
    group.bench_function("the same page, in the device TLB", |bencher| {
        bencher.iter(|| translate(&mut port, black_box(IOVA)));
    });
    group.finish();
}

/// Translations of random pages of `machine`, by one thread and by two.
fn random_pages(group: &mut Group<'_>, name: &str, machine: &Machine, pages: u64) {
    let addresses = addresses(pages);
    let at = |iteration: u64| addresses[iteration as usize & 0xffff];
    for threads in [1, 2] {
        let id = BenchmarkId::new(format!("{name}{threads} thread(s), pages"), pages);
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|iterations| {
                let ports = (0..threads).map(|_| machine.port()).collect();
                on_threads(iterations, ports, |port, it| translate(port, at(it)))
            });
        });
    }
}

fn misses(criterion: &mut Criterion) {
    let vtd: fn(usize, usize) -> Unit = |iotlb, tables| Unit::Vtd { iotlb, tables };
    let smmu: fn(usize, usize) -> Unit = |iotlb, tables| Unit::SmmuV3 { iotlb, tables };
    for (name, unit) in [("miss", vtd), ("SMMUv3 miss", smmu)] {
        let mut group = criterion.benchmark_group(name);
        // Without an IOTLB every request walks.
        for (name, tables) in [("warm", 4096), ("cold", 0)] {
            for pages in SPREADS {
                let machine = Machine::new(pages, unit(0, tables));
                random_pages(&mut group, &format!("{name} paging structures, "), &machine, pages);
            }
        }
        // With one that is too small, nearly every request also replaces an entry.
        let (pages, machine) = (64 << 10, Machine::new(64 << 10, unit(4096, 1024)));
        random_pages(&mut group, "replacing one of 4096 entries, ", &machine, pages);
        group.finish();
    }
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
        let machine = Machine::vtd(length as u64 / PAGE, VtdUnitConfig::default());
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

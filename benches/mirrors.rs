// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of mirrored tables: a guest maps or unmaps something, and invalidates it, with few and
//! with many mappings in the same table; above a host that does nothing but keep books, and on the
//! emulated one.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion};
use twostage::iommufd::fake::RecordingHost;
use twostage::iommufd::{Extensions, HostIommu, HwInfo, HwInfoData, ObjectId};
use twostage::nesting::vtd::{Nesting, Serving, VtdNesting};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::root::AddressWidth;
use twostage::spec::vtd::PageRange;
use twostage::viommu::vtd::{
    DomainTag, Invalidation, Policy, RequesterConfig, Stage1, VtdConfig, VtdHostSide,
    VtdSecondStage,
};
use twostage::viommu::Requester;
use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RID: Bdf = Bdf::from_raw(0x20);
const TAG: DomainTag = DomainTag { domain: 1, pasid: 0 };
/// Mappings of single pages, of which no two are adjacent.
const EXISTING: [u64; 3] = [10, 1000, 100_000];
/// The tables: four levels, and those of the lowest one in a row.
const TOP: u64 = 0x1000;
const GIGABYTES: u64 = 0x2000;
const MEGABYTES: u64 = 0x3000;
const PAGES: u64 = 0x10_0000;
const RW: u64 = 3;
const LARGE: u64 = 1 << 7;

/// What is mapped and unmapped.
#[derive(Clone, Copy)]
struct Change {
    name: &'static str,
    /// GPA of its entry.
    entry: u64,
    word: u64,
    range: PageRange,
}

/// The hosts to measure.
const HOSTS: [&str; 2] = ["no host", "the emulated host"];

/// A host, by its name, with a bound device.
fn host(name: &str) -> (Arc<dyn HostIommu>, ObjectId) {
    if name == HOSTS[0] {
        let host = RecordingHost::new(Extensions::default());
        host.mute();
        let dev = host.add_device(0, HwInfo::new(HwInfoData::None));
        return (host, dev);
    }
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("device", unit, RID, DeviceConfig::default()).expect("a new device");
    let dev = host.device_bind("device").expect("it is there");
    (host, dev)
}

/// One device on second-stage tables with so many mappings.
struct Rig {
    nesting: VtdNesting,
    memory: Arc<GuestMemoryMmap>,
}

impl Rig {
    fn new(existing: u64, name: &str) -> Self {
        let ranges = [0, 1 << 39].map(|start| (GuestAddress(start), 1 << 30));
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("2 GiB, hardly used");
        let memory = Arc::new(memory);
        let (host, dev) = host(name);
        let ioas = GuestIoas::new(host).expect("an IOAS");
        ioas.map_all(&*memory).expect("memory is mapped");
        let nesting = Nesting::Off { pieces: Nesting::PIECES };
        let serving = Serving::new(nesting, memory.clone(), VtdConfig::default());
        let rig = Self { nesting: VtdNesting::serving(ioas, serving), memory };
        rig.put(TOP, GIGABYTES | RW);
        rig.put(GIGABYTES, MEGABYTES | RW);
        for page in (0..2 * existing).step_by(2) {
            rig.put(MEGABYTES + page / 512 * 8, (PAGES + page / 512 * 0x1000) | RW);
            rig.put(PAGES + page * 8, page << 12 | RW);
        }
        rig.nesting.add_device(RID, dev).expect("the device is attached");
        let tables = VtdSecondStage {
            table: TOP,
            address_width: AddressWidth::Bits48,
            accessed_dirty: false,
        };
        let policy = Policy::Stage1(Stage1::VtdSecondStage(tables));
        let config = RequesterConfig { policy, tag: TAG, fault_disabled: false };
        rig.nesting.configure(Requester::rid(RID), &config).expect("the table is mirrored");
        assert_eq!(rig.nesting.counters().mirror_pieces, existing);
        rig
    }

    fn put(&self, gpa: u64, word: u64) {
        self.memory.write_obj(word, GuestAddress(gpa)).expect("there is a GiB");
    }

    /// The time and the host calls of mapping `change` and of unmapping it, each invalidated.
    fn round(&self, change: &Change) -> [(Duration, u64); 2] {
        [change.word, 0].map(|word| {
            let calls = self.nesting.counters().host_calls;
            let begun = Instant::now();
            self.put(change.entry, word);
            self.invalidate(&[Some(change.range)]);
            let time = begun.elapsed();
            (time, self.nesting.counters().host_calls - calls)
        })
    }

    fn invalidate(&self, ranges: &[Option<PageRange>]) {
        let of = |range: &_| Invalidation { domain: Some(TAG.domain), pasid: None, range: *range };
        let batch: Vec<_> = ranges.iter().map(of).collect();
        self.nesting.invalidate(black_box(&batch)).expect("the host does all");
    }
}

/// Pages between the others, and large ones after them.
fn changes(existing: u64) -> [Change; 3] {
    let range = |iova: u64, pages| PageRange::new(iova, pages, false);
    // An odd page in the middle.
    let page = existing | 1;
    let megabytes = (2 * existing).div_ceil(512);
    [
        Change {
            name: "4 KiB",
            entry: PAGES + page * 8,
            word: 1 << 39 | RW,
            range: range(page << 12, 1),
        },
        Change {
            name: "2 MiB",
            entry: MEGABYTES + megabytes * 8,
            word: 1 << 39 | LARGE | RW,
            range: range(megabytes << 21, 512),
        },
        Change {
            name: "1 GiB",
            entry: GIGABYTES + 8,
            word: 1 << 39 | LARGE | RW,
            range: range(1 << 30, 512 * 512),
        },
    ]
}

fn maps_and_unmaps(criterion: &mut Criterion) {
    for name in HOSTS {
        for (verb, number) in [("map", 0), ("unmap", 1)] {
            let mut group = criterion.benchmark_group(format!("{verb} and invalidate, {name}"));
            for existing in EXISTING {
                let rig = Rig::new(existing, name);
                for change in changes(existing) {
                    let (_, calls) = rig.round(&change)[number];
                    println!("{verb} {}, {existing} others: {calls} host calls", change.name);
                    let id = BenchmarkId::new(change.name, format!("{existing} others"));
                    group.bench_function(id, |bencher| {
                        bencher.iter_custom(|count| {
                            (0..count).map(|_| rig.round(&change)[number].0).sum()
                        });
                    });
                }
            }
            group.finish();
        }
    }
}

/// What is compared although nothing has changed: many pages of one batch, and whole domains.
fn comparisons(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nothing has changed");
    for existing in EXISTING {
        let rig = Rig::new(existing, HOSTS[0]);
        let one = |number: u64| Some(PageRange::new(number << 13, 1, true));
        let pages: Vec<_> = (0..1000).map(one).collect();
        for (name, ranges) in [("1000 pages", &pages[..]), ("the domain", &[None])] {
            let id = BenchmarkId::new(name, format!("{existing} mappings"));
            group.bench_function(id, |bencher| bencher.iter(|| rig.invalidate(ranges)));
        }
    }
    group.finish();
}

/// There are many of them, and each is stable.
fn short() -> Criterion {
    let criterion = Criterion::default().warm_up_time(Duration::from_millis(300));
    criterion.measurement_time(Duration::from_secs(1))
}

criterion_group!(name = benches; config = short(); targets = maps_and_unmaps, comparisons);
criterion_main!(benches);

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest with 2^20 PASIDs on two devices: the time of one command for all of them, the longest
//! register read of another processor meanwhile, and the memory that the whole stack (virtual unit,
//! nesting and emulated host) uses for them; and the same with device TLBs and page requests. The
//! figures are printed once; criterion measures commands that find nothing to change.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::iommufd::{HostIommu, Protection, UserMemory};
use twostage::nesting::host_vtd;
use twostage::nesting::vtd::VtdNesting;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::vtd::qi::{
    AddressMask, Descriptor, DeviceTlbRange, IotlbScope, PasidCacheScope, StatusWrite,
};
use twostage::spec::vtd::regs::{self, Gcmd, Iqa, Rtaddr};
use twostage::viommu::vtd::FaultTarget;
use twostage::viommu::vtd::{VtdConfig, VtdIommu};
use twostage::viommu::InterruptSink;
use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const DEVICES: [Bdf; 2] = [Bdf::from_raw(0x20), Bdf::from_raw(0x28)];
const PASID_BITS: u8 = 20;
const PASIDS: u64 = 1 << PASID_BITS;

const MEMORY: usize = 96 << 20;
const ROOT: u64 = 0x1000;
const CONTEXT: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const QUEUE: u64 = 0x4000;
/// Binary logarithm: a queue of 2048 descriptors.
const QUEUE_PAGES: u8 = 4;
/// A directory of 2^14 entries.
const DIRECTORY: u64 = 0x10_0000;
/// A table for each of them.
const TABLES: u64 = 0x100_0000;
const PAGE: u64 = 0x1000;
/// Number of different guest tables. A VT-d has 2^16 domain IDs, so the host cannot distinguish
/// many more.
const DISTINCT: u64 = 60_000;

#[derive(Debug)]
struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn send_msi(&self, _: u64, _: u32) {}
}

/// The whole stack in one process.
struct Machine {
    memory: Arc<GuestMemoryMmap>,
    iommu: Arc<VtdIommu>,
    nesting: Arc<VtdNesting>,
}

impl Machine {
    /// A unit with its queue enabled, whose tables have no present PASID. With `asking` the devices
    /// have TLBs and make page requests.
    fn new(asking: bool) -> Self {
        let unit = VtdUnitConfig::default().with_device_tlb(asking).with_page_requests(asking);
        let unit = VtdUnit::new(unit);
        let host = EmulatedHost::new();
        let id = host.add_unit(unit.clone());
        let nesting =
            Arc::new(VtdNesting::new(GuestIoas::new(host.clone()).expect("an empty host")));
        let region = Arc::new(
            GuestRegionMmap::<()>::from_range(GuestAddress(0), MEMORY, None)
                .expect("address space"),
        );
        let mapped = UserMemory::whole(region.clone());
        nesting.ioas().unwrap().map(0, &mapped, Protection::READ_WRITE).expect("an empty IOAS");
        for (rid, name) in DEVICES.into_iter().zip(["a", "b"]) {
            let config = DeviceConfig::default().with_pasid_bits(PASID_BITS);
            let config = config.with_ats(asking).with_pri(asking);
            host.add_device(name, id, rid, config).expect("a new name and id");
            unit.port(rid.raw()).control().set_device_tlb(asking);
            let dev = host.device_bind(name).expect("it is there");
            nesting.add_device(rid, dev).expect("the unit nests");
        }
        let infos = nesting.hw_infos();
        let units: Vec<_> = infos
            .iter()
            .filter_map(|it| host_vtd(it.rid.to_string(), &it.info, host.extensions()))
            .collect();
        let config = VtdConfig::default().with_pasid_bits(Some(PASID_BITS));
        let config = config.with_device_iotlb(asking).with_page_requests(asking);
        let config = config.intersect(&units).expect("the unit has all of it");
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(vec![region]).expect("one region"));
        let interrupts = Arc::new(NoInterrupts);
        let iommu = VtdIommu::new(&config, memory.clone(), nesting.clone(), interrupts, None)
            .expect("a possible configuration");
        nesting.set_fault_target(Arc::downgrade(&iommu) as Weak<dyn FaultTarget>);
        DEVICES.into_iter().for_each(|rid| iommu.add_device(rid).expect("the unit serves it"));
        let machine = Self { memory, iommu, nesting };
        machine.store(ROOT, CONTEXT | 1);
        for rid in DEVICES {
            // A directory of 2^(7 + 7) entries; PASIDs enabled; DTE and PRE.
            let entry = CONTEXT + u64::from(rid.devfn()) * 32;
            let services = if asking { 1 << 4 | 1 << 2 } else { 0 };
            machine.store(entry, DIRECTORY | 7 << 9 | services | 1 << 3 | 1);
        }
        let root = Rtaddr::new().with_ttm(1).with_rta(ROOT / PAGE);
        machine.write(regs::RTADDR, &root.into_bits().to_le_bytes());
        machine.command(Gcmd::new().with_srtp(true));
        let queue = Iqa::new().with_dw(true).with_qs(QUEUE_PAGES).with_iqa(QUEUE / PAGE);
        machine.write(regs::IQA, &queue.into_bits().to_le_bytes());
        machine.command(Gcmd::new().with_qie(true));
        machine
    }

    fn store(&self, address: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(address)).expect("guest memory");
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.iommu.mmio_write(offset, bytes);
    }

    fn read(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.iommu.mmio_read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn command(&self, command: Gcmd) {
        self.write(regs::GCMD, &command.into_bits().to_le_bytes());
    }

    fn enable_translation(&self, enable: bool) {
        self.command(Gcmd::new().with_qie(true).with_te(enable));
    }

    /// Entries of all PASIDs: in one table page shared by all directory entries, or each
    /// separately.
    fn fill(&self, one_table: bool, domain: impl Fn(u64) -> u64, table: impl Fn(u64) -> u64) {
        let pages = PASIDS / 64;
        for index in 0..pages {
            let page = TABLES + if one_table { 0 } else { index * PAGE };
            self.store(DIRECTORY + index * 8, page | 1);
        }
        for pasid in 0..if one_table { 64 } else { PASIDS } {
            let entry: [u64; 3] = [1 << 6 | 1, domain(pasid), table(pasid)];
            let bytes: Vec<u8> = entry.iter().flat_map(|word| word.to_le_bytes()).collect();
            let address = GuestAddress(TABLES + pasid * 64);
            self.memory.write_slice(&bytes, address).expect("guest memory");
        }
    }

    /// One descriptor and a wait, complete on return.
    fn submit(&self, descriptor: Descriptor) {
        self.submit_all(&[descriptor]);
    }

    /// As many descriptors as fit in the queue, and a wait, complete on return.
    fn submit_all(&self, descriptors: &[Descriptor]) {
        let status = Some(StatusWrite { address: STATUS, data: 1 });
        let wait =
            Descriptor::Wait { status, interrupt: false, fence: false, drain_page_requests: false };
        self.memory.write_obj(0u32, GuestAddress(STATUS)).expect("guest memory");
        let mut tail = self.read(regs::IQT);
        for descriptor in descriptors.iter().chain([&wait]) {
            for (word, offset) in descriptor.encode().into_iter().zip([0, 8, 16, 24]) {
                self.store(QUEUE + tail + offset, word);
            }
            tail = (tail + 32) % (PAGE << QUEUE_PAGES);
        }
        self.write(regs::IQT, &tail.to_le_bytes());
        let status: u32 = self.memory.read_obj(GuestAddress(STATUS)).expect("guest memory");
        assert_eq!(status, 1, "the wait is done");
    }

    fn flush_pasid_cache(&self) {
        self.submit(Descriptor::PasidCache(PasidCacheScope::Global));
    }

    fn flush_iotlb(&self) {
        let scope = IotlbScope::Global;
        self.submit(Descriptor::Iotlb { scope, drain_writes: false, drain_reads: false });
    }

    /// What the devices have of every PASID, in 2^20 invalidations of each.
    fn flush_device_tlbs(&self) {
        let range = DeviceTlbRange { address: (1 << 63) - PAGE, size: true };
        let of_pasid = |pasid: u64| {
            let pasid = Pasid::new(pasid as u32).expect("20 bits");
            DEVICES.map(|source| Descriptor::PasidDeviceTlb {
                source,
                pasid,
                global: false,
                physical_function: 0,
                max_pending: 0,
                range,
            })
        };
        for first in (0..PASIDS).step_by(512) {
            self.submit_all(&(first..first + 512).flat_map(of_pasid).collect::<Vec<_>>());
        }
    }

    /// One batch of 1024 invalidations: 256 ranges, each too wide to be looked up by page, of four
    /// PASIDs of the domains `domain`.
    fn flush_ranges(&self, domain: impl Fn(u32) -> u16) {
        let range = |at: u64| Some(AddressMask { address: at << 30, mask: 12, leaf: false });
        let of_pasid = |pasid: u32| {
            let (domain, pasid) = (domain(pasid), Pasid::new(pasid).expect("20 bits"));
            (0..256).map(move |at| Descriptor::PasidIotlb { domain, pasid, range: range(at) })
        };
        self.submit_all(&(1..=4).flat_map(of_pasid).collect::<Vec<_>>());
    }

    /// Does `work` while another thread reads a register continuously, and prints the times.
    fn beside_a_reader(&self, what: &str, work: impl FnOnce(&Self)) {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut reads, mut late, mut worst) = (0u64, 0u64, Duration::ZERO);
                while !over.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    self.read(regs::GCMD);
                    let took = start.elapsed();
                    reads += 1;
                    late += u64::from(took > Duration::from_millis(1));
                    worst = worst.max(took);
                }
                (reads, late, worst)
            });
            std::thread::sleep(Duration::from_millis(50));
            let (before, start) = (resident(), Instant::now());
            work(self);
            let (took, after) = (start.elapsed(), resident());
            over.store(true, Ordering::Relaxed);
            let (reads, late, worst) = reader.join().expect("the reader does not panic");
            println!(
                "{what}: {took:.2?}; another processor's read waits {worst:.2?} at most ({late} of \
                 {reads} over 1 ms); memory {:+} KiB",
                after - before
            );
        });
    }
}

/// Resident memory of this process, in KiB.
fn resident() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// The cost of the commands of a guest's life, in order.
fn figures(name: &str, machine: &Machine, change: impl FnOnce(&Machine)) {
    let before = resident();
    let step = |what: &str, work: &dyn Fn(&Machine)| {
        machine.beside_a_reader(&format!("{name}, {what}"), work);
    };
    step("translation enabled", &|machine| machine.enable_translation(true));
    step("PASID cache invalidated, nothing changed", &Machine::flush_pasid_cache);
    step("IOTLB invalidated", &Machine::flush_iotlb);
    change(machine);
    step("PASID cache invalidated, all changed", &Machine::flush_pasid_cache);
    let nested = machine.nesting.counters().nested_allocs;
    let kept = resident() - before;
    println!("{name}: {kept:+} KiB for 2^{PASID_BITS} PASIDs of two devices, {nested} HWPT_NESTED");
}

fn many_pasids(criterion: &mut Criterion) {
    for (name, asking) in [("one table", false), ("one table, ATS and PRI", true)] {
        let machine = Machine::new(asking);
        machine.fill(true, |_| 1, |_| 0x5000);
        figures(name, &machine, |machine| machine.fill(true, |_| 2, |_| 0x5000));
        if asking {
            machine.beside_a_reader("all PASIDs of two device TLBs invalidated", |machine| {
                machine.flush_device_tlbs();
            });
        }
        let start = Instant::now();
        machine.nesting.shutdown().expect("the host lets go of everything");
        println!("{name}, taken down: {:.2?}", start.elapsed());
    }

    let machine = Machine::new(false);
    let table = |pasid: u64| (pasid * 7 % DISTINCT + 1) << 12;
    machine.fill(false, |pasid| pasid & 0xffff, table);
    figures("all distinct", &machine, |machine| {
        machine.fill(false, |pasid| (pasid + 1) & 0xffff, table);
    });

    machine.beside_a_reader("all distinct, 1024 ranges of four PASIDs invalidated", |machine| {
        machine.flush_ranges(|pasid| pasid as u16 + 1);
    });

    let mut group = criterion.benchmark_group("a command for every PASID of two devices");
    group.sample_size(10).measurement_time(Duration::from_secs(10));
    group.throughput(Throughput::Elements(2 * PASIDS));
    group.bench_function(BenchmarkId::from_parameter("nothing changed"), |bencher| {
        bencher.iter(|| machine.flush_pasid_cache());
    });
    for index in 0..PASIDS / 64 {
        machine.store(DIRECTORY + index * 8, 0);
    }
    machine.beside_a_reader("all distinct, PASID cache invalidated, all gone", |machine| {
        machine.flush_pasid_cache();
    });
    group.bench_function(BenchmarkId::from_parameter("none present"), |bencher| {
        bencher.iter(|| machine.flush_pasid_cache());
    });
    group.finish();
}

criterion_group!(benches, many_pasids);
criterion_main!(benches);

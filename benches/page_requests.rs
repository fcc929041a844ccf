// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests, and device TLBs: the whole stack in one process (device, emulated host, nesting,
//! virtual VT-d), with a driver that answers at once instead of a guest's kernel.
//!
//! - a page request from the DMA that misses its page to the same DMA with it, alone and among
//!   others;
//! - a DMA that its device's TLB serves, beside one that the IOTLB serves, for a random page among
//!   so many;
//! - an unmap with its wait, for a device without TLB, and for one with a TLB that has the page.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use twostage::iommufd::PageResponseCode;
use twostage::spec::vtd::page_request::PageResponse;
use twostage::spec::vtd::qi::{AddressMask, Descriptor, DeviceTlbRange};
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::{DmaAccess, DmaAttributes, DmaError, DmaPort, DmaServices, VtdUnitConfig};

#[allow(dead_code)] // The tests use all of these, the bench a part.
#[path = "../tests/two_stages/common.rs"]
mod common;
#[allow(dead_code)]
#[path = "../tests/two_stages/vtd/machine.rs"]
mod machine;

use common::{A, PAGE};
use machine::{pasid, vtd_config, Machine};

const PASID: u32 = 9;
const DOMAIN: u16 = 1;
const IOVA: u64 = 0x4000_0000;
const WITH_PASID: DmaAttributes =
    DmaAttributes { pasid: Some(PASID), privileged: false, execute: false };

/// Pages that are asked for before all are taken away again.
const PAGES: u64 = 512;
/// Numbers of page requests that are outstanding together; the queue has 128 entries.
const TOGETHER: [u64; 3] = [1, 16, 100];
/// Numbers of pages that DMAs are spread over; a device TLB has 1,024 entries.
const SPREADS: [u64; 2] = [64, 512];

/// A machine whose guest serves the page requests of `A`, which has a TLB or not; and a first-stage
/// table without pages, which its PASID is on.
struct Served {
    machine: Machine,
    table: u64,
    frames: Vec<u64>,
}

impl Served {
    fn new(device_tlb: bool) -> Self {
        let unit = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
        let config = vtd_config().with_device_iotlb(true).with_page_requests(true);
        let machine = Machine::with(unit, config);
        let guest = &machine.guest;
        let table = guest.page();
        guest.set_entry(A, PASID, Entry::FirstStage { table, domain: DOMAIN });
        guest.set_page_requests(A, true);
        guest.start_page_queue();
        guest.enable();
        machine.port(A).control().set_device_tlb(device_tlb);
        // One more than pages: that of its tables' paths exists before anything is measured.
        let frames = (0..PAGES).map(|_| guest.page()).collect();
        let served = Self { machine, table, frames };
        served.map(0);
        served.unmap_all();
        served
    }

    fn map(&self, page: u64) {
        let frame = self.frames[page as usize];
        self.machine.guest.map(self.table, IOVA + page * PAGE, frame, 1, true);
    }

    fn unmap(&self, page: u64) {
        self.machine.guest.unmap(self.table, IOVA + page * PAGE);
    }

    fn unmap_all(&self) {
        (0..PAGES).for_each(|page| self.unmap(page));
        let everything =
            Descriptor::PasidIotlb { domain: DOMAIN, pasid: pasid(PASID), range: None };
        let all = DeviceTlbRange { address: (1 << 63) - PAGE, size: true };
        assert_eq!(self.submit(&[everything, of_device(all)]), Completion::Done);
    }

    fn submit(&self, descriptors: &[Descriptor]) -> Completion {
        self.machine.guest.submit(descriptors)
    }

    /// The time of `count` DMAs to pages that are not there, `together` of which ask before the
    /// guest answers any.
    fn ask(&self, count: u64, together: u64) -> Duration {
        let mut port = self.machine.port(A);
        port.set_services(DmaServices { wait_for_pages: false, ..DmaServices::default() });
        let mut took = Duration::ZERO;
        let mut left = count;
        while left != 0 {
            self.unmap_all();
            let round = left.min(PAGES);
            let start = Instant::now();
            let mut first = 0;
            while first < round {
                let end = round.min(first + together);
                self.ask_at_once(&mut port, first, end);
                first = end;
            }
            took += start.elapsed();
            left -= round;
        }
        took
    }

    /// DMA to the pages from `first` to before `end`, which all ask.
    fn ask_at_once(&self, port: &mut DmaPort, first: u64, end: u64) {
        let mut bytes = [0; 8];
        let mut read =
            |port: &mut DmaPort, page: u64| port.read(WITH_PASID, IOVA + page * PAGE, &mut bytes);
        let asked = |page| match read(port, page) {
            Err(DmaError::PageRequested { group, .. }) => group,
            other => panic!("page {page} is not there: {other:?}"),
        };
        let groups: Vec<_> = (first..end).map(asked).collect();
        for _ in first..end {
            let request = loop {
                // Another thread brings it.
                match self.machine.guest.take_page_request() {
                    Some(request) => break request,
                    None => std::thread::yield_now(),
                }
            };
            self.map((request.address - IOVA) / PAGE);
            let responded = self.machine.guest.respond(&request, PageResponse::Success);
            assert_eq!(responded, Completion::Done);
        }
        let control = port.control();
        for (page, group) in (first..end).zip(groups) {
            assert_eq!(control.wait_for_page(group), PageResponseCode::Success);
            read(port, page).expect("the page is there");
        }
    }
}

fn of_device(range: DeviceTlbRange) -> Descriptor {
    Descriptor::PasidDeviceTlb {
        source: A,
        pasid: pasid(PASID),
        global: false,
        physical_function: 0,
        max_pending: 0,
        range,
    }
}

fn page_requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a DMA with its page request");
    group.throughput(Throughput::Elements(1));
    for together in TOGETHER {
        let served = Served::new(false);
        group.bench_function(BenchmarkId::new("outstanding together", together), |bencher| {
            bencher.iter_custom(|count| served.ask(count, together));
        });
        assert_eq!(served.machine.iommu.counters().page_requests_refused, 0);
    }
    group.finish();
}

fn hits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a DMA's translation that is cached");
    for (name, device_tlb) in [("by the IOTLB", false), ("by the device TLB", true)] {
        let served = Served::new(device_tlb);
        (0..PAGES).for_each(|page| served.map(page));
        for pages in SPREADS {
            let mut port = served.machine.port(A);
            let mut at = 0;
            group.bench_function(BenchmarkId::new(name, pages), |bencher| {
                bencher.iter(|| {
                    // An odd step visits every page in turn, and none is next to the one before.
                    at = (at + 37) % pages;
                    let iova = black_box(IOVA + at * PAGE);
                    let found = port.translate(WITH_PASID, iova, 8, DmaAccess::Read);
                    black_box(found.expect("it is mapped").slice().len());
                });
            });
        }
    }
    group.finish();
}

fn invalidations(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a DMA, then an unmap of its page with a wait");
    let range = Some(AddressMask { address: IOVA, mask: 0, leaf: true });
    let iotlb = Descriptor::PasidIotlb { domain: DOMAIN, pasid: pasid(PASID), range };
    let device = of_device(DeviceTlbRange { address: IOVA, size: false });
    for (name, device_tlb, descriptors) in
        [("ATS off", false, &[iotlb][..]), ("ATS on", true, &[iotlb, device][..])]
    {
        let served = Served::new(device_tlb);
        let mut port = served.machine.port(A);
        let mut bytes = [0; 8];
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                served.map(0);
                port.read(WITH_PASID, IOVA, &mut bytes).expect("it is mapped");
                served.unmap(0);
                assert_eq!(served.submit(black_box(descriptors)), Completion::Done);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, page_requests, hits, invalidations);
criterion_main!(benches);

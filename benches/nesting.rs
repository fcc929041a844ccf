// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The cost of nesting above the host: calls per 1,000 single-page unmaps, and merging ranges.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion};
use twostage::iommufd::fake::RecordingHost;
use twostage::iommufd::{iommu_hw_info_vtd, Extensions, HwInfo, HwInfoData};
use twostage::nesting::vtd::{FlushSet, VtdNesting};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::pasid::PagingMode;
use twostage::spec::vtd::PageRange;
use twostage::viommu::vtd::{
    DomainTag, Invalidation, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdHostSide,
};
use twostage::viommu::Requester;

const UNMAPS: u64 = 1000;
const TAG: DomainTag = DomainTag { domain: 1, pasid: 0 };

/// One device behind one stage 1.
fn nested_device() -> (Arc<RecordingHost>, VtdNesting) {
    let host = RecordingHost::new(Extensions::default());
    host.mute();
    let nesting =
        VtdNesting::new(GuestIoas::new(host.clone()).expect("the recording host makes an IOAS"));
    let data = HwInfoData::Vtd(iommu_hw_info_vtd::default());
    let info = HwInfo::new(data);
    let rid = Bdf::from_raw(0x20);
    nesting.add_device(rid, host.add_device(0, info)).expect("the recording host attaches");
    let tables = VtdFirstStage {
        table: 0x1000,
        paging_mode: PagingMode::Level4,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
    };
    let config = RequesterConfig {
        policy: Policy::Stage1(Stage1::VtdFirstStage(tables)),
        tag: TAG,
        fault_disabled: false,
    };
    nesting.configure(Requester::rid(rid), &config).expect("the recording host nests");
    (host, nesting)
}

fn page(number: u64) -> Invalidation {
    let range = PageRange::new(number << 12, 1, true);
    Invalidation { domain: Some(TAG.domain), pasid: Some(TAG.pasid), range: Some(range) }
}

/// 1,000 single-page unmaps, `per_batch` of them between two ordering points.
fn unmap(nesting: &VtdNesting, per_batch: u64, stride: u64) {
    let pages: Vec<_> = (0..UNMAPS).map(|number| page(number * stride)).collect();
    for batch in pages.chunks(per_batch as usize) {
        nesting.invalidate(batch).expect("the recording host invalidates");
    }
}

fn unmaps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("1000 single-page unmaps");
    for (name, per_batch, stride) in [
        ("a wait after each", 1, 1),
        ("a wait after 100, adjacent", 100, 1),
        ("a wait after 100, scattered", 100, 8),
        ("one wait, adjacent", UNMAPS, 1),
        ("one wait, scattered", UNMAPS, 8),
    ] {
        let (host, nesting) = nested_device();
        let (calls, entries) = (host.calls(), nesting.counters().entries_out);
        unmap(&nesting, per_batch, stride);
        println!(
            "1000 single-page unmaps, {name}: {} host calls with {} entries",
            host.calls() - calls,
            nesting.counters().entries_out - entries,
        );
        group.bench_function(name, |bencher| {
            bencher.iter(|| unmap(&nesting, per_batch, stride));
        });
    }
    group.finish();
}

fn merging(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("merge ranges");
    for count in [256u64, 4096] {
        // Descending and half of them adjacent: the worst order for sorting and merging.
        let mut set = FlushSet::default();
        for number in (0..count).rev() {
            set.add(page(number + number / 2).range);
        }
        group.bench_function(count.to_string(), |bencher| {
            bencher.iter_batched(
                || set.clone(),
                |set| black_box(set.into_entries()),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, unmaps, merging);
criterion_main!(benches);

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of `HWPT_INVALIDATE`.

use super::fake::{Bench, Told, PARENT, PASID, PLAIN};
use crate::units::hardware::CacheRange;
use twostage::iommufd::{
    iommu_hwpt_vtd_s1_invalidate, Errno, HostIommu, InvalidateData, InvalidateError, ObjectId,
};
use twostage::spec::vtd::PageRange;

fn page(addr: u64) -> iommu_hwpt_vtd_s1_invalidate {
    iommu_hwpt_vtd_s1_invalidate { addr, npages: 1, ..Default::default() }
}

fn failure(outcome: Result<(), InvalidateError>) -> (usize, Errno) {
    let error = outcome.unwrap_err();
    (error.done, error.error.errno)
}

#[test]
fn an_array_stops_at_the_first_bad_entry_and_says_how_many_are_done() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    bench.fake.told();
    let entries = [page(0x1000), page(0x2000), page(0x3001), page(0x4000)];
    let outcome = bench.host.hwpt_invalidate(nested, InvalidateData::VtdS1(&entries));
    assert_eq!(failure(outcome), (2, Errno::EINVAL));
    let ranges: Vec<_> = bench
        .fake
        .told()
        .into_iter()
        .map(|told| match told {
            Told::Invalidate(_, CacheRange::Pages(range)) => range,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ranges, [0x1000, 0x2000].map(|address| PageRange::new(address, 1, false)));
    let flagged = iommu_hwpt_vtd_s1_invalidate { flags: 6, ..page(0) };
    let outcome = bench.host.hwpt_invalidate(nested, InvalidateData::VtdS1(&[page(0), flagged]));
    assert_eq!(failure(outcome), (1, Errno::EOPNOTSUPP));
}

#[test]
fn only_user_owned_tables_are_invalidated() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    let none = InvalidateData::VtdS1(&[]);
    for id in [a, ioas, parent] {
        assert_eq!(failure(bench.host.hwpt_invalidate(id, none)), (0, Errno::EINVAL));
    }
    let absent = bench.host.hwpt_invalidate(ObjectId(99), none);
    assert_eq!(failure(absent), (0, Errno::ENOENT));
    let format = bench.host.hwpt_invalidate(nested, InvalidateData::VtdSecondStage(&[]));
    assert_eq!(failure(format), (0, Errno::EINVAL));
    bench.host.hwpt_invalidate(nested, none).expect("an empty array probes the format");
}

#[test]
fn every_iommu_that_serves_the_hwpt_is_told_once() {
    let bench = Bench::new();
    let (a, b, far, ioas) = (bench.bind("a"), bench.bind("b"), bench.bind("far"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PASID, 0).unwrap();
    let other = bench.nested(a, parent, PASID, 0).unwrap();
    let told = |hwpt| {
        bench.fake.told();
        bench.other.told();
        bench.host.hwpt_invalidate(hwpt, InvalidateData::VtdS1(&[page(0)])).unwrap();
        (bench.fake.told().len(), bench.other.told().len())
    };
    assert_eq!(told(nested), (0, 0), "nothing is attached");
    for (dev, slot) in [(a, None), (a, Some(1)), (b, None), (far, None)] {
        bench.host.device_attach(dev, slot, nested).unwrap();
    }
    assert_eq!(told(nested), (1, 1));
    assert_eq!(told(other), (0, 0), "another HWPT");
    bench.host.device_detach(far, None).unwrap();
    bench.host.device_detach(b, None).unwrap();
    assert_eq!(told(nested), (1, 0));
    bench.host.device_attach(a, None, other).unwrap();
    assert_eq!(told(nested), (1, 0), "its PASID is still attached");
    bench.host.device_detach(a, Some(1)).unwrap();
    assert_eq!(told(nested), (0, 0));
}

#[test]
fn each_hwpt_has_a_cache_tag_of_its_own() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let mut tags = Vec::new();
    for _ in 0..4 {
        let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
        bench.host.device_attach(a, None, nested).unwrap();
        bench.fake.told();
        bench.host.hwpt_invalidate(nested, InvalidateData::VtdS1(&[page(0)])).unwrap();
        let Some(Told::Invalidate(tag, _)) = bench.fake.told().pop() else { panic!() };
        assert!(!tags.contains(&tag), "not even when the object id is used again");
        tags.push(tag);
        bench.host.device_detach(a, None).unwrap();
        bench.host.destroy(nested).unwrap();
    }
}

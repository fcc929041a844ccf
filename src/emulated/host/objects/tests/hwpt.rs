// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of `HWPT_ALLOC`, `GET_HW_INFO` and `HWPT_INVALIDATE`.

use super::fake::{s1, Bench, Failure, Fake, Told, PARENT, PASID, PLAIN};
use crate::units::hardware::CacheRange;
use crate::ObjectKind;
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, Errno, HostIommu, HwInfoData, HwptAlloc,
    HwptData, HwptFlags, HwptVtdNested, HwptVtdSecondStage, InvalidateData, InvalidateError,
    MapTarget, ObjectId, Protection,
};
use twostage::spec::vtd::regs::{Cap, Ecap};
use twostage::spec::vtd::PageRange;

const DIRTY: HwptFlags = HwptFlags::new().with_dirty_tracking(true);
const FAULT: HwptFlags = HwptFlags::new().with_fault_id_valid(true);

fn with_data(dev: ObjectId, pt: ObjectId, data: HwptData) -> HwptAlloc {
    HwptAlloc { flags: PLAIN, dev, pt, data, fault: None }
}

#[test]
fn a_hwpt_on_an_ioas_is_paging() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    for flags in [PLAIN, PARENT, DIRTY, PASID, PARENT.with_dirty_tracking(true).with_pasid(true)] {
        let hwpt = bench.paging(a, ioas, flags).unwrap();
        let graph = bench.host.graph();
        let object = graph.objects.iter().find(|object| object.id == hwpt).unwrap();
        assert_eq!((object.kind, object.on[0].to), (ObjectKind::HwptPaging, ioas));
    }
}

#[test]
fn a_hwpt_on_a_nesting_parent_is_nested() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PASID, 0x5000).unwrap();
    let graph = bench.host.graph();
    let object = graph.of_kind(ObjectKind::HwptNested).next().unwrap();
    assert_eq!((object.id, object.on[0].to), (nested, parent));
}

#[test]
fn a_hwpt_on_any_other_object_fails() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    assert_eq!(bench.nested(a, a, PLAIN, 0).errno(), Errno::EINVAL, "a device");
    assert_eq!(bench.nested(a, nested, PLAIN, 0).errno(), Errno::EINVAL, "itself nested");
    assert_eq!(bench.nested(a, ObjectId(99), PLAIN, 0).errno(), Errno::EINVAL, "nothing");
    assert_eq!(bench.nested(ioas, parent, PLAIN, 0).errno(), Errno::ENOENT, "not a device");
}

#[test]
fn a_parent_that_is_automatic_is_refused() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let automatic = bench.host.device_attach(a, None, ioas).unwrap();
    assert_eq!(bench.nested(a, automatic, PLAIN, 0).errno(), Errno::EINVAL);
}

#[test]
fn a_parent_that_lacks_nest_parent_is_refused() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let plain = bench.paging(a, ioas, PLAIN).unwrap();
    assert_eq!(bench.nested(a, plain, PLAIN, 0).errno(), Errno::EINVAL);
}

#[test]
fn flags_without_a_meaning_are_refused() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let unknown = HwptFlags::new().with_unknown(1);
    assert_eq!(bench.paging(a, ioas, unknown).errno(), Errno::EOPNOTSUPP);
    assert_eq!(bench.paging(a, ioas, PARENT.with_fault_id_valid(true)).errno(), Errno::EOPNOTSUPP);
    for flags in [unknown, PARENT, DIRTY] {
        assert_eq!(bench.nested(a, parent, flags, 0).errno(), Errno::EOPNOTSUPP, "{flags:?}");
    }
}

#[test]
fn a_fault_queue_that_does_not_exist_is_refused_last() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    assert_eq!(bench.paging(a, ioas, FAULT).errno(), Errno::ENOENT);
    assert_eq!(bench.nested(a, parent, FAULT, 0).errno(), Errno::ENOENT);
    assert_eq!(bench.nested(a, a, FAULT, 0).errno(), Errno::EINVAL);
}

#[test]
fn dirty_tracking_and_nesting_are_as_the_iommu_has_them() {
    let ecap = Ecap::new().with_smts(true).with_fsts(true).with_ssts(true);
    let less = Fake::new(Cap::new().with_mgaw(47).with_sagaw(0b0100), ecap);
    let bench = Bench::of(Fake::able(), less);
    let (a, far, ioas) = (bench.bind("a"), bench.bind("far"), bench.ioas());
    assert_eq!(bench.paging(far, ioas, DIRTY).errno(), Errno::EOPNOTSUPP);
    assert_eq!(bench.paging(far, ioas, PARENT).errno(), Errno::EOPNOTSUPP);
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    assert_eq!(bench.nested(far, parent, PLAIN, 0).errno(), Errno::EOPNOTSUPP);
    assert_eq!(bench.host.device_attach(far, None, parent).errno(), Errno::EINVAL);
    assert!(bench.host.get_hw_info(a).unwrap().capabilities.dirty_tracking());
    assert!(!bench.host.get_hw_info(far).unwrap().capabilities.dirty_tracking());
}

#[test]
fn data_is_for_nested_hwpts_and_they_need_it() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    assert_eq!(bench.nested(a, ioas, PLAIN, 0).errno(), Errno::EOPNOTSUPP);
    assert_eq!(bench.paging(a, parent, PLAIN).errno(), Errno::EOPNOTSUPP);
}

#[test]
fn values_of_nested_data_are_looked_at_when_a_device_is_attached() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let odd = HwptData::VtdS1(iommu_hwpt_vtd_s1 { addr_width: 40, ..s1(0) });
    let nested = bench.host.hwpt_alloc(&with_data(a, parent, odd)).unwrap();
    assert_eq!(bench.host.device_attach(a, None, nested).errno(), Errno::EINVAL);
    bench.host.destroy(nested).unwrap();
}

#[test]
fn a_format_that_the_iommu_lacks_is_not_supported() {
    let mut fake = Fake::able();
    fake.extensions.guest_second_stage = false;
    let bench = Bench::of(fake, Fake::able());
    let (a, far, ioas) = (bench.bind("a"), bench.bind("far"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let tables = HwptVtdSecondStage { pgtbl_addr: 0, addr_width: 48, accessed_dirty: false };
    let data = HwptData::VtdSecondStage(tables);
    let both = HwptData::VtdNested(HwptVtdNested { first: s1(0), second: tables });
    for data in [data, both] {
        assert_eq!(bench.host.hwpt_alloc(&with_data(a, parent, data)).errno(), Errno::EOPNOTSUPP);
        let nested = bench.host.hwpt_alloc(&with_data(far, parent, data)).unwrap();
        assert_eq!(bench.host.device_attach(a, None, nested).errno(), Errno::EINVAL);
    }
    assert!(!bench.host.extensions().guest_second_stage, "not every IOMMU does");
}

#[test]
fn cache_coherency_is_enforced_by_the_parent() {
    let ecap = Ecap::new().with_smts(true).with_ssts(true).with_nest(true);
    let cap = Cap::new().with_mgaw(47).with_sagaw(0b0100);
    let bench = Bench::of(Fake::new(cap, ecap.with_sc(true)), Fake::new(cap, ecap));
    let (a, far, ioas) = (bench.bind("a"), bench.bind("far"), bench.ioas());
    let [coherent, plain] = [a, far].map(|dev| bench.paging(dev, ioas, PARENT).unwrap());
    let on_coherent = bench.nested(far, coherent, PLAIN, 0).unwrap();
    let on_plain = bench.nested(a, plain, PLAIN, 0).unwrap();
    for (dev, hwpt, fits) in [
        (a, coherent, true),
        (a, on_coherent, true),
        (a, plain, true),
        (far, coherent, false),
        (far, on_coherent, false),
        (far, on_plain, true),
    ] {
        let outcome = bench.host.device_attach(dev, None, hwpt);
        assert_eq!(outcome.is_ok(), fits, "{dev:?} {hwpt:?}");
        assert!(fits || outcome.errno() == Errno::EINVAL);
    }
}

#[test]
fn a_nested_hwpt_may_serve_devices_behind_several_iommus() {
    let bench = Bench::new();
    let (a, far, ioas) = (bench.bind("a"), bench.bind("far"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0x7000).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    bench.host.device_attach(far, None, nested).unwrap();
    assert_eq!((bench.fake.told().len(), bench.other.told().len()), (1, 1));
}

#[test]
fn a_hwpt_outlives_the_device_it_was_made_for() {
    let bench = Bench::new();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    bench.host.device_unbind(a).unwrap();
    bench.host.device_attach(b, None, parent).unwrap();
}

#[test]
fn a_nesting_parent_holds_no_read_only_mappings() {
    // Erratum 772415, which Linux 7.2 applies to every VT-d.
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let memory = super::fake::memory(0x1000);
    let map =
        |iova, protection| bench.host.ioas_map(ioas, &memory, MapTarget::Fixed(iova), protection);
    map(0, Protection::READ_ONLY).unwrap();
    assert_eq!(bench.paging(a, ioas, PARENT).errno(), Errno::EINVAL);
    let plain = bench.paging(a, ioas, PLAIN).unwrap();
    bench.unmapped(ioas);
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    assert_eq!(map(0, Protection::READ_ONLY).errno(), Errno::EINVAL);
    map(0x1000, Protection::READ_WRITE).unwrap();
    bench.host.destroy(parent).unwrap();
    map(0, Protection::READ_ONLY).unwrap();
    bench.host.destroy(plain).unwrap();
}

#[test]
fn hw_info_is_the_iommus_own() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let info = bench.host.get_hw_info(a).unwrap();
    assert_eq!(info.data, HwInfoData::Vtd(bench.fake.info));
    assert!(info.capabilities.pci_ats_not_supported());
    assert!(!info.capabilities.pci_pasid_exec());
    assert_eq!(bench.host.get_hw_info(ioas).errno(), Errno::ENOENT);
}

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
fn nested_tables_take_invalidations_of_both_their_stages() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let second = HwptVtdSecondStage { pgtbl_addr: 0, addr_width: 48, accessed_dirty: true };
    let both = HwptData::VtdNested(HwptVtdNested { first: s1(0x5000), second });
    let nested = bench.host.hwpt_alloc(&with_data(a, parent, both)).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    assert_eq!(bench.fake.told(), [Told::Install(0x20, None, Some(0x5000))]);
    let entries = [page(0x1000)];
    let range = CacheRange::Pages(PageRange::new(0x1000, 1, false));
    bench.host.hwpt_invalidate(nested, InvalidateData::VtdS1(&entries)).unwrap();
    let [Told::Invalidate(tag, first)] = bench.fake.told()[..] else { panic!() };
    assert_eq!(first, range);
    bench.host.hwpt_invalidate(nested, InvalidateData::VtdSecondStage(&entries)).unwrap();
    assert_eq!(bench.fake.told(), [Told::InvalidateSecondStage(tag, range)]);
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

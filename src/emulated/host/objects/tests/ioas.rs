// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of an IOAS: mappings, reservations, pages.

use super::fake::{memory, Bench, Failure, Told, PARENT, PLAIN};
use crate::DeviceConfig;
use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection};
use twostage::spec::pci::Bdf;

const WRITE_ONLY: Protection = Protection { read: false, write: true };
const NOTHING: Protection = Protection { read: false, write: false };

fn fixed(bench: &Bench, ioas: ObjectId, iova: u64, length: u64) -> Errno {
    bench.map(ioas, iova, length).errno()
}

#[test]
fn what_is_refused_when_mapping() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let page = memory(0x1000);
    let map = |ioas, target, protection| bench.host.ioas_map(ioas, &page, target, protection);
    let at = MapTarget::Fixed;
    assert_eq!(map(ioas, at(u64::MAX), NOTHING).errno(), Errno::EOVERFLOW);
    assert_eq!(map(a, at(0), NOTHING).errno(), Errno::EINVAL);
    assert_eq!(map(a, at(0), WRITE_ONLY).errno(), Errno::ENOENT);
    assert_eq!(fixed(&bench, ioas, u64::MAX - 1, 0x1000), Errno::EOVERFLOW);
    map(ioas, at(0x1234), Protection::READ_WRITE).expect("no HWPT asks for an alignment yet");
    assert_eq!(fixed(&bench, ioas, 0x1234, 0x1000), Errno::EEXIST);
    assert_eq!(fixed(&bench, ioas, 0x2000, 0x1000), Errno::EEXIST);
}

#[test]
fn a_hwpt_asks_for_pages() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    assert_eq!(bench.host.ioas_iova_ranges(ioas).unwrap().alignment, 1);
    bench.map(ioas, 0x1800, 0x1000).unwrap();
    assert_eq!(bench.paging(a, ioas, PLAIN).errno(), Errno::EADDRINUSE, "a mapping is unaligned");
    bench.unmapped(ioas);
    let hwpt = bench.paging(a, ioas, PLAIN).unwrap();
    assert_eq!(bench.host.ioas_iova_ranges(ioas).unwrap().alignment, 0x1000);
    assert_eq!(fixed(&bench, ioas, 0x1800, 0x1000), Errno::EINVAL);
    let half = memory(0x2000).part(0, 0x800).unwrap();
    let skew = memory(0x2000).part(0x800, 0x1000).unwrap();
    for (memory, target) in
        [(&half, MapTarget::Fixed(0)), (&skew, MapTarget::Fixed(0)), (&skew, MapTarget::Anywhere)]
    {
        let outcome = bench.host.ioas_map(ioas, memory, target, Protection::READ_WRITE);
        assert_eq!(outcome.errno(), Errno::EINVAL, "{memory:?} {target:?}");
    }
    bench.host.destroy(hwpt).unwrap();
    bench.map(ioas, 0x1800, 0x1000).unwrap();
}

#[test]
fn anywhere_finds_room_that_every_reservation_leaves() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.host.device_attach(a, None, ioas).unwrap();
    bench.host.ioas_allow_iovas(ioas, &[0xfed0_0000..=0xfedf_ffff]).unwrap();
    let page = memory(0x10_0000);
    let map = || bench.host.ioas_map(ioas, &page, MapTarget::Anywhere, Protection::READ_WRITE);
    assert_eq!(map().unwrap(), 0xfed0_0000);
    assert_eq!(map().errno(), Errno::ENOSPC);
}

#[test]
fn a_copy_shares_the_pages_and_outlives_the_source() {
    let bench = Bench::new();
    let (a, src, dst) = (bench.bind("a"), bench.ioas(), bench.ioas());
    for ioas in [src, dst] {
        bench.paging(a, ioas, PLAIN).unwrap();
    }
    let (host, rw) = (&bench.host, Protection::READ_WRITE);
    bench.map(src, 0, 0x4000).unwrap();
    assert_eq!(host.pinned_bytes(), 0x4000);
    let copy = |target, iova, length| host.ioas_copy(dst, target, src, iova, length, rw);
    assert_eq!(copy(MapTarget::Fixed(0x8000), 0x1000, 0x2000).unwrap(), 0x8000);
    assert_eq!(copy(MapTarget::Fixed(0xa000), 0, 0x4000).unwrap(), 0xa000);
    assert_eq!(host.pinned_bytes(), 0x4000, "pinned and accounted once");
    bench.unmapped(src);
    assert_eq!(host.pinned_bytes(), 0x4000);
    assert_eq!(host.ioas_unmap(dst, 0xa000, 0x4000).unwrap(), 0x4000);
    assert_eq!(host.pinned_bytes(), 0x2000, "only what the smaller copy shows");
    bench.unmapped(dst);
    assert_eq!(host.pinned_bytes(), 0);
}

#[test]
fn what_is_refused_when_copying() {
    let bench = Bench::new();
    let (host, src, dst) = (&bench.host, bench.ioas(), bench.ioas());
    let (rw, ro) = (Protection::READ_WRITE, Protection::READ_ONLY);
    host.ioas_map(src, &memory(0x2000), MapTarget::Fixed(0), ro).unwrap();
    let copy = |dst, src, iova, length, protection| {
        host.ioas_copy(dst, MapTarget::Fixed(0), src, iova, length, protection).errno()
    };
    let none = ObjectId(77);
    assert_eq!(copy(dst, src, u64::MAX, 1, NOTHING), Errno::EOVERFLOW);
    assert_eq!(copy(dst, src, 0, u64::MAX, NOTHING), Errno::EOVERFLOW);
    assert_eq!(copy(dst, none, 0, 1, NOTHING), Errno::EINVAL);
    assert_eq!(copy(dst, none, 0, 0, ro), Errno::ENOENT);
    assert_eq!(copy(none, src, 0, 0, ro), Errno::EINVAL);
    assert_eq!(copy(none, src, 0x1000, 0x1001, ro), Errno::ENOENT, "a gap in the source");
    assert_eq!(copy(none, src, 0, 0x1000, ro), Errno::ENOENT, "no destination");
    assert_eq!(copy(src, src, 0, 0x1000, ro), Errno::EEXIST);
    assert_eq!(copy(dst, src, 0, 0x1000, rw), Errno::EPERM, "the pages are not writable");
    assert_eq!(host.ioas_unmap(dst, 0, u64::MAX).unwrap(), 0, "nothing was mapped");
}

#[test]
fn a_copy_makes_one_mapping_for_each_it_copies_from() {
    let bench = Bench::new();
    let (host, ioas) = (&bench.host, bench.ioas());
    bench.map(ioas, 0, 0x2000).unwrap();
    bench.map(ioas, 0x2000, 0x2000).unwrap();
    let target = MapTarget::Fixed(0x10000);
    host.ioas_copy(ioas, target, ioas, 0x1000, 0x2000, Protection::READ_WRITE).unwrap();
    assert_eq!(host.ioas_unmap(ioas, 0x10000, 0x1000).unwrap(), 0x1000);
    assert_eq!(host.ioas_unmap(ioas, 0x11000, 0x1000).unwrap(), 0x1000);
}

#[test]
fn pages_are_pinned_while_a_hwpt_needs_them() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.map(ioas, 0, 0x4000).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 0);
    let first = bench.paging(a, ioas, PARENT).unwrap();
    let second = bench.paging(a, ioas, PLAIN).unwrap();
    bench.map(ioas, 0x4000, 0x1000).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 0x5000, "once, for two HWPTs");
    bench.host.destroy(first).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 0x5000);
    bench.host.destroy(second).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 0);
}

#[test]
fn whole_mappings_are_unmapped_up_to_one_that_would_be_cut() {
    let bench = Bench::new();
    let (host, ioas) = (&bench.host, bench.ioas());
    assert_eq!(bench.unmapped(ioas), 0, "unmapping all of nothing is fine");
    for iova in [0x1000, 0x3000] {
        bench.map(ioas, iova, 0x1000).unwrap();
    }
    let unmap = |ioas, iova, length| host.ioas_unmap(ioas, iova, length);
    assert_eq!(unmap(ObjectId(9), 0, 0).errno(), Errno::ENOENT);
    assert_eq!(unmap(ioas, 1, u64::MAX).errno(), Errno::EOVERFLOW);
    assert_eq!(unmap(ioas, u64::MAX, 1).errno(), Errno::EOVERFLOW);
    assert_eq!(unmap(ioas, 0, 0).errno(), Errno::EINVAL);
    assert_eq!(unmap(ioas, 0x1000, u64::MAX - 1).errno(), Errno::EOVERFLOW);
    assert_eq!(unmap(ioas, 0x2000, 0x1000).errno(), Errno::ENOENT);
    assert_eq!(unmap(ioas, 0x1001, 0x4000).errno(), Errno::ENOENT, "would cut the first");
    assert_eq!(unmap(ioas, 0x800, 0x3801).unwrap(), 0x2000, "gaps and more are fine");
    for iova in [0x1000, 0x3000] {
        bench.map(ioas, iova, 0x1000).unwrap();
    }
    assert_eq!(unmap(ioas, 0x1000, 0x2001).errno(), Errno::ENOENT, "would cut the second");
    assert_eq!(
        unmap(ioas, 0x1000, 0x1000).errno(),
        Errno::ENOENT,
        "the first is gone, as in Linux"
    );
    assert_eq!(unmap(ioas, 0x3000, 0x1000).unwrap(), 0x1000);
}

#[test]
fn an_unmap_is_over_when_the_hardware_was_told() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.map(ioas, 0, 0x1000).unwrap();
    bench.unmapped(ioas);
    assert_eq!(bench.fake.told(), [], "no HWPT, so no hardware");
    bench.paging(a, ioas, PLAIN).unwrap();
    for page in 0..8 {
        bench.map(ioas, page * 0x1000, 0x1000).unwrap();
    }
    assert_eq!(bench.fake.told(), [], "a mapping takes nothing away");
    bench.host.ioas_unmap(ioas, 0, 0x8000).unwrap();
    assert_eq!(bench.fake.told(), [Told::Stage2Changed], "once for the whole call");
    assert_eq!(bench.host.ioas_unmap(ioas, 0, 0x8000).errno(), Errno::ENOENT);
    assert_eq!(bench.fake.told(), []);
}

#[test]
fn a_device_reserves_its_regions_while_attached() {
    let bench = Bench::new();
    let config = DeviceConfig { reserved: vec![0x7000..=0x7fff], ..DeviceConfig::default() };
    let unit = bench.host.machine().part("a").unwrap().unit;
    bench.host.add_device("rmrr", unit, Bdf::from_raw(0x40), config).unwrap();
    let (dev, ioas) = (bench.bind("rmrr"), bench.ioas());
    let all = || bench.host.ioas_iova_ranges(ioas).unwrap().allowed;
    assert_eq!(all(), [0..=u64::MAX]);
    let hwpt = bench.paging(dev, ioas, PARENT).unwrap();
    let last = (1 << 48) - 1;
    assert_eq!(all(), [0..=last]);
    bench.host.device_attach(dev, None, hwpt).unwrap();
    assert_eq!(all(), [0..=0x6fff, 0x8000..=0xfedf_ffff, 0xfef0_0000..=last]);
    assert_eq!(fixed(&bench, ioas, 0x7000, 0x1000), Errno::EINVAL);
    assert_eq!(fixed(&bench, ioas, 0xfeef_f000, 0x1000), Errno::EINVAL);
    assert_eq!(fixed(&bench, ioas, last + 1, 0x1000), Errno::EINVAL);
    bench.host.device_detach(dev, None).unwrap();
    assert_eq!(all(), [0..=last]);
    bench.host.destroy(hwpt).unwrap();
    assert_eq!(all(), [0..=u64::MAX]);
}

#[test]
fn a_mapping_in_a_reserved_region_keeps_devices_out() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.map(ioas, 0xfee0_0000, 0x1000).unwrap();
    assert_eq!(bench.host.device_attach(a, None, ioas).errno(), Errno::EADDRINUSE);
    bench.unmapped(ioas);
    bench.map(ioas, 1 << 48, 0x1000).unwrap();
    assert_eq!(bench.host.device_attach(a, None, ioas).errno(), Errno::EADDRINUSE);
    assert_eq!(bench.paging(a, ioas, PARENT).errno(), Errno::EADDRINUSE);
    bench.unmapped(ioas);
    bench.host.ioas_allow_iovas(ioas, &[0xfee0_0000..=0xfee0_0fff]).unwrap();
    assert_eq!(bench.host.device_attach(a, None, ioas).errno(), Errno::EADDRINUSE);
    assert_eq!(bench.host.live_objects(), 2, "nothing is left behind");
    bench.host.ioas_allow_iovas(ioas, &[]).unwrap();
    bench.host.device_attach(a, None, ioas).unwrap();
    let reserved = bench.host.ioas_allow_iovas(ioas, &[0xfee0_0000..=0xfee0_0fff]);
    assert_eq!(reserved.errno(), Errno::EADDRINUSE);
}

#[test]
fn regions_follow_a_device_from_ioas_to_ioas() {
    let bench = Bench::new();
    let (a, b) = (bench.bind("a"), bench.bind("b"));
    let (first, second) = (bench.ioas(), bench.ioas());
    let msi_is_free = |ioas: ObjectId| {
        let ranges = bench.host.ioas_iova_ranges(ioas).unwrap().allowed;
        ranges.iter().any(|range| range.contains(&0xfee0_0000))
    };
    for dev in [a, b] {
        bench.host.device_attach(dev, None, first).unwrap();
    }
    bench.host.device_attach(a, None, second).unwrap();
    assert!(!msi_is_free(first) && !msi_is_free(second));
    bench.host.device_attach(b, None, second).unwrap();
    assert!(msi_is_free(first) && !msi_is_free(second));
    bench.host.device_detach(a, None).unwrap();
    assert!(!msi_is_free(second));
}

#[test]
fn a_nested_hwpt_has_no_ioas_of_its_own() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    // The regions of the device are reserved in the parent's.
    assert_eq!(fixed(&bench, ioas, 0xfee0_0000, 0x1000), Errno::EINVAL);
    bench.host.device_attach(a, None, parent).unwrap();
    assert_eq!(fixed(&bench, ioas, 0xfee0_0000, 0x1000), Errno::EINVAL);
}

#[test]
fn a_tebibyte_is_one_mapping() {
    // Only address space: untouched memory costs nothing.
    let memory = memory(1 << 40);
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.paging(a, ioas, PARENT).unwrap();
    let rw = Protection::READ_WRITE;
    bench.host.ioas_map(ioas, &memory, MapTarget::Fixed(1 << 40), rw).unwrap();
    assert_eq!(bench.host.pinned_bytes(), 1 << 40);
    assert!(bench.host.graph().to_string().contains("1 mapping"));
    assert_eq!(bench.unmapped(ioas), 1 << 40);
    assert_eq!(bench.host.pinned_bytes(), 0);
}

#[test]
fn without_huge_pages_all_is_aligned_to_pages() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let alignment = || bench.host.ioas_iova_ranges(ioas).unwrap().alignment;
    let set = |allowed| {
        let outcome = bench.host.objects().set_huge_pages(ioas, allowed);
        outcome.map_err(|refusal| refusal.errno)
    };
    bench.map(ioas, 0x1800, 0x1000).unwrap();
    assert_eq!(set(false), Err(Errno::EADDRINUSE));
    assert_eq!(alignment(), 1, "nothing has changed");
    set(true).unwrap();
    bench.unmapped(ioas);
    bench.map(ioas, 0x1000, 0x1000).unwrap();
    set(false).unwrap();
    assert_eq!(alignment(), 0x1000);
    assert_eq!(fixed(&bench, ioas, 0x2800, 0x1000), Errno::EINVAL);
    set(true).unwrap();
    assert_eq!(alignment(), 1);
    bench.paging(a, ioas, PLAIN).unwrap();
    assert_eq!(set(false), Err(Errno::EINVAL), "a HWPT may hold a huge page of it");
    bench.unmapped(ioas);
    set(false).unwrap();
}

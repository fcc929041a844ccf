// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of binding, attaching, replacing and detaching, of IOMMU groups, and of several iommufds
//! on one machine.

use super::fake::{Bench, Failure, Told, PARENT, PASID, PLAIN, RID_A, RID_B};
use crate::host::machine::MachineError;
use crate::host::objects::Change;
use crate::{DeviceConfig, ObjectKind};
use twostage::iommufd::{Errno, HostIommu, ObjectId};
use twostage::spec::pci::Bdf;

#[test]
fn one_device_binds_to_one_iommufd() {
    let bench = Bench::new();
    assert_eq!(bench.host.device_bind("a").unwrap(), ObjectId(1));
    assert_eq!(bench.fake.told(), [Told::Remove(RID_A, None)], "it starts blocked");
    assert_eq!(bench.host.device_bind("a").errno(), Errno::EBUSY);
    assert_eq!(bench.host.device_bind("nobody").errno(), Errno::ENODEV);
    assert_eq!(bench.host.device_unbind(ObjectId(2)).errno(), Errno::ENOENT);
    bench.host.device_unbind(ObjectId(1)).unwrap();
    assert_eq!(bench.host.device_unbind(ObjectId(1)).errno(), Errno::ENOENT);
    bench.host.device_bind("a").unwrap();
}

#[test]
fn a_device_is_attached_to_page_tables_only() {
    let bench = Bench::new();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    assert_eq!(bench.host.device_attach(ioas, None, ioas).errno(), Errno::ENOENT);
    assert_eq!(bench.host.device_attach(a, None, ObjectId(9)).errno(), Errno::ENOENT);
    assert_eq!(bench.host.device_attach(a, None, b).errno(), Errno::EINVAL);
}

#[test]
fn attaching_to_an_ioas_reuses_a_compatible_automatic_hwpt_or_makes_one() {
    let bench = Bench::new();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let hwpt = bench.host.device_attach(a, None, ioas).unwrap();
    assert_ne!(hwpt, ioas);
    assert_eq!(bench.host.device_attach(b, None, ioas).unwrap(), hwpt);
    assert_eq!(bench.host.device_attach(a, None, ioas).unwrap(), hwpt);
    let graph = bench.host.graph();
    let automatic: Vec<_> = graph.of_kind(ObjectKind::HwptPaging).collect();
    assert_eq!(automatic.len(), 1);
    assert_eq!(automatic[0].flags, ["AUTO"]);
}

#[test]
fn attaching_to_an_ioas_never_picks_a_manual_hwpt() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let manual = bench.paging(a, ioas, PLAIN).unwrap();
    assert_ne!(bench.host.device_attach(a, None, ioas).unwrap(), manual);
}

#[test]
fn an_automatic_hwpt_of_another_kind_of_iommu_is_not_reused() {
    use twostage::spec::vtd::regs::{Cap, Ecap};
    let legacy = super::fake::Fake::new(Cap::new().with_mgaw(38).with_sagaw(0b0010), Ecap::new());
    let bench = Bench::of(super::fake::Fake::able(), legacy);
    let (a, far, ioas) = (bench.bind("a"), bench.bind("far"), bench.ioas());
    let first = bench.host.device_attach(a, None, ioas).unwrap();
    let second = bench.host.device_attach(far, None, ioas).unwrap();
    assert_ne!(first, second);
    assert_eq!(bench.host.device_attach(far, None, first).errno(), Errno::EINVAL);
}

#[test]
fn automatic_hwpts_vanish_with_their_last_user() {
    let bench = Bench::new();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let hwpt = bench.host.device_attach(a, None, ioas).unwrap();
    bench.host.device_attach(b, None, hwpt).unwrap();
    bench.host.device_detach(a, None).unwrap();
    assert_eq!(bench.host.destroy(hwpt).errno(), Errno::EBUSY);
    bench.host.device_detach(b, None).unwrap();
    assert_eq!(bench.host.destroy(hwpt).errno(), Errno::ENOENT);
    bench.host.destroy(ioas).unwrap();
}

#[test]
fn manual_hwpts_stay() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PLAIN).unwrap();
    assert_eq!(bench.host.device_attach(a, None, hwpt).unwrap(), hwpt);
    bench.host.device_detach(a, None).unwrap();
    bench.host.destroy(hwpt).unwrap();
}

#[test]
fn replace_swaps_without_a_gap() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0x5000).unwrap();
    bench.host.device_attach(a, None, parent).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    bench.host.device_attach(a, None, parent).unwrap();
    assert_eq!(
        bench.fake.told(),
        [
            Told::Install(RID_A, None, None),
            Told::Install(RID_A, None, Some(0x5000)),
            Told::Install(RID_A, None, None),
        ]
    );
    bench.host.destroy(nested).unwrap();
    assert_eq!(bench.host.destroy(parent).errno(), Errno::EBUSY);
}

#[test]
fn attaching_what_is_attached_tells_the_hardware_nothing() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PLAIN).unwrap();
    bench.host.device_attach(a, None, hwpt).unwrap();
    bench.fake.told();
    bench.host.device_attach(a, None, hwpt).unwrap();
    assert_eq!(bench.fake.told(), []);
    bench.host.device_detach(a, None).unwrap();
    bench.host.destroy(hwpt).unwrap();
}

#[test]
fn a_replacement_that_is_refused_changes_nothing() {
    let bench = Bench::new();
    let (a, ioas, other) = (bench.bind("a"), bench.ioas(), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let odd = twostage::iommufd::HwptData::VtdS1(twostage::iommufd::iommu_hwpt_vtd_s1 {
        addr_width: 13,
        ..Default::default()
    });
    let nested = bench
        .host
        .hwpt_alloc(&twostage::iommufd::HwptAlloc {
            flags: PLAIN,
            dev: a,
            pt: parent,
            data: odd,
            fault: None,
        })
        .expect("values are looked at when a device is attached");
    bench.host.device_attach(a, None, parent).unwrap();
    bench.map(other, 0xfee0_0000, 0x1000).unwrap();
    let before = (bench.host.graph(), bench.host.ioas_iova_ranges(ioas).unwrap());
    bench.fake.told();
    assert_eq!(bench.host.device_attach(a, None, nested).errno(), Errno::EINVAL);
    assert_eq!(bench.host.device_attach(a, None, other).errno(), Errno::EADDRINUSE);
    assert_eq!((bench.host.graph(), bench.host.ioas_iova_ranges(ioas).unwrap()), before);
    assert_eq!(bench.fake.told(), []);
}

#[test]
fn a_detached_device_is_blocked_and_detaching_again_does_nothing() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.host.device_attach(a, None, ioas).unwrap();
    bench.fake.told();
    bench.host.device_detach(a, None).unwrap();
    assert_eq!(bench.fake.told(), [Told::Remove(RID_A, None)]);
    bench.host.device_detach(a, None).unwrap();
    bench.host.device_detach(a, Some(5)).unwrap();
    assert_eq!(bench.fake.told(), []);
    assert_eq!(bench.host.device_detach(ioas, None).errno(), Errno::ENOENT);
}

#[test]
fn a_pasid_needs_hwpts_with_the_pasid_flag() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let without = bench.paging(a, ioas, PARENT).unwrap();
    let with = bench.paging(a, ioas, PASID).unwrap();
    let host = &bench.host;
    assert_eq!(host.device_attach(a, Some(5), without).errno(), Errno::EINVAL);
    assert_eq!(host.device_attach(a, Some(5), ioas).errno(), Errno::EINVAL, "automatic");
    host.device_attach(a, None, without).unwrap();
    assert_eq!(host.device_attach(a, Some(5), with).errno(), Errno::EINVAL, "the device's own");
    host.device_attach(a, None, with).unwrap();
    host.device_attach(a, Some(5), with).unwrap();
    assert_eq!(host.device_attach(a, None, without).errno(), Errno::EINVAL);
    assert_eq!(host.device_attach(a, None, ioas).errno(), Errno::EINVAL);
}

#[test]
fn a_pasid_is_one_the_device_and_its_iommu_have() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PASID).unwrap();
    bench.host.device_attach(a, Some(0xffff), hwpt).unwrap();
    for pasid in [0, 0x1_0000, 1 << 31, u32::MAX] {
        assert_eq!(bench.host.device_attach(a, Some(pasid), hwpt).errno(), Errno::EINVAL);
    }
    assert_eq!(bench.host.get_hw_info(a).unwrap().max_pasid_log2, 16);
}

#[test]
fn a_pasid_attachment_stands_alone() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PASID).unwrap();
    bench.host.device_attach(a, Some(5), hwpt).unwrap();
    bench.host.device_attach(a, None, hwpt).unwrap();
    bench.host.device_detach(a, None).unwrap();
    bench.fake.told();
    assert_eq!(bench.host.destroy(hwpt).errno(), Errno::EBUSY);
    bench.host.device_detach(a, Some(5)).unwrap();
    assert_eq!(bench.fake.told(), [Told::Remove(RID_A, Some(5))]);
    bench.host.destroy(hwpt).unwrap();
}

#[test]
fn unbinding_detaches_pasids_then_the_device() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PASID).unwrap();
    for slot in [Some(7), None, Some(3)] {
        bench.host.device_attach(a, slot, hwpt).unwrap();
    }
    bench.fake.told();
    bench.host.device_unbind(a).unwrap();
    assert_eq!(
        bench.fake.told(),
        [
            Told::Remove(RID_A, Some(3)),
            Told::Remove(RID_A, Some(7)),
            Told::Remove(RID_A, None),
            Told::FaultSink(RID_A, None),
        ]
    );
    bench.host.destroy(hwpt).unwrap();
    bench.host.destroy(ioas).unwrap();
    assert_eq!(bench.host.live_objects(), 0);
}

#[test]
fn a_device_is_bound_to_one_iommufd_at_a_time() {
    let bench = Bench::new();
    let other = bench.host.machine().open();
    let a = bench.bind("a");
    assert_eq!(other.device_bind("a").errno(), Errno::EBUSY);
    other.device_bind("b").expect("a group of its own");
    bench.host.device_unbind(a).unwrap();
    assert_eq!(other.device_bind("a").unwrap(), ObjectId(2), "each iommufd counts its own objects");
    bench.host.close();
    assert_eq!(other.live_objects(), 2, "closing one leaves the other alone");
}

#[test]
fn a_group_is_bound_to_one_iommufd_at_a_time() {
    let bench = Bench::grouped();
    let other = bench.host.machine().open();
    bench.bind("a");
    assert_eq!(other.device_bind("b").errno(), Errno::EPERM);
    bench.host.device_bind("b").unwrap();
    drop(bench.host);
    other.device_bind("b").expect("an iommufd that is gone has nothing");
}

#[test]
fn iommufds_share_an_iommu_and_nothing_else() {
    let bench = Bench::new();
    let other = bench.host.machine().open();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let b = other.device_bind("b").unwrap();
    let far_ioas = other.ioas_alloc().unwrap();
    bench.fake.told();
    bench.host.device_attach(a, None, ioas).unwrap();
    other.device_attach(b, None, far_ioas).unwrap();
    let told = [Told::Install(RID_A, None, None), Told::Install(RID_B, None, None)];
    assert_eq!(bench.fake.told(), told);
    bench.host.close();
    assert_eq!(
        bench.fake.told(),
        [Told::Remove(RID_A, None), Told::FaultSink(RID_A, None)],
        "the other's device is not touched"
    );
}

#[test]
fn the_first_device_attaches_its_whole_group_and_the_last_detaches_it() {
    let bench = Bench::grouped();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PLAIN).unwrap();
    bench.host.device_attach(a, None, hwpt).unwrap();
    let both = [Told::Install(RID_A, None, None), Told::Install(RID_B, None, None)];
    assert_eq!(bench.fake.told(), both, "even those that are not bound");
    let b = bench.host.device_bind("b").unwrap();
    bench.host.device_attach(b, None, hwpt).unwrap();
    assert_eq!(bench.fake.told(), [], "the second follows");
    bench.host.device_detach(a, None).unwrap();
    assert_eq!(bench.fake.told(), []);
    assert_eq!(bench.host.destroy(hwpt).errno(), Errno::EBUSY);
    bench.host.device_detach(b, None).unwrap();
    assert_eq!(bench.fake.told(), [Told::Remove(RID_A, None), Told::Remove(RID_B, None)]);
    bench.host.destroy(hwpt).unwrap();
}

#[test]
fn a_device_joins_only_what_its_group_is_attached_to() {
    let bench = Bench::grouped();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let first = bench.paging(a, ioas, PLAIN).unwrap();
    let second = bench.paging(a, ioas, PLAIN).unwrap();
    bench.host.device_attach(a, None, first).unwrap();
    assert_eq!(bench.host.device_attach(b, None, second).errno(), Errno::EINVAL);
    let automatic = bench.host.device_attach(b, None, ioas);
    assert_eq!(automatic.errno(), Errno::EINVAL, "an automatic one is another");
    assert_eq!(bench.host.live_objects(), 5, "and is not left over");
}

#[test]
fn replacing_moves_all_attached_devices_of_the_group() {
    let bench = Bench::grouped();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0x5000).unwrap();
    let automatic = bench.host.device_attach(a, None, ioas).unwrap();
    assert_eq!(bench.host.device_attach(b, None, ioas).unwrap(), automatic);
    bench.fake.told();
    bench.host.device_attach(b, None, nested).unwrap();
    let table = Some(0x5000);
    let told = [Told::Install(RID_A, None, table), Told::Install(RID_B, None, table)];
    assert_eq!(bench.fake.told(), told);
    assert_eq!(bench.host.destroy(automatic).errno(), Errno::ENOENT, "it vanished");
    bench.host.device_detach(b, None).unwrap();
    assert_eq!(bench.host.destroy(nested).errno(), Errno::EBUSY, "the other device is there too");
    bench.host.device_detach(a, None).unwrap();
    bench.host.destroy(nested).unwrap();
}

#[test]
fn reserved_regions_go_with_every_device_of_the_group() {
    let bench = Bench::grouped();
    let (a, b) = (bench.bind("a"), bench.bind("b"));
    let [first, second] = [0; 2].map(|_| bench.ioas());
    bench.host.device_attach(a, None, first).unwrap();
    bench.host.device_attach(b, None, first).unwrap();
    bench.host.device_attach(a, None, second).unwrap();
    let usable = |ioas| bench.host.ioas_iova_ranges(ioas).unwrap().allowed;
    assert_eq!(usable(first), [0..=u64::MAX]);
    assert_eq!(usable(second).len(), 2, "the interrupt window is cut out");
    bench.host.device_detach(a, None).unwrap();
    assert_eq!(usable(second).len(), 2);
    bench.host.device_detach(b, None).unwrap();
    assert_eq!(usable(second), [0..=u64::MAX]);
}

#[test]
fn a_pasid_of_a_group_needs_the_flag_of_all() {
    let bench = Bench::grouped();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let (plain, pasid) =
        (bench.paging(a, ioas, PLAIN).unwrap(), bench.paging(a, ioas, PASID).unwrap());
    bench.host.device_attach(a, Some(3), pasid).unwrap();
    assert_eq!(bench.host.device_attach(b, None, plain).errno(), Errno::EINVAL);
    bench.host.device_attach(b, None, pasid).unwrap();
}

#[test]
fn attaching_and_replacing_are_told_apart() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let hwpt = bench.paging(a, ioas, PASID).unwrap();
    for slot in [None, Some(5)] {
        let change = |change| {
            let outcome = bench.host.objects().device_change(a, slot, hwpt, change);
            outcome.map_err(|refusal| refusal.errno)
        };
        assert_eq!(change(Change::Replace), Err(Errno::EINVAL));
        assert_eq!(change(Change::Attach), Ok(hwpt));
        assert_eq!(change(Change::Attach), Err(Errno::EBUSY));
        assert_eq!(change(Change::Replace), Ok(hwpt));
    }
}

#[test]
fn devices_come_and_go_unless_their_group_is_in_use() {
    let bench = Bench::grouped();
    let machine = bench.host.machine();
    let unit = machine.part("a").unwrap().unit;
    let config = |group| DeviceConfig { group, ..DeviceConfig::default() };
    let add =
        |name: &str, rid, group| machine.add_device(name, unit, Bdf::from_raw(rid), config(group));
    bench.bind("a");
    let in_use = |name: &str| Err(MachineError::GroupInUse(name.to_owned()));
    assert_eq!(add("c", 0x30, Some(7)), in_use("c"));
    assert_eq!(machine.remove_device("b"), in_use("b"));
    assert_eq!(machine.remove_device("x"), Err(MachineError::NoSuchDevice("x".into())));
    add("c", 0x30, Some(8)).unwrap();
    let c = bench.host.device_bind("c").unwrap();
    assert_eq!(machine.remove_device("c"), in_use("c"));
    bench.host.device_unbind(c).unwrap();
    machine.remove_device("c").unwrap();
    assert_eq!(bench.host.device_bind("c").errno(), Errno::ENODEV);
    add("c", 0x30, None).expect("name and requester id are free again");
}

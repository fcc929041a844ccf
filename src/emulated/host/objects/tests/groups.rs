// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of IOMMU groups, and of several iommufds on one machine.

use super::fake::{Bench, Failure, Told, PARENT, PASID, PLAIN, RID_A, RID_B};
use crate::host::machine::MachineError;
use crate::host::objects::Change;
use crate::DeviceConfig;
use twostage::iommufd::{Errno, HostIommu, ObjectId};
use twostage::spec::pci::Bdf;

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of use, destruction, vIOMMUs and closing.

use std::sync::Weak;

use super::fake::{Bench, Failure, Fake, Told, PARENT, PASID, PLAIN, RID_A};
use twostage::iommufd::{Errno, FaultSink, HostFault, HostIommu, ObjectId, ViommuKind};

const KIND: ViommuKind = ViommuKind::ArmSmmuV3;

#[test]
fn objects_in_use_cannot_be_destroyed() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    for id in [a, ioas, parent, nested] {
        assert_eq!(bench.host.destroy(id).errno(), Errno::EBUSY, "{id:?}");
    }
    let error = bench.host.destroy(parent).unwrap_err();
    assert!(error.to_string().contains(&format!("used by HWPT_NESTED {nested}")), "{error}");
    bench.host.device_detach(a, None).unwrap();
    for id in [ioas, parent] {
        assert_eq!(bench.host.destroy(id).errno(), Errno::EBUSY, "{id:?}");
    }
    for id in [nested, parent, ioas] {
        bench.host.destroy(id).unwrap();
        assert_eq!(bench.host.destroy(id).errno(), Errno::ENOENT);
    }
    assert_eq!(bench.host.destroy(a).errno(), Errno::EBUSY, "a device is ended by closing it");
    assert_eq!(bench.host.destroy(ObjectId(0)).errno(), Errno::ENOENT);
}

#[test]
fn ids_are_never_reused_while_referenced() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let nested = bench.nested(a, parent, PLAIN, 0).unwrap();
    let fresh: Vec<_> = (0..8).map(|_| bench.ioas()).collect();
    for id in [a, ioas, parent, nested] {
        assert!(!fresh.contains(&id));
    }
    bench.host.destroy(nested).unwrap();
    assert_eq!(bench.ioas(), nested, "the lowest free id is the next");
}

#[test]
fn an_ioas_with_mappings_can_be_destroyed() {
    let bench = Bench::new();
    let ioas = bench.ioas();
    bench.map(ioas, 0, 0x2000).unwrap();
    bench.host.destroy(ioas).unwrap();
    assert_eq!((bench.host.live_objects(), bench.host.pinned_bytes()), (0, 0));
}

#[test]
fn vt_d_has_no_viommus() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let alloc = |kind, dev, hwpt| bench.host.viommu_alloc(kind, dev, hwpt).errno();
    assert_eq!(alloc(ViommuKind::Default, ObjectId(99), parent), Errno::EOPNOTSUPP);
    assert_eq!(alloc(KIND, ObjectId(99), parent), Errno::ENOENT);
    assert_eq!(alloc(KIND, a, ObjectId(99)), Errno::EOPNOTSUPP, "before the HWPT is looked at");
}

#[test]
fn a_viommu_stands_on_a_nesting_parent() {
    let bench = Bench::with_viommus();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let plain = bench.paging(a, ioas, PLAIN).unwrap();
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let alloc = |hwpt| bench.host.viommu_alloc(KIND, a, hwpt);
    assert_eq!(alloc(ioas).errno(), Errno::ENOENT);
    assert_eq!(alloc(plain).errno(), Errno::EINVAL);
    let viommu = alloc(parent).unwrap();
    assert_eq!(bench.host.destroy(parent).errno(), Errno::EBUSY);
    bench.host.device_unbind(a).expect("a vIOMMU is of the IOMMU, not of the device");
    bench.host.destroy(viommu).unwrap();
    bench.host.destroy(parent).unwrap();
}

#[test]
fn devices_share_a_viommu_behind_one_physical_iommu_only() {
    let bench = Bench::with_viommus();
    let (a, b, far, ioas) = (bench.bind("a"), bench.bind("b"), bench.bind("far"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let viommu = bench.host.viommu_alloc(KIND, a, parent).unwrap();
    bench.host.vdevice_alloc(viommu, a, 0x10).unwrap();
    bench.host.vdevice_alloc(viommu, b, 0x18).unwrap();
    assert_eq!(bench.host.vdevice_alloc(viommu, far, 0x20).errno(), Errno::EINVAL);
    assert_eq!(bench.nested(far, viommu, PLAIN, 0).errno(), Errno::EINVAL);
    let nested = bench.nested(b, viommu, PLAIN, 0).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
}

#[test]
fn a_device_has_one_vdevice_and_a_virtual_id_names_one() {
    let bench = Bench::with_viommus();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let [first, second] = [0; 2].map(|_| bench.host.viommu_alloc(KIND, a, parent).unwrap());
    let alloc = |viommu, dev, id| bench.host.vdevice_alloc(viommu, dev, id);
    assert_eq!(alloc(parent, ObjectId(99), 0).errno(), Errno::ENOENT);
    assert_eq!(alloc(first, parent, 0).errno(), Errno::ENOENT);
    let vdevice = alloc(first, a, u64::MAX).unwrap();
    assert_eq!(alloc(second, a, 1).errno(), Errno::EEXIST);
    assert_eq!(alloc(first, b, u64::MAX).errno(), Errno::EEXIST);
    alloc(second, b, u64::MAX).expect("ids are the vIOMMU's own");
    assert_eq!(bench.host.destroy(first).errno(), Errno::EBUSY);
    bench.host.destroy(vdevice).unwrap();
    bench.host.destroy(first).unwrap();
    alloc(second, a, 1).unwrap();
}

#[test]
fn a_nested_hwpt_of_a_viommu_holds_the_viommu() {
    let bench = Bench::with_viommus();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let viommu = bench.host.viommu_alloc(KIND, a, parent).unwrap();
    let nested = bench.nested(a, viommu, PLAIN, 0).unwrap();
    assert_eq!(bench.host.destroy(viommu).errno(), Errno::EBUSY);
    for id in [nested, viommu, parent] {
        bench.host.destroy(id).unwrap();
    }
}

#[test]
fn unbinding_a_device_ends_its_vdevice_and_buries_the_id() {
    let bench = Bench::with_viommus();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(a, ioas, PARENT).unwrap();
    let viommu = bench.host.viommu_alloc(KIND, a, parent).unwrap();
    let vdevice = bench.host.vdevice_alloc(viommu, a, 1).unwrap();
    bench.host.device_unbind(a).unwrap();
    assert_eq!(bench.host.destroy(vdevice).errno(), Errno::ENOENT);
    assert_eq!(bench.ioas(), a, "the device's id is free again");
    assert_ne!(bench.ioas(), vdevice, "the vDEVICE's is not");
    bench.host.destroy(viommu).unwrap();
}

struct Nobody;
impl FaultSink for Nobody {
    fn dma_fault(&self, _: &HostFault) {}
}

#[test]
fn faults_are_reported_where_the_iommu_does() {
    let mut silent = Fake::able();
    silent.extensions.fault_reports = false;
    let bench = Bench::of(Fake::able(), silent);
    let (a, far) = (bench.bind("a"), bench.bind("far"));
    let sink = || -> Weak<dyn FaultSink> { Weak::<Nobody>::new() };
    bench.host.set_fault_sink(a, sink()).unwrap();
    assert_eq!(bench.fake.told(), [Told::FaultSink(RID_A, Some(a))]);
    assert_eq!(bench.host.set_fault_sink(far, sink()).errno(), Errno::EOPNOTSUPP);
    assert_eq!(bench.host.set_fault_sink(ObjectId(9), sink()).errno(), Errno::ENOENT);
}

#[test]
fn closing_tears_all_down_in_order() {
    let bench = Bench::with_viommus();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    bench.map(ioas, 0, 0x3000).unwrap();
    let parent = bench.paging(a, ioas, PARENT.with_pasid(true)).unwrap();
    let viommu = bench.host.viommu_alloc(KIND, a, parent).unwrap();
    bench.host.vdevice_alloc(viommu, a, 1).unwrap();
    let nested = bench.nested(a, viommu, PASID, 0).unwrap();
    bench.host.device_attach(a, None, parent).unwrap();
    bench.host.device_attach(a, Some(1), nested).unwrap();
    bench.fake.told();
    bench.host.close();
    assert_eq!(
        bench.fake.told(),
        [Told::Remove(RID_A, Some(1)), Told::Remove(RID_A, None), Told::FaultSink(RID_A, None),],
        "the hardware is told while what it uses is alive"
    );
    assert_eq!((bench.host.live_objects(), bench.host.pinned_bytes()), (0, 0));
    assert_eq!(bench.host.device_bind("a").unwrap(), ObjectId(1), "it can be opened again");
    let fake = bench.fake.clone();
    fake.told();
    drop(bench);
    assert_eq!(fake.told(), [Told::FaultSink(RID_A, None)]);
}

#[test]
fn the_graph_is_drawn_as_the_documentation_draws_it() {
    let bench = Bench::with_viommus();
    let (a, b, ioas) = (bench.bind("a"), bench.bind("b"), bench.ioas());
    bench.map(ioas, 0, 0x1000).unwrap();
    let parent = bench.paging(a, ioas, PARENT.with_pasid(true)).unwrap();
    let nested = bench.nested(a, parent, PASID, 0x5000).unwrap();
    bench.host.device_attach(a, None, nested).unwrap();
    bench.host.device_attach(a, Some(7), nested).unwrap();
    bench.host.device_attach(b, None, parent).unwrap();
    assert_eq!(
        bench.host.graph().to_string(),
        "IOAS 3 (1 mapping)\n  \
           ← HWPT_PAGING 4 [NEST_PARENT|PASID]\n    \
             ← DEVICE 2 b (00:05.0)\n    \
             ← HWPT_NESTED 5 [PASID] VTD_S1 at 0x5000, 48 bits\n      \
               ← DEVICE 1 a (00:04.0)\n      \
               ← DEVICE 1 a (00:04.0) PASID 0x7\n\
         5 objects, 0x1000 bytes pinned\n"
    );
}

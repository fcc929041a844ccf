// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rules of fault queues and vEVENTQs.

use std::sync::Arc;

use super::fake::{s1, Bench, Failure, PARENT, PLAIN};
use super::viommus::KIND;
use twostage::iommufd::{
    Errno, FaultQueue, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId, PageRequest,
    PageRequestFlags, PageRequestPermissions, PageResponseCode, Result, Vevent, ViommuKind,
};

const FAULT: HwptFlags = HwptFlags::new().with_fault_id_valid(true);

fn request(pasid: Option<u32>, address: u64) -> PageRequest {
    PageRequest {
        flags: PageRequestFlags::new().with_pasid_valid(pasid.is_some()).with_last_page(true),
        pasid: pasid.unwrap_or_default(),
        group: 1,
        permissions: PageRequestPermissions::new().with_read(true),
        address,
    }
}

/// A HWPT for `dev` on `pt` whose page requests go to `fault`; nested unless `pt` is an IOAS.
fn with_fault(
    bench: &Bench,
    dev: ObjectId,
    pt: ObjectId,
    fault: ObjectId,
    data: HwptData,
) -> Result<ObjectId> {
    let flags = FAULT.with_pasid(true);
    bench.host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: Some(fault) })
}

/// A bound device that is attached to a HWPT with a fault queue.
struct Served {
    bench: Bench,
    dev: ObjectId,
    ioas: ObjectId,
    hwpt: ObjectId,
    queue: Arc<dyn FaultQueue>,
}

fn served() -> Served {
    let bench = Bench::with_viommus();
    let (dev, ioas) = (bench.bind("a"), bench.ioas());
    let queue = bench.host.fault_queue_alloc().unwrap();
    let hwpt = with_fault(&bench, dev, ioas, queue.object(), HwptData::None).unwrap();
    bench.host.device_attach(dev, None, hwpt).unwrap();
    Served { bench, dev, ioas, hwpt, queue }
}

#[test]
fn a_page_request_goes_to_the_queue_and_its_answer_to_the_device() {
    let Served { bench, dev, queue, .. } = served();
    assert_eq!(queue.next_group().unwrap(), None);
    bench.host.page_request(dev, request(None, 0x1000)).unwrap();
    let group = queue.next_group().unwrap().unwrap();
    assert_eq!((group.dev, group.requests.as_slice()), (dev, &[request(None, 0x1000)][..]));
    assert_eq!(bench.fake.answered(), []);
    queue.respond(group.cookie, PageResponseCode::Success).unwrap();
    assert_eq!(bench.fake.answered(), [(0x1000, PageResponseCode::Success)]);
    assert_eq!(queue.respond(group.cookie, PageResponseCode::Success).errno(), Errno::EINVAL);
}

#[test]
fn a_group_waits_for_its_last_request() {
    let Served { bench, dev, queue, .. } = served();
    let part = |group, address| PageRequest {
        group,
        flags: PageRequestFlags::new(),
        ..request(None, address)
    };
    for request in [part(1, 0x1000), part(2, 0x2000), part(1, 0x3000)] {
        bench.host.page_request(dev, request).unwrap();
    }
    assert_eq!(queue.next_group().unwrap(), None);
    bench.host.page_request(dev, request(None, 0x4000)).unwrap();
    let group = queue.next_group().unwrap().unwrap();
    let addresses: Vec<_> = group.requests.iter().map(|request| request.address).collect();
    assert_eq!(addresses, [0x1000, 0x3000, 0x4000], "the other group still waits");
}

#[test]
fn requests_that_nobody_serves_are_answered_at_once() {
    let Served { bench, dev, ioas, .. } = served();
    let invalid = |address| [(address, PageResponseCode::Invalid)];
    let outcome = bench.host.page_request(dev, request(Some(7), 0x1000));
    assert_eq!(outcome.errno(), Errno::EINVAL, "the PASID is not attached");
    assert_eq!(bench.fake.answered(), invalid(0x1000));
    bench.host.device_attach(dev, None, ioas).unwrap();
    let outcome = bench.host.page_request(dev, request(None, 0x2000));
    assert_eq!(outcome.errno(), Errno::EINVAL, "the HWPT has no fault queue");
    assert_eq!(bench.fake.answered(), invalid(0x2000));
    assert_eq!(bench.host.page_request(ioas, request(None, 0)).errno(), Errno::ENOENT);
}

#[test]
fn a_pasid_of_its_own_comes_before_the_tables_of_a_nested_hwpt() {
    let Served { bench, dev, ioas, queue, .. } = served();
    let parent = bench.paging(dev, ioas, PARENT).unwrap();
    let other = bench.host.fault_queue_alloc().unwrap();
    let tables = HwptData::VtdS1(s1(0x1000));
    let nested = with_fault(&bench, dev, parent, other.object(), tables).unwrap();
    bench.host.device_attach(dev, None, nested).unwrap();
    bench.host.page_request(dev, request(Some(7), 0x1000)).unwrap();
    assert!(other.next_group().unwrap().is_some(), "the user's PASID table says");
    let pasid = with_fault(&bench, dev, ioas, queue.object(), HwptData::None).unwrap();
    bench.host.device_attach(dev, Some(7), pasid).unwrap();
    bench.host.page_request(dev, request(Some(7), 0x2000)).unwrap();
    assert!(queue.next_group().unwrap().is_some());
    assert_eq!(other.next_group().unwrap(), None);
}

#[test]
fn what_an_attachment_asked_is_answered_when_it_ends() {
    let Served { bench, dev, ioas, hwpt, queue } = served();
    let invalid = |address| [(address, PageResponseCode::Invalid)];
    bench.host.page_request(dev, request(None, 0x1000)).unwrap();
    let group = queue.next_group().unwrap().unwrap();
    bench.host.device_attach(dev, None, ioas).unwrap();
    assert_eq!(bench.fake.answered(), invalid(0x1000), "replaced");
    assert_eq!(queue.respond(group.cookie, PageResponseCode::Success).errno(), Errno::EINVAL);
    bench.host.device_attach(dev, None, hwpt).unwrap();
    bench.host.page_request(dev, request(None, 0x2000)).unwrap();
    bench.host.device_detach(dev, None).unwrap();
    assert_eq!(bench.fake.answered(), invalid(0x2000), "detached");
    assert_eq!(queue.next_group().unwrap(), None);
}

#[test]
fn a_fault_queue_is_used_by_its_hwpts_and_whoever_has_it_open() {
    let Served { bench, dev, hwpt, queue, .. } = served();
    let fault = queue.object();
    assert_eq!(bench.host.destroy(fault).errno(), Errno::EBUSY);
    drop(queue);
    assert_eq!(bench.host.destroy(fault).errno(), Errno::EBUSY);
    let graph = bench.host.graph().to_string();
    assert!(graph.contains(&format!("FAULT {fault}\n  ← HWPT_PAGING {hwpt}")), "{graph}");
    bench.host.device_detach(dev, None).unwrap();
    bench.host.destroy(hwpt).unwrap();
    bench.host.destroy(fault).unwrap();
}

#[test]
fn a_hwpt_names_a_fault_queue_that_there_is() {
    let Served { bench, dev, ioas, hwpt, .. } = served();
    for fault in [ObjectId(0), ObjectId(99), hwpt] {
        let outcome = with_fault(&bench, dev, ioas, fault, HwptData::None);
        assert_eq!(outcome.errno(), Errno::ENOENT);
    }
    let args = HwptAlloc { flags: FAULT, dev, pt: ioas, data: HwptData::None, fault: None };
    assert_eq!(bench.host.hwpt_alloc(&args).errno(), Errno::ENOENT);
    let ignored = HwptAlloc { flags: PLAIN, fault: Some(ObjectId(99)), ..args };
    bench.host.hwpt_alloc(&ignored).expect("without the flag it is not looked at");
}

#[test]
fn vt_d_attaches_nothing_with_a_fault_queue() {
    let bench = Bench::new();
    let (dev, ioas) = (bench.bind("a"), bench.ioas());
    let queue = bench.host.fault_queue_alloc().unwrap();
    let hwpt = with_fault(&bench, dev, ioas, queue.object(), HwptData::None).unwrap();
    assert_eq!(bench.host.device_attach(dev, None, hwpt).errno(), Errno::ENODEV);
}

/// A bench, a bound device and a vIOMMU.
fn viommu() -> (Bench, ObjectId, ObjectId) {
    let bench = Bench::with_viommus();
    let (dev, ioas) = (bench.bind("a"), bench.ioas());
    let parent = bench.paging(dev, ioas, PARENT).unwrap();
    let viommu = bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent).unwrap();
    (bench, dev, viommu)
}

#[test]
fn events_go_to_the_queue_of_their_type() {
    let (bench, dev, viommu) = viommu();
    let report = |data: &[u8]| bench.host.report_event(viommu, KIND, data);
    assert_eq!(report(&[1]).errno(), Errno::EOPNOTSUPP);
    let queue = bench.host.veventq_alloc(viommu, KIND, 1).unwrap();
    report(&[1]).unwrap();
    report(&[2]).unwrap();
    let event = Vevent::Event { sequence: 0, data: vec![1] };
    assert_eq!(queue.next_event().unwrap(), Some(event));
    assert_eq!(queue.next_event().unwrap(), Some(Vevent::Lost { sequence: 1 }));
    assert_eq!(queue.next_event().unwrap(), None);
    assert_eq!(bench.host.report_event(dev, KIND, &[1]).errno(), Errno::ENOENT);
}

#[test]
fn a_viommu_has_one_queue_of_a_type() {
    let (bench, dev, viommu) = viommu();
    let alloc = |viommu, kind, depth| {
        bench.host.veventq_alloc(viommu, kind, depth).map(|queue| queue.object())
    };
    assert_eq!(alloc(dev, 0, 0).errno(), Errno::EOPNOTSUPP, "the default type");
    for depth in [0, (1 << 19) + 1] {
        assert_eq!(alloc(dev, KIND, depth).errno(), Errno::EINVAL);
    }
    assert_eq!(alloc(dev, KIND, 1).errno(), Errno::ENOENT);
    let queue = bench.host.veventq_alloc(viommu, KIND, 1 << 19).unwrap();
    assert_eq!(alloc(viommu, KIND, 1).errno(), Errno::EEXIST);
    alloc(viommu, KIND + 1, 1).expect("Linux does not ask the driver which types it has");
    let id = queue.object();
    assert_eq!(bench.host.destroy(id).errno(), Errno::EBUSY, "it is open");
    drop(queue);
    assert_eq!(bench.host.destroy(viommu).errno(), Errno::EBUSY);
    bench.host.destroy(id).unwrap();
    alloc(viommu, KIND, 1).unwrap();
}

#[test]
fn closing_the_iommufd_takes_open_queues_with_it() {
    let (bench, _, viommu) = viommu();
    let events = bench.host.veventq_alloc(viommu, KIND, 1).unwrap();
    let faults = bench.host.fault_queue_alloc().unwrap();
    bench.host.close();
    assert_eq!((bench.host.live_objects(), bench.host.pinned_bytes()), (0, 0));
    let ioas = bench.ioas();
    drop((events, faults));
    bench.host.destroy(ioas).expect("queues of the closed iommufd destroy nothing");
}

#[test]
fn an_open_queue_keeps_the_iommufd_open() {
    let Served { bench, dev, queue, .. } = served();
    bench.host.page_request(dev, request(None, 0x1000)).unwrap();
    let Bench { host, fake, .. } = bench;
    drop(host);
    let group = queue.next_group().unwrap().unwrap();
    queue.respond(group.cookie, PageResponseCode::Success).unwrap();
    assert_eq!(fake.answered(), [(0x1000, PageResponseCode::Success)]);
}

#[test]
fn attachments_of_one_queue_end_one_by_one() {
    let bench = Bench::with_viommus();
    let (dev, ioas) = (bench.bind("a"), bench.ioas());
    let queue = bench.host.fault_queue_alloc().unwrap();
    let [first, second] =
        [0; 2].map(|_| with_fault(&bench, dev, ioas, queue.object(), HwptData::None).unwrap());
    bench.host.device_attach(dev, None, first).unwrap();
    bench.host.device_attach(dev, Some(3), second).unwrap();
    bench.host.page_request(dev, request(Some(3), 0x1000)).unwrap();
    bench.host.device_detach(dev, None).unwrap();
    assert_eq!(bench.fake.answered(), [], "the PASID is attached still");
    assert_eq!(queue.next_group().unwrap().unwrap().dev, dev);
}

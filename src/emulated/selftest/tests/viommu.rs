// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nested tables and vIOMMUs: their caches, page requests, events, queues and pages.

use super::*;
use crate::MmapRequest;
use twostage::iommufd::{PageResponseCode, Vevent};

const ALL: u32 = abi::IOMMU_TEST_INVALIDATE_FLAG_ALL;

/// A device, a nesting parent, and nested tables on it.
fn nested(program: &Program) -> (Mock, u32, u32) {
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    let flags = HwptFlags::new().with_nest_parent(true);
    let parent = program.hwpt(mock.idev, ioas, flags).unwrap();
    let nested = program.hwpt_with(mock.idev, parent, 0, &[7]).unwrap();
    (mock, parent, nested)
}

#[test]
fn tables_take_the_data_of_the_driver_alone() {
    let program = Program::new();
    let (mock, parent, _) = nested(&program);
    let alloc = |data: &[u32]| program.hwpt_with(mock.idev, parent, 0, data).map(drop);
    assert_eq!(alloc(&[7, 0]), Ok(()));
    assert_eq!(alloc(&[7, 0, 0]), Err(Errno::EINVAL), "longer than it is");
    let paging = |kind: u32| program.hwpt_with(mock.idev, 1, 0, &[0, kind]).map(drop);
    assert_eq!(paging(abi::MOCK_IOMMUPT_HUGE), Ok(()));
    assert_eq!(paging(2), Err(Errno::EOPNOTSUPP));
}

#[test]
fn entries_of_the_iotlb_are_dropped_up_to_the_first_bad_one() {
    let program = Program::new();
    let (_, _, nested) = nested(&program);
    let is = |entry: u32, value: u32| {
        program.test(op::MD_CHECK_IOTLB, nested, &[entry, value]).map(drop)
    };
    (0..4).for_each(|entry| is(entry, 7).unwrap());
    assert_eq!(is(4, 7), Err(Errno::EINVAL), "there are four");
    assert_eq!(program.invalidate(nested, 2, &[0, 0, 2, 1]), (1, Err(Errno::EOPNOTSUPP)));
    assert_eq!((is(0, 0), is(1, 7)), (Ok(()), Ok(())));
    assert_eq!(program.invalidate(nested, 2, &[0, 1, ALL, 4]), (1, Err(Errno::EINVAL)));
    assert_eq!((is(1, 0), is(2, 7)), (Ok(()), Ok(())));
    assert_eq!(program.invalidate(nested, 3, &[0, 1, 0]), (0, Err(Errno::EINVAL)), "12 bytes");
    assert_eq!(program.invalidate(nested, 2, &[ALL, 0]), (1, Ok(())));
    (0..4).for_each(|entry| is(entry, 0).unwrap());
}

fn viommu_on(program: &Program, mock: &Mock, parent: u32) -> u32 {
    let words = [0, 0, abi::IOMMU_VIOMMU_TYPE_SELFTEST, mock.idev, parent, 0, 0, 0, 0, 0];
    program.ioctl(VIOMMU_ALLOC, &words).unwrap()[5]
}

#[test]
fn a_viommu_drops_the_caches_of_the_devices_that_it_knows() {
    let program = Program::new();
    let (mock, parent, _) = nested(&program);
    let viommu = viommu_on(&program, &mock, parent);
    let is = |entry: u32, value: u32| {
        program.test(op::DEV_CHECK_CACHE, mock.idev, &[entry, value]).map(drop)
    };
    let full = abi::IOMMU_TEST_DEV_CACHE_DEFAULT;
    assert_eq!(program.invalidate(viommu, 3, &[0, 9, 0]), (0, Err(Errno::EINVAL)), "no vDEVICE");
    program.host.vdevice_alloc(ObjectId(viommu), ObjectId(mock.idev), 9).unwrap();
    assert_eq!((is(0, full), is(4, full)), (Ok(()), Err(Errno::EINVAL)));
    assert_eq!(program.invalidate(viommu, 3, &[0, 9, 0, 2, 9, 1]), (1, Err(Errno::EOPNOTSUPP)));
    assert_eq!((is(0, 0), is(1, full)), (Ok(()), Ok(())));
    assert_eq!(program.invalidate(viommu, 3, &[ALL, 9, 4]), (0, Err(Errno::EINVAL)));
    assert_eq!(program.invalidate(viommu, 4, &[0, 9, 1, 5]), (0, Err(Errno::E2BIG)));
    assert_eq!(program.invalidate(viommu, 4, &[0, 9, 1, 0]), (1, Ok(())), "zeroes are no excess");
    assert_eq!(program.invalidate(viommu, 3, &[ALL, 9, 0]), (1, Ok(())));
    (0..4).for_each(|entry| is(entry, 0).unwrap());
}

#[test]
fn tables_of_a_viommu_serve_devices_that_it_knows() {
    let program = Program::new();
    let (mock, parent, _) = nested(&program);
    let viommu = viommu_on(&program, &mock, parent);
    let nested = program.hwpt_with(mock.idev, viommu, 0, &[7]).unwrap();
    let attach = || program.test(op::MOCK_DOMAIN_REPLACE, mock.stdev, &[nested]).map(drop);
    assert_eq!(attach(), Err(Errno::ENOENT));
    program.host.vdevice_alloc(ObjectId(viommu), ObjectId(mock.idev), 9).unwrap();
    assert_eq!(attach(), Ok(()));
}

const HW_QUEUE_ALLOC: u32 = 0x3b94;

#[test]
fn page_requests_reach_the_queue_of_the_hwpt_that_serves() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, abi::MOCK_FLAGS_DEVICE_PASID).unwrap();
    let queue = program.host.fault_queue_alloc().unwrap();
    let flags = HwptFlags::new().with_nest_parent(true);
    let parent = program.hwpt(mock.idev, ioas, flags).unwrap();
    let ask = |pasid| {
        let body = [vec![mock.idev, pasid, 5, 3], words(&[0x1234_5678_9abc])].concat();
        program.test(op::TRIGGER_IOPF, 0, &body).map(drop)
    };
    assert_eq!(ask(0), Ok(()), "nobody serves it");
    assert!(queue.next_group().unwrap().is_none());
    let fault = HwptFlags::new().with_fault_id_valid(true).into_bits();
    let nested = program.hwpt_of(mock.idev, parent, fault, queue.object().0, &[7]).unwrap();
    program.test(op::MOCK_DOMAIN_REPLACE, mock.stdev, &[nested]).unwrap();
    // The user's tables determine where its PASIDs go.
    for pasid in [0, 9] {
        ask(pasid).unwrap();
        let group = queue.next_group().unwrap().unwrap();
        let [request] = group.requests[..] else { panic!("one request: {group:?}") };
        assert_eq!((group.dev.0, request.pasid, request.group), (mock.idev, pasid, 5));
        assert_eq!(request.flags.pasid_valid(), pasid != 0);
        assert!(request.flags.last_page() && request.permissions.write());
        assert_eq!(request.address, 0x1234_5678_9abc);
        queue.respond(group.cookie, PageResponseCode::Success).unwrap();
    }
    assert_eq!(program.test(op::TRIGGER_IOPF, 0, &[77]), Err(Errno::ENOENT));
}

/// A device, and a vIOMMU over its IOAS.
fn viommu(program: &Program) -> (Mock, u32, u32) {
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    let flags = HwptFlags::new().with_nest_parent(true);
    let parent = program.hwpt(mock.idev, ioas, flags).unwrap();
    let viommu = viommu_on(program, &mock, parent);
    (mock, parent, viommu)
}

#[test]
fn events_name_the_device_as_the_guest_does() {
    let program = Program::new();
    let (mock, _, viommu) = viommu(&program);
    let happen = || program.test(op::TRIGGER_VEVENT, 0, &[mock.idev]).map(drop);
    assert_eq!(happen(), Err(Errno::ENOENT), "no vIOMMU knows it");
    program.host.vdevice_alloc(ObjectId(viommu), ObjectId(mock.idev), 0x99).unwrap();
    let nested = program.hwpt_with(mock.idev, viommu, 0, &[7]).unwrap();
    program.test(op::MOCK_DOMAIN_REPLACE, mock.stdev, &[nested]).unwrap();
    assert_eq!(happen(), Err(Errno::EOPNOTSUPP), "nobody wants to know");
    let kind = abi::IOMMU_VEVENTQ_TYPE_SELFTEST;
    let queue = program.host.veventq_alloc(ObjectId(viommu), kind, 1).unwrap();
    assert_eq!((happen(), happen()), (Ok(()), Ok(())));
    let data = 0x99u32.to_ne_bytes().to_vec();
    assert_eq!(queue.next_event().unwrap(), Some(Vevent::Event { sequence: 0, data }));
    assert_eq!(queue.next_event().unwrap(), Some(Vevent::Lost { sequence: 1 }));
}

#[test]
fn queues_start_and_end_in_order() {
    let program = Program::new();
    let (_, _, viommu) = viommu(&program);
    program.map(1, abi::MOCK_APERTURE_START, 0, 0x1000);
    let start = |index| {
        let base = words(&[abi::MOCK_APERTURE_START, 0x1000]);
        let kind = abi::IOMMU_HW_QUEUE_TYPE_SELFTEST;
        let words = [vec![0, 0, viommu, kind, index, 0], base].concat();
        program.ioctl(HW_QUEUE_ALLOC, &words).map(|words| words[5])
    };
    assert_eq!((start(1), start(2)), (Err(Errno::EIO), Err(Errno::EINVAL)));
    let first = start(0).unwrap();
    assert_eq!(start(0), Err(Errno::EEXIST));
    let second = start(1).unwrap();
    let destroy = |id| program.host.destroy(ObjectId(id)).map_err(|error| error.errno);
    assert_eq!(
        (destroy(first), destroy(second), destroy(first)),
        (Err(Errno::EBUSY), Ok(()), Ok(()))
    );
    assert!(start(0).is_ok());
}

#[test]
fn pages_of_a_viommu_show_what_it_was_given() {
    let program = Program::new();
    let (mock, parent, _) = viommu(&program);
    let data = program.put(0x7000, &[0xbeef, 0, 0, 0, 0, 0]);
    let (low, high, kind) = (data as u32, (data >> 32) as u32, abi::IOMMU_VIOMMU_TYPE_SELFTEST);
    let alloc = |length| {
        let words = [0, 0, kind, mock.idev, parent, 0, length, 0, low, high];
        program.ioctl(VIOMMU_ALLOC, &words).map(|words| words[5])
    };
    assert_eq!((alloc(4), alloc(25)), (Err(Errno::EINVAL), Err(Errno::EINVAL)));
    let viommu = alloc(24).unwrap();
    let mut answer = [0; 24];
    program.region.read_slice(&mut answer, MemoryRegionAddress(0x7000)).unwrap();
    let answer: abi::ViommuData = zerocopy::transmute!(answer);
    assert_eq!((answer.out_data, answer.out_mmap_length), (0xbeef, 0x2000));
    let (offset, length) = (answer.out_mmap_offset, answer.out_mmap_length);
    let map = |offset, length| {
        program.host.mmap(MmapRequest { offset, length, shared: true, executable: false })
    };
    assert_eq!(map(offset, 0x1000).unwrap_err(), Errno::ENXIO);
    let pages = map(offset, length).unwrap();
    let mut first = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(pages.file(), &mut first, 0).unwrap();
    assert_eq!(u32::from_ne_bytes(first), 0xbeef);
    let destroy = || program.host.destroy(ObjectId(viommu)).map_err(|error| error.errno);
    assert_eq!(destroy(), Err(Errno::EBUSY));
    drop(pages);
    assert_eq!(destroy(), Ok(()));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nested tables, vIOMMUs, and their caches.

use super::*;

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

fn viommu(program: &Program, mock: &Mock, parent: u32) -> u32 {
    let words = [0, 0, abi::IOMMU_VIOMMU_TYPE_SELFTEST, mock.idev, parent, 0, 0, 0, 0, 0];
    program.ioctl(VIOMMU_ALLOC, &words).unwrap()[5]
}

#[test]
fn a_viommu_drops_the_caches_of_the_devices_that_it_knows() {
    let program = Program::new();
    let (mock, parent, _) = nested(&program);
    let viommu = viommu(&program, &mock, parent);
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
    let viommu = viommu(&program, &mock, parent);
    let nested = program.hwpt_with(mock.idev, viommu, 0, &[7]).unwrap();
    let attach = || program.test(op::MOCK_DOMAIN_REPLACE, mock.stdev, &[nested]).map(drop);
    assert_eq!(attach(), Err(Errno::ENOENT));
    program.host.vdevice_alloc(ObjectId(viommu), ObjectId(mock.idev), 9).unwrap();
    assert_eq!(attach(), Ok(()));
}

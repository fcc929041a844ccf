// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mock devices: creation, attachment, end.

use super::*;
use twostage::iommufd::HwInfoData;

#[test]
fn a_device_is_two_objects_and_ends_with_the_first() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    assert_eq!((ioas, mock.stdev, mock.idev, mock.hwpt), (1, 2, 3, 4));
    assert_eq!(program.host.destroy(ObjectId(mock.idev)).unwrap_err().errno, Errno::EBUSY);
    assert_eq!(program.host.destroy(ObjectId(ioas)).unwrap_err().errno, Errno::EBUSY);
    program.host.destroy(ObjectId(mock.stdev)).unwrap();
    assert_eq!(program.host.live_objects(), 1, "the automatic HWPT is gone too");
    program.host.destroy(ObjectId(ioas)).unwrap();
}

#[test]
fn nothing_is_left_of_a_device_that_cannot_be_attached() {
    let program = Program::new();
    assert_eq!(program.mock(9, 0).err(), Some(Errno::ENOENT));
    assert_eq!(program.mock(9, 1 << 1).err(), Some(Errno::EINVAL));
    assert_eq!(program.host.live_objects(), 0);
    assert!(program.host.dma_port("iommufd_mock0").is_none());
    let ioas = program.ioas();
    program.mock(ioas, 0).unwrap();
    assert!(program.host.graph().to_string().contains("iommufd_mock0"), "the number is free again");
}

#[test]
fn devices_end_with_their_iommufd() {
    let program = Program::new();
    let ioas = program.ioas();
    program.mock(ioas, 0).unwrap();
    program.host.close();
    let other = program.host.machine().open();
    let ioas = other.ioas_alloc().unwrap();
    let other = Program { host: other, ..program };
    other.mock(ioas.0, 0).unwrap();
    assert!(other.host.graph().to_string().contains("iommufd_mock0"));
}

#[test]
fn what_a_device_says_of_itself() {
    let program = Program::new();
    let ioas = program.ioas();
    let plain = program.mock(ioas, abi::MOCK_FLAGS_DEVICE_NO_DIRTY).unwrap();
    let able = program.mock(ioas, abi::MOCK_FLAGS_DEVICE_PASID).unwrap();
    let info = |mock: &Mock| program.host.get_hw_info(ObjectId(mock.idev)).unwrap();
    assert!(!info(&plain).capabilities.dirty_tracking() && info(&plain).max_pasid_log2 == 0);
    assert!(info(&able).capabilities.dirty_tracking() && info(&able).max_pasid_log2 == 20);
    assert_eq!(info(&able).data, HwInfoData::None, "a type of its own");
}

#[test]
fn a_device_without_dirty_tracking_takes_no_tables_with_it() {
    let program = Program::new();
    let ioas = program.ioas();
    let (able, unable) = (
        program.mock(ioas, 0).unwrap(),
        program.mock(ioas, abi::MOCK_FLAGS_DEVICE_NO_DIRTY).unwrap(),
    );
    let dirty = HwptFlags::new().with_dirty_tracking(true);
    assert_eq!(program.hwpt(unable.idev, ioas, dirty), Err(Errno::EOPNOTSUPP));
    let hwpt = program.hwpt(able.idev, ioas, dirty).unwrap();
    program.test(op::MOCK_DOMAIN_REPLACE, able.stdev, &[hwpt]).unwrap();
    let refused = program.test(op::MOCK_DOMAIN_REPLACE, unable.stdev, &[hwpt]);
    assert_eq!(refused, Err(Errno::EINVAL));
}

#[test]
fn every_other_attachment_to_one_pasid_fails() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, abi::MOCK_FLAGS_DEVICE_PASID).unwrap();
    let flags = HwptFlags::new().with_pasid(true);
    let hwpts = [0; 2].map(|_| program.hwpt(mock.idev, ioas, flags).unwrap());
    program.test(op::MOCK_DOMAIN_REPLACE, mock.stdev, &[hwpts[0]]).unwrap();
    let pasid = |operation, pasid, pt| program.test(operation, mock.stdev, &[pasid, pt]).map(drop);
    let reserved = abi::IOMMU_TEST_PASID_RESERVED;
    assert_eq!(pasid(op::PASID_REPLACE, reserved, hwpts[0]), Err(Errno::EINVAL), "not attached");
    pasid(op::PASID_ATTACH, reserved, hwpts[0]).unwrap();
    assert_eq!(pasid(op::PASID_ATTACH, reserved, hwpts[0]), Err(Errno::EBUSY));
    assert_eq!(pasid(op::PASID_REPLACE, reserved, hwpts[1]), Err(Errno::ENOMEM));
    pasid(op::PASID_CHECK_HWPT, reserved, hwpts[0]).unwrap();
    assert_eq!(pasid(op::PASID_CHECK_HWPT, reserved, hwpts[1]), Err(Errno::EINVAL));
    pasid(op::PASID_REPLACE, reserved, hwpts[1]).unwrap();
    pasid(op::PASID_DETACH, reserved, 0).unwrap();
    pasid(op::PASID_CHECK_HWPT, reserved, 0).unwrap();
    pasid(op::PASID_ATTACH, reserved, hwpts[1]).unwrap();
    pasid(op::PASID_DETACH, reserved, 0).unwrap();
    for _ in 0..3 {
        pasid(op::PASID_ATTACH, 7, hwpts[0]).unwrap();
        pasid(op::PASID_REPLACE, 7, hwpts[1]).unwrap();
        pasid(op::PASID_DETACH, 7, 0).unwrap();
    }
}

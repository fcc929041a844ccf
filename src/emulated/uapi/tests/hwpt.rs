// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! HWPT ioctls: the order of their checks, `data_type` and `data_len`, partial counts.

use iommufd_bindings::*;

use super::{id, u32_at, u64_at, Field, Process, D, NOWHERE, Q};
use crate::host::objects::tests::fake::{Told, PARENT, PLAIN};
use twostage::iommufd::{Errno, HostIommu, ObjectId};

const NOBODY: ObjectId = ObjectId(99);
const FAULT_ID_VALID: u32 = 4;

/// flags, dev, pt, reserved, data_type, data_len, data_uptr
type Alloc = (u32, ObjectId, ObjectId, u32, u32, u32, u64);

fn fields((flags, dev, pt, reserved, data_type, len, ptr): Alloc) -> Vec<Field> {
    let (flags, dev, pt) = (D(flags), id(dev), id(pt));
    vec![flags, dev, pt, D(0), D(reserved), D(data_type), D(len), Q(ptr), D(0), D(1)]
}

#[test]
fn hwpt_alloc_checks_in_linuxs_order() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let parent = process.bench.paging(dev, ioas, PARENT).unwrap();
    let plain = process.bench.paging(dev, ioas, PLAIN).unwrap();
    let s1 = process.poke(0, &[Q(0), Q(0x5000), D(48), D(0)]);
    let rows: [(Alloc, Errno); 20] = [
        ((!0, NOBODY, NOBODY, 1, 0, 5, 0), Errno::EOPNOTSUPP),
        ((!0, NOBODY, NOBODY, 0, 0, 5, 0), Errno::EINVAL),
        ((!0, NOBODY, NOBODY, 0, 1, 0, 0), Errno::EINVAL),
        ((!0, NOBODY, NOBODY, 0, 0, 0, 0), Errno::ENOENT),
        ((!0, dev, NOBODY, 0, 0, 0, 0), Errno::EINVAL),
        ((!0, dev, dev, 0, 0, 0, 0), Errno::EINVAL),
        ((!0, dev, ioas, 0, 1, 24, s1), Errno::EOPNOTSUPP),
        ((1 | FAULT_ID_VALID, dev, ioas, 0, 0, 0, 0), Errno::EOPNOTSUPP),
        ((FAULT_ID_VALID, dev, ioas, 0, 1, 24, s1), Errno::EOPNOTSUPP),
        ((FAULT_ID_VALID, dev, ioas, 0, 0, 0, 0), Errno::ENOENT),
        // On a HWPT_PAGING.
        ((1, dev, plain, 0, 1, 24, s1), Errno::EOPNOTSUPP),
        ((0, dev, plain, 0, 0, 0, 0), Errno::EOPNOTSUPP),
        ((0, dev, plain, 0, 1, 24, s1), Errno::EINVAL),
        ((0, dev, plain, 0, 2, 24, s1), Errno::EINVAL),
        ((0, dev, parent, 0, 2, 9, NOWHERE), Errno::EOPNOTSUPP),
        ((0, dev, parent, 0, 1, 23, NOWHERE), Errno::EINVAL),
        ((0, dev, parent, 0, 1, 25, NOWHERE), Errno::EINVAL),
        ((0, dev, parent, 0, 1, 24, NOWHERE), Errno::EFAULT),
        ((FAULT_ID_VALID, dev, parent, 0, 1, 24, NOWHERE), Errno::EFAULT),
        ((FAULT_ID_VALID, dev, parent, 0, 1, 24, s1), Errno::ENOENT),
    ];
    let before = process.bench.host.live_objects();
    for (alloc, errno) in rows {
        assert_eq!(process.errno(IOMMUFD_CMD_HWPT_ALLOC, &fields(alloc)), errno, "{alloc:x?}");
    }
    assert_eq!(process.bench.host.live_objects(), before);
    let alloc = fields((8, dev, parent, 0, 1, 24, s1));
    let nested = u32_at(&process.call(IOMMUFD_CMD_HWPT_ALLOC, &alloc).unwrap(), 16);
    process.bench.host.device_attach(dev, None, ObjectId(nested)).unwrap();
    assert!(process.bench.host.graph().to_string().contains("VTD_S1 at 0x5000, 48 bits"));
    let with_pointer = fields((0, dev, ioas, 0, 0, 0, NOWHERE));
    process
        .call(IOMMUFD_CMD_HWPT_ALLOC, &with_pointer)
        .expect("type NONE needs length 0, whatever the pointer");
}

/// flags, dev, data_len, data_uptr, type, reserved
fn info(flags: u32, dev: ObjectId, len: u32, ptr: u64, wanted: u32, reserved: u32) -> Vec<Field> {
    // out_max_pasid_log2 is the lowest byte of the word, then three reserved.
    vec![D(flags), id(dev), D(len), Q(ptr), D(wanted), D(reserved << 8), Q(0)]
}

#[test]
fn hw_info_fills_what_fits_and_zeroes_the_rest() {
    let process = Process::new();
    let dev = process.bench.bind("a");
    let raw = process.bench.fake.info;
    let ask = |fields: Vec<Field>| process.call(IOMMUFD_CMD_GET_HW_INFO, &fields);
    assert_eq!(ask(info(2, NOBODY, 0, 0, 0, 0)), Err(Errno::EOPNOTSUPP));
    assert_eq!(ask(info(0, NOBODY, 0, 0, 0, 1)), Err(Errno::EOPNOTSUPP));
    assert_eq!(ask(info(1, NOBODY, 0, 0, 9, 0)), Err(Errno::ENOENT));
    assert_eq!(ask(info(1, dev, 24, NOWHERE, 2, 0)), Err(Errno::EOPNOTSUPP));
    assert_eq!(ask(info(0, dev, 24, NOWHERE, 9, 0)), Err(Errno::EFAULT));

    process.poke(0, &[Q(!0); 8]);
    let answer = ask(info(1, dev, 40, process.at(0), 1, 0)).unwrap();
    assert_eq!(u32_at(&answer, 12), 24, "what the host knows");
    assert_eq!(u32_at(&answer, 24), 1, "out_data_type");
    assert_eq!(answer[28], 16, "out_max_pasid_log2");
    assert_eq!(u64_at(&answer, 32), 1 | 8, "dirty tracking, no ATS");
    assert_eq!(process.peek(0), 1, "flags and reserved");
    assert_eq!((process.peek(8), process.peek(16)), (raw.cap_reg, raw.ecap_reg));
    assert_eq!((process.peek(24), process.peek(32), process.peek(40)), (0, 0, !0));

    process.poke(0, &[Q(!0); 8]);
    let answer = ask(info(0, dev, 8, process.at(0), 9, 0)).unwrap();
    assert_eq!(u32_at(&answer, 12), 24);
    assert_eq!((process.peek(0), process.peek(8)), (1, !0));
    ask(info(0, dev, 0, 0, 0, 0)).expect("a length of 0 needs no buffer");
}

/// hwpt, data_uptr, data_type, entry_len, entry_num, reserved
fn invalidation(
    hwpt: ObjectId,
    ptr: u64,
    data_type: u32,
    len: u32,
    count: u32,
    reserved: u32,
) -> Vec<Field> {
    vec![id(hwpt), Q(ptr), D(data_type), D(len), D(count), D(reserved)]
}

#[test]
fn invalidate_always_says_how_many_entries_are_done() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let parent = process.bench.paging(dev, ioas, PARENT).unwrap();
    let nested = process.bench.nested(dev, parent, PLAIN, 0).unwrap();
    process.bench.host.device_attach(dev, None, nested).unwrap();
    let good = [Q(0x1000), Q(1), D(0), D(0)];
    let list = process.poke(0, &[good, good, [Q(0x1001), Q(1), D(0), D(0)], good].concat());
    let max = 1 << 19;
    let rows = [
        (invalidation(NOBODY, 0, 9, 0, 3, 1), Err(Errno::EOPNOTSUPP), 0),
        (invalidation(NOBODY, 0, 9, 24, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(NOBODY, list, 9, 0, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(NOBODY, list, 9, 4097, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(NOBODY, list, 9, 24, max + 1, 0), Err(Errno::EINVAL), 0),
        (invalidation(NOBODY, list, 9, 24, max, 0), Err(Errno::ENOENT), 0),
        (invalidation(parent, list, 0, 24, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(nested, list, 1, 24, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(nested, list, 0, 23, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(nested, list, 0, 25, 3, 0), Err(Errno::EINVAL), 0),
        (invalidation(nested, NOWHERE, 0, 24, 3, 0), Err(Errno::EFAULT), 0),
        (invalidation(nested, list, 0, 24, 4, 0), Err(Errno::EINVAL), 2),
        (invalidation(nested, list, 0, 24, 2, 0), Ok(()), 2),
        (invalidation(nested, 0, 0, 0, 0, 0), Ok(()), 0),
        (invalidation(nested, 0, 7, 0, 0, 0), Err(Errno::EINVAL), 0),
        (invalidation(nested, process.at(super::MEMORY - 24), 0, 24, 2, 0), Err(Errno::EFAULT), 1),
    ];
    for (fields, expected, done) in rows {
        let (outcome, answer) = process.call_and_look(IOMMUFD_CMD_HWPT_INVALIDATE, &fields);
        assert_eq!((outcome, u32_at(&answer, 24)), (expected, done), "{fields:x?}");
    }
    let told = process.bench.fake.told();
    let count = told.iter().filter(|told| matches!(told, Told::Invalidate(..))).count();
    assert_eq!(count, 5, "those that were done, and no other");
}

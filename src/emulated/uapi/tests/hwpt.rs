// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! HWPT ioctls: the order of their checks, `data_type` and `data_len`, partial counts, dirty
//! bitmaps.

use iommufd_bindings::*;

use super::{id, u32_at, u64_at, Field, Process, D, MEMORY, NOWHERE, Q};
use crate::host::objects::tests::fake::{Told, PARENT, PLAIN};
use crate::{DmaAttributes, DmaPort};
use twostage::iommufd::{Errno, HostIommu, HwptFlags, ObjectId};

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
        (invalidation(nested, process.at(MEMORY - 24), 0, 24, 2, 0), Err(Errno::EFAULT), 1),
    ];
    for (fields, expected, done) in rows {
        let (outcome, answer) = process.call_and_look(IOMMUFD_CMD_HWPT_INVALIDATE, &fields);
        assert_eq!((outcome, u32_at(&answer, 24)), (expected, done), "{fields:x?}");
    }
    let told = process.bench.fake.told();
    let count = told.iter().filter(|told| matches!(told, Told::Invalidate(..))).count();
    assert_eq!(count, 5, "those that were done, and no other");
}

const DIRTY: HwptFlags = HwptFlags::new().with_dirty_tracking(true);
const SET: u32 = IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING;
const GET: u32 = IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP;

#[test]
fn checks_are_in_linuxs_order() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let plain = process.bench.paging(dev, ioas, PLAIN).unwrap();
    let dirty = process.bench.paging(dev, ioas, DIRTY).unwrap();
    let set = |flags, hwpt| process.call(SET, &[D(flags), id(hwpt), D(1)]).map(drop);
    assert_eq!(set(2, NOBODY), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(1, NOBODY), Err(Errno::ENOENT));
    assert_eq!(set(1, ioas), Err(Errno::ENOENT));
    assert_eq!(set(1, plain), Err(Errno::EOPNOTSUPP));
    set(1, dirty).unwrap();
    set(0, dirty).unwrap();
    // Each row fixes what the one before it broke: HWPT, flags, reserved, IOVA, length, page.
    let rows = [
        (NOBODY, 2, 0, 1, u64::MAX, 0, Errno::EOPNOTSUPP),
        (NOBODY, 1, 1, 1, u64::MAX, 0, Errno::EOPNOTSUPP),
        (NOBODY, 1, 0, 1, u64::MAX, 0, Errno::ENOENT),
        (plain, 1, 0, 0, 0, 0, Errno::EINVAL),
        (plain, 1, 0, 2, u64::MAX, 0, Errno::EOVERFLOW),
        (plain, 1, 0, 0, 0x800, 0, Errno::EINVAL),
        (plain, 1, 0, 0, 0x1000, 0, Errno::EINVAL),
        (plain, 1, 0, 0, 0x1000, 0x2000, Errno::EINVAL),
        (plain, 1, 0, 0, 0x1000, 0x1000, Errno::EOPNOTSUPP),
    ];
    for (hwpt, flags, reserved, iova, length, page, errno) in rows {
        let fields = [id(hwpt), D(flags), D(reserved), Q(iova), Q(length), Q(page), Q(NOWHERE)];
        assert_eq!(process.errno(GET, &fields), errno, "{fields:x?}");
    }
    let fields = [id(dirty), D(0), D(0), Q(0), Q(0x1000), Q(0x1000), Q(NOWHERE)];
    process.call(GET, &fields).expect("nothing is dirty, so nothing is written");
}

/// 64 MiB from IOVA 1 MiB on, with a device that writes there while tracking is on.
fn tracked() -> (Process, ObjectId, DmaPort) {
    let process = Process::with_edu();
    let (dev, ioas) = (process.bench.bind("edu"), process.bench.ioas());
    process.bench.map(ioas, 0x10_0000, 0x40_0000).unwrap();
    let hwpt = process.bench.paging(dev, ioas, DIRTY).unwrap();
    process.bench.host.device_attach(dev, None, hwpt).unwrap();
    process.call(SET, &[D(1), id(hwpt), D(0)]).unwrap();
    let port = process.bench.host.dma_port("edu").unwrap();
    (process, hwpt, port)
}

#[test]
fn bits_are_set_from_the_first_byte_on() {
    let (process, hwpt, mut port) = tracked();
    for page in [0x103, 0x104, 0x10d, 0x200] {
        port.write(DmaAttributes::default(), page * 0x1000, &[1]).unwrap();
    }
    let get = |flags| {
        process.poke(0, &[Q(0x80), Q(0), Q(0)]);
        let (iova, length, data) = (0x10_0000, 0x10_0000, process.at(1));
        let fields = [id(hwpt), D(flags), D(0), Q(iova), Q(length), Q(0x1000), Q(data)];
        process.call(GET, &fields).unwrap();
        process.peek(0)
    };
    let expected = 0x80 | (1 << 3 | 1 << 4 | 1 << 13) << 8;
    assert_eq!(get(1), expected, "what was there stays");
    assert_eq!(get(0), expected, "they were not cleared");
    assert_eq!(get(0), 0x80);
}

#[test]
fn a_bitmap_that_cannot_be_written_leaves_pages_dirty() {
    let (process, hwpt, mut port) = tracked();
    for page in [0x103, 0x207] {
        port.write(DmaAttributes::default(), page * 0x1000, &[1]).unwrap();
    }
    let get = |data, length| {
        let (iova, page) = (0x10_0000, 0x1000);
        let fields = [id(hwpt), D(0), D(0), Q(iova), Q(length), Q(page), Q(data)];
        process.call(GET, &fields).map(drop)
    };
    assert_eq!(get(NOWHERE, 0x40_0000), Err(Errno::EFAULT));
    // The bit of the first page fits, that of the second does not.
    assert_eq!(get(process.at(MEMORY) - 0x20, 0x40_0000), Err(Errno::EFAULT));
    process.poke(0, &[Q(0); 0x10]);
    assert_eq!(get(process.at(0), 0), Err(Errno::EINVAL), "no byte is not all of them");
    get(process.at(0), 0x40_0000).unwrap();
    let words: Vec<u64> = (0..6).map(|word| process.peek(word * 8)).collect();
    assert_eq!(words, [1 << 3, 0, 0, 0, 1 << 7, 0], "both are told of");
    process.poke(0, &[Q(0); 0x10]);
    get(process.at(0), 0x40_0000).unwrap();
    assert_eq!((process.peek(0), process.peek(32)), (0, 0), "and are clean then");
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOAS ioctls: the order of their checks and what they write back.

use iommufd_bindings::*;

use super::{id, u32_at, u64_at, Process, D, MEMORY, NOWHERE, Q};
use crate::emulated::objects::tests::fake::PLAIN;
use crate::iommufd::{Errno, HostIommu, ObjectId};

const FIXED_RW: u32 = 7;
const RW: u32 = 6;
const R: u32 = 4;
const NONE: ObjectId = ObjectId(99);

#[test]
fn an_ioas_is_made_and_destroyed() {
    let process = Process::new();
    assert_eq!(process.errno(IOMMUFD_CMD_IOAS_ALLOC, &[D(1), D(0)]), Errno::EOPNOTSUPP);
    let answer = process.call(IOMMUFD_CMD_IOAS_ALLOC, &[D(0), D(77)]).unwrap();
    let ioas = u32_at(&answer, 8);
    assert_eq!(ioas, 1);
    process.call(IOMMUFD_CMD_DESTROY, &[D(ioas)]).unwrap();
    for id in [ioas, 0] {
        assert_eq!(process.errno(IOMMUFD_CMD_DESTROY, &[D(id)]), Errno::ENOENT);
    }
}

#[test]
fn map_checks_in_linuxs_order() {
    let process = Process::new();
    let ioas = process.bench.ioas();
    let va = process.at(0);
    // flags, ioas, reserved, user_va, length, iova: each row repairs what the one before it broke.
    let rows = [
        (8, NONE, 0, !0, !0, !0, Errno::EOPNOTSUPP),
        (0, NONE, 1, !0, !0, !0, Errno::EOPNOTSUPP),
        (0, NONE, 0, !0, 2, !0, Errno::EOVERFLOW),
        (0, NONE, 0, !0, !0, 0, Errno::EOVERFLOW),
        (0, NONE, 0, !0, 2, 0, Errno::EINVAL),
        (R, NONE, 0, !0, 2, 0, Errno::ENOENT),
        (R, ioas, 0, !0, 2, 0, Errno::EOVERFLOW),
        (R, ioas, 0, NOWHERE, 0, 0, Errno::EINVAL),
        (FIXED_RW, ioas, 0, NOWHERE, 0x1000, u64::MAX - 1, Errno::EOVERFLOW),
        (FIXED_RW, ioas, 0, NOWHERE, 0x1000, 0, Errno::EFAULT),
        (FIXED_RW, ioas, 0, va, MEMORY + 1, 0, Errno::EFAULT),
    ];
    for (flags, ioas, reserved, va, length, iova, errno) in rows {
        let fields = [D(flags), id(ioas), D(reserved), Q(va), Q(length), Q(iova)];
        assert_eq!(process.errno(IOMMUFD_CMD_IOAS_MAP, &fields), errno, "{fields:x?}");
    }
    let fields = [D(RW), id(ioas), D(0), Q(va), Q(0x2000), Q(5)];
    let answer = process.call(IOMMUFD_CMD_IOAS_MAP, &fields).unwrap();
    let iova = u64_at(&answer, 32);
    assert_eq!((iova % 0x1000, iova == 0), (0, false), "where the host found room");
    let fields = [D(FIXED_RW), id(ioas), D(0), Q(NOWHERE), Q(0x1000), Q(iova)];
    assert_eq!(process.errno(IOMMUFD_CMD_IOAS_MAP, &fields), Errno::EEXIST, "before the memory");
}

#[test]
fn copy_checks_in_linuxs_order() {
    let process = Process::new();
    let (src, dst) = (process.bench.ioas(), process.bench.ioas());
    process.bench.map(src, 0x4000, 0x2000).unwrap();
    // flags, dst, src, length, dst_iova, src_iova
    let rows = [
        (8, NONE, NONE, !0, !0, !0, Errno::EOPNOTSUPP),
        (0, NONE, NONE, 0, !0, 0, Errno::EOVERFLOW),
        (0, NONE, NONE, 0, 0, !0, Errno::EOVERFLOW),
        (0, NONE, NONE, 0, 0, 0, Errno::EINVAL),
        (R, NONE, NONE, 0, 0, 0, Errno::ENOENT),
        (R, NONE, src, 0, 0, 0, Errno::EINVAL),
        (R, NONE, src, 0x1000, 0, 0, Errno::ENOENT),
        (R, NONE, src, 0x1000, 0, 0x4000, Errno::ENOENT),
    ];
    for (flags, dst, src, length, dst_iova, src_iova, errno) in rows {
        let fields = [D(flags), id(dst), id(src), Q(length), Q(dst_iova), Q(src_iova)];
        assert_eq!(process.errno(IOMMUFD_CMD_IOAS_COPY, &fields), errno, "{fields:x?}");
    }
    let fields = [D(FIXED_RW), id(dst), id(src), Q(0x1000), Q(0x9000), Q(0x5000)];
    let answer = process.call(IOMMUFD_CMD_IOAS_COPY, &fields).unwrap();
    assert_eq!(u64_at(&answer, 24), 0x9000);
}

#[test]
fn unmap_says_how_much_and_nothing_when_it_fails() {
    let process = Process::new();
    let ioas = process.bench.ioas();
    process.bench.map(ioas, 0x1000, 0x2000).unwrap();
    let unmap = |iova, length| {
        process.call_and_look(IOMMUFD_CMD_IOAS_UNMAP, &[id(ioas), Q(iova), Q(length)])
    };
    let (outcome, answer) = unmap(0x1000, 0x1000);
    assert_eq!((outcome, u64_at(&answer, 16)), (Err(Errno::ENOENT), 0x1000));
    let (outcome, answer) = unmap(0, 0x8000);
    assert_eq!((outcome, u64_at(&answer, 16)), (Ok(()), 0x2000));
    let (outcome, answer) = unmap(0, u64::MAX);
    assert_eq!((outcome, u64_at(&answer, 16)), (Ok(()), 0));
}

#[test]
fn iova_ranges_says_how_many_there_are_even_when_they_do_not_fit() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let hwpt = process.bench.paging(dev, ioas, PLAIN).unwrap();
    process.bench.host.device_attach(dev, None, hwpt).unwrap();
    let ask = |ioas, room, reserved, list| {
        let fields = [id(ioas), D(room), D(reserved), Q(list), Q(0)];
        process.call_and_look(IOMMUFD_CMD_IOAS_IOVA_RANGES, &fields)
    };
    assert_eq!(ask(NONE, 0, 1, 0).0, Err(Errno::EOPNOTSUPP));
    assert_eq!(ask(NONE, 0, 0, 0).0, Err(Errno::ENOENT));
    assert_eq!(ask(ioas, 1, 0, NOWHERE).0, Err(Errno::EFAULT));
    let (outcome, answer) = ask(ioas, 1, 0, process.at(0));
    assert_eq!(outcome, Err(Errno::EMSGSIZE));
    assert_eq!((u32_at(&answer, 8), u64_at(&answer, 24)), (2, 0x1000));
    assert_eq!((process.peek(0), process.peek(8), process.peek(16)), (0, 0xfedf_ffff, 0));
    let (outcome, answer) = ask(ioas, 5, 0, process.at(0));
    assert_eq!((outcome, u32_at(&answer, 8)), (Ok(()), 2));
    assert_eq!((process.peek(16), process.peek(24)), (0xfef0_0000, (1 << 47) - 1));
    assert_eq!(ask(ioas, 0, 0, NOWHERE).0, Err(Errno::EMSGSIZE), "asking for the number");
}

#[test]
fn allow_iovas_reads_up_to_the_first_bad_range() {
    let process = Process::new();
    let ioas = process.bench.ioas();
    let list = process.poke(0, &[Q(0x1000), Q(0x1fff), Q(0x3000), Q(0x3000)]);
    let allow = |ioas, count, reserved, list| {
        process.call(IOMMUFD_CMD_IOAS_ALLOW_IOVAS, &[id(ioas), D(count), D(reserved), Q(list)])
    };
    assert_eq!(allow(NONE, 1, 1, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(allow(NONE, 1, 0, NOWHERE), Err(Errno::ENOENT));
    assert_eq!(allow(ioas, 1, 0, NOWHERE), Err(Errno::EFAULT));
    assert_eq!(allow(ioas, u32::MAX, 0, list), Err(Errno::EINVAL), "the second is one byte");
    allow(ioas, 1, 0, list).unwrap();
    let va = process.at(0);
    let map = || {
        let fields = [D(RW), id(ioas), D(0), Q(va), Q(0x1000), Q(0)];
        process.call(IOMMUFD_CMD_IOAS_MAP, &fields).map(|answer| u64_at(&answer, 32))
    };
    assert_eq!(map(), Ok(0x1000));
    assert_eq!(map(), Err(Errno::ENOSPC));
    allow(ioas, 0, 0, NOWHERE).unwrap();
    map().unwrap();
}

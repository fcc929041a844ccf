// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOAS ioctls: the order of their checks, what they write back, and device memory.

use std::sync::Arc;

use iommufd_bindings::*;
use vm_memory::Bytes;

use super::{id, u32_at, u64_at, Process, D, MEMORY, NOWHERE, Q};
use crate::host::objects::tests::fake::{memory, PLAIN};
use crate::host::user_space::Credentials;
use crate::{DmaAttributes, DmaBuf};
use twostage::iommufd::{Errno, HostIommu, MapTarget, ObjectId, Protection};

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
    // flags, ioas, reserved, user_va, length, iova: each row fixes what the one before it broke.
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
fn memory_is_not_looked_at_before_there_is_a_hwpt() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let map = |va, length, iova| {
        let fields = [D(FIXED_RW), id(ioas), D(0), Q(va), Q(length), Q(iova)];
        process.call(IOMMUFD_CMD_IOAS_MAP, &fields).map(drop)
    };
    map(process.at(0), MEMORY, 0x10000).unwrap();
    map(NOWHERE, 0x1000, 0x40000).unwrap();
    let outcome = process.bench.paging(dev, ioas, PLAIN);
    assert_eq!(outcome.unwrap_err().errno, Errno::EFAULT);
    assert_eq!(process.bench.host.live_objects(), 2);
    assert_eq!(process.bench.host.pinned_bytes(), 0);
    process.bench.host.ioas_unmap(ioas, 0x40000, 0x1000).unwrap();
    process.bench.paging(dev, ioas, PLAIN).unwrap();
    assert_eq!(process.bench.host.pinned_bytes(), MEMORY);
    assert_eq!(map(process.at(0), MEMORY + 0x1000, 0x40000), Err(Errno::EFAULT));
    assert_eq!(map(NOWHERE, 0x1000, 0x40000), Err(Errno::EFAULT));
    assert_eq!(process.bench.host.pinned_bytes(), MEMORY);
}

#[test]
fn a_file_is_mapped_by_offset() {
    let mut process = Process::new();
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(0x8000).unwrap();
    process.files.push((5, file));
    let ioas = process.bench.ioas();
    let call = |flags, ioas, fd, start, length, iova| {
        let fields = [D(flags), id(ioas), D(fd), Q(start), Q(length), Q(iova)];
        process.call(IOMMUFD_CMD_IOAS_MAP_FILE, &fields).map(|answer| u64_at(&answer, 32))
    };
    // Each row fixes what the one before it broke.
    let rows = [
        (8, NONE, 6, !0, !0, !0, Errno::EOPNOTSUPP),
        (0, NONE, 6, !0, 0, !0, Errno::EOVERFLOW),
        (0, NONE, 6, !0, 0, 0, Errno::EINVAL),
        (R, NONE, 6, !0, 0, 0, Errno::ENOENT),
        (R, ioas, 6, !0, 0, 0, Errno::EINVAL),
        (R, ioas, 6, !0, 2, 0, Errno::EOVERFLOW),
        (R, ioas, 6, 0, 2, 0, Errno::EBADF),
        (R, ioas, 5, 0, u64::MAX - 1, 0, Errno::EINVAL),
    ];
    for (flags, ioas, fd, start, length, iova, errno) in rows {
        assert_eq!(call(flags, ioas, fd, start, length, iova), Err(errno), "{start:x} {length:x}");
    }
    assert_eq!(call(RW, ioas, 5, 0x3000, 0x1000, 0), Ok(0x1000));
    assert_eq!(call(FIXED_RW, ioas, 5, 0, 0x8001, 0x10000), Ok(0x10000), "not looked at yet");
    let dev = process.bench.bind("a");
    let hwpt = || process.bench.paging(dev, ioas, PLAIN).map_err(|error| error.errno);
    assert_eq!(hwpt(), Err(Errno::EADDRINUSE), "one byte too many");
    process.bench.host.ioas_unmap(ioas, 0x10000, 0x8001).unwrap();
    call(FIXED_RW, ioas, 5, 0, 0x9000, 0x10000).unwrap();
    assert_eq!(hwpt(), Err(Errno::EINVAL), "past the end of the file");
    process.bench.host.ioas_unmap(ioas, 0x10000, 0x9000).unwrap();
    hwpt().unwrap();
    assert_eq!(process.bench.host.pinned_bytes(), 0x1000);
}

#[test]
fn files_follow_to_another_process() {
    let mut process = Process::new();
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(0x8000).unwrap();
    process.files.push((5, file));
    let poor = |memlock_limit| {
        let privileged = Credentials::privileged();
        Credentials { memlock_limit, ipc_lock: false, ..privileged }
    };
    let first = poor(0x4000);
    process.who = first.clone();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    process.bench.paging(dev, ioas, PLAIN).unwrap();
    let map = |start| {
        let fields = [D(RW), id(ioas), D(5), Q(start), Q(0x3000), Q(0)];
        process.call(IOMMUFD_CMD_IOAS_MAP_FILE, &fields).map(drop)
    };
    map(0).unwrap();
    assert_eq!(map(0x3000), Err(Errno::ENOMEM), "more than the user may lock");
    assert_eq!(first.user.bytes(), 0x3000);
    let change = |process: &Process| process.call(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &[D(0)]);
    assert_eq!(process.errno(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &[D(1)]), Errno::EOPNOTSUPP);
    process.who = poor(0x2000);
    assert_eq!(change(&process).unwrap_err(), Errno::ENOMEM);
    let second = poor(0x3000);
    process.who = second.clone();
    change(&process).unwrap();
    assert_eq!((first.user.bytes(), second.user.bytes()), (0, 0x3000));
    process.bench.map(ioas, 0x10_0000, 0x1000).unwrap();
    assert_eq!(change(&process).unwrap_err(), Errno::EINVAL, "memory of a process");
}

#[test]
fn options_are_got_and_set() {
    let mut process = Process::new();
    let option = |process: &Process, id, op: u32, reserved: u32, object: ObjectId, value| {
        let fields = [D(id), D(op | reserved << 16), D(object.0), Q(value)];
        process.call(IOMMUFD_CMD_OPTION, &fields).map(|answer| u64_at(&answer, 16))
    };
    const SET: u32 = 0;
    const GET: u32 = 1;
    const NOBODY: ObjectId = ObjectId(0);
    assert_eq!(option(&process, 0, GET, 1, NOBODY, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(&process, 2, GET, 0, NOBODY, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(&process, 0, GET, 0, ObjectId(1), 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(&process, 0, 2, 0, NOBODY, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(&process, 0, GET, 0, NOBODY, 7), Ok(0));
    assert_eq!(option(&process, 0, SET, 0, NOBODY, 1), Ok(1));
    assert_eq!(option(&process, 0, SET, 0, NOBODY, 2), Err(Errno::EINVAL));
    assert_eq!(option(&process, 0, GET, 0, NOBODY, 7), Ok(1));
    process.who.sys_resource = false;
    assert_eq!(option(&process, 0, SET, 0, NOBODY, 2), Err(Errno::EPERM));
    process.who.sys_resource = true;
    assert_eq!(option(&process, 1, GET, 0, NONE, 0), Err(Errno::ENOENT));
    let ioas = process.bench.ioas();
    assert_eq!(option(&process, 0, SET, 0, NOBODY, 2), Err(Errno::EBUSY));
    assert_eq!(option(&process, 1, GET, 0, ioas, 7), Ok(1));
    assert_eq!(option(&process, 1, SET, 0, ioas, 2), Err(Errno::EINVAL));
    assert_eq!(option(&process, 1, 2, 0, ioas, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(&process, 1, SET, 0, ioas, 0), Ok(0));
    assert_eq!(option(&process, 1, GET, 0, ioas, 7), Ok(0));
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

const SIZE: u64 = 0x4000;
const FD: u32 = 5;

/// A process that has opened a device's memory, and an IOAS.
fn process() -> (Process, ObjectId) {
    let mut process = Process::with_edu();
    process.dma_bufs.push((FD as i32, DmaBuf::new(memory(SIZE))));
    let ioas = process.bench.ioas();
    (process, ioas)
}

impl Process {
    fn map_dma_buf(&self, ioas: ObjectId, start: u64, length: u64) -> Result<u64, Errno> {
        let fields = [D(6), id(ioas), D(FD), Q(start), Q(length), Q(0)];
        self.call(IOMMUFD_CMD_IOAS_MAP_FILE, &fields).map(|answer| u64_at(&answer, 32))
    }

    fn reaches(&self, iova: u64) -> bool {
        let mut port = self.bench.host.dma_port("edu").unwrap();
        port.write(DmaAttributes::default(), iova, &[1]).is_ok()
    }
}

#[test]
fn a_device_reaches_another_ones_memory_until_it_is_revoked() {
    let (process, ioas) = process();
    let (host, buf) = (&process.bench.host, &process.dma_bufs[0].1);
    let dev = process.bench.bind("edu");
    let before = process.map_dma_buf(ioas, 0x1000, SIZE - 0x1000).unwrap();
    host.device_attach(dev, None, ioas).unwrap();
    let after = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    assert!(process.reaches(before) && process.reaches(after + SIZE - 1));
    assert_eq!(host.pinned_bytes(), 0, "it is not accounted");
    let mut first = [0];
    buf.memory().slice().read_slice(&mut first, 0x1000).unwrap();
    assert_eq!(first, [1]);

    buf.revoke();
    assert!(!process.reaches(before) && !process.reaches(after));
    assert_eq!(process.map_dma_buf(ioas, 0, SIZE), Err(Errno::ENODEV));
    buf.restore();
    let anew = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    assert!(process.reaches(anew));
    assert!(!process.reaches(before), "what was lost stays so");
    host.device_detach(dev, None).unwrap();
    host.device_attach(dev, None, ioas).unwrap();
    assert!(!process.reaches(before) && process.reaches(anew), "also to a new HWPT");
    buf.revoke();
    assert!(!process.reaches(anew));
    assert_eq!(process.bench.unmapped(ioas), 3 * SIZE - 0x1000);
}

#[test]
fn only_hwpts_hold_memory_of_a_device() {
    let (process, ioas) = process();
    let host = &process.bench.host;
    for (start, length, errno) in [
        (0, 0, Errno::EINVAL),
        (u64::MAX, 2, Errno::EOVERFLOW),
        (SIZE, SIZE, Errno::EINVAL),
        (0, SIZE + 1, Errno::EINVAL),
    ] {
        assert_eq!(process.map_dma_buf(ioas, start, length), Err(errno), "{start:#x} {length:#x}");
    }
    let iova = process.map_dma_buf(ioas, 0, SIZE).unwrap();
    let access = host.access_create(None).unwrap();
    access.attach(ioas).unwrap();
    assert_eq!(access.read(iova, &mut [0]).unwrap_err().errno, Errno::EINVAL);
    let change = process.call(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, &[D(0)]);
    assert_eq!(change.unwrap_err(), Errno::EINVAL);
    let mut objects = host.objects();
    assert_eq!(objects.cut(ioas, iova + 0xfff).unwrap_err().errno, Errno::EOPNOTSUPP);
    drop(objects);
    let copy = MapTarget::Fixed(0x10_0000);
    let rw = Protection::READ_WRITE;
    host.ioas_copy(ioas, copy, ioas, iova, SIZE, rw).expect("a copy is as good");
}

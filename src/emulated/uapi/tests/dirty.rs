// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Ioctls of dirty tracking: the order of their checks, and the bitmap.

use iommufd_bindings::*;

use super::{id, Process, D, MEMORY, NOWHERE, Q};
use crate::host::objects::tests::fake::{Bench, Fake, PLAIN};
use crate::{DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, VtdUnit, VtdUnitConfig};
use twostage::iommufd::{Errno, HostIommu, HwptFlags, ObjectId};
use twostage::spec::pci::Bdf;

const DIRTY: HwptFlags = HwptFlags::new().with_dirty_tracking(true);
const NONE: ObjectId = ObjectId(99);
const SET: u32 = IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING;
const GET: u32 = IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP;

#[test]
fn checks_are_in_linuxs_order() {
    let process = Process::new();
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let plain = process.bench.paging(dev, ioas, PLAIN).unwrap();
    let dirty = process.bench.paging(dev, ioas, DIRTY).unwrap();
    let set = |flags, hwpt| process.call(SET, &[D(flags), id(hwpt), D(1)]).map(drop);
    assert_eq!(set(2, NONE), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(1, NONE), Err(Errno::ENOENT));
    assert_eq!(set(1, ioas), Err(Errno::ENOENT));
    assert_eq!(set(1, plain), Err(Errno::EOPNOTSUPP));
    set(1, dirty).unwrap();
    set(0, dirty).unwrap();
    // Each row fixes what the one before it broke: HWPT, flags, reserved, IOVA, length, page.
    let rows = [
        (NONE, 2, 0, 1, u64::MAX, 0, Errno::EOPNOTSUPP),
        (NONE, 1, 1, 1, u64::MAX, 0, Errno::EOPNOTSUPP),
        (NONE, 1, 0, 1, u64::MAX, 0, Errno::ENOENT),
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
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
    let mut bench = Bench::of(Fake::able(), Fake::able());
    bench.host = host;
    let process = Process::of(bench);
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An iommufd as a VFIO container.

use iommufd_bindings::*;

use super::super::vfio_request;
use super::{flat, id, u32_at, Field, Process, D, MEMORY, NOWHERE, Q};
use crate::host::objects::tests::fake::{PARENT, PLAIN};
use twostage::iommufd::{Errno, HostIommu, ObjectId};

const CHECK_EXTENSION: u32 = vfio_request(1);
const SET_IOMMU: u32 = vfio_request(2);
const GET_INFO: u32 = vfio_request(12);
const MAP_DMA: u32 = vfio_request(13);
const UNMAP_DMA: u32 = vfio_request(14);
const DIRTY_PAGES: u32 = vfio_request(17);

const TYPE1: u64 = 1;
const TYPE1V2: u64 = 3;
const NOIOMMU: u64 = 8;
const RW: u32 = 3;

/// IOVA of the tests' mappings.
const IOVA: u64 = 0x10_0000;

impl Process {
    fn vfio(&self, request: u32, argument: u64) -> Result<i32, Errno> {
        self.bench.host.vfio_ioctl(request, argument, &self.caller())
    }

    /// A VFIO ioctl on a structure with these fields after its size.
    fn dma(&self, request: u32, fields: &[Field]) -> Result<i32, Errno> {
        let size = 4 + flat(fields).len() as u32;
        self.dma_of_size(request, size, fields)
    }

    fn dma_of_size(&self, request: u32, argsz: u32, fields: &[Field]) -> Result<i32, Errno> {
        self.poke(4, fields);
        self.vfio(request, self.poke(0, &[D(argsz)]))
    }

    fn map_dma(&self, offset: u64, iova: u64, size: u64) -> Result<i32, Errno> {
        self.dma(MAP_DMA, &[D(RW), Q(self.at(offset)), Q(iova), Q(size)])
    }

    /// Unmaps; returns the size that was unmapped according to the structure.
    fn unmap_dma(&self, flags: u32, iova: u64, size: u64) -> (Result<i32, Errno>, u64) {
        let outcome = self.dma(UNMAP_DMA, &[D(flags), Q(iova), Q(size)]);
        (outcome, self.peek(16))
    }

    /// The container has an IOAS.
    fn with_ioas(self) -> (Self, ObjectId) {
        let ioas = self.bench.ioas();
        self.call(IOMMUFD_CMD_VFIO_IOAS, &[id(ioas), D(SET)]).unwrap();
        (self, ioas)
    }
}

const GET: u32 = 0;
const SET: u32 = 1;
const CLEAR: u32 = 2;

#[test]
fn the_ioas_is_got_set_and_cleared() {
    let process = Process::new();
    let call = |ioas: ObjectId, operation| {
        let answer = process.call(IOMMUFD_CMD_VFIO_IOAS, &[id(ioas), D(operation)]);
        answer.map(|answer| ObjectId(u32_at(&answer, 4)))
    };
    let none = ObjectId(0);
    assert_eq!(call(none, GET | 1 << 16), Err(Errno::EOPNOTSUPP));
    assert_eq!(call(none, 3), Err(Errno::EOPNOTSUPP));
    assert_eq!(call(none, GET), Err(Errno::ENODEV));
    assert_eq!(call(none, SET), Err(Errno::ENOENT));
    let ioas = process.bench.ioas();
    call(ioas, SET).unwrap();
    assert_eq!(call(none, GET), Ok(ioas));
    call(none, CLEAR).unwrap();
    assert_eq!(call(none, GET), Err(Errno::ENODEV));
    call(ioas, SET).unwrap();
    process.bench.host.destroy(ioas).unwrap();
    assert_eq!(process.bench.ioas(), ioas, "the id is used again");
    assert_eq!(call(none, GET), Err(Errno::ENODEV), "but it is another IOAS");
}

#[test]
fn a_group_brings_an_ioas_or_excludes_it() {
    let process = Process::new();
    let host = &process.bench.host;
    host.vfio_add_group().unwrap();
    host.vfio_add_group().unwrap();
    assert_eq!(host.live_objects(), 1);
    assert_eq!(host.vfio_add_group_without_iommu(), Err(Errno::EINVAL));
    assert_eq!(process.vfio(SET_IOMMU, NOIOMMU), Err(Errno::EINVAL));
    assert_eq!(process.vfio(SET_IOMMU, TYPE1V2), Ok(0));

    let mut process = Process::new();
    process.bench.host.vfio_add_group_without_iommu().unwrap();
    assert_eq!(process.bench.host.vfio_add_group(), Err(Errno::EINVAL));
    assert_eq!(process.vfio(CHECK_EXTENSION, TYPE1), Ok(0));
    assert_eq!(process.vfio(CHECK_EXTENSION, NOIOMMU), Ok(1));
    for kind in [TYPE1, TYPE1V2] {
        assert_eq!(process.vfio(SET_IOMMU, kind), Err(Errno::EINVAL));
    }
    assert_eq!(process.vfio(SET_IOMMU, NOIOMMU), Ok(0));
    process.who.sys_rawio = false;
    assert_eq!(process.vfio(SET_IOMMU, NOIOMMU), Err(Errno::EPERM));
}

#[test]
fn extensions_are_those_of_linux() {
    let process = Process::new();
    assert_eq!(process.vfio(vfio_request(0), 0), Ok(0), "VFIO_GET_API_VERSION");
    assert_eq!(process.vfio(DIRTY_PAGES, 0), Err(Errno::ENOTTY));
    assert_eq!(process.vfio(CHECK_EXTENSION, 4), Err(Errno::ENODEV), "VFIO_DMA_CC_IOMMU");
    for (kind, errno) in [(TYPE1, Errno::ENODEV), (TYPE1V2, Errno::ENODEV), (2, Errno::EINVAL)] {
        assert_eq!(process.vfio(SET_IOMMU, kind), Err(errno));
    }
    let (process, ioas) = process.with_ioas();
    for (extension, has) in
        [(0, 0), (1, 1), (2, 0), (3, 1), (4, 1), (6, 0), (8, 1), (9, 1), (10, 0), (u64::MAX, 0)]
    {
        assert_eq!(process.vfio(CHECK_EXTENSION, extension), Ok(has), "{extension}");
    }
    let dev = process.bench.bind("a");
    process.bench.paging(dev, ioas, PLAIN).unwrap();
    assert_eq!(process.vfio(CHECK_EXTENSION, 4), Ok(0), "the unit has no snoop control");
}

#[test]
fn map_checks_in_linuxs_order() {
    let process = Process::new();
    let va = process.at(0);
    let map = |process: &Process, argsz, flags, va, iova, size| {
        process.dma_of_size(MAP_DMA, argsz, &[D(flags), Q(va), Q(iova), Q(size)])
    };
    assert_eq!(process.vfio(MAP_DMA, NOWHERE), Err(Errno::EFAULT));
    assert_eq!(map(&process, 31, RW, va, IOVA, 0x1000), Err(Errno::EINVAL));
    assert_eq!(map(&process, 32, 4, va, IOVA, 0x1000), Err(Errno::EINVAL));
    assert_eq!(map(&process, 32, RW, va, IOVA, 0x1000), Err(Errno::ENODEV));
    let (process, ioas) = process.with_ioas();
    for (va, iova, size, errno) in [
        (u64::MAX, IOVA, 2, Errno::EOVERFLOW),
        (va, IOVA, 0, Errno::EINVAL),
        (va, u64::MAX, 2, Errno::EOVERFLOW),
    ] {
        assert_eq!(map(&process, 32, RW, va, iova, size), Err(errno), "{iova:#x} {size:#x}");
    }
    let va = process.at(0);
    map(&process, 4096, RW, va, IOVA, 0x1000).expect("what follows is not looked at");
    assert_eq!(map(&process, 32, RW, va, IOVA, 0x1000), Err(Errno::EEXIST));
    map(&process, 32, 0, NOWHERE, IOVA + 0x1000, 0x1000).expect("it is not looked at yet");
    let dev = process.bench.bind("a");
    let hwpt = || process.bench.paging(dev, ioas, PARENT).map_err(|error| error.errno);
    assert_eq!(hwpt(), Err(Errno::EFAULT));
    process.unmap_dma(0, IOVA + 0x1000, 0x1000).0.unwrap();
    hwpt().unwrap();
    assert_eq!(map(&process, 32, 0, va, IOVA + 0x1000, 0x1000), Err(Errno::EINVAL));
    assert_eq!(map(&process, 32, RW, NOWHERE, IOVA + 0x1000, 0x1000), Err(Errno::EFAULT));
}

#[test]
fn unmap_says_how_much_even_when_it_fails() {
    let process = Process::new();
    assert_eq!(process.vfio(UNMAP_DMA, NOWHERE), Err(Errno::EFAULT));
    let argsz = |argsz| process.dma_of_size(UNMAP_DMA, argsz, &[D(0), Q(IOVA), Q(0x1000)]);
    assert_eq!(argsz(23), Err(Errno::EINVAL));
    for flags in [1, 4, 1 << 31] {
        assert_eq!(process.unmap_dma(flags, IOVA, 0x1000).0, Err(Errno::EINVAL), "{flags:#x}");
    }
    assert_eq!(argsz(24), Err(Errno::ENODEV));
    let (process, _) = process.with_ioas();
    for (iova, size, errno) in [(IOVA, 0, Errno::EINVAL), (u64::MAX, 2, Errno::EOVERFLOW)] {
        assert_eq!(process.unmap_dma(0, iova, size), (Err(errno), 0));
    }
    assert_eq!(process.unmap_dma(0, IOVA, 0x1000), (Ok(0), 0), "nothing is no error");
    process.map_dma(0, IOVA, 0x1000).unwrap();
    process.map_dma(0, IOVA + 0x1000, 0x2000).unwrap();
    assert_eq!(process.unmap_dma(2, 0, 0x1000), (Err(Errno::EINVAL), 0x1000), "not written");
    assert_eq!(
        process.unmap_dma(0, IOVA, 0x2000),
        (Err(Errno::ENOENT), 0x1000),
        "the second cannot be cut"
    );
    assert_eq!(process.unmap_dma(2, 0, 0), (Ok(0), 0x2000));
}

#[test]
fn the_first_version_unmaps_any_pages() {
    let (process, ioas) = Process::new().with_ioas();
    let dev = process.bench.bind("a");
    process.bench.paging(dev, ioas, PARENT).unwrap();
    assert_eq!(process.vfio(SET_IOMMU, TYPE1), Ok(0));
    process.map_dma(0, IOVA, MEMORY).unwrap();
    assert_eq!(process.vfio(SET_IOMMU, TYPE1), Ok(0), "it is set already");
    for (page, pinned) in [(2, MEMORY - 0x1000), (0, MEMORY - 0x2000), (7, MEMORY - 0x3000)] {
        assert_eq!(process.unmap_dma(0, IOVA + page * 0x1000, 0x1000), (Ok(0), 0x1000));
        assert_eq!(process.bench.host.pinned_bytes(), pinned);
        let objects = process.bench.host.objects();
        let stage2 = &objects.table().ioas(ioas).unwrap().stage2;
        assert!(stage2.lookup(IOVA + page * 0x1000).is_none());
        let third = stage2.lookup(IOVA + 0x3000).unwrap();
        assert_eq!(third.target(IOVA + 0x3000), 0x3000, "the rest leads where it led");
    }
    assert_eq!(process.unmap_dma(0, IOVA + 0x1800, 0x1000), (Err(Errno::EINVAL), 0x1000));
    assert_eq!(process.unmap_dma(0, IOVA, MEMORY), (Ok(0), MEMORY - 0x3000));
    assert_eq!(process.bench.host.pinned_bytes(), 0);
}

#[test]
fn the_first_version_comes_too_late_for_huge_pages() {
    let (process, ioas) = Process::new().with_ioas();
    let dev = process.bench.bind("a");
    process.bench.paging(dev, ioas, PARENT).unwrap();
    process.map_dma(0, IOVA, 0x2000).unwrap();
    assert_eq!(process.vfio(SET_IOMMU, TYPE1), Err(Errno::EINVAL));
    assert_eq!(process.vfio(SET_IOMMU, TYPE1V2), Ok(0));
    assert_eq!(process.unmap_dma(0, IOVA, 0x1000), (Err(Errno::ENOENT), 0));
}

/// Queries the information with `argsz` bytes of room; the result, and all the memory.
fn info(process: &Process, argsz: u32) -> (Result<i32, Errno>, Vec<u8>) {
    process.poke(0, &[Q(0xaaaa_aaaa_aaaa_aaaa); 32]);
    let outcome = process.vfio(GET_INFO, process.poke(0, &[D(argsz)]));
    (outcome, (0..32).flat_map(|word| process.peek(word * 8).to_ne_bytes()).collect())
}

#[test]
fn information_is_as_long_as_there_is_room() {
    let process = Process::new();
    assert_eq!(process.vfio(GET_INFO, NOWHERE), Err(Errno::EFAULT));
    assert_eq!(info(&process, 15).0, Err(Errno::EINVAL));
    assert_eq!(info(&process, 16).0, Err(Errno::ENODEV));
    let (process, ioas) = process.with_ioas();
    let page_sizes = |bytes: &[u8]| u64::from_ne_bytes(bytes[8..16].try_into().unwrap());
    assert_eq!(page_sizes(&info(&process, 16).1), !0xfff, "no HWPT: any");
    let dev = process.bench.bind("a");
    let hwpt = process.bench.paging(dev, ioas, PARENT).unwrap();
    process.bench.host.device_attach(dev, None, hwpt).unwrap();

    // Two ranges: below and above the interrupt messages.
    const WHOLE: u32 = 24 + 16 + 16 + 2 * 16;
    for argsz in 16..100 {
        let (outcome, bytes) = info(&process, argsz);
        assert_eq!(outcome, Ok(0));
        assert_eq!((u32_at(&bytes, 0), u32_at(&bytes, 4)), (WHOLE, 3));
        assert_eq!(page_sizes(&bytes), 0x1000);
        assert!(bytes[argsz as usize..].iter().all(|byte| *byte == 0xaa), "{argsz}");
        if argsz >= 24 {
            assert_eq!(u32_at(&bytes, 16), if argsz >= WHOLE { 24 } else { 0 });
        }
    }
    // The second range does not fit: only the first is written, without what precedes them.
    let (_, bytes) = info(&process, WHOLE - 1);
    assert_eq!(bytes[40..56], [0xaa; 16]);
    assert_eq!(bytes[56..72], flat(&[Q(0), Q(0xfedf_ffff)]));
    assert_eq!(bytes[72..88], [0xaa; 16]);
    assert_eq!(info(&process, WHOLE - 17).1[56..72], [0xaa; 16]);
    let (_, bytes) = info(&process, WHOLE);
    let dma_avail = flat(&[D(3 | 1 << 16), D(40), D(u32::MAX)]);
    assert_eq!(bytes[24..36], dma_avail);
    let last = (1 << 48) - 1;
    let ranges = [Q(0), Q(0xfedf_ffff), Q(0xfef0_0000), Q(last)];
    assert_eq!(bytes[40..48], flat(&[D(1 | 1 << 16), D(0)]));
    assert_eq!(bytes[48..88], [flat(&[D(2), D(0)]), flat(&ranges)].concat());
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mappings and pins; exported and revoked memory.

use super::*;
use twostage::iommufd::DirtyRange;

const START: u64 = abi::MOCK_APERTURE_START;

#[test]
fn a_mapping_leads_to_its_own_memory_only() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    program.map(ioas, START + 0x800, 0x1800, 0x2000);
    let check = |iova, offset, length| {
        let body = words(&[iova, length, program.at(offset)]);
        program.test(op::MD_CHECK_MAP, mock.hwpt, &body).map(drop)
    };
    assert_eq!(check(START + 0x800, 0x1800, 0x2000), Ok(()));
    assert_eq!(check(START + 0x1000, 0x2000, 0x1800), Ok(()));
    assert_eq!(check(START + 0x1000, 0x1000, 0x800), Err(Errno::EINVAL), "another page");
    assert_eq!(check(START + 0x800, 0x1800, 0x2800), Err(Errno::EINVAL), "past the end");
    assert_eq!(check(START + 0x800, 0x1400, 0x800), Err(Errno::EINVAL), "not aligned");
    assert_eq!(check(START + 0x800, 0x1_0000, 0x800), Err(Errno::EFAULT));
    let refused = program.test(op::MD_CHECK_MAP, ioas, &[0; 6]);
    assert_eq!(refused, Err(Errno::ENOENT), "no HWPT");
}

#[test]
fn pins_of_all_iommufds_count_and_shared_pages_once() {
    let program = Program::new();
    let other = Program {
        host: program.host.machine().open(),
        caller: program.caller.clone(),
        region: program.region.clone(),
    };
    let check = |offset, length, refs: u32| {
        let body = [words(&[length, program.at(offset)]), vec![refs]].concat();
        program.test(op::MD_CHECK_REFS, 0, &body).map(drop)
    };
    let ioas = program.ioas();
    program.map(ioas, START, 0x1800, 0x1000);
    assert_eq!(check(0, 0x8000, 0), Ok(()), "nothing is pinned without a HWPT");
    program.mock(ioas, 0).unwrap();
    assert_eq!((check(0, 0x1000, 0), check(0x1000, 0x2000, 1)), (Ok(()), Ok(())));
    assert_eq!(check(0x1000, 0x3000, 1), Err(Errno::EIO), "the last page has none");
    let (src, dst) = (ObjectId(ioas), MapTarget::Fixed(START + 0x8000));
    program.host.ioas_copy(src, dst, src, START, 0x1000, Protection::READ_WRITE).unwrap();
    assert_eq!(check(0x1000, 0x2000, 1), Ok(()), "the same pages");
    let elsewhere = other.ioas();
    other.mock(elsewhere, 0).unwrap();
    other.map(elsewhere, START, 0x2000, 0x1000);
    assert_eq!((check(0x1000, 0x1000, 1), check(0x2000, 0x1000, 2)), (Ok(()), Ok(())));
    drop(other);
    assert_eq!(check(0x1000, 0x2000, 1), Ok(()));
    assert_eq!(check(0x800, 0x1000, 1), Err(Errno::EINVAL), "not whole pages");
}

#[test]
fn reserved_iovas_stay_reserved() {
    let program = Program::new();
    let ioas = program.ioas();
    let reserve =
        |start, length| program.test(op::ADD_RESERVED, ioas, &words(&[start, length])).map(drop);
    assert_eq!(reserve(0x1000, 0), Err(Errno::EINVAL));
    assert_eq!(reserve(0x1000, u64::MAX), Err(Errno::EOVERFLOW));
    assert_eq!(reserve(0x1000, 0x1000), Ok(()));
    program.map(ioas, 0x4000, 0, 0x1000);
    assert_eq!(reserve(0x4800, 0x800), Err(Errno::EADDRINUSE));
    let usable = program.host.ioas_iova_ranges(ObjectId(ioas)).unwrap().allowed;
    assert_eq!(usable, [0..=0xfff, 0x2000..=u64::MAX]);
    let refused = program.test(op::ADD_RESERVED, 77, &words(&[0, 1]));
    assert_eq!(refused, Err(Errno::ENOENT));
}

#[test]
fn the_aperture_and_the_page_size_of_a_mock_domain() {
    let program = Program::new();
    let ioas = program.ioas();
    program.mock(ioas, 0).unwrap();
    let ranges = program.host.ioas_iova_ranges(ObjectId(ioas)).unwrap();
    assert_eq!(ranges.allowed, [abi::MOCK_APERTURE_START..=abi::MOCK_APERTURE_LAST]);
    assert_eq!(ranges.alignment, abi::MOCK_PAGE_SIZE);
}

#[test]
fn a_limit_below_one_entry_is_refused() {
    let program = Program::new();
    let limit = |bytes| program.test(op::SET_TEMP_MEMORY_LIMIT, 0, &[bytes]).map(drop);
    assert_eq!((limit(11), limit(12)), (Err(Errno::EINVAL), Ok(())));
    assert_eq!(program.test(99, 0, &[]), Err(Errno::EOPNOTSUPP));
}

#[test]
fn a_leaf_gets_dirty_as_a_whole() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    let dirty = HwptFlags::new().with_dirty_tracking(true);
    let hwpt = program.hwpt(mock.idev, ioas, dirty).unwrap();
    // The memory is at least page-aligned: align both addresses to exactly 4 KiB.
    let skew = program.at(0) % 0x2000;
    program.map(ioas, START + skew + 0x1000, 0, 0x1000);
    let mark = |iova, bit: u32| {
        let bitmap = program.put(0x7000, &[1 << bit]);
        let body = words(&[0, iova, 0x1000, 0x800, bitmap]);
        program.test(op::DIRTY, hwpt, &body).map(|body| body[10])
    };
    let base = START + skew + 0x1000;
    assert_eq!(mark(base, 1), Err(Errno::EINVAL), "not tracked yet");
    program.host.hwpt_set_dirty_tracking(ObjectId(hwpt), true).unwrap();
    assert_eq!(mark(base, 1), Ok(1));
    assert_eq!(mark(base + 0x1000, 0), Ok(1), "a hole counts too");
    assert_eq!(mark(base + 0x400, 0), Err(Errno::EINVAL));
    let read = |clear| {
        let range = DirtyRange { iova: base, length: 0x1000, page_size: 0x800 };
        let mut bitmap = [0];
        program.host.hwpt_get_dirty_bitmap(ObjectId(hwpt), &range, clear, &mut bitmap).unwrap();
        bitmap[0]
    };
    assert_eq!((read(false), read(true), read(true)), (0b11, 0b11, 0), "one page of 4 KiB");
    program.host.destroy(ObjectId(mock.stdev)).unwrap();
}

#[test]
fn a_copy_names_its_source_by_number() {
    const COPY: u32 = 0x3b83;
    let program = Program::new();
    let (src, dst) = (program.ioas(), program.ioas());
    program.map(src, 0x1_0000, 0, 0x1000);
    program.map(src, 0x3_0000, 0x2000, 0x2000);
    let copy = |number: u64| {
        let flags = 7 | abi::MOCK_FLAGS_ACCESS_SYZ;
        let fields = words(&[0x1000, 0x5_0000, number | 0x1000 << 32]);
        program.ioctl(COPY, &[vec![0, flags, dst, src], fields].concat()).map(drop)
    };
    assert_eq!(copy(2), Err(Errno::ENOENT), "there is no third one");
    assert_eq!(copy(0), Err(Errno::ENOENT), "it ends before");
    assert_eq!(copy(1), Ok(()));
    let mock = program.mock(src, 0);
    assert!(mock.is_err(), "outside the aperture");
    let start = |ioas: u32| {
        let objects = program.host.objects();
        let space = &objects.table().ioas(ObjectId(ioas)).unwrap().space;
        space
            .areas()
            .map(|(start, area)| (start, area.pages.start_of(area.offset)))
            .collect::<Vec<_>>()
    };
    assert_eq!(start(dst), [(0x5_0000, program.at(0x3000))]);
}

const MAP_FILE: u32 = 0x3b8f;
const FIXED_AND_BOTH: u32 = 7;

/// The descriptor of a dma-buf.
fn export(program: &Program, length: u32) -> Result<i32, Errno> {
    let words = [[abi::SIZE as u32, op::DMABUF_GET, 0, 0].as_slice(), &[length], &[0; 13]].concat();
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    program.host.ioctl(TEST, &mut bytes, &program.caller)
}

fn revoke(program: &Program, fd: i32, revoked: bool) -> Result<(), Errno> {
    program.test(op::DMABUF_REVOKE, 0, &[fd.cast_unsigned(), revoked.into()]).map(drop)
}

fn map(program: &Program, ioas: u32, fd: i32, iova: u64, length: u64) -> Result<(), Errno> {
    let head = vec![0, FIXED_AND_BOTH, ioas, fd.cast_unsigned()];
    program.ioctl(MAP_FILE, &[head, words(&[0, length, iova])].concat()).map(drop)
}

#[test]
fn memory_that_is_taken_back_is_mapped_no_more() {
    let program = Program::new();
    let ioas = program.ioas();
    let mock = program.mock(ioas, 0).unwrap();
    let fd = export(&program, 0x3fff).unwrap();
    assert_eq!(map(&program, ioas, fd, START, 0x4001), Err(Errno::EINVAL));
    map(&program, ioas, fd, START, 0x4000).unwrap();
    let is_mapped = |hwpt: u32, iova| {
        let objects = program.host.objects();
        let ioas = objects.table().hwpt_paging(ObjectId(hwpt)).unwrap().ioas;
        objects.table().ioas(ioas).unwrap().stage2.lookup(iova).is_some()
    };
    assert!(is_mapped(mock.hwpt, START + 0x3fff));
    revoke(&program, fd, true).unwrap();
    assert!(!is_mapped(mock.hwpt, START));
    assert_eq!(map(&program, ioas, fd, START + 0x8000, 0x4000), Err(Errno::ENODEV));
    revoke(&program, fd, false).unwrap();
    map(&program, ioas, fd, START + 0x8000, 0x4000).unwrap();
    assert!(is_mapped(mock.hwpt, START + 0x8000) && !is_mapped(mock.hwpt, START));
    let other = program.ioas();
    let copied = program.host.ioas_copy(
        ObjectId(other),
        MapTarget::Fixed(START),
        ObjectId(ioas),
        START,
        0x4000,
        Protection::READ_WRITE,
    );
    copied.unwrap();
    let mock = program.mock(other, 0).unwrap();
    assert!(!is_mapped(mock.hwpt, START), "it stays revoked");
    program.host.ioas_unmap(ObjectId(ioas), START, 0x4000).unwrap();
}

#[test]
fn what_is_refused() {
    let program = Program::new();
    let ioas = program.ioas();
    for length in [0, 0x20_0001] {
        assert_eq!(export(&program, length), Err(Errno::EINVAL));
    }
    assert_eq!(revoke(&program, 9, true), Err(Errno::EBADF));
    let fd = export(&program, 0x1000).unwrap();
    map(&program, ioas, fd, 0x1_0000, 0x1000).unwrap();
    let pins = abi::MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES;
    let access = program.test(op::CREATE_ACCESS, ioas, &[0, pins]).unwrap()[0];
    let body = [vec![0, 0], words(&[0x1_0000, 0x1000, 0])].concat();
    assert_eq!(program.test(op::ACCESS_PAGES, access, &body), Err(Errno::EINVAL));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Exported and revoked memory.

use super::*;

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
    const START: u64 = abi::MOCK_APERTURE_START;
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

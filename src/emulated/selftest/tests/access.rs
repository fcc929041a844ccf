// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access objects with descriptors.

use super::*;

const PINS: u32 = abi::MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES;
const SYZ: u32 = abi::MOCK_FLAGS_ACCESS_SYZ;
const EBADE: Errno = Errno::from_raw(52);

fn create(program: &Program, ioas: u32, flags: u32) -> Result<u32, Errno> {
    program.test(op::CREATE_ACCESS, ioas, &[0, flags]).map(|body| body[0])
}

/// Pins `length` bytes at `iova`, which must be the memory at `uptr`; returns the number of the
/// pin.
fn pin(program: &Program, fd: u32, iova: u64, length: u64, uptr: u64) -> Result<u32, Errno> {
    let body = [vec![0, 0], words(&[iova, length, uptr])].concat();
    program.test(op::ACCESS_PAGES, fd, &body).map(|body| body[1])
}

fn unpin(program: &Program, fd: u32, number: u32) -> Result<(), Errno> {
    program.test(op::DESTROY_ACCESS_PAGES, fd, &[number]).map(drop)
}

fn copy(program: &Program, fd: u32, iova: u64, uptr: u64, flags: u32) -> Result<(), Errno> {
    let body = [words(&[iova, 4, uptr]), vec![flags]].concat();
    program.test(op::ACCESS_RW, fd, &body).map(drop)
}

#[test]
fn pinned_pages_are_those_of_the_program() {
    let program = Program::new();
    let ioas = program.ioas();
    program.map(ioas, 0x1_0000, 0x1000, 0x3000);
    let fd = create(&program, ioas, PINS).unwrap();
    let first = pin(&program, fd, 0x1_0000, 0x3000, program.at(0x1000)).unwrap();
    let second = pin(&program, fd, 0x1_1000, 0x1800, program.at(0x2000)).unwrap();
    assert_eq!((first, second, program.host.pinned_bytes()), (0, 1, 0x3000));
    let wrong = |at| pin(&program, fd, 0x1_0000, 0x3000, at).err();
    assert_eq!(wrong(program.at(0x2000)), Some(EBADE));
    assert_eq!(wrong(program.at(0x1000) + 0x1_0000), Some(Errno::EFAULT));
    assert_eq!(
        (unpin(&program, fd, first), unpin(&program, fd, first)),
        (Ok(()), Err(Errno::ENOENT))
    );
    assert_eq!(program.host.pinned_bytes(), 0x2000, "nothing is left of the wrong ones");
    unpin(&program, fd, second).unwrap();
    assert_eq!(program.host.pinned_bytes(), 0);
}

#[test]
fn an_unmap_drops_what_is_pinned_there() {
    let program = Program::new();
    let ioas = program.ioas();
    program.map(ioas, 0x1_0000, 0, 0x2000);
    program.map(ioas, 0x2_0000, 0, 0x2000);
    let fd = create(&program, ioas, PINS).unwrap();
    let pins = [0x1_0000, 0x2_0000].map(|iova| pin(&program, fd, iova, 0x1000, 0).unwrap());
    program.host.ioas_unmap(ObjectId(ioas), 0x1_0000, 0x2000).unwrap();
    assert_eq!(unpin(&program, fd, pins[0]), Err(Errno::ENOENT));
    let other = program.ioas();
    program.test(op::ACCESS_REPLACE_IOAS, fd, &[other]).unwrap();
    assert_eq!(unpin(&program, fd, pins[1]), Err(Errno::ENOENT));
    assert_eq!(program.host.pinned_bytes(), 0);
    program.host.destroy(ObjectId(ioas)).unwrap();
    assert_eq!(program.host.destroy(ObjectId(other)).unwrap_err().errno, Errno::EBUSY);
    program.caller.files.lock().clear();
    program.host.destroy(ObjectId(other)).unwrap();
}

#[test]
fn memory_is_copied_by_iova_or_by_the_number_of_an_area() {
    let program = Program::new();
    let ioas = program.ioas();
    program.map(ioas, 0x1_0000, 0, 0x1000);
    program.map(ioas, 0x2_0000, 0x1000, 0x1000);
    let fd = create(&program, ioas, 0).unwrap();
    program.put(0x1010, &[7]);
    copy(&program, fd, 0x2_0010, program.at(0x4000), 0).unwrap();
    copy(&program, fd, 0x1_0000, program.at(0x4000), abi::MOCK_ACCESS_RW_WRITE).unwrap();
    let slow = abi::MOCK_ACCESS_RW_WRITE | abi::MOCK_ACCESS_RW_SLOW_PATH;
    copy(&program, fd, 0x1_0004, program.at(0x4000), slow).unwrap();
    copy(&program, fd, 1 | 0x10 << 32, program.at(0x4004), SYZ).unwrap();
    let mut bytes = [0; 8];
    program.region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
    assert_eq!(bytes, [7, 0, 0, 0, 7, 0, 0, 0]);
    program.region.read_slice(&mut bytes, MemoryRegionAddress(0x4000)).unwrap();
    assert_eq!(bytes, [7, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(copy(&program, fd, 2, program.at(0x4000), SYZ), Err(Errno::ENOENT), "no area 2");
}

#[test]
fn what_is_refused() {
    let program = Program::new();
    let ioas = program.ioas();
    assert_eq!(create(&program, 77, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(create(&program, 77, 0), Err(Errno::ENOENT));
    assert_eq!(program.host.live_objects(), 1, "nothing is left of them");
    let fd = create(&program, ioas, 0).unwrap();
    assert_eq!(pin(&program, 9, 0, (16 << 20) + 1, 0), Err(Errno::ENOMEM));
    assert_eq!(pin(&program, 9, 0, 0x1000, 0), Err(Errno::EBADFD));
    assert_eq!(pin(&program, fd, 0, 0x1000, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(copy(&program, 9, 0, 0, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(copy(&program, 9, 0, 0, 0), Err(Errno::EBADFD));
    assert_eq!(copy(&program, fd, 0, 0x1000, abi::MOCK_ACCESS_RW_WRITE), Err(Errno::EFAULT));
    assert_eq!(unpin(&program, fd, 0), Err(Errno::ENOENT));
    let replace = |ioas| program.test(op::ACCESS_REPLACE_IOAS, fd, &[ioas]).map(drop);
    assert_eq!((replace(77), replace(ioas)), (Err(Errno::ENOENT), Ok(())));
}

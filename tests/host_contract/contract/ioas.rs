// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! IOASes without devices.

use twostage::iommufd::{Errno, MapTarget, ObjectId, Protection};

use super::memory::Memory;
use super::{destroy, ioas_of, refused, Subject, BASE, PAGE};

const RW: Protection = Protection::READ_WRITE;

pub fn mappings(subject: &Subject) {
    let host = &*subject.host;
    let memory = Memory::new(8);
    let fresh = host.ioas_alloc().expect("IOAS_ALLOC");
    let ranges = host.ioas_iova_ranges(fresh).expect("IOAS_IOVA_RANGES");
    assert_eq!((ranges.allowed, ranges.alignment), (vec![0..=u64::MAX], 1));
    assert_eq!(host.ioas_unmap(fresh, 0, u64::MAX).expect("nothing"), 0);
    destroy(host, &[fresh]);
    refused(host.destroy(fresh), Errno::ENOENT);
    refused(host.ioas_iova_ranges(fresh), Errno::ENOENT);
    refused(host.ioas_unmap(fresh, 0, u64::MAX), Errno::ENOENT);
    refused(host.ioas_map(fresh, &memory.whole(), MapTarget::Fixed(BASE), RW), Errno::ENOENT);

    let ioas = ioas_of(host, &memory, BASE);
    let map = |offset, pages, iova, rights| {
        host.ioas_map(ioas, &memory.part(offset, pages * PAGE), MapTarget::Fixed(iova), rights)
    };
    refused(map(0, 8, BASE, RW), Errno::EEXIST);
    refused(map(0, 1, BASE + 7 * PAGE, RW), Errno::EEXIST);
    refused(map(0, 0, 0, RW), Errno::EINVAL);
    refused(map(0, 1, 0, Protection { read: false, write: false }), Errno::EINVAL);
    refused(map(0, 2, u64::MAX - PAGE + 1, RW), Errno::EOVERFLOW);
    assert_eq!(map(0, 1, 0, Protection::READ_ONLY).expect("IOAS_MAP"), 0);
    assert_eq!(map(PAGE, 2, 4 * PAGE, RW).expect("IOAS_MAP"), 4 * PAGE);

    // A mapping that would be split: whole mappings below it are unmapped nevertheless.
    refused(host.ioas_unmap(ioas, BASE, PAGE), Errno::ENOENT);
    refused(host.ioas_unmap(ioas, 0, 5 * PAGE), Errno::ENOENT);
    refused(host.ioas_unmap(ioas, 0, PAGE), Errno::ENOENT);
    refused(host.ioas_unmap(ioas, 0, 0), Errno::EINVAL);
    assert_eq!(host.ioas_unmap(ioas, 0, 8 * PAGE).expect("IOAS_UNMAP"), 2 * PAGE);
    assert_eq!(host.ioas_unmap(ioas, BASE, 8 * PAGE).expect("IOAS_UNMAP"), 8 * PAGE);
    refused(host.ioas_unmap(ioas, BASE, 8 * PAGE), Errno::ENOENT);
    map(0, 8, BASE, RW).expect("it is free again");
    assert_eq!(host.ioas_unmap(ioas, 0, u64::MAX).expect("all"), 8 * PAGE);
    map(0, 8, BASE, RW).expect("it is free again");
    destroy(host, &[ioas]);
}

pub fn placement(subject: &Subject) {
    let host = &*subject.host;
    let memory = Memory::new(8);
    let ioas = host.ioas_alloc().expect("IOAS_ALLOC");
    let range = BASE..=BASE + 12 * PAGE - 1;
    let allow = |ranges: &[_]| host.ioas_allow_iovas(ioas, ranges);
    refused(allow(&[range.clone(), BASE + PAGE..=BASE + 2 * PAGE]), Errno::EINVAL);
    refused(allow(&[BASE..=BASE]), Errno::EINVAL);
    refused(host.ioas_allow_iovas(ObjectId(12345), &[]), Errno::ENOENT);
    allow(std::slice::from_ref(&range)).expect("IOAS_ALLOW_IOVAS");
    let first = host.ioas_map(ioas, &memory.whole(), MapTarget::Anywhere, RW).expect("room");
    assert!(range.contains(&first) && range.contains(&(first + 8 * PAGE - 1)));
    refused(host.ioas_map(ioas, &memory.whole(), MapTarget::Anywhere, RW), Errno::ENOSPC);
    // A fixed address may be outside of the allowed ranges.
    host.ioas_map(ioas, &memory.whole(), MapTarget::Fixed(0), RW).expect("IOAS_MAP");
    allow(&[]).expect("IOAS_ALLOW_IOVAS");
    let second = host.ioas_map(ioas, &memory.whole(), MapTarget::Anywhere, RW).expect("room");
    assert!(second >= 8 * PAGE && second != first);
    destroy(host, &[ioas]);
}

pub fn copies(subject: &Subject) {
    let host = &*subject.host;
    let memory = Memory::new(8);
    let from = ioas_of(host, &memory, BASE);
    let to = host.ioas_alloc().expect("IOAS_ALLOC");
    let copy =
        |target, iova, pages, rights| host.ioas_copy(to, target, from, iova, pages * PAGE, rights);
    let at = MapTarget::Fixed;
    assert_eq!(copy(at(0), BASE, 8, RW).expect("IOAS_COPY"), 0);
    assert_eq!(copy(at(BASE), BASE + PAGE, 2, RW).expect("a part"), BASE);
    refused(copy(at(0), BASE, 8, RW), Errno::EEXIST);
    refused(copy(at(0x10 * BASE), BASE + PAGE, 8, RW), Errno::ENOENT);
    refused(copy(at(0x10 * BASE), BASE, 0, RW), Errno::EINVAL);
    copy(MapTarget::Anywhere, BASE, 4, RW).expect("room");
    let read = Protection::READ_ONLY;
    host.ioas_map(from, &memory.part(0, PAGE), at(0), read).expect("IOAS_MAP");
    refused(copy(at(0x10 * BASE), 0, 1, RW), Errno::EPERM);
    copy(at(0x10 * BASE), 0, 1, read).expect("IOAS_COPY");
    // The copies outlive their source.
    destroy(host, &[from]);
    assert_eq!(host.ioas_unmap(to, 0, u64::MAX).expect("all"), (8 + 2 + 4 + 1) * PAGE);
    destroy(host, &[to]);
}

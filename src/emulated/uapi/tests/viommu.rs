// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of vIOMMUs and their objects; `FAULT_QUEUE_ALLOC`, `VEVENTQ_ALLOC`, and their
//! descriptors.

use std::os::unix::fs::FileExt;

use iommufd_bindings::*;

use super::{id, u32_at, Process, D, NOWHERE, Q};
use crate::host::objects::tests::fake::{Bench, Fake, PARENT};
use crate::host::objects::tests::viommus::{FORBIDDEN_ID, KIND};
use crate::{MappedPages, MmapRequest};
use twostage::iommufd::{
    Errno, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId, PageRequest, PageRequestFlags,
    PageRequestPermissions, ViommuKind,
};

const NOBODY: ObjectId = ObjectId(99);

#[test]
fn viommus_and_vdevices_by_their_bytes() {
    let process = Process::of(Bench::of(Fake::with_viommus(), Fake::able()));
    let (dev, far, ioas) =
        (process.bench.bind("a"), process.bench.bind("far"), process.bench.ioas());
    let parent = process.bench.paging(dev, ioas, PARENT).unwrap();
    // flags, type, dev, hwpt, out, data_len, reserved, data_uptr
    let alloc = |flags, kind, dev, hwpt| {
        let fields = [D(flags), D(kind), id(dev), id(hwpt), D(0), D(0), D(9), Q(0)];
        process.call(IOMMUFD_CMD_VIOMMU_ALLOC, &fields).map(|answer| u32_at(&answer, 20))
    };
    assert_eq!(alloc(1, 1, NOBODY, NOBODY), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(0, 0, NOBODY, NOBODY), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(0, 7, NOBODY, NOBODY), Err(Errno::ENOENT));
    assert_eq!(alloc(0, 7, dev, NOBODY), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(0, 1, far, NOBODY), Err(Errno::EOPNOTSUPP), "a VT-d");
    assert_eq!(alloc(0, 1, dev, NOBODY), Err(Errno::ENOENT));
    let viommu = alloc(0, 1, dev, parent).unwrap();
    let vdevice = |viommu, dev, virt_id| {
        let fields = [D(viommu), id(dev), D(0), Q(virt_id)];
        process.call(IOMMUFD_CMD_VDEVICE_ALLOC, &fields).map(|answer| u32_at(&answer, 12))
    };
    assert_eq!(vdevice(99, NOBODY, 0), Err(Errno::ENOENT));
    assert_eq!(vdevice(viommu, far, 0), Err(Errno::EINVAL));
    let made = vdevice(viommu, dev, !0).unwrap();
    assert_eq!(vdevice(viommu, dev, 0), Err(Errno::EEXIST));
    process.call(IOMMUFD_CMD_DESTROY, &[D(made)]).unwrap();
}

/// A process with a bound device, a nesting parent, and a vIOMMU over it.
struct Rig {
    process: Process,
    dev: ObjectId,
    ioas: ObjectId,
    parent: ObjectId,
    viommu: u32,
}

fn rig() -> Rig {
    let process = Process::of(Bench::with_viommus());
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let parent = process.bench.paging(dev, ioas, PARENT).unwrap();
    let fields = [D(0), D(KIND), id(dev), id(parent), D(0), D(0), D(0), Q(0)];
    let answer = process.call(IOMMUFD_CMD_VIOMMU_ALLOC, &fields).unwrap();
    Rig { process, dev, ioas, parent, viommu: u32_at(&answer, 20) }
}

#[test]
fn data_goes_to_the_driver_and_comes_back() {
    let Rig { process, dev, parent, .. } = rig();
    let alloc = |length, address| {
        let fields = [D(0), D(KIND), id(dev), id(parent), D(0), D(length), D(0), Q(address)];
        process.call(IOMMUFD_CMD_VIOMMU_ALLOC, &fields).map(|answer| u32_at(&answer, 20))
    };
    let data = process.poke(0, &[Q(0xbeef), Q(0)]);
    assert_eq!(alloc(15, data), Err(Errno::EINVAL));
    assert_eq!(alloc(17, data), Err(Errno::EINVAL));
    assert_eq!(alloc(16, NOWHERE), Err(Errno::EFAULT));
    let viommu = ObjectId(alloc(16, data).unwrap());
    let offset = process.peek(8);
    let map = |offset, length, shared, executable| {
        process.bench.host.mmap(MmapRequest { offset, length, shared, executable })
    };
    let errno = |outcome: Result<MappedPages, Errno>| outcome.unwrap_err();
    assert_eq!(errno(map(offset, 0x2001, true, true)), Errno::EINVAL);
    assert_eq!(errno(map(offset, 0x2000, false, true)), Errno::EINVAL, "private");
    assert_eq!(errno(map(offset, 0x2000, true, true)), Errno::EPERM);
    for (offset, length) in [(0, 0x2000), (offset + 0x1000, 0x1000), (offset, 0x1000)] {
        assert_eq!(errno(map(offset, length, true, false)), Errno::ENXIO, "{offset:#x}");
    }
    let pages = map(offset, 0x2000, true, false).unwrap();
    let mut word = [0; 8];
    pages.file().read_exact_at(&mut word, 0).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 0xbeef);
    let again = pages.clone();
    drop(pages);
    let busy = process.bench.host.destroy(viommu).unwrap_err();
    assert_eq!(busy.errno, Errno::EBUSY, "it is mapped");
    drop(again);
    process.bench.host.destroy(viommu).unwrap();
    assert_eq!(errno(map(offset, 0x2000, true, false)), Errno::ENXIO);
}

#[test]
fn a_vdevice_that_the_driver_refuses_is_none() {
    let Rig { process, dev, viommu, .. } = rig();
    let vdevice = |virt_id| {
        let fields = [D(viommu), id(dev), D(0), Q(virt_id)];
        process.call(IOMMUFD_CMD_VDEVICE_ALLOC, &fields).map(|answer| u32_at(&answer, 12))
    };
    assert_eq!(vdevice(FORBIDDEN_ID), Err(Errno::ENODEV));
    let made = vdevice(5).unwrap();
    process.call(IOMMUFD_CMD_DESTROY, &[D(made)]).unwrap();
    vdevice(5).unwrap();
    process.bench.host.device_unbind(dev).expect("the driver is told once");
}

#[test]
fn a_viommu_takes_the_invalidations_of_its_driver() {
    let Rig { process, dev, viommu, .. } = rig();
    let fields = [D(viommu), id(dev), D(0), Q(5)];
    process.call(IOMMUFD_CMD_VDEVICE_ALLOC, &fields).unwrap();
    let list = process.poke(0, &[Q(5), Q(5), Q(6)]);
    let call = |kind, entry_len, count| {
        let fields = [D(viommu), Q(list), D(kind), D(entry_len), D(count), D(0)];
        let (outcome, answer) = process.call_and_look(IOMMUFD_CMD_HWPT_INVALIDATE, &fields);
        (outcome, u32_at(&answer, 24))
    };
    assert_eq!(call(KIND, 8, 2), (Ok(()), 2));
    assert_eq!(call(KIND, 8, 3), (Err(Errno::EIO), 2));
    assert_eq!(call(KIND, 7, 1), (Err(Errno::EINVAL), 0));
    assert_eq!(call(KIND + 1, 8, 1), (Err(Errno::EINVAL), 0));
    assert_eq!(call(KIND, 8, 0), (Ok(()), 0));
}

#[test]
fn a_hardware_queue_keeps_its_memory_where_it_is() {
    let Rig { process, ioas, viommu, .. } = rig();
    // flags, viommu, type, index, out, iova, length
    let alloc = |flags, viommu, kind, index, iova, length| {
        let fields = [D(flags), D(viommu), D(kind), D(index), D(0), Q(iova), Q(length)];
        process.call(IOMMUFD_CMD_HW_QUEUE_ALLOC, &fields).map(|answer| u32_at(&answer, 20))
    };
    assert_eq!(alloc(1, 99, 0, 0, 0, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(0, 99, 0, 0, 0, 0), Err(Errno::EOPNOTSUPP), "the default type");
    assert_eq!(alloc(0, 99, KIND, 0, 0, 0), Err(Errno::EINVAL));
    assert_eq!(alloc(0, 99, KIND, 0, !0, 2), Err(Errno::EOVERFLOW));
    assert_eq!(alloc(0, 99, KIND, 0, 0, 1), Err(Errno::ENOENT));
    assert_eq!(alloc(0, ioas.0, KIND, 0, 0, 1), Err(Errno::ENOENT));
    assert_eq!(alloc(0, viommu, KIND + 1, 0, 0, 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(0, viommu, KIND, 0, 0, !0), Err(Errno::ERANGE));
    assert_eq!(alloc(0, viommu, KIND, 0, 0x1000, 0x1000), Err(Errno::ENOENT), "nothing mapped");
    process.bench.map(ioas, 0x1000, 0x1000).unwrap();
    process.bench.map(ioas, 0x2000, 0x1000).unwrap();
    let pinned = process.bench.host.pinned_bytes();
    assert_eq!(alloc(0, viommu, KIND, 0, 0x1000, 0x2000), Err(Errno::EFAULT), "in two pieces");
    assert_eq!(alloc(0, viommu, KIND, 1, 0x1000, 0x1000), Err(Errno::EIO));
    assert_eq!(alloc(0, viommu, KIND, 2, 0x1000, 0x1000), Err(Errno::EINVAL));
    let unmap = |iova| process.bench.host.ioas_unmap(ioas, iova, 0x1000);
    let first = alloc(0, viommu, KIND, 0, 0x1000, 0x1000).unwrap();
    assert_eq!(alloc(0, viommu, KIND, 0, 0x1000, 0x1000), Err(Errno::EEXIST));
    assert_eq!(unmap(0x1000).unwrap_err().errno, Errno::EBUSY);
    unmap(0x2000).unwrap();
    let second = alloc(0, viommu, KIND, 1, 0x1800, 0x800).unwrap();
    let destroy = |id| process.bench.host.destroy(ObjectId(id));
    for id in [first, viommu] {
        assert_eq!(destroy(id).unwrap_err().errno, Errno::EBUSY);
    }
    destroy(second).unwrap();
    assert_eq!(unmap(0x1000).unwrap_err().errno, Errno::EBUSY);
    destroy(first).unwrap();
    assert_eq!(process.bench.host.pinned_bytes(), pinned - 0x1000);
    unmap(0x1000).unwrap();
    destroy(viommu).unwrap();
}

/// Size of a page request, of a response, and of an event header, in bytes.
const REQUEST: usize = 40;
const RESPONSE: usize = 8;
const HEADER: usize = 8;

#[test]
fn a_fault_queue_is_an_object_and_a_descriptor() {
    let mut process = Process::new();
    assert_eq!(
        process.errno(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &[D(1), D(0), D(0)]),
        Errno::EOPNOTSUPP
    );
    let answer = process.call(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &[D(0), D(0), D(0)]).unwrap();
    assert_eq!((u32_at(&answer, 8), u32_at(&answer, 12)), (1, 10), "out_fault_id, out_fault_fd");
    process.queues = None;
    assert_eq!(process.errno(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &[D(0); 3]), Errno::EMFILE);
    assert_eq!(process.bench.host.live_objects(), 1, "without a descriptor there is no object");
}

#[test]
fn page_requests_are_read_and_answered_by_their_bytes() {
    let process = Process::of(Bench::with_viommus());
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    process.call(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, &[D(0); 3]).unwrap();
    let flags = HwptFlags::new().with_fault_id_valid(true);
    let args = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault: Some(ObjectId(3)) };
    let hwpt = process.bench.host.hwpt_alloc(&args).unwrap();
    process.bench.host.device_attach(dev, None, hwpt).unwrap();

    let (caller, queues) = (process.caller(), process.queues.clone().unwrap());
    let mut queues = queues.lock();
    let queue = &queues[0];
    let read = |address, count| queue.read(&caller, address, count);
    assert!(!queue.readable() && queue.writable());
    assert_eq!(read(process.at(0), REQUEST), Ok(0));
    let request = PageRequest {
        flags: PageRequestFlags::new().with_last_page(true),
        pasid: 0,
        group: 4,
        permissions: PageRequestPermissions::new().with_write(true).with_privileged(true),
        address: 0xabc0_0000_1000,
    };
    process.bench.host.page_request(dev, request).unwrap();
    assert!(queue.readable());
    assert_eq!(read(process.at(0), REQUEST - 1), Err(Errno::ESPIPE));
    assert_eq!(read(process.at(0), 0), Err(Errno::EINVAL));
    assert_eq!(read(NOWHERE, REQUEST), Err(Errno::EFAULT));
    assert_eq!(read(process.at(0), 2 * REQUEST), Ok(REQUEST));
    // flags and dev_id, pasid and grpid, perm, addr, length and cookie
    let words: Vec<_> = (0..5).map(|word| process.peek(8 * word)).collect();
    assert_eq!(words, [1 << 32 | 2, 4 << 32, 0b1010, 0xabc0_0000_1000, 1 << 32]);

    let write = |address, count| queue.write(&caller, address, count);
    let response = process.poke(0, &[D(1), D(0), D(1), D(0)]);
    assert_eq!(write(response, RESPONSE + 1), Err(Errno::ESPIPE));
    assert_eq!(write(NOWHERE, RESPONSE), Err(Errno::EFAULT));
    assert_eq!(write(response, 0), Ok(0));
    assert_eq!(write(response, 2 * RESPONSE), Ok(RESPONSE), "the second names no request");
    assert_eq!(process.bench.fake.answered().len(), 1);

    let destroy = |id| process.bench.host.destroy(ObjectId(id)).map_err(|error| error.errno);
    process.bench.host.device_detach(dev, None).unwrap();
    destroy(hwpt.0).unwrap();
    assert_eq!(destroy(3), Err(Errno::EBUSY), "the descriptor is open");
    queues.clear();
    destroy(3).unwrap();
}

#[test]
fn events_are_read_by_their_bytes() {
    let process = Process::of(Bench::with_viommus());
    let (dev, ioas) = (process.bench.bind("a"), process.bench.ioas());
    let parent = process.bench.paging(dev, ioas, PARENT).unwrap();
    let viommu = process.bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent).unwrap();
    // flags, viommu, type, depth, out id, out fd, reserved
    let alloc = |flags, viommu, kind, depth, reserved| {
        let fields = [D(flags), id(viommu), D(kind), D(depth), D(0), D(0), D(reserved)];
        process.call(IOMMUFD_CMD_VEVENTQ_ALLOC, &fields)
    };
    let errno = |outcome: Result<Vec<u8>, Errno>| outcome.unwrap_err();
    assert_eq!(errno(alloc(1, dev, 0, 0, 0)), Errno::EOPNOTSUPP);
    assert_eq!(errno(alloc(0, dev, KIND, 0, 1)), Errno::EOPNOTSUPP, "the reserved field");
    assert_eq!(errno(alloc(0, dev, 0, 0, 0)), Errno::EOPNOTSUPP, "the default type");
    assert_eq!(errno(alloc(0, dev, KIND, 0, 0)), Errno::EINVAL);
    assert_eq!(errno(alloc(0, dev, KIND, 2, 0)), Errno::ENOENT);
    let answer = alloc(0, viommu, KIND, 2, 0).unwrap();
    assert_eq!((u32_at(&answer, 20), u32_at(&answer, 24)), (viommu.0 + 1, 10));
    assert_eq!(errno(alloc(0, viommu, KIND, 2, 0)), Errno::EEXIST);

    let (caller, queues) = (process.caller(), process.queues.clone().unwrap());
    let queues = queues.lock();
    let queue = &queues[0];
    assert!(!queue.writable());
    assert_eq!(queue.write(&caller, process.at(0), RESPONSE), Err(Errno::EINVAL));
    let read = |address, count| queue.read(&caller, address, count);
    assert_eq!(read(process.at(0), HEADER - 1), Err(Errno::EINVAL));
    assert_eq!(read(process.at(0), HEADER), Ok(0));
    for word in [7u64, 8, 9] {
        process.bench.host.report_event(viommu, KIND, &word.to_ne_bytes()).unwrap();
    }
    assert_eq!(read(process.at(0), HEADER), Err(Errno::EINVAL), "no room for the event");
    assert_eq!(read(NOWHERE, 100), Err(Errno::EFAULT));
    assert_eq!(read(process.at(0), 100), Ok(40));
    // flags and sequence, data; twice; then what was lost
    let words: Vec<_> = (0..5).map(|word| process.peek(8 * word)).collect();
    assert_eq!(words, [0, 7, 1 << 32, 8, 2 << 32 | 1]);
    assert!(!queue.readable());
}

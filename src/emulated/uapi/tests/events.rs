// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `FAULT_QUEUE_ALLOC`, `VEVENTQ_ALLOC`, and their descriptors.

use iommufd_bindings::*;

use super::{id, u32_at, Process, D, NOWHERE};
use crate::host::objects::tests::fake::{Bench, PARENT};
use crate::host::objects::tests::viommus::KIND;
use twostage::iommufd::{
    Errno, HostIommu, HwptAlloc, HwptData, HwptFlags, ObjectId, PageRequest, PageRequestFlags,
    PageRequestPermissions, ViommuKind,
};

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What applies to the structure of every ioctl: numbers, sizes, zero-extension, excess. Of invalid
//! structures and pointers the result is Linux's, and nothing changes.

use std::ops::RangeInclusive;
use std::sync::Arc;

use iommufd_bindings::*;

use super::super::{iommufd_request, OPERATIONS};
use super::{flat, id, u32_at, Field, Process, D, NOWHERE, Q};
use crate::host::objects::tests::fake::{Bench, PARENT};
use crate::host::objects::tests::viommus::KIND;
use twostage::iommufd::{Errno, HostIommu, ObjectId, ViommuKind};

#[test]
fn sizes_are_those_of_linux() {
    let sizes: Vec<_> = OPERATIONS.iter().map(|op| (op.number, op.min_size, op.size)).collect();
    let linux = [
        (8, 8),
        (12, 12),
        (24, 24),
        (40, 40),
        (32, 32),
        (40, 40),
        (24, 24),
        (24, 24),
        (12, 12),
        (24, 48),
        (32, 40),
        (16, 16),
        (48, 48),
        (32, 32),
        (16, 16),
        (40, 40),
        (24, 40),
        (24, 24),
        (8, 8),
        (28, 32),
        (40, 40),
    ];
    let expected: Vec<_> =
        (IOMMUFD_CMD_BASE..).zip(linux).map(|(number, (min, size))| (number, min, size)).collect();
    assert_eq!(sizes, expected);
}

/// A structure of `size` bytes that declares `declared`.
fn zeroes(declared: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[..4].copy_from_slice(&(declared as u32).to_ne_bytes());
    bytes
}

#[test]
fn an_unknown_number_is_no_ioctl_whatever_its_argument() {
    let process = Process::new();
    for number in [0, IOMMUFD_CMD_BASE - 1, IOMMUFD_CMD_HW_QUEUE_ALLOC + 1, 0xff] {
        let outcome = process.bench.host.ioctl(iommufd_request(number), &mut [], &process.space);
        assert_eq!(outcome, Err(Errno::ENOTTY), "{number:#x}");
    }
}

#[test]
fn a_bad_pointer_comes_before_a_wrong_request() {
    let process = Process::new();
    let ioctl = |request, bytes: &mut [u8]| {
        process.bench.host.ioctl(request, bytes, &process.space).unwrap_err()
    };
    for operation in &OPERATIONS {
        let request = iommufd_request(operation.number);
        assert_eq!(ioctl(request, &mut []), Errno::EFAULT);
        assert_eq!(ioctl(request, &mut [8, 0, 0]), Errno::EFAULT);
        assert_eq!(ioctl(request | 1 << 30, &mut []), Errno::EFAULT);
        assert_eq!(ioctl(request | 1 << 30, &mut zeroes(0, 4)), Errno::ENOTTY);
        assert_eq!(ioctl(request ^ 1 << 8, &mut zeroes(0, 4)), Errno::ENOTTY);
    }
}

#[test]
fn a_structure_shorter_than_its_first_version_is_refused() {
    let process = Process::new();
    for operation in &OPERATIONS {
        let short = operation.min_size - 1;
        let mut bytes = zeroes(short, operation.size);
        let request = iommufd_request(operation.number);
        let outcome = process.bench.host.ioctl(request, &mut bytes, &process.space);
        assert_eq!(outcome, Err(Errno::EINVAL), "{:#x}", operation.number);
    }
}

#[test]
fn a_longer_structure_is_accepted_only_if_the_excess_is_zero() {
    let process = Process::new();
    for operation in &OPERATIONS {
        let ioctl = |bytes: &mut [u8]| {
            let request = iommufd_request(operation.number);
            let outcome = process.bench.host.ioctl(request, bytes, &process.space);
            // So that the next call starts from the same state.
            process.bench.host.close();
            outcome
        };
        let exact = ioctl(&mut zeroes(operation.size, operation.size));
        assert_ne!(exact, Err(Errno::E2BIG));
        for excess in [1, 8, 5000] {
            let long = operation.size + excess;
            let mut bytes = zeroes(long, long);
            assert_eq!(ioctl(&mut bytes), exact, "{:#x}", operation.number);
            let mut bytes = zeroes(long, long);
            bytes[long - 1] = 1;
            assert_eq!(ioctl(&mut bytes), Err(Errno::E2BIG), "{:#x}", operation.number);
            let mut cut = zeroes(long, long - 1);
            assert_eq!(ioctl(&mut cut), Err(Errno::EFAULT), "{:#x}", operation.number);
        }
    }
}

#[test]
fn a_shorter_structure_is_extended_with_zeroes_and_answered_in_its_own_size() {
    let process = Process::new();
    let dev = process.bench.bind("a");
    let ioas = process.bench.ioas();
    let mut bytes = flat(&[D(24), D(0), D(dev.0), D(ioas.0), D(0), D(0), Q(!0), Q(!0)]);
    let request = iommufd_request(IOMMUFD_CMD_HWPT_ALLOC);
    process.bench.host.ioctl(request, &mut bytes, &process.space).unwrap();
    assert_eq!(u32_at(&bytes, 16), 3, "out_hwpt_id");
    assert_eq!(bytes[24..], [0xff; 16], "data_type and what follows were not looked at");
}

/// Descriptor of a file.
const FILE: i32 = 5;
/// Address of driver data in the process's memory.
const DATA: u64 = 0x4000;

/// A process with an object of every kind that ioctls use.
struct Rig {
    process: Process,
    dev: ObjectId,
    idle: ObjectId,
    ioas: ObjectId,
    parent: ObjectId,
    nested: ObjectId,
    viommu: ObjectId,
}

fn rig() -> Rig {
    let mut process = Process::of(Bench::with_viommus());
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x1000).unwrap();
    process.files.push((FILE, Arc::new(file)));
    let (dev, idle, ioas) = (process.bench.bind("a"), process.bench.ioas(), process.bench.ioas());
    let flags = PARENT.with_dirty_tracking(true);
    let parent = process.bench.paging(dev, ioas, flags).unwrap();
    let nested = process.bench.nested(dev, parent, Default::default(), 0).unwrap();
    let viommu = process.bench.host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent).unwrap();
    process.bench.map(ioas, 0x1000, 0x1000).unwrap();
    Rig { process, dev, idle, ioas, parent, nested, viommu }
}

/// A successful ioctl.
struct Call {
    number: u32,
    /// The fields after the size.
    fields: Vec<Field>,
    /// The field that is a pointer.
    pointer: Option<usize>,
}

fn call(number: u32, fields: Vec<Field>) -> Call {
    Call { number, fields, pointer: None }
}

fn pointing(number: u32, fields: Vec<Field>, pointer: usize) -> Call {
    Call { number, fields, pointer: Some(pointer) }
}

/// One call of every ioctl, in numerical order, each for a new rig.
fn calls(rig: &Rig) -> Vec<Call> {
    let &Rig { ref process, dev, idle, ioas, parent, nested, viommu } = rig;
    let (readable, fixed, writable) = (4, 1, 2);
    let data = process.poke(DATA, &[Q(0), Q(0x5000), D(48), D(0)]);
    let viommu_data = process.poke(DATA + 0x100, &[Q(0), Q(0)]);
    let entry = process.poke(DATA + 0x200, &[Q(0), Q(1), D(0), D(0)]);
    let range = process.poke(DATA + 0x300, &[Q(0x1000), Q(0x1fff)]);
    let room = process.at(DATA + 0x400);
    let page = process.at(0x1000 - process.at(0) % 0x1000);
    vec![
        call(IOMMUFD_CMD_DESTROY, vec![id(idle)]),
        call(IOMMUFD_CMD_IOAS_ALLOC, vec![D(0), D(0)]),
        pointing(IOMMUFD_CMD_IOAS_ALLOW_IOVAS, vec![id(idle), D(1), D(0), Q(range)], 3),
        call(
            IOMMUFD_CMD_IOAS_COPY,
            vec![D(readable), id(idle), id(ioas), Q(0x1000), Q(0), Q(0x1000)],
        ),
        pointing(IOMMUFD_CMD_IOAS_IOVA_RANGES, vec![id(ioas), D(1), D(0), Q(room), Q(0)], 3),
        pointing(
            IOMMUFD_CMD_IOAS_MAP,
            vec![D(readable | writable | fixed), id(ioas), D(0), Q(page), Q(0x1000), Q(0x2000)],
            3,
        ),
        call(IOMMUFD_CMD_IOAS_UNMAP, vec![id(ioas), Q(0x1000), Q(0x1000)]),
        call(IOMMUFD_CMD_OPTION, vec![D(1), D(1), id(idle), Q(0)]),
        call(IOMMUFD_CMD_VFIO_IOAS, vec![id(ioas), D(1)]),
        pointing(
            IOMMUFD_CMD_HWPT_ALLOC,
            vec![D(0), id(dev), id(parent), D(0), D(0), D(1), D(24), Q(data), D(0), D(0)],
            7,
        ),
        pointing(IOMMUFD_CMD_GET_HW_INFO, vec![D(0), id(dev), D(24), Q(room), Q(0), Q(0)], 3),
        call(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, vec![D(1), id(parent), D(0)]),
        // Linux ignores a bitmap that it cannot write.
        call(
            IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP,
            vec![id(parent), D(0), D(0), Q(0x1000), Q(0x1000), Q(0x1000), Q(room)],
        ),
        pointing(
            IOMMUFD_CMD_HWPT_INVALIDATE,
            vec![id(nested), Q(entry), D(0), D(24), D(1), D(0)],
            1,
        ),
        call(IOMMUFD_CMD_FAULT_QUEUE_ALLOC, vec![D(0), D(0), D(0)]),
        call(
            IOMMUFD_CMD_IOAS_MAP_FILE,
            vec![D(readable), id(idle), D(FILE as u32), Q(0), Q(0x1000), Q(0)],
        ),
        pointing(
            IOMMUFD_CMD_VIOMMU_ALLOC,
            vec![D(0), D(KIND), id(dev), id(parent), D(0), D(16), D(0), Q(viommu_data)],
            7,
        ),
        call(IOMMUFD_CMD_VDEVICE_ALLOC, vec![id(viommu), id(dev), D(0), Q(5)]),
        call(IOMMUFD_CMD_IOAS_CHANGE_PROCESS, vec![D(0)]),
        call(IOMMUFD_CMD_VEVENTQ_ALLOC, vec![D(0), id(viommu), D(KIND), D(1), D(0), D(0), D(0)]),
        call(
            IOMMUFD_CMD_HW_QUEUE_ALLOC,
            vec![D(0), id(viommu), D(KIND), D(0), D(0), Q(0x1000), Q(0x1000)],
        ),
    ]
}

/// What an ioctl could have changed.
fn state(rig: &Rig) -> impl PartialEq + std::fmt::Debug {
    let host = &rig.process.bench.host;
    let ranges = |ioas| -> Vec<RangeInclusive<u64>> {
        host.ioas_iova_ranges(ioas).map(|ranges| ranges.allowed).unwrap_or_default()
    };
    let queues = rig.process.queues.as_ref().map(|queues| queues.lock().len());
    (host.graph(), [rig.idle, rig.ioas].map(ranges), queues, rig.process.bench.fake.told())
}

/// The bytes of a structure that declares `declared` bytes.
fn structure(fields: &[Field], declared: usize) -> Vec<u8> {
    [(declared as u32).to_ne_bytes().to_vec(), flat(fields)].concat()
}

/// Makes the call on `bytes`; neither they nor anything else may change.
fn refused(rig: &Rig, number: u32, bytes: &[u8], expected: Errno) {
    rig.process.bench.fake.told();
    let before = state(rig);
    let mut argument = bytes.to_vec();
    let outcome =
        rig.process.bench.host.ioctl(iommufd_request(number), &mut argument, &rig.process.caller());
    assert_eq!(outcome, Err(expected), "{number:#x}: {bytes:x?}");
    assert!(state(rig) == before, "{number:#x}: {bytes:x?}");
    // The number of completed entries is always written back, and the sample has one entry.
    if number != IOMMUFD_CMD_HWPT_INVALIDATE {
        assert_eq!(argument, bytes, "{number:#x}");
    }
}

#[test]
fn the_samples_are_of_every_ioctl_and_succeed() {
    let numbers: Vec<_> = calls(&rig()).iter().map(|call| call.number).collect();
    assert_eq!(numbers, OPERATIONS.each_ref().map(|operation| operation.number));
    for (index, operation) in OPERATIONS.iter().enumerate() {
        let rig = rig();
        if operation.number == IOMMUFD_CMD_IOAS_CHANGE_PROCESS {
            // It uses no memory of a process.
            rig.process.bench.unmapped(rig.ioas);
        }
        let call = &calls(&rig)[index];
        let mut bytes = structure(&call.fields, operation.size);
        assert_eq!(bytes.len(), operation.size, "{:#x}", call.number);
        let process = rig.process.caller();
        let outcome =
            rig.process.bench.host.ioctl(iommufd_request(call.number), &mut bytes, &process);
        assert_eq!(outcome, Ok(0), "{:#x}", call.number);
    }
}

#[test]
fn structures_of_a_wrong_size_change_nothing() {
    let rig = rig();
    for (call, operation) in calls(&rig).iter().zip(&OPERATIONS) {
        let bytes = |declared: usize, length: usize, last: u8| {
            let mut bytes = structure(&call.fields, declared);
            bytes.resize(length, 0);
            if let Some(byte) = bytes[operation.size.min(length)..].last_mut() {
                *byte = last;
            }
            bytes
        };
        let size = operation.size;
        for short in 0..operation.min_size {
            refused(&rig, call.number, &bytes(short, size, 0), Errno::EINVAL);
        }
        for excess in [1, 8, 4096] {
            refused(&rig, call.number, &bytes(size + excess, size + excess, 1), Errno::E2BIG);
            refused(&rig, call.number, &bytes(size + excess, size + excess - 1, 0), Errno::EFAULT);
        }
        refused(&rig, call.number, &bytes(usize::MAX, size, 0), Errno::EFAULT);
        for cut in 0..4 {
            refused(&rig, call.number, &bytes(size, cut, 0), Errno::EFAULT);
        }
        refused(&rig, call.number, &bytes(size, size - 1, 0), Errno::EFAULT);
    }
}

#[test]
fn pointers_that_lead_nowhere_change_nothing() {
    let rig = rig();
    for (call, operation) in calls(&rig).iter().zip(&OPERATIONS) {
        let Some(pointer) = call.pointer else { continue };
        for address in [NOWHERE, u64::MAX - 0x1fff] {
            let mut fields = call.fields.clone();
            fields[pointer] = Q(address);
            let bytes = structure(&fields, operation.size);
            refused(&rig, call.number, &bytes, Errno::EFAULT);
        }
    }
}

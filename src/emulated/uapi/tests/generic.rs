// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What applies to every structure: numbers, sizes, zero-extension, excess.

use iommufd_bindings::*;

use super::super::{request_of, OPERATIONS};
use super::{flat, u32_at, Process, D, Q};
use twostage::iommufd::Errno;

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
fn structure(declared: usize, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[..4].copy_from_slice(&(declared as u32).to_ne_bytes());
    bytes
}

#[test]
fn an_unknown_number_is_no_ioctl_whatever_its_argument() {
    let process = Process::new();
    for number in [0, IOMMUFD_CMD_BASE - 1, IOMMUFD_CMD_HW_QUEUE_ALLOC + 1, 0xff] {
        let outcome = process.bench.host.ioctl(request_of(number), &mut [], &process.space);
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
        let request = request_of(operation.number);
        assert_eq!(ioctl(request, &mut []), Errno::EFAULT);
        assert_eq!(ioctl(request, &mut [8, 0, 0]), Errno::EFAULT);
        assert_eq!(ioctl(request | 1 << 30, &mut []), Errno::EFAULT);
        assert_eq!(ioctl(request | 1 << 30, &mut structure(0, 4)), Errno::ENOTTY);
        assert_eq!(ioctl(request ^ 1 << 8, &mut structure(0, 4)), Errno::ENOTTY);
    }
}

#[test]
fn a_structure_shorter_than_its_first_version_is_refused() {
    let process = Process::new();
    for operation in &OPERATIONS {
        let short = operation.min_size - 1;
        let mut bytes = structure(short, operation.size);
        let request = request_of(operation.number);
        let outcome = process.bench.host.ioctl(request, &mut bytes, &process.space);
        assert_eq!(outcome, Err(Errno::EINVAL), "{:#x}", operation.number);
    }
}

#[test]
fn a_longer_structure_is_accepted_only_if_the_excess_is_zero() {
    let process = Process::new();
    for operation in &OPERATIONS {
        let ioctl = |bytes: &mut [u8]| {
            let request = request_of(operation.number);
            let outcome = process.bench.host.ioctl(request, bytes, &process.space);
            // So that the next call starts from the same state.
            process.bench.host.close();
            outcome
        };
        let exact = ioctl(&mut structure(operation.size, operation.size));
        assert_ne!(exact, Err(Errno::E2BIG));
        for excess in [1, 8, 5000] {
            let long = operation.size + excess;
            let mut bytes = structure(long, long);
            assert_eq!(ioctl(&mut bytes), exact, "{:#x}", operation.number);
            let mut bytes = structure(long, long);
            bytes[long - 1] = 1;
            assert_eq!(ioctl(&mut bytes), Err(Errno::E2BIG), "{:#x}", operation.number);
            let mut cut = structure(long, long - 1);
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
    let request = request_of(IOMMUFD_CMD_HWPT_ALLOC);
    process.bench.host.ioctl(request, &mut bytes, &process.space).unwrap();
    assert_eq!(u32_at(&bytes, 16), 3, "out_hwpt_id");
    assert_eq!(bytes[24..], [0xff; 16], "data_type and what follows were not looked at");
}

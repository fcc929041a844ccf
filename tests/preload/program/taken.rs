// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a program may do to memory and files that are mapped for a device, and which files can be
//! mapped.
#![allow(unsafe_code)]

use crate::uapi::*;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::null_mut;

const LENGTH: usize = 0x1000;
const IOVA: u64 = 0x10_0000;

fn memfd() -> File {
    // SAFETY: the name is a C string; the number is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
    file.set_len(LENGTH as u64).expect("memory");
    file
}

fn map_file(iommufd: RawFd, ioas: u32, fd: RawFd, iova: u64) -> std::io::Result<()> {
    // size and flags, ioas and descriptor, start, length, iova
    let mut map = [40 | 7 << 32, u64::from(ioas) | (fd as u64) << 32, 0, LENGTH as u64, iova];
    ioctl(iommufd, 0x8f, &mut map)
}

fn first_byte(address: *mut libc::c_void) -> u8 {
    // SAFETY: the address is mapped, and may be read.
    unsafe { address.cast::<u8>().read_volatile() }
}

/// The device at `path` accesses memory whatever the program may do there.
pub fn protected(path: &str) {
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    device.bind(iommufd).expect("bind");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    device.attach(ioas).expect("attach");
    let (rights, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping touches nothing.
    let memory = unsafe { libc::mmap(null_mut(), LENGTH, rights, flags, -1, 0) };
    // SAFETY: the memory is this function's.
    unsafe { memory.cast::<u8>().write_bytes(0x5a, 8) };
    ioas_map(iommufd, ioas, memory as u64, LENGTH as u64, IOVA).expect("IOAS_MAP");
    // SAFETY: nobody refers to it.
    let protect = |rights| assert_eq!(unsafe { libc::mprotect(memory, LENGTH, rights) }, 0);
    protect(libc::PROT_NONE);
    println!("not even readable: fetch {}", device.fetch(IOVA, 8));
    protect(libc::PROT_READ);
    println!("read-only: store {}, fetch {}", device.store(IOVA + 64, 8), device.fetch(IOVA, 8));
    println!("the program sees {:#x}", {
        // SAFETY: within the memory.
        first_byte(unsafe { memory.add(64) })
    });
    protect(rights);
    // SAFETY: nobody refers to it.
    assert_eq!(unsafe { libc::madvise(memory, LENGTH, libc::MADV_DONTNEED) }, 0);
    println!("discarded: fetch {}", device.fetch(IOVA, 8));
    let file = memfd();
    map_file(iommufd, ioas, file.as_raw_fd(), 2 * IOVA).expect("IOAS_MAP_FILE");
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is this function's.
    assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, LENGTH as i64) }, 0);
    println!("a hole: fetch {}", device.fetch(2 * IOVA, 8));
    file.set_len(0).expect("truncated");
    println!("truncated: fetch {}", device.fetch(2 * IOVA, 8));
}

/// Which files can be mapped, and the size of single accesses to the device at `path`.
pub fn files(path: &str) {
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    device.bind(iommufd).expect("bind");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    device.attach(ioas).expect("attach");
    let map = |file: &File| {
        let outcome = outcome(map_file(iommufd, ioas, file.as_raw_fd(), IOVA));
        let reached = (device.fetch(IOVA, 8), device.store(IOVA, 8));
        let _ = ioas_unmap(iommufd, ioas, 0, u64::MAX);
        format!("{outcome} {reached:?}")
    };
    let memory = memfd();
    println!("memory: {}", map(&memory));
    let read_only = File::open(format!("/proc/self/fd/{}", memory.as_raw_fd())).expect("memory");
    println!("opened read-only: {}", map(&read_only));
    let program = File::open(std::env::current_exe().expect("this program")).expect("a file");
    println!("on disk: {}", map(&program));
    device.print_whole_accesses();
}

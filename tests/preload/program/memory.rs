// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory and files that are mapped for a device: they stay accessible to it, whatever the program
//! does with them and with the addresses; and which files can be mapped.
#![allow(unsafe_code)]

use crate::uapi::*;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::null_mut;

const LENGTH: usize = 0x4000;

fn map(flags: i32, fd: i32, at: *mut libc::c_void) -> *mut libc::c_void {
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping; with MAP_FIXED over one of ours.
    unsafe { libc::mmap(at, LENGTH, rights, flags, fd, 0) }
}

fn unmap(address: *mut libc::c_void) -> i32 {
    // SAFETY: nothing refers to it any more.
    unsafe { libc::munmap(address, LENGTH) }
}

fn first_byte(address: *mut libc::c_void) -> u8 {
    // SAFETY: the address is mapped.
    unsafe { address.cast::<u8>().read_volatile() }
}

/// This process's pinned memory according to the kernel.
fn pinned() -> String {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    line.expect("VmPin").trim().to_owned()
}

/// Makes the device at `path` access memory that is unmapped, and memory that is replaced.
pub fn run(path: &str) {
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    device.bind(iommufd).expect("bind");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    device.attach(ioas).expect("attach");

    let anonymous = libc::MAP_ANONYMOUS;
    // SAFETY: the name is a C string.
    let file = unsafe { libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: the file is new.
    assert_eq!(unsafe { libc::ftruncate(file, LENGTH as i64) }, 0);

    let shared = map(libc::MAP_SHARED, file, null_mut());
    let view = map(libc::MAP_SHARED, file, null_mut());
    let private = map(libc::MAP_PRIVATE | anonymous, -1, null_mut());
    for (memory, iova) in [(shared, 0x10_0000), (private, 0x20_0000)] {
        let mapped = ioas_map(iommufd, ioas, memory as u64, LENGTH as u64, iova);
        println!("map: {}", outcome(mapped));
    }
    let wanted = ioas_map(iommufd, ioas, 0x10_0000_0000, LENGTH as u64, 0x30_0000);
    println!("map what is not there: {}", outcome(wanted));
    let constant = ioas_map(iommufd, ioas, run as *const () as u64 & !0xfff, 0x1000, 0x30_0000);
    println!("map code to be written: {}", outcome(constant));

    println!("pinned: {}", pinned());
    println!("unmap shared: {}", unmap(shared));
    // Unrelated memory in place of the device's.
    let other = map(libc::MAP_PRIVATE | anonymous | libc::MAP_FIXED, -1, shared);
    assert_eq!(other, shared);
    // SAFETY: the source and both views are mapped.
    unsafe { view.cast::<u8>().write_volatile(7) };
    println!("fetch {}, store {}", device.fetch(0x10_0000, 1), device.store(0x10_1000, 1));
    // SAFETY: it is within the view.
    println!("the file has {}, the other memory {}", first_byte(unsafe { view.add(0x1000) }), {
        // SAFETY: it is within the other memory.
        first_byte(unsafe { other.add(0x1000) })
    });

    println!("unmap private: {}", unmap(private));
    println!("store {}", device.store(0x20_0000, 1));
    let next = map(libc::MAP_PRIVATE | anonymous, -1, null_mut());
    println!("a new mapping is elsewhere: {}", next != private);
    println!("fetch {}, store {}", device.fetch(0x20_0000, 1), device.store(0x10_0000, 1));
    println!("pinned: {}", pinned());
    println!("unmap: {:#x}", ioas_unmap(iommufd, ioas, 0, u64::MAX).expect("IOAS_UNMAP"));
    println!("store {}", device.store(0x20_0000, 1));
    // What was unmapped first is still unmapped.
    let residents = &mut [0u8; LENGTH / 0x1000];
    // SAFETY: there is room for a byte for each page.
    let mapped = unsafe { libc::mincore(private, LENGTH, residents.as_mut_ptr()) } == 0;
    println!("private memory is still there: {mapped}");
    println!("pinned: {}", pinned());
}

/// Closes the numbers from `first` on, none of which this program has, and takes one of them.
pub fn close_from(first: RawFd) -> File {
    // SAFETY: nothing here has such a number; the new one is nobody's.
    unsafe {
        assert_eq!(libc::close_range(first as u32, u32::MAX, 0), 0);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        File::from_raw_fd(libc::fcntl(null, libc::F_DUPFD, first))
    }
}

const IOVA: u64 = 0x10_0000;

fn memfd() -> File {
    // SAFETY: the name is a C string; the number is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
    file.set_len(PAGE).expect("memory");
    file
}

fn map_file(iommufd: RawFd, ioas: u32, fd: RawFd, iova: u64) -> std::io::Result<()> {
    // size and flags, ioas and descriptor, start, length, iova
    let mut map = [40 | 7 << 32, u64::from(ioas) | (fd as u64) << 32, 0, PAGE, iova];
    ioctl(iommufd, 0x8f, &mut map)
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
    let memory = unsafe { libc::mmap(null_mut(), PAGE as usize, rights, flags, -1, 0) };
    // SAFETY: the memory is this function's.
    unsafe { memory.cast::<u8>().write_bytes(0x5a, 8) };
    ioas_map(iommufd, ioas, memory as u64, PAGE, IOVA).expect("IOAS_MAP");
    // SAFETY: nobody refers to it.
    let protect = |rights| assert_eq!(unsafe { libc::mprotect(memory, PAGE as usize, rights) }, 0);
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
    assert_eq!(unsafe { libc::madvise(memory, PAGE as usize, libc::MADV_DONTNEED) }, 0);
    println!("discarded: fetch {}", device.fetch(IOVA, 8));
    let file = memfd();
    map_file(iommufd, ioas, file.as_raw_fd(), 2 * IOVA).expect("IOAS_MAP_FILE");
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is this function's.
    assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, PAGE as i64) }, 0);
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
    // It is used when a device is attached, however long it has been closed.
    let later = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    map_file(iommufd, later, memory.as_raw_fd(), IOVA).expect("IOAS_MAP_FILE");
    drop((memory, read_only));
    // The last one that was opened.
    let other = close_from(program.as_raw_fd() + 1);
    device.attach(later).expect("attach");
    let reached = (device.fetch(IOVA, 8), device.store(IOVA, 8));
    println!("closed before it is used: fetch {}, store {}", reached.0, reached.1);
    ioas_unmap(iommufd, later, 0, u64::MAX).expect("IOAS_UNMAP");
    println!("another's descriptor: {}", other.metadata().is_ok());
    device.print_whole_accesses();
}

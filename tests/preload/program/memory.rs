// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory mapped for a device stays accessible to it, whatever the program does with the addresses.
#![allow(unsafe_code)]

use crate::uapi::*;
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

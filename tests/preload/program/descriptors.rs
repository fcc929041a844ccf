// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on the descriptors, and on the paths.
#![allow(unsafe_code)]

use crate::processes::child;
use crate::uapi::*;
use std::io::Error;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

fn flags(fd: RawFd) -> i32 {
    // SAFETY: reads flags alone.
    unsafe { libc::fcntl(fd, libc::F_GETFD) }
}

fn errno() -> i32 {
    Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub fn run() {
    for path in ["/dev/iommu", "/dev/vfio/vfio", "/dev/vfio/devices/vfio0"] {
        let metadata = std::fs::metadata(path).expect(path);
        println!("{path}: {} {:o}", metadata.file_type().is_char_device(), metadata.mode());
    }
    println!("vfio9: {}", std::path::Path::new("/dev/vfio/devices/vfio9").exists());

    let fd = open("/dev/iommu");
    println!("closed on exec: {}", flags(fd) & libc::FD_CLOEXEC != 0);
    let ioas = ioas_alloc(fd).expect("IOAS_ALLOC");
    // SAFETY: duplicates and closes descriptors of this function.
    unsafe {
        let second = libc::dup(fd);
        println!("a duplicate is not: {}", flags(second));
        let third = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100);
        println!("close: {}", libc::close(fd));
        println!("closed: {} {}", outcome(ioas_alloc(fd)), libc::close(fd));
        println!("destroy through {}: {}", third >= 100, outcome(destroy(third, ioas)));
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        println!("over a duplicate: {}", libc::dup2(null, second) == second);
        println!("no iommufd: {}", outcome(ioas_alloc(second)));
        println!("the last: {}", outcome(ioas_alloc(third).map(|_| ())));
        println!("read {} {}", libc::read(third, (&raw mut libc::environ).cast(), 0), errno());
        println!("close all: {}", libc::close_range(3, u32::MAX, 0));
    }
    // The descriptor still works, with separate objects.
    let fd = open("/dev/iommu");
    println!("{fd}: IOAS {}", ioas_alloc(fd).expect("IOAS_ALLOC"));
    println!("no pointer: {}", outcome(ioctl_null(fd)));
}

/// The error of reading an iommufd at an offset: a socket would fail with ESPIPE.
fn read_at(fd: RawFd) -> i32 {
    let mut byte = 0u8;
    // SAFETY: there is room for the byte.
    assert_eq!(unsafe { libc::pread(fd, (&raw mut byte).cast(), 1, 0) }, -1);
    errno()
}

fn close_all(flags: i32) -> String {
    // SAFETY: the descriptors belong to functions of this file.
    match unsafe { libc::close_range(3, u32::MAX, flags) } {
        0 => "0".to_owned(),
        result => format!("{result} errno {}", errno()),
    }
}

/// Ranges that close nothing, or nothing of other threads.
pub fn ranges() {
    const UNSHARE: i32 = libc::CLOSE_RANGE_UNSHARE as i32;
    let fd = open("/dev/iommu");
    println!("a flag that is none: {}, {}", close_all(0x80), read_at(fd));
    std::thread::scope(|scope| {
        let apart = || {
            println!("a thread alone: {}, {}", close_all(UNSHARE), read_at(fd));
            // SAFETY: nobody's descriptor.
            println!("again: {} {}", unsafe { libc::close(fd) }, errno());
        };
        assert!(scope.spawn(apart).join().is_ok());
        println!("the others: {}", read_at(fd));
    });
    println!("all: {}, {}", close_all(UNSHARE), read_at(fd));
    // The library's thread has it, too.
    let fd = open("/dev/iommu");
    child(|| println!("a child: {}", outcome(ioas_alloc(fd).map(|_| ()))));
}

/// IOAS_ALLOC without a structure.
fn ioctl_null(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: the kernel checks the pointer.
    match unsafe { libc::ioctl(fd, 0x3b81, 0) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

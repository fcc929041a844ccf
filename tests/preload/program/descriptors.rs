// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on the descriptors, in one process, and in several processes and threads; and on the
//! paths.
#![allow(unsafe_code)]

use crate::uapi::*;
use std::io::Error;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::null_mut;

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

/// Runs `work` in a child, and waits for it.
pub fn child(work: impl FnOnce()) {
    // SAFETY: this program has no other threads here.
    match unsafe { libc::fork() } {
        0 => {
            work();
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) }
        }
        pid => {
            assert!(pid > 0, "fork");
            let mut status = 0;
            // SAFETY: there is room for the status.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            assert_eq!(status, 0, "the child ends well");
        }
    }
}

fn shared_page() -> u64 {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping touches nothing.
    let page = unsafe { libc::mmap(null_mut(), 0x1000, rights, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    page as u64
}

/// A child works on its parent's objects; what it opens is separate.
pub fn fork() {
    let fd = open("/dev/iommu");
    let ioas = ioas_alloc(fd).expect("IOAS_ALLOC");
    let page = shared_page();
    child(|| {
        println!("map in the child: {}", outcome(ioas_map(fd, ioas, page, 0x1000, 0x1000)));
        println!("bad pointer: {}", outcome(ioas_map(fd, ioas + 9, page, 0x1000, 0x1000)));
        println!("allocate in the child: {}", outcome(ioas_alloc(fd)));
        let own = open("/dev/iommu");
        println!("of its own: IOAS {}", ioas_alloc(own).expect("IOAS_ALLOC"));
    });
    println!("unmap in the parent: {:#x}", ioas_unmap(fd, ioas, 0, u64::MAX).expect("UNMAP"));
    println!("next: IOAS {}", ioas_alloc(fd).expect("IOAS_ALLOC"));

    // The parent closes its descriptor: the objects stay in the child, and end with it.
    let mut ends = [0; 2];
    // SAFETY: there is room for two.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: this program has no other threads.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let mut byte = 0u8;
        // SAFETY: there is room for a byte.
        assert_eq!(unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) }, 1);
        println!("the parent has closed: {}", outcome(destroy(fd, ioas)));
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: the descriptors are this function's.
    unsafe {
        libc::close(fd);
        assert_eq!(libc::write(ends[1], [1u8].as_ptr().cast(), 1), 1);
        assert_eq!(libc::waitpid(pid, null_mut(), 0), pid);
    }

    // The owner exits before its child, which waits at a pipe and then prints.
    // SAFETY: as above.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let fd = open("/dev/iommu");
        // SAFETY: as above.
        if unsafe { libc::fork() } == 0 {
            // SAFETY: queries the parent; the loop ends when it changes.
            while unsafe { libc::getppid() } != std::os::unix::process::parent_id() as i32 {}
            let mut byte = 0u8;
            // The owner's end of the pipe is closed with it.
            // SAFETY: the descriptors are inherited; there is room for a byte.
            unsafe {
                libc::close(ends[1]);
                libc::read(ends[0], (&raw mut byte).cast(), 1);
            }
            println!("the owner is gone: {}", outcome(ioas_alloc(fd)));
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) }
        }
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: waits for the owner, then for the child, which has the last end of standard output.
    unsafe {
        assert_eq!(libc::waitpid(pid, null_mut(), 0), pid);
        libc::close(ends[1]);
    }
}

/// A child of vfork: closes and duplicates descriptors, in its parent's memory.
extern "C" fn vforked(fd: *mut libc::c_void) -> libc::c_int {
    let fd = fd as usize as RawFd;
    // SAFETY: the descriptors are copies of the parent's.
    unsafe {
        libc::dup2(fd, 0);
        libc::dup2(2, fd);
        libc::close(fd);
        libc::close_range(3, u32::MAX, 0);
        libc::_exit(7)
    }
}

/// A child that shares its parent's memory, but not its descriptors.
pub fn vfork() {
    let fd = open("/dev/iommu");
    let ioas = ioas_alloc(fd).expect("IOAS_ALLOC");
    let mut stack = vec![0u128; 0x1000];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let mut status = 0;
    // SAFETY: only the child uses the stack until it exits, which this waits for.
    unsafe {
        let top = stack.as_mut_ptr_range().end.cast();
        let pid = libc::clone(vforked, top, flags, fd as usize as *mut libc::c_void);
        assert!(pid > 0, "clone");
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
    }
    println!("the child: {}", libc::WEXITSTATUS(status));
    println!("destroy: {}", outcome(destroy(fd, ioas)));
    // SAFETY: the descriptors are this function's.
    unsafe {
        let other = libc::dup(fd);
        println!("duplicate: {}", outcome(ioas_alloc(other)));
        println!("close: {} {}", libc::close(fd), libc::close(other));
    }
    println!("closed: {}", outcome(ioas_alloc(fd)));
}

/// A program that is started with an inherited descriptor.
pub fn exec() {
    let fd = open("/dev/iommu");
    println!("IOAS {}", ioas_alloc(fd).expect("IOAS_ALLOC"));
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["inherited", &fd.to_string()]);
    // SAFETY: fcntl may be called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::fcntl(fd, libc::F_SETFD, 0);
            Ok(())
        });
    }
    assert!(command.status().expect("the program").success());
    println!("next: IOAS {}", ioas_alloc(fd).expect("IOAS_ALLOC"));
}

/// The code of that program.
pub fn inherited(fd: RawFd) {
    println!("inherited: IOAS {}", ioas_alloc(fd).expect("IOAS_ALLOC"));
}

/// A thread that uses a descriptor in every way while another one closes it: nobody blocks.
pub fn closing() {
    const ROUNDS: u32 = 3_000;
    let iommufd = open("/dev/iommu");
    // Read-only: empty.
    // SAFETY: the path is a C string.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY) };
    let start = std::sync::Barrier::new(2);
    let fd = std::sync::atomic::AtomicI32::new(-1);
    let order = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = [0u8; 64];
            for round in 0..ROUNDS {
                start.wait();
                let (fd, room) = (fd.load(order), bytes.as_mut_ptr().cast::<libc::c_void>());
                let vector = libc::iovec { iov_base: room, iov_len: 64 };
                // SAFETY: there is room for what is read; the number is this program's, if
                // anyone's.
                let result = unsafe {
                    match round % 4 {
                        0 => libc::read(fd, room, 64),
                        1 => libc::readv(fd, &vector, 1),
                        2 => libc::write(fd, room, 64),
                        _ => {
                            let copy = libc::dup(fd);
                            let result = if copy < 0 { -1 } else { libc::read(copy, room, 64) };
                            libc::close(copy);
                            result
                        }
                    }
                };
                assert!(result <= 0, "{result}");
                start.wait();
            }
        });
        for round in 0..ROUNDS {
            let (queue, number) = fault_queue(iommufd).expect("FAULT_QUEUE_ALLOC");
            fd.store(number, order);
            start.wait();
            // SAFETY: the descriptor is this function's.
            unsafe {
                match round % 3 {
                    0 => libc::close(number),
                    1 => libc::close_range(number as u32, number as u32, 0),
                    _ => libc::dup2(null, number),
                };
            }
            start.wait();
            if round % 3 == 2 {
                // SAFETY: as above.
                unsafe { libc::close(number) };
            }
            destroy(iommufd, queue).expect("DESTROY");
        }
    });
    println!("rounds: {ROUNDS}");
}

/// Threads that open, map, unmap, duplicate and close concurrently.
pub fn threads() {
    let shared = open("/dev/iommu");
    let ioas = ioas_alloc(shared).expect("IOAS_ALLOC");
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                let page = shared_page();
                for round in 0..200u64 {
                    let fd = open("/dev/iommu");
                    let own = ioas_alloc(fd).expect("IOAS_ALLOC");
                    ioas_map(fd, own, page, 0x1000, 0x1000).expect("IOAS_MAP");
                    let iova = 0x1000 * (1 + thread * 1000 + round);
                    ioas_map(shared, ioas, page, 0x1000, iova).expect("IOAS_MAP");
                    // SAFETY: both descriptors are this thread's.
                    unsafe {
                        let other = libc::dup(fd);
                        libc::close(fd);
                        destroy(other, own).expect("DESTROY");
                        libc::close(other);
                    }
                    ioas_unmap(shared, ioas, iova, 0x1000).expect("IOAS_UNMAP");
                }
            });
        }
    });
    println!("destroy: {}", outcome(destroy(shared, ioas)));
}

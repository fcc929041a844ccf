// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The functions behind the hooks: those of the next library.
//!
//! If the function is not known (the lookup itself gets here, or libc lacks it) the system call is
//! made instead.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_ulong, c_void, CStr};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use libc::{iovec, mode_t, off64_t, size_t, ssize_t, syscall, AT_FDCWD};

/// Finds `name` in the libraries after this one, once. Null if this thread is already searching (a
/// search that allocates memory, and so calls one of our hooks, must not start another), or if a
/// search of another thread does not end: that thread was not forked.
fn find(found: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    /// The searching thread; 0 for none.
    static SEARCHER: AtomicUsize = AtomicUsize::new(0);
    const PATIENCE: usize = 1 << 24;
    // SAFETY: the call has no preconditions.
    let this = unsafe { libc::pthread_self() } as usize;
    let mut turns = 0;
    loop {
        let known = found.load(Ordering::Acquire);
        if !known.is_null() || SEARCHER.load(Ordering::Relaxed) == this || turns == PATIENCE {
            return known;
        }
        let free = SEARCHER.compare_exchange(0, this, Ordering::Acquire, Ordering::Relaxed);
        if free.is_ok() {
            break;
        }
        turns += 1;
        std::hint::spin_loop();
    }
    // SAFETY: the name is a C string, and a library may ask for RTLD_NEXT.
    let function = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    found.store(function, Ordering::Release);
    SEARCHER.store(0, Ordering::Release);
    function
}

/// `fn name(arguments) -> result, type of the function in libc, the system call;`
macro_rules! next {
    ($(
        fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty, $libc:ty, $system_call:expr;
    )*) => {
        $(
            /// The next library's function.
            ///
            /// # Safety
            /// As the function of that name in libc.
            // Not everything can be done by a system call.
            #[allow(unused_unsafe)]
            pub unsafe fn $name($($argument: $type),*) -> $result {
                static FOUND: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
                const NAME: &CStr =
                    match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        // An identifier has no zero byte; and this is at compile time.
                        Err(_) => panic!(),
                    };
                let function = find(&FOUND, NAME);
                if function.is_null() {
                    // SAFETY: the caller guarantees the system call's requirements.
                    return unsafe { $system_call } as $result;
                }
                // SAFETY: libc's function with this name has this type.
                let function: $libc = unsafe { std::mem::transmute(function) };
                // SAFETY: the caller guarantees the function's requirements.
                unsafe { function($($argument),*) }
            }
        )*
    };
}

type Path = *const c_char;
type Buffer = *mut c_void;
type Data = *const c_void;
type Vectors = *const iovec;

next! {
    fn open(path: Path, flags: c_int, mode: mode_t) -> c_int,
        unsafe extern "C" fn(Path, c_int, ...) -> c_int,
        syscall(libc::SYS_openat, AT_FDCWD, path, flags, mode);
    fn open64(path: Path, flags: c_int, mode: mode_t) -> c_int,
        unsafe extern "C" fn(Path, c_int, ...) -> c_int,
        syscall(libc::SYS_openat, AT_FDCWD, path, flags, mode);
    fn openat(directory: c_int, path: Path, flags: c_int, mode: mode_t) -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int, ...) -> c_int,
        syscall(libc::SYS_openat, directory, path, flags, mode);
    fn openat64(directory: c_int, path: Path, flags: c_int, mode: mode_t) -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int, ...) -> c_int,
        syscall(libc::SYS_openat, directory, path, flags, mode);
    fn __open_2(path: Path, flags: c_int) -> c_int,
        unsafe extern "C" fn(Path, c_int) -> c_int,
        syscall(libc::SYS_openat, AT_FDCWD, path, flags, 0);
    fn __open64_2(path: Path, flags: c_int) -> c_int,
        unsafe extern "C" fn(Path, c_int) -> c_int,
        syscall(libc::SYS_openat, AT_FDCWD, path, flags, 0);
    fn __openat_2(directory: c_int, path: Path, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int) -> c_int,
        syscall(libc::SYS_openat, directory, path, flags, 0);
    fn __openat64_2(directory: c_int, path: Path, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int) -> c_int,
        syscall(libc::SYS_openat, directory, path, flags, 0);

    // There is no such system call, and the search does not get here.
    fn fopen(path: Path, mode: Path) -> *mut libc::FILE,
        unsafe extern "C" fn(Path, Path) -> *mut libc::FILE,
        { let _ = path; libc::fdopen(-1, mode) };
    fn fopen64(path: Path, mode: Path) -> *mut libc::FILE,
        unsafe extern "C" fn(Path, Path) -> *mut libc::FILE,
        { let _ = path; libc::fdopen(-1, mode) };

    fn close(fd: c_int) -> c_int,
        unsafe extern "C" fn(c_int) -> c_int,
        syscall(libc::SYS_close, fd);
    fn close_range(first: u32, last: u32, flags: c_int) -> c_int,
        unsafe extern "C" fn(u32, u32, c_int) -> c_int,
        syscall(libc::SYS_close_range, first, last, flags);
    fn dup(fd: c_int) -> c_int,
        unsafe extern "C" fn(c_int) -> c_int,
        syscall(libc::SYS_dup, fd);
    fn dup2(fd: c_int, to: c_int) -> c_int,
        unsafe extern "C" fn(c_int, c_int) -> c_int,
        if fd == to { syscall(libc::SYS_fcntl, fd, libc::F_GETFD).min(i64::from(fd)) }
        else { syscall(libc::SYS_dup3, fd, to, 0) };
    fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, c_int, c_int) -> c_int,
        syscall(libc::SYS_dup3, fd, to, flags);
    fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int,
        unsafe extern "C" fn(c_int, c_int, ...) -> c_int,
        syscall(libc::SYS_fcntl, fd, command, argument);
    fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int,
        unsafe extern "C" fn(c_int, c_int, ...) -> c_int,
        syscall(libc::SYS_fcntl, fd, command, argument);
    fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int,
        unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int,
        syscall(libc::SYS_ioctl, fd, request, argument);

    fn read(fd: c_int, to: Buffer, count: size_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t) -> ssize_t,
        syscall(libc::SYS_read, fd, to, count);
    fn write(fd: c_int, from: Data, count: size_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Data, size_t) -> ssize_t,
        syscall(libc::SYS_write, fd, from, count);
    fn readv(fd: c_int, to: Vectors, count: c_int) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int) -> ssize_t,
        syscall(libc::SYS_readv, fd, to, count);
    fn writev(fd: c_int, from: Vectors, count: c_int) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int) -> ssize_t,
        syscall(libc::SYS_writev, fd, from, count);
    fn pread(fd: c_int, to: Buffer, count: size_t, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t, off64_t) -> ssize_t,
        syscall(libc::SYS_pread64, fd, to, count, offset);
    fn pread64(fd: c_int, to: Buffer, count: size_t, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t, off64_t) -> ssize_t,
        syscall(libc::SYS_pread64, fd, to, count, offset);
    fn pwrite(fd: c_int, from: Data, count: size_t, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Data, size_t, off64_t) -> ssize_t,
        syscall(libc::SYS_pwrite64, fd, from, count, offset);
    fn pwrite64(fd: c_int, from: Data, count: size_t, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Data, size_t, off64_t) -> ssize_t,
        syscall(libc::SYS_pwrite64, fd, from, count, offset);
    fn preadv(fd: c_int, to: Vectors, count: c_int, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int, off64_t) -> ssize_t,
        syscall(libc::SYS_preadv, fd, to, count, offset, offset >> 63);
    fn preadv64(fd: c_int, to: Vectors, count: c_int, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int, off64_t) -> ssize_t,
        syscall(libc::SYS_preadv, fd, to, count, offset, offset >> 63);
    fn pwritev(fd: c_int, from: Vectors, count: c_int, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int, off64_t) -> ssize_t,
        syscall(libc::SYS_pwritev, fd, from, count, offset, offset >> 63);
    fn pwritev64(fd: c_int, from: Vectors, count: c_int, offset: off64_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Vectors, c_int, off64_t) -> ssize_t,
        syscall(libc::SYS_pwritev, fd, from, count, offset, offset >> 63);
    fn __read_chk(fd: c_int, to: Buffer, count: size_t, room: size_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t, size_t) -> ssize_t,
        syscall(libc::SYS_read, fd, to, count.min(room));

    fn __pread_chk(fd: c_int, to: Buffer, count: size_t, offset: off64_t, room: size_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t, off64_t, size_t) -> ssize_t,
        syscall(libc::SYS_pread64, fd, to, count.min(room), offset);
    fn __pread64_chk(fd: c_int, to: Buffer, count: size_t, offset: off64_t, room: size_t)
        -> ssize_t,
        unsafe extern "C" fn(c_int, Buffer, size_t, off64_t, size_t) -> ssize_t,
        syscall(libc::SYS_pread64, fd, to, count.min(room), offset);

    fn mmap(
        address: Buffer, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off64_t
    ) -> Buffer,
        unsafe extern "C" fn(Buffer, size_t, c_int, c_int, c_int, off64_t) -> Buffer,
        syscall(libc::SYS_mmap, address, length, protection, flags, fd, offset);
    fn mmap64(
        address: Buffer, length: size_t, protection: c_int, flags: c_int, fd: c_int, offset: off64_t
    ) -> Buffer,
        unsafe extern "C" fn(Buffer, size_t, c_int, c_int, c_int, off64_t) -> Buffer,
        syscall(libc::SYS_mmap, address, length, protection, flags, fd, offset);
    fn mprotect(address: Buffer, length: size_t, protection: c_int) -> c_int,
        unsafe extern "C" fn(Buffer, size_t, c_int) -> c_int,
        syscall(libc::SYS_mprotect, address, length, protection);
    fn madvise(address: Buffer, length: size_t, advice: c_int) -> c_int,
        unsafe extern "C" fn(Buffer, size_t, c_int) -> c_int,
        syscall(libc::SYS_madvise, address, length, advice);
    fn fallocate(fd: c_int, mode: c_int, offset: off64_t, length: off64_t) -> c_int,
        unsafe extern "C" fn(c_int, c_int, off64_t, off64_t) -> c_int,
        syscall(libc::SYS_fallocate, fd, mode, offset, length);
    fn fallocate64(fd: c_int, mode: c_int, offset: off64_t, length: off64_t) -> c_int,
        unsafe extern "C" fn(c_int, c_int, off64_t, off64_t) -> c_int,
        syscall(libc::SYS_fallocate, fd, mode, offset, length);
    fn ftruncate(fd: c_int, length: off64_t) -> c_int,
        unsafe extern "C" fn(c_int, off64_t) -> c_int,
        syscall(libc::SYS_ftruncate, fd, length);
    fn ftruncate64(fd: c_int, length: off64_t) -> c_int,
        unsafe extern "C" fn(c_int, off64_t) -> c_int,
        syscall(libc::SYS_ftruncate, fd, length);
    fn munmap(address: Buffer, length: size_t) -> c_int,
        unsafe extern "C" fn(Buffer, size_t) -> c_int,
        syscall(libc::SYS_munmap, address, length);
    fn mremap(address: Buffer, old: size_t, new: size_t, flags: c_int, to: Buffer) -> Buffer,
        unsafe extern "C" fn(Buffer, size_t, size_t, c_int, ...) -> Buffer,
        syscall(libc::SYS_mremap, address, old, new, flags, to);

    fn stat(path: Path, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(Path, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_newfstatat, AT_FDCWD, path, status, 0);
    fn stat64(path: Path, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(Path, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_newfstatat, AT_FDCWD, path, status, 0);
    fn lstat(path: Path, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(Path, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_newfstatat, AT_FDCWD, path, status, libc::AT_SYMLINK_NOFOLLOW);
    fn lstat64(path: Path, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(Path, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_newfstatat, AT_FDCWD, path, status, libc::AT_SYMLINK_NOFOLLOW);
    fn fstat(fd: c_int, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(c_int, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_fstat, fd, status);
    fn fstat64(fd: c_int, status: *mut libc::stat64) -> c_int,
        unsafe extern "C" fn(c_int, *mut libc::stat64) -> c_int,
        syscall(libc::SYS_fstat, fd, status);
    fn fstatat(directory: c_int, path: Path, status: *mut libc::stat64, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, Path, *mut libc::stat64, c_int) -> c_int,
        syscall(libc::SYS_newfstatat, directory, path, status, flags);
    fn fstatat64(directory: c_int, path: Path, status: *mut libc::stat64, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, Path, *mut libc::stat64, c_int) -> c_int,
        syscall(libc::SYS_newfstatat, directory, path, status, flags);
    fn statx(directory: c_int, path: Path, flags: c_int, mask: u32, status: *mut libc::statx)
        -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int, u32, *mut libc::statx) -> c_int,
        syscall(libc::SYS_statx, directory, path, flags, mask, status);
    // Not system calls, either.
    fn opendir(path: Path) -> Buffer,
        unsafe extern "C" fn(Path) -> Buffer,
        { let _ = path; null_mut::<c_void>() };
    fn scandir(path: Path, list: Buffer, filter: Data, compare: Data) -> c_int,
        unsafe extern "C" fn(Path, Buffer, Data, Data) -> c_int,
        { let _ = (path, list, filter, compare); -1 };
    fn scandir64(path: Path, list: Buffer, filter: Data, compare: Data) -> c_int,
        unsafe extern "C" fn(Path, Buffer, Data, Data) -> c_int,
        { let _ = (path, list, filter, compare); -1 };
    fn realpath(path: Path, to: *mut c_char) -> *mut c_char,
        unsafe extern "C" fn(Path, *mut c_char) -> *mut c_char,
        { let _ = (path, to); null_mut::<c_char>() };
    fn __realpath_chk(path: Path, to: *mut c_char, room: size_t) -> *mut c_char,
        unsafe extern "C" fn(Path, *mut c_char, size_t) -> *mut c_char,
        { let _ = (path, to, room); null_mut::<c_char>() };
    fn readlink(path: Path, to: *mut c_char, count: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, *mut c_char, size_t) -> ssize_t,
        syscall(libc::SYS_readlinkat, AT_FDCWD, path, to, count);
    fn readlinkat(directory: c_int, path: Path, to: *mut c_char, count: size_t) -> ssize_t,
        unsafe extern "C" fn(c_int, Path, *mut c_char, size_t) -> ssize_t,
        syscall(libc::SYS_readlinkat, directory, path, to, count);
    fn __readlink_chk(path: Path, to: *mut c_char, count: size_t, room: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, *mut c_char, size_t, size_t) -> ssize_t,
        syscall(libc::SYS_readlinkat, AT_FDCWD, path, to, count.min(room));
    fn __readlinkat_chk(directory: c_int, path: Path, to: *mut c_char, count: size_t, room: size_t)
        -> ssize_t,
        unsafe extern "C" fn(c_int, Path, *mut c_char, size_t, size_t) -> ssize_t,
        syscall(libc::SYS_readlinkat, directory, path, to, count.min(room));
    fn getxattr(path: Path, name: Path, to: Buffer, count: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, Path, Buffer, size_t) -> ssize_t,
        syscall(libc::SYS_getxattr, path, name, to, count);
    fn lgetxattr(path: Path, name: Path, to: Buffer, count: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, Path, Buffer, size_t) -> ssize_t,
        syscall(libc::SYS_lgetxattr, path, name, to, count);
    fn listxattr(path: Path, to: *mut c_char, count: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, *mut c_char, size_t) -> ssize_t,
        syscall(libc::SYS_listxattr, path, to, count);
    fn llistxattr(path: Path, to: *mut c_char, count: size_t) -> ssize_t,
        unsafe extern "C" fn(Path, *mut c_char, size_t) -> ssize_t,
        syscall(libc::SYS_llistxattr, path, to, count);
    fn access(path: Path, mode: c_int) -> c_int,
        unsafe extern "C" fn(Path, c_int) -> c_int,
        syscall(libc::SYS_faccessat, AT_FDCWD, path, mode);
    fn faccessat(directory: c_int, path: Path, mode: c_int, flags: c_int) -> c_int,
        unsafe extern "C" fn(c_int, Path, c_int, c_int) -> c_int,
        syscall(libc::SYS_faccessat2, directory, path, mode, flags);
}

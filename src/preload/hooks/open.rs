// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening paths.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, CStr};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};

use libc::mode_t;
use twostage::iommufd::Errno;

use super::{answer_int, node};
#[cfg(feature = "selftest")]
use crate::files::fail_nth;
use crate::{callers::calls, memory::proc_status, next, state, sys};

/// Opens `path` if it, or its content, is emulated.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn open_ours(path: *const c_char, flags: c_int) -> Option<c_int> {
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    // SAFETY: guaranteed by the caller.
    if let Some((state, node)) = unsafe { node(path) } {
        let opened = state.world().and_then(|world| match world.open(node) {
            Err(Errno::EBUSY) => {
                // Perhaps busy only because of a process that is gone.
                state.end_hung_up();
                world.open(node)
            }
            opened => opened,
        });
        let installed = opened.and_then(|file| {
            state.start_service(calls::serve)?;
            state.install(file, close_on_exec)
        });
        return Some(answer_int(installed.map(i64::from)));
    }
    #[cfg(feature = "selftest")]
    // SAFETY: as above.
    if let Some(opened) = unsafe { open_fault_injection(path, close_on_exec) } {
        return Some(opened);
    }
    // SAFETY: as above.
    unsafe { status_file(path) }.map(|status| give(status, close_on_exec))
}

/// Returns the descriptor `file` to the program.
fn give(file: OwnedFd, close_on_exec: bool) -> c_int {
    let opened = sys::set_flags(file.as_raw_fd(), close_on_exec, false);
    answer_int(opened.map(|()| i64::from(file.into_raw_fd())))
}

/// Opens `path` if it belongs to Linux's fault injection.
///
/// # Safety
/// `path` is null or a C string.
#[cfg(feature = "selftest")]
unsafe fn open_fault_injection(path: *const c_char, close_on_exec: bool) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: guaranteed by the caller.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    if fail_nth::is_switch(path) {
        // What is written there is ignored.
        let written = sys::file_of(b"");
        return Some(
            written.map_or_else(|errno| answer_int(Err(errno)), |file| give(file, close_on_exec)),
        );
    }
    let state = fail_nth::is_own(path).then(state::current)?;
    let installed = state
        .start_service(calls::serve)
        .and_then(|()| state.install(std::sync::Arc::new(fail_nth::FailNthFile), close_on_exec));
    Some(answer_int(installed.map(i64::from)))
}

/// The status of a process with pinned memory.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn status_file(path: *const c_char) -> Option<OwnedFd> {
    let state = state::begun().filter(|_| !path.is_null())?;
    // SAFETY: guaranteed by the caller.
    let pid = proc_status::process_of(unsafe { CStr::from_ptr(path) }.to_bytes())?;
    proc_status::open(state, pid)
}

macro_rules! fopen {
    ($($name:ident)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
            // SAFETY: libc's contract for the path.
            match unsafe { status_file(path) } {
                // SAFETY: the descriptor belongs to a file, and is owned by the stream from now on;
                // the mode is as the program gave it.
                Some(status) => unsafe { libc::fdopen(status.into_raw_fd(), mode) },
                // SAFETY: the arguments are as the program gave them.
                None => unsafe { next::$name(path, mode) },
            }
        }
    )* };
}

fopen!(fopen fopen64);

macro_rules! hooks {
    ($(
        fn $name:ident $([$before:ident: $before_type:ty])?
            (path, flags $(, $mode:ident: $mode_type:ty)?);
    )*) => {
        $(
            #[cfg_attr(not(test), no_mangle)]
            unsafe extern "C" fn $name(
                $($before: $before_type,)?
                path: *const c_char,
                flags: c_int
                $(, $mode: $mode_type)?
            ) -> c_int {
                // SAFETY: libc's contract for the path.
                match unsafe { open_ours(path, flags) } {
                    Some(result) => result,
                    // SAFETY: the arguments are as the program gave them.
                    None => unsafe { next::$name($($before,)? path, flags $(, $mode)?) },
                }
            }
        )*
    };
}

// The names that begin with underscores are called by programs built with _FORTIFY_SOURCE.
hooks! {
    fn open(path, flags, mode: mode_t);
    fn open64(path, flags, mode: mode_t);
    fn openat[directory: c_int](path, flags, mode: mode_t);
    fn openat64[directory: c_int](path, flags, mode: mode_t);
    fn __open_2(path, flags);
    fn __open64_2(path, flags);
    fn __openat_2[directory: c_int](path, flags);
    fn __openat64_2[directory: c_int](path, flags);
}

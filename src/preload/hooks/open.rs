// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Opening paths.

use std::ffi::{c_char, c_int};

use libc::mode_t;

use super::{answer_int, node};
use crate::next;

/// Opens `path` when it is ours.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn open_ours(path: *const c_char, flags: c_int) -> Option<c_int> {
    // SAFETY: the caller's promise.
    let (state, node) = unsafe { node(path) }?;
    let opened = state.world().and_then(|world| world.open(node));
    let close_on_exec = flags & libc::O_CLOEXEC != 0;
    let installed = opened.and_then(|file| state.install(file, close_on_exec));
    Some(answer_int(installed.map(i64::from)))
}

macro_rules! hooks {
    ($(fn $name:ident $([$before:ident: $before_type:ty])? (path, flags $(, $mode:ident: $mode_type:ty)?);)*) => {
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

// The names that begin with underscores are those that programs built with _FORTIFY_SOURCE call.
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

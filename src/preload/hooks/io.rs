// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading, writing and ioctls.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_ulong, c_void};
use std::os::fd::RawFd;

use libc::{iovec, off64_t, size_t, ssize_t};
use twostage::iommufd::Errno;
use twostage_emulated::uapi::UserSpace;

use super::{answer, answer_int, ours};
use crate::callers::process::Process;
use crate::files::file::Call;
use crate::table::{self, Entry};
use crate::{callers::calls, next, state, sys};

/// Makes `call` if `fd` is ours.
fn call(fd: RawFd, call: Call) -> Option<Result<i64, Errno>> {
    calls::call(ours(fd)?, fd, call)
}

/// The result of libc's `read` for `fd`, unless that became one of ours after it was looked up:
/// such reads give up at once ([`sys::give_up_soon`]), and `again` is called.
fn or_again(fd: RawFd, read: ssize_t, again: impl FnOnce() -> Option<i64>) -> ssize_t {
    let errno = sys::last_errno();
    if read >= 0 || errno.raw() != libc::EAGAIN || state::begun().is_none() {
        return read;
    }
    if state::is_emulated(fd) {
        // For a file that is being closed it may still be ours.
        if table::get(fd) == Entry::NotOurs {
            state::current().recognise(fd);
        }
        return again().unwrap_or_else(|| answer(Err(Errno::from_raw(libc::EBADF)))) as ssize_t;
    }
    sys::set_errno(errno);
    read
}

/// Whether `fd` is one of ours, or was until now.
fn is_ours(fd: RawFd) -> bool {
    ours(fd).is_some_and(|state| !matches!(state.find(fd), Ok(None)))
}

/// The type of all ioctls of VFIO and iommufd (`VFIO_TYPE`, `IOMMUFD_TYPE`).
const TYPE: c_ulong = b';' as c_ulong;

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int {
    let ioctl = Call::Ioctl { request: request as u32, argument };
    let mut result = call(fd, ioctl);
    // One that was opened without a hook.
    if result.is_none() && (request >> 8) & 0xff == TYPE && state::is_emulated(fd) {
        result = state::current().recognise(fd).and_then(|_| call(fd, ioctl));
    }
    match result {
        Some(result) => answer_int(result),
        // SAFETY: as the program asked.
        None => unsafe { next::ioctl(fd, request, argument) },
    }
}

fn offset_of(offset: off64_t) -> Result<u64, Errno> {
    u64::try_from(offset).map_err(|_| Errno::EINVAL)
}

fn read_call(to: *mut c_void, count: size_t, offset: Option<u64>) -> Call {
    Call::Read { to: to as u64, count: count as u64, offset }
}

fn write_call(from: *const c_void, count: size_t, offset: Option<u64>) -> Call {
    Call::Write { from: from as u64, count: count as u64, offset }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn read(fd: c_int, to: *mut c_void, count: size_t) -> ssize_t {
    let ours = || call(fd, read_call(to, count, None)).map(answer);
    match ours() {
        Some(result) => result as ssize_t,
        // SAFETY: as the program asked.
        None => or_again(fd, unsafe { next::read(fd, to, count) }, ours),
    }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn __read_chk(
    fd: c_int,
    to: *mut c_void,
    count: size_t,
    room: size_t,
) -> ssize_t {
    let ours = || call(fd, read_call(to, count.min(room), None)).map(answer);
    match ours() {
        Some(result) => result as ssize_t,
        // SAFETY: as the program asked.
        None => or_again(fd, unsafe { next::__read_chk(fd, to, count, room) }, ours),
    }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn write(fd: c_int, from: *const c_void, count: size_t) -> ssize_t {
    match call(fd, write_call(from, count, None)) {
        Some(result) => answer(result) as ssize_t,
        // SAFETY: as the program asked.
        None => unsafe { next::write(fd, from, count) },
    }
}

/// `UIO_MAXIOV`: more in one call are refused.
const MOST_PIECES: u64 = 1024;

/// One call for each piece, `one` of what was done before, until one is incomplete: our files have
/// no vectored calls.
fn each_piece(
    fd: RawFd,
    vectors: *const iovec,
    count: c_int,
    one: impl Fn(&iovec, u64) -> Call,
) -> i64 {
    let mut done = 0;
    let Some(count) = u64::try_from(count).ok().filter(|count| *count <= MOST_PIECES) else {
        return answer(Err(Errno::EINVAL));
    };
    for index in 0..count {
        let mut vector = [0; size_of::<iovec>()];
        let address = vectors as u64 + index * size_of::<iovec>() as u64;
        if Process::own().read(address, &mut vector).is_err() {
            return answer(Err(Errno::EFAULT));
        }
        let word = |at: usize| {
            let word = vector.get(at..).and_then(|rest| rest.first_chunk());
            word.map_or(0, |word| usize::from_ne_bytes(*word))
        };
        let vector = iovec { iov_base: word(0) as *mut c_void, iov_len: word(size_of::<usize>()) };
        match call(fd, one(&vector, done as u64)) {
            Some(Ok(count)) => {
                done += count;
                if count < vector.iov_len as i64 {
                    break;
                }
            }
            _ if done > 0 => break,
            Some(Err(errno)) => return answer(Err(errno)),
            None => return answer(Err(Errno::from_raw(libc::EBADF))),
        }
    }
    done
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn readv(fd: c_int, vectors: *const iovec, count: c_int) -> ssize_t {
    let ours = || {
        let one = |vector: &iovec, _| read_call(vector.iov_base, vector.iov_len, None);
        is_ours(fd).then(|| each_piece(fd, vectors, count, one))
    };
    match ours() {
        Some(result) => result as ssize_t,
        // SAFETY: as the program asked.
        None => or_again(fd, unsafe { next::readv(fd, vectors, count) }, ours),
    }
}

#[cfg_attr(not(test), no_mangle)]
unsafe extern "C" fn writev(fd: c_int, vectors: *const iovec, count: c_int) -> ssize_t {
    if is_ours(fd) {
        let one = |vector: &iovec, _| write_call(vector.iov_base, vector.iov_len, None);
        return each_piece(fd, vectors, count, one) as ssize_t;
    }
    // SAFETY: as the program asked.
    unsafe { next::writev(fd, vectors, count) }
}

macro_rules! at_offset {
    ($($name:ident, $pointer:ty, $one:ident;)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            fd: c_int,
            buffer: $pointer,
            count: size_t,
            offset: off64_t,
        ) -> ssize_t {
            let result = ours(fd).and_then(|_| match offset_of(offset) {
                Ok(offset) => call(fd, $one(buffer, count, Some(offset))),
                Err(errno) => Some(Err(errno)),
            });
            match result {
                Some(result) => answer(result) as ssize_t,
                // SAFETY: as the program asked.
                None => unsafe { next::$name(fd, buffer, count, offset) },
            }
        }
    )* };
}

macro_rules! vectors_at_offset {
    ($($name:ident, $one:ident;)*) => { $(
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            fd: c_int,
            vectors: *const iovec,
            count: c_int,
            offset: off64_t,
        ) -> ssize_t {
            if !is_ours(fd) {
                // SAFETY: as the program asked.
                return unsafe { next::$name(fd, vectors, count, offset) };
            }
            let Ok(start) = offset_of(offset) else { return answer(Err(Errno::EINVAL)) as ssize_t };
            let one = |vector: &iovec, done| {
                $one(vector.iov_base, vector.iov_len, Some(start.saturating_add(done)))
            };
            each_piece(fd, vectors, count, one) as ssize_t
        }
    )* };
}

vectors_at_offset! {
    preadv, read_call;
    preadv64, read_call;
    pwritev, write_call;
    pwritev64, write_call;
}

macro_rules! at_offset_within {
    ($($name:ident, $plain:ident;)*) => { $(
        /// Called by programs built with _FORTIFY_SOURCE.
        #[cfg_attr(not(test), no_mangle)]
        unsafe extern "C" fn $name(
            fd: c_int,
            to: *mut c_void,
            count: size_t,
            offset: off64_t,
            room: size_t,
        ) -> ssize_t {
            if is_ours(fd) {
                // SAFETY: as the program asked.
                return unsafe { $plain(fd, to, count.min(room), offset) };
            }
            // SAFETY: as the program asked.
            unsafe { next::$name(fd, to, count, offset, room) }
        }
    )* };
}

at_offset_within! {
    __pread_chk, pread;
    __pread64_chk, pread64;
}

at_offset! {
    pread, *mut c_void, read_call;
    pread64, *mut c_void, read_call;
    pwrite, *const c_void, write_call;
    pwrite64, *const c_void, write_call;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::file::{Answer, Caller, File};
    use std::sync::Arc;

    /// A file that fails every call with a distinct errno.
    #[derive(Debug)]
    struct Mute;

    impl File for Mute {
        fn name(&self) -> String {
            "mute".to_owned()
        }

        fn call(&self, _: &dyn Caller, _: Call) -> Result<Answer, Errno> {
            Err(Errno::ENOSPC)
        }
    }

    #[test]
    fn what_becomes_ours_or_is_being_closed_while_it_is_looked_up() {
        let state = state::current();
        state.start_service(calls::serve).unwrap();
        let fd = state.install(Arc::new(Mute), true).unwrap();
        let mut room = [0u8; 1];
        let at: *mut c_void = room.as_mut_ptr().cast();
        let vector = iovec { iov_base: at, iov_len: 1 };
        // SAFETY: there is room for the byte; the descriptor is this test's.
        let reads: [&dyn Fn() -> ssize_t; 3] = unsafe {
            [&|| read(fd, at, 1), &|| __read_chk(fd, at, 1, 1), &|| readv(fd, &vector, 1)]
        };
        // SAFETY: as above.
        let others: [&dyn Fn() -> ssize_t; 5] = unsafe {
            [
                &|| write(fd, at, 1),
                &|| writev(fd, &vector, 1),
                &|| pread(fd, at, 1, 0),
                &|| pwrite(fd, at, 1, 0),
                &|| ioctl(fd, TYPE << 8 | 0x81, 0) as ssize_t,
            ]
        };
        let fails = |call: &&dyn Fn() -> ssize_t| {
            assert_eq!(call(), -1);
            sys::last_errno()
        };
        for count in [-1, 1025] {
            // SAFETY: none of the pieces is looked at.
            let refused = unsafe { [readv(fd, &vector, count), writev(fd, &vector, count)] };
            assert_eq!((refused, sys::last_errno()), ([-1; 2], Errno::EINVAL));
        }
        let entry = table::get(fd);
        assert_eq!(reads.iter().chain(&others).map(fails).collect::<Vec<_>>(), [Errno::ENOSPC; 8]);
        table::set(fd, Entry::Closing);
        let closed = Errno::from_raw(libc::EBADF);
        assert_eq!(reads.iter().chain(&others).map(fails).collect::<Vec<_>>(), [closed; 8]);
        // As if another thread had opened it since.
        for read in &reads {
            table::set(fd, Entry::NotOurs);
            assert_eq!((fails(read), table::get(fd)), (Errno::ENOSPC, entry));
        }
        sys::close_number(fd);
        table::set(fd, Entry::NotOurs);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls on files of another process: how they get there and back.
//!
//! The caller sends one message through the descriptor, and a socket with it, on which the owner
//! answers. The owner reads and writes the caller's memory with `process_vm_readv(2)`, for which it
//! needs the right to trace it: it has that for its own children.
#![forbid(unsafe_code)]

use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use twostage::iommufd::Errno;

use crate::file::{Call, Window};
use crate::process::Process;
use crate::state::Own;
use crate::sys;

/// A message: what it is, and three numbers.
type Words = [u64; 4];
/// A message and what came with it.
type Received = (Words, Option<OwnedFd>);

/// Length of a message, in bytes: it begins with [`MAGIC`].
const BYTES: usize = size_of::<u64>() + size_of::<Words>();
const MAGIC: u64 = u64::from_le_bytes(*b"twostage");

const IOCTL: u64 = 1;
const READ: u64 = 2;
const READ_AT: u64 = 3;
const WRITE: u64 = 4;
const WRITE_AT: u64 = 5;
/// What a mapping shows; the answer has a descriptor.
const WINDOW: u64 = 6;
/// The answer to a call: a value.
const DONE: u64 = 7;
/// The answer to a call: an errno.
const FAILED: u64 = 8;

fn send(socket: RawFd, words: Words, passed: Option<RawFd>) -> Result<(), Errno> {
    let mut bytes = [0; BYTES];
    let all = std::iter::once(MAGIC).chain(words);
    for (to, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(all) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    sys::send(socket, &bytes, passed)
}

/// The next message; `None` when there is none, and none will come unless `wait` was not set.
fn receive(socket: RawFd, wait: bool) -> Result<Option<Received>, Errno> {
    let mut bytes = [0; BYTES];
    match sys::receive(socket, &mut bytes, wait)? {
        None | Some((0, _)) => Ok(None),
        Some((BYTES, passed)) => {
            let mut words = bytes
                .chunks_exact(size_of::<u64>())
                .map(|word| word.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word)));
            if words.next() != Some(MAGIC) {
                return Err(Errno::from_raw(libc::EPROTO));
            }
            Ok(Some((std::array::from_fn(|_| words.next().unwrap_or(0)), passed)))
        }
        Some(_) => Err(Errno::from_raw(libc::EPROTO)),
    }
}

/// Makes `call` on `fd`, a file of another process.
///
/// # Errors
/// The owner's; `ENODEV` when it is gone.
pub fn call(fd: RawFd, call: Call) -> Result<i64, Errno> {
    let words = match call {
        Call::Ioctl { request, argument } => [IOCTL, u64::from(request), argument, 0],
        Call::Read { to, count, offset: None } => [READ, to, count, 0],
        Call::Read { to, count, offset: Some(offset) } => [READ_AT, to, count, offset],
        Call::Write { from, count, offset: None } => [WRITE, from, count, 0],
        Call::Write { from, count, offset: Some(offset) } => [WRITE_AT, from, count, offset],
    };
    ask(fd, words).map(|(value, _)| value as i64)
}

/// What a mapping of `fd`, a file of another process, shows.
///
/// # Errors
/// As [`call`].
pub fn window(fd: RawFd, offset: u64, length: u64) -> Result<Window, Errno> {
    match ask(fd, [WINDOW, offset, length, 0])? {
        (offset, Some(file)) => Ok(Window { file, offset }),
        (_, None) => Err(Errno::ENODEV),
    }
}

fn ask(fd: RawFd, words: Words) -> Result<(u64, Option<OwnedFd>), Errno> {
    let (channel, theirs) = sys::socket_pair()?;
    send(fd, words, Some(theirs.as_raw_fd())).map_err(|_| Errno::ENODEV)?;
    drop(theirs);
    match receive(channel.as_raw_fd(), true) {
        Ok(Some(([DONE, value, ..], passed))) => Ok((value, passed)),
        Ok(Some(([FAILED, errno, ..], _))) => Err(Errno::from_raw(errno as i32)),
        _ => Err(Errno::ENODEV),
    }
}

/// Takes one call that waits at the owner's end of `own`, and answers it; whether there was one.
///
/// # Errors
/// When what came is no call, or the caller is gone.
pub fn answer_one(own: &Own) -> Result<bool, Errno> {
    let Some((words, passed)) = receive(own.end.raw(), false)? else { return Ok(false) };
    let channel = passed.ok_or(Errno::from_raw(libc::EPROTO))?;
    let process = Process::of(sys::peer_process(channel.as_raw_fd())?);
    let call = match words {
        [IOCTL, request, argument, _] => Call::Ioctl { request: request as u32, argument },
        [READ, to, count, _] => Call::Read { to, count, offset: None },
        [READ_AT, to, count, offset] => Call::Read { to, count, offset: Some(offset) },
        [WRITE, from, count, _] => Call::Write { from, count, offset: None },
        [WRITE_AT, from, count, offset] => Call::Write { from, count, offset: Some(offset) },
        [WINDOW, offset, length, _] => {
            let window = own.file.window(offset, length);
            answer(&channel, window.map(|window| (window.offset, Some(window.file))))?;
            return Ok(true);
        }
        _ => return Err(Errno::from_raw(libc::EPROTO)),
    };
    let result = own.file.call(&process, call);
    answer(&channel, result.map(|value| (value as u64, None)))?;
    Ok(true)
}

fn answer(channel: &OwnedFd, result: Result<(u64, Option<OwnedFd>), Errno>) -> Result<(), Errno> {
    let socket = channel.as_raw_fd();
    match result {
        Ok((value, passed)) => {
            send(socket, [DONE, value, 0, 0], passed.as_ref().map(AsRawFd::as_raw_fd))
        }
        Err(errno) => send(socket, [FAILED, errno.raw() as u64, 0, 0], None),
    }
}

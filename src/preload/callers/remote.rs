// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Transport of calls on files of another process.
//!
//! The caller sends one message through the descriptor, with a socket for the answer of the owner
//! ([`crate::callers::calls::serve`]); before that, the owner may send a descriptor for the caller.
//! The owner accesses the caller's memory with `process_vm_readv(2)`, which needs permission to
//! trace it: it has that for its own children.

use std::mem::size_of;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use twostage::iommufd::Errno;

use crate::files::file::{Answer, Call, File};
use crate::memory::accounts::Pinned;
use crate::{state, sys};

/// A message: its type and three numbers.
type Words = [u64; 4];
/// A message and the descriptor that came with it.
type Received = (Words, Option<OwnedFd>);

/// Length of a message, in bytes: it begins with [`MAGIC`].
const BYTES: usize = size_of::<u64>() + size_of::<Words>();
const MAGIC: u64 = u64::from_le_bytes(*b"twostage");

const IOCTL: u64 = 1;
const READ: u64 = 2;
const READ_AT: u64 = 3;
const WRITE: u64 = 4;
const WRITE_AT: u64 = 5;
/// What is pinned of a process.
const PINNED: u64 = 6;
/// The answer to a call: a value, and whether to take a message from the descriptor.
const DONE: u64 = 7;
/// The answer to a call: an errno.
const FAILED: u64 = 8;
/// A descriptor for the caller, which sends its number back.
const INSTALL: u64 = 9;
/// How long a caller may take for that: it is within a call, and has nothing else to do.
const INSTALLING: Duration = Duration::from_secs(2);

/// Sends a message. An answer does not `wait` for room: in a caller's channel, which nobody else
/// writes to, there is some.
fn send(socket: RawFd, words: Words, passed: Option<RawFd>, wait: bool) -> Result<(), Errno> {
    let mut bytes = [0; BYTES];
    let all = std::iter::once(MAGIC).chain(words);
    for (to, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(all) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    sys::send(socket, &bytes, passed, wait)
}

/// The next message; `None` if there is none and `wait` is not set, or the other end is closed.
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
/// The owner's; `ENODEV` if it is gone.
pub fn call(fd: RawFd, call: Call) -> Result<Answer, Errno> {
    let words = match call {
        Call::Ioctl { request, argument } => [IOCTL, u64::from(request), argument, 0],
        Call::Read { to, count, offset: None } => [READ, to, count, 0],
        Call::Read { to, count, offset: Some(offset) } => [READ_AT, to, count, offset],
        Call::Write { from, count, offset: None } => [WRITE, from, count, 0],
        Call::Write { from, count, offset: Some(offset) } => [WRITE_AT, from, count, offset],
    };
    let [value, take_message] = ask(fd, words)?;
    Ok(Answer { value: value as i64, take_message: take_message != 0 })
}

/// What the owner of `fd` has pinned of process `pid`.
///
/// # Errors
/// `ENODEV` the owner is gone.
pub fn pinned(fd: RawFd, pid: i32) -> Result<Pinned, Errno> {
    let [pinned, locked] = ask(fd, [PINNED, pid as u64, 0, 0])?;
    Ok(Pinned { pinned, locked })
}

/// Sends a request through `fd` and waits for the answer.
fn ask(fd: RawFd, words: Words) -> Result<[u64; 2], Errno> {
    let (channel, theirs) = sys::socket_pair()?;
    send(fd, words, Some(theirs.as_raw_fd()), true).map_err(|_| Errno::ENODEV)?;
    drop(theirs);
    // Not kept if the owner, which does not wait for long, has given the call up meanwhile.
    let mut installed = Vec::new();
    loop {
        match receive(channel.as_raw_fd(), true) {
            Ok(Some(([DONE, first, second, _], _))) => {
                installed.into_iter().for_each(|fd: OwnedFd| _ = fd.into_raw_fd());
                return Ok([first, second]);
            }
            Ok(Some(([FAILED, errno, ..], _))) => return Err(Errno::from_raw(errno as i32)),
            Ok(Some(([INSTALL, ..], Some(passed)))) => {
                let known = state::current().recognise(passed.as_raw_fd()).is_some();
                let number = if known { passed.as_raw_fd() as u64 } else { u64::MAX };
                let told = send(channel.as_raw_fd(), [DONE, number, 0, 0], None, true);
                told.map_err(|_| Errno::ENODEV)?;
                if known {
                    installed.push(passed);
                }
            }
            _ => return Err(Errno::ENODEV),
        }
    }
}

/// A request of another process on a file.
#[derive(Debug)]
pub enum Request {
    /// A call on it.
    Call(Call),
    /// What is pinned of a process.
    Pinned(i32),
}

/// Takes the request pending at the owner's end `end`, with the channel for its answer, if there is
/// one.
///
/// # Errors
/// The message is not a request.
pub fn take_request(end: RawFd) -> Result<Option<(Request, OwnedFd)>, Errno> {
    let Some((words, passed)) = receive(end, false)? else { return Ok(None) };
    let channel = passed.ok_or(Errno::from_raw(libc::EPROTO))?;
    let call = match words {
        [IOCTL, request, argument, _] => Call::Ioctl { request: request as u32, argument },
        [READ, to, count, _] => Call::Read { to, count, offset: None },
        [READ_AT, to, count, offset] => Call::Read { to, count, offset: Some(offset) },
        [WRITE, from, count, _] => Call::Write { from, count, offset: None },
        [WRITE_AT, from, count, offset] => Call::Write { from, count, offset: Some(offset) },
        [PINNED, pid, ..] => {
            // More than any ID has is that of no process.
            let pid = i32::try_from(pid).unwrap_or(-1);
            return Ok(Some((Request::Pinned(pid), channel)));
        }
        _ => return Err(Errno::from_raw(libc::EPROTO)),
    };
    Ok(Some((Request::Call(call), channel)))
}

/// Answers a call.
///
/// # Errors
/// The caller is gone.
pub fn answer_call(channel: &OwnedFd, answer: Result<Answer, Errno>) -> Result<(), Errno> {
    let words = match answer {
        Ok(Answer { value, take_message }) => [DONE, value as u64, u64::from(take_message), 0],
        Err(errno) => [FAILED, errno.raw() as u64, 0, 0],
    };
    send(channel.as_raw_fd(), words, None, false)
}

/// Answers what is pinned.
///
/// # Errors
/// The caller is gone.
pub fn answer_pinned(channel: &OwnedFd, pinned: Pinned) -> Result<(), Errno> {
    send(channel.as_raw_fd(), [DONE, pinned.pinned, pinned.locked, 0], None, false)
}

/// Gives the caller at the other end of `channel` a descriptor for `file`; returns its number
/// there.
///
/// # Errors
/// The kernel's error if there are no more descriptors; `EPIPE` the caller is gone, or does not
/// take it.
pub fn install(channel: &OwnedFd, file: Arc<dyn File>) -> Result<i32, Errno> {
    let (fd, _) = state::current().publish(file)?;
    send(channel.as_raw_fd(), [INSTALL, 0, 0, 0], Some(fd.as_raw_fd()), false)?;
    installed(channel)
}

/// The number that the caller says that it gave a descriptor.
fn installed(channel: &OwnedFd) -> Result<i32, Errno> {
    // All others wait meanwhile.
    if !sys::is_readable_within(channel.as_raw_fd(), INSTALLING) {
        return Err(Errno::from_raw(libc::EPIPE));
    }
    match receive(channel.as_raw_fd(), false)? {
        Some(([DONE, number, ..], _)) => {
            i32::try_from(number).map_err(|_| Errno::from_raw(libc::EMFILE))
        }
        _ => Err(Errno::from_raw(libc::EPIPE)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_caller_that_takes_nothing() {
        let (channel, _silent) = sys::socket_pair().unwrap();
        let epipe = Errno::from_raw(libc::EPIPE);
        assert_eq!(installed(&channel).unwrap_err(), epipe, "a descriptor that it does not take");
        // It has filled its channel before it asked.
        while sys::send(channel.as_raw_fd(), &[0; BYTES], None, false).is_ok() {}
        let answer = Ok(Answer { value: 0, take_message: false });
        assert!(answer_call(&channel, answer).is_err());
        assert!(answer_pinned(&channel, Pinned { pinned: 0, locked: 0 }).is_err());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (end, caller) = sys::socket_pair().unwrap();
        let refused = |bytes: &[u8]| {
            sys::send(caller.as_raw_fd(), bytes, Some(caller.as_raw_fd()), true).unwrap();
            take_request(end.as_raw_fd()).unwrap_err()
        };
        let eproto = Errno::from_raw(libc::EPROTO);
        // Another length, another start, and a type that is none.
        assert_eq!(refused(&[1; BYTES - 1]), eproto);
        assert_eq!(refused(&[1; BYTES + 1]), eproto);
        assert_eq!(refused(&[0; BYTES]), eproto);
        send(caller.as_raw_fd(), [DONE, 0, 0, 0], Some(caller.as_raw_fd()), true).unwrap();
        assert_eq!(take_request(end.as_raw_fd()).unwrap_err(), eproto);
        // Without a channel for the answer.
        send(caller.as_raw_fd(), [READ, 0, 0, 0], None, true).unwrap();
        assert_eq!(take_request(end.as_raw_fd()).unwrap_err(), eproto);
        assert!(take_request(end.as_raw_fd()).unwrap().is_none());
    }
}

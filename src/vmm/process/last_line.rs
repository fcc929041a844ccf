// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A last line of a process, by a thread that may be in a signal handler, or out of memory: it only
//! makes system calls that every filter allows.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::stdio::stderr;

use crate::process::{bell, disposition};

const LONGEST: usize = 320;
/// How long standard error is waited for.
const PATIENCE: Duration = Duration::from_millis(200);

/// A thread says the last line, and ends the process with this code less [`BASE`]: there is only
/// one.
static ENDING: AtomicU16 = AtomicU16::new(0);
const BASE: u16 = 0x100;

/// Ends the process if a thread says its last line, and does not come to an end: standard error may
/// be a file on a server that is gone.
pub(crate) fn end_if_said() {
    let ending = ENDING.load(Ordering::SeqCst);
    if ending != 0 {
        leave(ending);
    }
}

/// Leaves the last line to the other thread that says it.
fn leave(ending: u16) -> ! {
    thread::sleep(2 * PATIENCE);
    disposition::last_words();
    disposition::exit_now((ending - BASE).into())
}

/// A line, made without memory from a heap.
#[derive(Debug)]
pub(crate) struct Line {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Line {
    /// An empty one.
    pub const fn new() -> Self {
        Self { bytes: [0; LONGEST], length: 0 }
    }

    /// What was written to it.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Prints it, unless nobody reads standard error, and ends the process with `code`.
    pub fn end(&self, code: u8) -> ! {
        let ending = BASE + u16::from(code);
        if let Err(other) = ENDING.compare_exchange(0, ending, Ordering::SeqCst, Ordering::SeqCst) {
            leave(other);
        }
        // Whoever this wakes ends the process if the write below does not return.
        bell::ring();
        let mut wanted = [PollFd::from_borrowed_fd(stderr(), PollFlags::OUT)];
        let soon = Timespec { tv_sec: 0, tv_nsec: PATIENCE.subsec_nanos().into() };
        if poll(&mut wanted, Some(&soon)).is_ok_and(|ready| ready != 0) {
            // Nobody can be told that it failed.
            let _ = rustix::io::write(stderr(), self.bytes());
        }
        disposition::last_words();
        disposition::exit_now(code.into())
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = self.bytes.get_mut(self.length..).unwrap_or_default();
        let part = rest.get_mut(..text.len()).ok_or(fmt::Error)?;
        part.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut line = Line { bytes: [0; LONGEST], length: LONGEST - 1 };
        assert!(line.write_str("ab").is_err() && line.write_str("a").is_ok());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writing to a descriptor whose reader may be slow, stopped or gone, with a bounded wait.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use crate::console::deadline::{self, Turn};

/// Maximum size of a write: a pipe that polls ready accepts this without blocking.
pub(crate) const PIECE: usize = 4096;
/// A reader without progress for so long is given up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// A file that is written synchronously, but with a bounded wait if the reader makes no progress or
/// the machine has stopped: for output without gaps.
#[derive(Debug)]
pub(crate) struct Patient<F> {
    file: F,
    until: Option<Instant>,
}

impl<F> Patient<F> {
    /// Waits as long as there is progress.
    pub fn new(file: F) -> Self {
        Self { file, until: None }
    }

    /// Waits up to `until`.
    pub fn until(file: F, until: Instant) -> Self {
        Self { file, until: Some(until) }
    }
}

impl<F: Write + AsFd> Write for Patient<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match bytes.is_empty() {
            true => Ok(0),
            false => {
                let until = self.until.or_else(|| deadline::of(Turn::End));
                let left = |until: Instant| until.saturating_duration_since(Instant::now());
                write_some(&mut self.file, bytes, until.map_or(PATIENCE, left))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes some of `bytes`, which are not empty, if there is room within `patience`.
pub(crate) fn write_some(
    file: &mut (impl Write + AsFd),
    bytes: &[u8],
    patience: Duration,
) -> io::Result<usize> {
    let piece = bytes.get(..PIECE).unwrap_or(bytes);
    let started = Instant::now();
    loop {
        let left = patience.saturating_sub(started.elapsed());
        match has_room(file.as_fd(), left) {
            Ok(true) => {}
            Ok(false) => return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        match file.write(piece) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => return Ok(length),
            // Ready, but not for this much.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether `descriptor` is ready for writing (or reports an error) within `limit`.
fn has_room(descriptor: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let mut wanted = [PollFd::from_borrowed_fd(descriptor, PollFlags::OUT)];
    // Limits here are seconds.
    let limit = Timespec::try_from(limit).unwrap_or_default();
    Ok(poll(&mut wanted, Some(&limit))? != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_pipe_that_nobody_reads_is_not_waited_for() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let error = Patient::new(ours).write_all(&vec![0; 8 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn what_is_given_up_by_then_is_given_up_however_much_is_taken() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        // Only what fits is written.
        let mut late = Patient::until(ours, Instant::now());
        let error = late.write_all(&vec![0; 8 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(late);
        assert_ne!(io::copy(&mut &theirs, &mut io::sink()).unwrap(), 0);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How long slow readers and the host are waited for.
//!
//! The end of a machine waits for them a second in total after a requested stop, and ten seconds
//! after the guest ended by itself. A reader that makes no progress is given up sooner.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::MutexGuard;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};

use twostage::sync::Mutex;

/// The stop of this process's machine, if it was stopped.
static STOPPED: Mutex<Option<Stop>> = Mutex::new(None);

/// A stop.
#[derive(Debug, Clone, Copy)]
struct Stop {
    at: Instant,
    /// It was requested, so somebody waits for it.
    asked: bool,
}

/// The minimum for each turn, if earlier ones took too long.
const LEAST: Duration = Duration::from_millis(100);

/// Steps that may take long, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The guest's output.
    Output,
    /// Releasing the host's objects.
    Release,
    /// The last report.
    Report,
    /// Final messages.
    End,
}

impl Turn {
    /// The end of the turn, relative to a requested stop.
    fn length(self) -> Duration {
        Duration::from_millis(match self {
            Self::Output => 700,
            Self::Release => 800,
            Self::Report => 900,
            Self::End => 1000,
        })
    }

    fn over(self, stop: Stop, now: Instant) -> Instant {
        let length = if stop.asked { self.length() } else { self.length() * 10 };
        (stop.at + length).max(now + LEAST)
    }
}

/// The machine is stopped, and by request if `asked`: starts the clock, unless it is running.
pub(crate) fn begin(asked: bool) {
    stopped().get_or_insert_with(|| Stop { at: Instant::now(), asked });
}

/// A new machine starts.
pub(crate) fn clear() {
    *stopped() = None;
}

/// The end of the turn, if the machine was stopped.
pub(crate) fn of(turn: Turn) -> Option<Instant> {
    stopped().map(|stop| turn.over(stop, Instant::now()))
}

/// The limit for a reader without progress.
pub(crate) fn patience() -> Duration {
    match *stopped() {
        Some(Stop { asked: true, .. }) => Duration::from_millis(500),
        _ => Duration::from_secs(1),
    }
}

/// The deadline for something that is not waited for, but may need a moment.
pub(crate) fn soon() -> Instant {
    Instant::now() + LEAST
}

fn stopped() -> MutexGuard<'static, Option<Stop>> {
    STOPPED.lock()
}

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
                let until = self.until.or_else(|| of(Turn::End));
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
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn all_turns_together_take_so_long() {
        let at = Instant::now();
        for (asked, seconds) in [(true, 1), (false, 10)] {
            let (stop, mut now) = (Stop { at, asked }, at);
            for turn in [Turn::Output, Turn::Release, Turn::Report, Turn::End] {
                // Each waits as long as allowed.
                let over = turn.over(stop, now);
                assert!(over > now, "{turn:?}");
                now = over;
            }
            assert_eq!(now, at + Duration::from_secs(seconds));
            // A late one still has the minimum.
            let late = at + Duration::from_secs(15);
            assert_eq!(Turn::End.over(stop, late), late + LEAST);
        }
    }

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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Non-blocking output to a descriptor whose reader may be slow, stopped or gone.
//!
//! A thread writes it from a bounded buffer. When the buffer is full, output is dropped until the
//! buffer is empty, and a message says how much: neither a vCPU nor the end of a machine waits for
//! the reader of a terminal or pipe.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::{Duration, Instant};
use twostage::sync::{Condvar, Mutex};

use crate::console::deadline::{self, write_some, Patient, Turn, PATIENCE, PIECE};
use crate::process::jail::{self, Kind};
use crate::{Error, Result};

/// Capacity of the buffer, in bytes.
const CAPACITY: usize = 256 << 10;
/// Interval of progress checks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// Minimum interval between messages about dropped output, except the last.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// A handle to an output. The thread ends with the last handle.
#[derive(Debug, Clone)]
pub(crate) struct Output(Arc<Handle>);

#[derive(Debug)]
struct Handle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: String,
    state: Mutex<State>,
    /// There is something to write, or no handle left.
    filled: Condvar,
    /// Something was written.
    taken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<u8>,
    /// Bytes being written by the thread.
    under_way: usize,
    /// Bytes written since the start.
    written: u64,
    /// Everything is dropped until the buffer is empty.
    dropping: bool,
    /// Bytes dropped since the last message.
    dropped: u64,
    /// Bytes dropped since the start.
    lost: u64,
    /// The write error, if not reported yet.
    failure: Option<io::Error>,
    said: Option<Instant>,
    /// No handle is left.
    closed: bool,
}

impl State {
    fn is_written(&self) -> bool {
        self.waiting.is_empty() && self.under_way == 0
    }

    /// Whether `length` more bytes fit.
    fn has_room(&self, length: usize) -> bool {
        (!self.dropping || self.is_written())
            && self.waiting.len().saturating_add(length) <= CAPACITY
    }

    /// Buffers `bytes`, or drops them if there is no room for `length`.
    fn take(&mut self, bytes: &[u8], length: usize) {
        self.dropping &= !self.is_written();
        if !self.has_room(length) {
            self.dropping = true;
            self.drop_bytes(bytes.len());
        } else {
            self.waiting.extend(bytes);
        }
    }

    fn drop_bytes(&mut self, length: usize) {
        self.dropped = self.dropped.saturating_add(length as u64);
        self.lost = self.lost.saturating_add(length as u64);
    }

    /// The message about lost output, if one is due: at the end, or after the interval.
    fn loss(&mut self, at_the_end: bool) -> Option<String> {
        let due = self.said.is_none_or(|said| said.elapsed() >= BETWEEN_LINES);
        if self.dropped == 0 || !(at_the_end || due) {
            return None;
        }
        self.said = Some(Instant::now());
        let dropped = std::mem::take(&mut self.dropped);
        let why =
            self.failure.take().map_or("nobody read it".to_owned(), |error| error.to_string());
        Some(format!("{dropped} bytes of output were dropped: {why}"))
    }
}

impl Output {
    /// Output to `file`, with `name` for messages.
    ///
    /// # Errors
    /// The thread cannot be created.
    pub fn new(name: String, file: File) -> Result<Self> {
        let (filled, taken) = (Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { name, state: Mutex::default(), filled, taken });
        let writer = shared.clone();
        jail::start("output", Kind::Output, move || writer.write_all_to(&file))
            .map_err(Error::os("output thread"))?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// Standard output, shared by all machines of the process.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated, or the thread cannot be created.
    pub fn standard() -> Result<Self> {
        static STANDARD: OnceLock<Output> = OnceLock::new();
        of_process(&STANDARD, "standard output", io::stdout().as_fd())
    }

    /// Standard error, likewise.
    ///
    /// # Errors
    /// As [`Output::standard`].
    pub fn standard_error() -> Result<Self> {
        static STANDARD_ERROR: OnceLock<Output> = OnceLock::new();
        of_process(&STANDARD_ERROR, "standard error", io::stderr().as_fd())
    }

    /// Buffers `bytes`, or drops them if the buffer is full.
    pub fn take(&self, bytes: &[u8]) {
        let shared = self.shared();
        shared.lock().take(bytes, bytes.len());
        shared.filled.notify_one();
    }

    /// Buffers all of `text`, whatever its length, if there is any room. With `until`, waits up to
    /// then, for room and until it is written.
    ///
    /// # Errors
    /// Nobody has read it by then.
    fn take_whole(&self, text: &str, until: Option<Instant>) -> io::Result<()> {
        let shared = self.shared();
        // Waits for room, as a slow reader may still read what is buffered.
        if let Some(until) = until.filter(|_| !shared.lock().has_room(1)) {
            self.flush(until);
        }
        let mut state = shared.lock();
        let lost = state.lost;
        state.take(text.as_bytes(), 1);
        drop(state);
        shared.filled.notify_one();
        if let Some(until) = until {
            self.flush(until);
        }
        match shared.lock().lost == lost {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it")),
        }
    }

    /// Waits until everything is written, at most up to `until`, and not for a reader that makes no
    /// progress. Then reports losses. Returns whether everything was written.
    pub fn flush(&self, until: Instant) -> bool {
        let shared = self.shared();
        let mut state = shared.lock();
        let (mut written, mut since) = (state.written, Instant::now());
        let mut given_up = false;
        while !state.is_written() && !given_up {
            if state.written != written {
                (written, since) = (state.written, Instant::now());
            }
            if since.elapsed() >= deadline::patience() || Instant::now() >= until {
                let left = state.waiting.len();
                state.waiting.clear();
                // What the thread is writing may or may not arrive.
                let under_way = state.under_way;
                state.drop_bytes(left.saturating_add(under_way));
                given_up = true;
                continue;
            }
            state = shared.taken.wait_timeout(state, BETWEEN_LOOKS);
        }
        let loss = state.loss(true);
        drop(state);
        shared.say(loss);
        !given_up
    }

    /// Bytes that were dropped.
    pub fn lost(&self) -> u64 {
        self.shared().lock().lost
    }

    fn shared(&self) -> &Shared {
        &self.0 .0
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.filled.notify_one();
    }
}

/// Writes `text` to standard error after earlier messages. Waits for the reader only after the
/// machine has stopped.
///
/// # Errors
/// It cannot be written, or nobody reads it.
pub(crate) fn write_to_standard_error(text: &str) -> io::Result<()> {
    let until = deadline::of(Turn::Report);
    match Output::standard_error() {
        Ok(error) => error.take_whole(text, until),
        Err(_) => {
            let until = until.unwrap_or_else(deadline::soon);
            Patient::until(io::stderr(), until).write_all(text.as_bytes())
        }
    }
}

/// Prints `line` to standard error without waiting for the reader.
pub(crate) fn say(line: &str) {
    match Output::standard_error() {
        Ok(error) => error.take(format!("{line}\n").as_bytes()),
        Err(_) => {
            // Otherwise blocking; if that fails, the exit code has to suffice.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }
}

/// Prints `line` to standard error, and waits for that, at most for `patience`.
pub(crate) fn say_until(line: &str, patience: Duration) {
    let (line, until) = (format!("{line}\n"), Instant::now() + patience);
    // If that fails, the exit code has to suffice.
    let _ = match Output::standard_error() {
        Ok(error) => error.take_whole(&line, Some(until)),
        Err(_) => Patient::until(io::stderr(), until).write_all(line.as_bytes()),
    };
}

/// Waits until all messages are written, but not for a reader that makes no progress.
pub(crate) fn end() {
    if let Ok(error) = Output::standard_error() {
        let until = deadline::of(Turn::End).unwrap_or_else(|| Instant::now() + PATIENCE);
        // Losses of standard output are reported there, too, unless nobody reads it.
        if error.flush(until) {
            error.flush(until);
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.take(bytes);
        Ok(bytes.len())
    }

    /// Does not wait: see [`Output::flush`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The output to `descriptor`, created on first use.
fn of_process(once: &OnceLock<Output>, name: &str, descriptor: BorrowedFd<'_>) -> Result<Output> {
    if let Some(output) = once.get() {
        return Ok(output.clone());
    }
    let file = descriptor
        .try_clone_to_owned()
        .map_err(|source| Error::Output { what: name.to_owned(), source })?;
    let output = Output::new(name.to_owned(), File::from(file))?;
    Ok(once.get_or_init(|| output).clone())
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The thread: writes to `file` until no handle is left.
    fn write_all_to(&self, file: &File) {
        let mut piece = Vec::with_capacity(PIECE);
        while self.next(&mut piece) {
            let result = self.write_piece(file, &piece);
            let mut state = self.lock();
            if let Err(error) = result {
                let left = state.under_way;
                state.drop_bytes(left);
                state.failure = Some(error);
            }
            state.under_way = 0;
            let loss = if state.is_written() { state.loss(false) } else { None };
            drop(state);
            self.taken.notify_all();
            self.say(loss);
        }
    }

    /// Waits for the next `piece`; returns whether there is one.
    fn next(&self, piece: &mut Vec<u8>) -> bool {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            if state.closed {
                return false;
            }
            state = self.filled.wait(state);
        }
        piece.clear();
        let length = state.waiting.len().min(PIECE);
        piece.extend(state.waiting.drain(..length));
        state.under_way = length;
        true
    }

    fn write_piece(&self, mut file: &File, mut piece: &[u8]) -> io::Result<()> {
        while !piece.is_empty() {
            let length = match write_some(&mut file, piece, PATIENCE) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut && !self.lock().closed => 0,
                length => length?,
            };
            piece = piece.get(length..).unwrap_or_default();
            let mut state = self.lock();
            state.written = state.written.saturating_add(length as u64);
            state.under_way = piece.len();
        }
        Ok(())
    }

    fn say(&self, loss: Option<String>) {
        if let Some(loss) = loss {
            log::warn!("{}: {loss}", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn output() -> (Output, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(ours));
        (Output::new("test".into(), file).unwrap(), theirs)
    }

    #[test]
    fn what_the_buffer_holds_is_not_lost_however_late_it_is_read() {
        let (output, mut reader) = output();
        let bytes: Vec<u8> = (0..CAPACITY).map(|at| (at / 7) as u8).collect();
        for piece in bytes.chunks(1000) {
            output.take(piece);
        }
        drop(output);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert!(read == bytes, "{} of {} bytes", read.len(), bytes.len());
    }

    #[test]
    fn what_nobody_reads_is_dropped_in_one_piece_and_counted() {
        let (output, reader) = output();
        let block = [b'x'; 4096];
        for _ in 0..3 * CAPACITY / block.len() {
            output.take(&block);
        }
        let dropped = output.shared().lock().dropped;
        assert!(dropped >= CAPACITY as u64, "{dropped}");
        assert!(output.shared().lock().dropping);
        // The end does not wait for a reader that makes no progress.
        output.flush(Instant::now() + PATIENCE);
        let state = output.shared().lock();
        assert!(state.waiting.is_empty() && state.dropped == 0 && state.said.is_some());
        drop(state);
        drop(reader);
    }

    #[test]
    fn an_error_is_counted_and_named() {
        let (output, reader) = output();
        drop(reader);
        output.take(b"lost");
        let mut state = output.shared().lock();
        while !state.is_written() {
            state = output.shared().taken.wait(state);
        }
        // It was reported at once.
        assert!(state.said.is_some());
        state.take(&[0; CAPACITY + 1], CAPACITY + 1);
        let loss = state.loss(true).unwrap();
        assert!(loss.starts_with(&format!("{} bytes", CAPACITY + 1)), "{loss}");
    }
}

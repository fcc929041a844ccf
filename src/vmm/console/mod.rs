// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Connects standard input to the serial port.
//!
//! A terminal is raw while the guest uses it, and read even when the guest reads nothing, as
//! `Ctrl-A x` must end the machine of a hung guest. Other inputs are only read as the guest
//! consumes them.

pub(crate) mod deadline;
pub(crate) mod output;
pub(crate) mod serial;
pub(crate) mod terminal;

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use rustix::io::Errno;
use rustix::stdio::stdin;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use crate::console::serial::SerialPort;
use crate::console::terminal::Input;
use crate::process::overdue;
use crate::process::stop::{StopReason, Stopper};
use crate::{Error, Result};

/// Capacity for typed input that the guest has not read, in bytes. More is lost, as with a real
/// port.
const TYPED_MAX: usize = 64 << 10;
/// How much is read at once.
const PIECE: usize = 4096;
/// How often a background process checks whether it has the terminal again, as nothing notifies it.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

const ESCAPE: u8 = 0x01;

const HINT: &str = "twostage: Ctrl-A x ends the machine, Ctrl-A h shows help";
const HELP: &str = "\r\n\
Ctrl-A h  this help\r\n\
Ctrl-A x  end the machine\r\n\
Ctrl-A a  send Ctrl-A to the guest; so does Ctrl-A Ctrl-A\r\n";

/// The user's wish is not lost between two lives of a machine: `Ctrl-A x` came while one stopped.
static ENDED: AtomicBool = AtomicBool::new(false);
/// Ctrl-A came, and no key after it yet, which the next life may read.
static ESCAPED: AtomicBool = AtomicBool::new(false);

/// Whether the user has ended a machine that stopped for another reason: it must not start again.
pub(crate) fn ended_by_user() -> bool {
    ENDED.load(Ordering::Relaxed)
}

/// The meaning of a typed byte.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Guest(u8),
    Help,
    End,
    Nothing,
}

/// Separates the guest's keys from escape sequences.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn typed(&mut self, byte: u8) -> Key {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                Key::Nothing
            }
            (false, byte) => Key::Guest(byte),
            (true, ESCAPE | b'a') => Key::Guest(ESCAPE),
            (true, b'x') => Key::End,
            (true, b'h' | b'?') => Key::Help,
            (true, _) => Key::Nothing,
        }
    }
}

/// The kind of standard input.
#[derive(Debug)]
enum Source {
    /// A raw terminal.
    Typed(Keys),
    /// A terminal that another process has: this one is in the background.
    Elsewhere,
    /// A pipe or similar, which can be polled.
    Stream,
    /// A file, which is always ready.
    File,
    /// End of file.
    Ended,
}

/// Standard input, connected to a serial port.
pub(crate) struct Console {
    port: Arc<SerialPort>,
    stopper: Stopper,
    input: Input,
    source: Source,
    /// Read, but the port has no room for it yet.
    waiting: VecDeque<u8>,
    /// Standard input is in the event loop.
    polled: bool,
    /// When to check for the terminal.
    look: TimerFd,
    /// Number of lost typed bytes.
    lost: u64,
}

impl Console {
    /// Connects standard input to `port`; the escape sequence stops the machine through `stopper`.
    pub fn new(port: Arc<SerialPort>, stopper: Stopper) -> Result<Self> {
        let look = TimerFd::new().map_err(Error::os("timerfd"))?;
        let input = Input::new(stdin()).map_err(Error::os("standard input"))?;
        let (waiting, polled, lost) = (VecDeque::new(), false, 0);
        let source = if terminal::is_there() { Source::Elsewhere } else { Source::Stream };
        Ok(Self { port, stopper, input, source, waiting, polled, look, lost })
    }

    /// Takes the terminal, if it is available.
    fn take_terminal(&mut self, ops: &mut EventOps) {
        if !terminal::is_ours() {
            return self.leave_terminal(ops);
        }
        match terminal::make_raw() {
            Ok(first) => {
                if first {
                    output::say(HINT);
                }
                let escaped = ESCAPED.load(Ordering::Relaxed);
                self.source = Source::Typed(Keys { escaped });
                self.poll(ops);
                if let Err(error) = self.look.clear() {
                    log::debug!("timer: {error}");
                }
            }
            Err(error) => {
                log::warn!("the terminal cannot be made raw: {error}; there is no input");
                self.end(ops);
            }
        }
    }

    /// The process is in the background: others use the terminal.
    fn leave_terminal(&mut self, ops: &mut EventOps) {
        ESCAPED.store(false, Ordering::Relaxed);
        self.unpoll(ops);
        self.source = Source::Elsewhere;
        if let Err(error) = self.look.reset(BETWEEN_LOOKS, Some(BETWEEN_LOOKS)) {
            log::debug!("timer: {error}");
        }
    }

    fn end(&mut self, ops: &mut EventOps) {
        self.unpoll(ops);
        self.source = Source::Ended;
    }

    /// Adds standard input to the event loop.
    fn poll(&mut self, ops: &mut EventOps) {
        if self.polled {
            return;
        }
        match ops.add(Events::new(&self.input, EventSet::IN)) {
            Ok(()) => self.polled = true,
            // A file on disk cannot be polled, and need not be.
            Err(_) => self.source = Source::File,
        }
    }

    /// Removes it from the event loop: a closed pipe would be reported continuously.
    fn unpoll(&mut self, ops: &mut EventOps) {
        if std::mem::take(&mut self.polled) {
            if let Err(error) = ops.remove(Events::empty(&self.input)) {
                log::debug!("standard input: {error}");
            }
        }
    }

    /// Passes waiting input to the guest.
    fn feed(&mut self) {
        while !self.waiting.is_empty() {
            let taken = self.port.enqueue(self.waiting.make_contiguous());
            if taken == 0 {
                return;
            }
            self.waiting.drain(..taken.min(self.waiting.len()));
        }
    }

    /// Reads what is available and passes it to the guest.
    fn read(&mut self, ops: &mut EventOps) {
        let typed = matches!(self.source, Source::Typed(_));
        if typed && !terminal::is_ours() {
            return self.leave_terminal(ops);
        }
        let mut bytes = [0; PIECE];
        let read = self.input.read(&mut bytes);
        let read = read.map(|length| bytes.get(..length).unwrap_or_default());
        match (read, &mut self.source) {
            (Err(Errno::AGAIN | Errno::INTR), _) => {}
            (Err(Errno::IO), Source::Typed(_)) if !terminal::is_ours() => self.leave_terminal(ops),
            (Err(error), _) => {
                log::debug!("standard input: {error}");
                self.end(ops);
            }
            (Ok([]), _) => self.end(ops),
            (Ok(bytes), Source::Typed(keys)) => {
                let typed: Vec<_> = bytes.iter().map(|byte| keys.typed(*byte)).collect();
                ESCAPED.store(keys.escaped, Ordering::Relaxed);
                typed.into_iter().for_each(|key| self.typed(key));
            }
            (Ok(bytes), _) => self.waiting.extend(bytes),
        }
        self.feed();
    }

    fn typed(&mut self, key: Key) {
        match key {
            Key::Guest(byte) if self.waiting.len() < TYPED_MAX => self.waiting.push_back(byte),
            Key::Guest(_) => self.lost = self.lost.saturating_add(1),
            Key::Help => self.port.say(HELP),
            Key::End => {
                if !self.stopper.stop(StopReason::Escape) {
                    ENDED.store(true, Ordering::Relaxed);
                }
                overdue::asked_by_key();
            }
            Key::Nothing => {}
        }
    }

    /// There may be room for input.
    fn on_room(&mut self, ops: &mut EventOps) {
        self.feed();
        match self.source {
            Source::Stream if self.waiting.is_empty() => self.poll(ops),
            _ => {}
        }
        match self.source {
            Source::File if self.waiting.is_empty() => self.read(ops),
            _ => {}
        }
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [self.port.room().as_raw_fd(), self.look.as_raw_fd()] {
            if let Err(error) = ops.add(Events::new_raw(event, EventSet::IN)) {
                log::error!("serial input: {error}");
            }
        }
        match self.source {
            Source::Stream => self.on_room(ops),
            _ => self.take_terminal(ops),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.port.room().as_raw_fd() {
            // The value does not matter.
            let _ = self.port.room().read();
            self.on_room(ops);
        } else if events.fd() == self.look.as_raw_fd() {
            let _ = self.look.wait();
            if matches!(self.source, Source::Elsewhere) {
                self.take_terminal(ops);
            }
        } else {
            self.read(ops);
            // The rest is not read until the guest has consumed this.
            if matches!(self.source, Source::Stream) && !self.waiting.is_empty() {
                self.unpoll(ops);
            }
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        terminal::restore();
        if self.lost != 0 {
            log::warn!(
                "{} typed bytes were lost: the guest did not read them, and {TYPED_MAX} waited",
                self.lost
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_behind_the_escape_are_not_the_guests() {
        let mut keys = Keys::default();
        let typed: Vec<_> =
            b"a\x01\x01\x01a\x13\x01qx\x01h\x01x".iter().map(|b| keys.typed(*b)).collect();
        let typed: Vec<_> = typed.into_iter().filter(|key| *key != Key::Nothing).collect();
        let guest = |byte| Key::Guest(byte);
        let expected =
            [guest(b'a'), guest(1), guest(1), guest(0x13), guest(b'x'), Key::Help, Key::End];
        assert_eq!(typed, expected);
    }
}

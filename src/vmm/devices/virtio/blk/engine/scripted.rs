// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A disk that fails as it is told to, for fuzzers: without threads, so in the same order each
//! time.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use twostage::sync::Mutex;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::{Action, Engine, Finished, Operation};

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// At most this many bytes are.
    Short(usize),
    /// It fails with this errno.
    Fails(i32),
    /// It takes until the next operation is submitted, or the device waits.
    Later,
}

/// What becomes of the next operations, in order; those after them are done.
pub type Faults = Arc<Mutex<VecDeque<Outcome>>>;

/// The engine of such a disk.
#[derive(Debug)]
pub struct Scripted {
    file: Arc<File>,
    faults: Faults,
    begun: Vec<Operation>,
    finished: VecDeque<Finished>,
    event: EventFd,
}

impl Scripted {
    /// Performs operations on `file`.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new(file: Arc<File>, faults: Faults) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { file, faults, begun: Vec::new(), finished: VecDeque::new(), event })
    }

    fn perform(&mut self, mut operation: Operation, most: usize) {
        let offset = operation.offset;
        let action = operation.action;
        let bytes = operation.bytes();
        let bytes = bytes.split_at_mut(most.min(bytes.len())).0;
        let result = match action {
            Action::Read => self.file.read_at(bytes, offset),
            Action::Write => self.file.write_at(bytes, offset),
            Action::Flush => self.file.sync_data().map(|()| 0),
        };
        self.finished.push_back(Finished { operation, result });
    }
}

impl Engine for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn begin(&mut self, operation: Operation) {
        self.begun.push(operation);
    }

    fn submit(&mut self) -> io::Result<()> {
        for operation in std::mem::take(&mut self.begun) {
            let outcome = self.faults.lock().pop_front();
            match outcome.unwrap_or(Outcome::Done) {
                Outcome::Done => self.perform(operation, usize::MAX),
                Outcome::Short(most) => self.perform(operation, most),
                Outcome::Fails(errno) => {
                    let result = Err(io::Error::from_raw_os_error(errno));
                    self.finished.push_back(Finished { operation, result });
                }
                Outcome::Later => self.begun.push(operation),
            }
        }
        Ok(())
    }

    fn finished(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.faults.lock().retain(|outcome| *outcome != Outcome::Later);
        self.submit()
    }

    fn event(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

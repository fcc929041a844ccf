// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations by io_uring: a system call begins any number of them, and none collects them.
//!
//! Source: Linux's `io_uring(7)` and `io_uring_enter(2)`.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::register::{Probe, Restriction};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue, IoUring};

use super::{Action, Engine, Finished, Operation};

/// How often the kernel may say that it has no resources at the moment, in a row; and how long to
/// wait after the first time. It becomes twice as long each time, a third of a second in all.
const MOST_TRIES: u32 = 15;
const FIRST_WAIT: Duration = Duration::from_micros(10);

/// An io_uring for one disk.
pub(super) struct Uring {
    file: Arc<File>,
    ring: IoUring,
    /// The operations in the ring, by tag.
    operations: Vec<Option<Operation>>,
    /// Operations that the ring did not take.
    failed: VecDeque<Finished>,
}

impl Uring {
    /// A ring for up to `depth` operations on `file`.
    ///
    /// # Errors
    /// The kernel has no io_uring, lacks what is needed of it, or forbids it: by a seccomp filter,
    /// or by the sysctl `kernel.io_uring_disabled`.
    pub fn new(file: Arc<File>, depth: usize) -> io::Result<Self> {
        // A few, whatever the caller says.
        let entries = depth.next_power_of_two().min(1024) as u32;
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        // Without NODROP, completions could be lost.
        if !needed.iter().all(|code| probe.is_supported(*code))
            || !ring.params().is_feature_nodrop()
        {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // No filter of system calls sees what a ring is asked for: this one does nothing else.
        let [read, write, flush] = needed.map(Restriction::sqe_op);
        let none = Restriction::sqe_flags_allowed(0);
        let nothing = Restriction::sqe_op(opcode::Nop::CODE);
        ring.submitter().register_restrictions(&mut [read, write, flush, nothing, none])?;
        ring.submitter().register_enable_rings()?;
        let operations = (0..depth).map(|_| None).collect();
        let mut uring = Self { file, ring, operations, failed: VecDeque::new() };
        // A filter may permit to make a ring, and forbid to use it.
        uring.push(&opcode::Nop::new().build())?;
        uring.enter(1)?;
        uring.ring.completion().for_each(drop);
        Ok(uring)
    }

    /// Puts `entry` into the ring. It may only refer to what lives until it is finished.
    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            let mut queue = self.ring.submission();
            // SAFETY: `new` has an entry that refers to nothing, and `begin` one that refers to the
            // buffer of an operation in `operations`: there it stays, unmoved and unused, until the
            // kernel says that it is finished. `drop` leaks what is not.
            let pushed = unsafe { queue.push(entry) };
            drop(queue);
            if pushed.is_ok() {
                return Ok(());
            }
            // Full: the kernel has not taken earlier ones yet.
            self.enter(0)?;
        }
    }

    /// The kernel takes all entries; then waits for `wanted` that are finished.
    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        let mut tries = 0;
        loop {
            match self.ring.submit_and_wait(wanted) {
                // An entry with an error ends a call: the rest is for the next one.
                Ok(_) => {
                    let is_empty = self.ring.submission().is_empty();
                    if is_empty {
                        return Ok(());
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Out of memory, or completions have to be collected first, which the caller
                    // does: there is room for as many as there can be.
                    Some(libc::EAGAIN | libc::EBUSY) if tries < MOST_TRIES => {
                        thread::sleep(FIRST_WAIT.saturating_mul(1 << tries));
                        tries += 1;
                    }
                    _ => return Err(error),
                },
            }
        }
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn begin(&mut self, mut operation: Operation) {
        let (file, offset, tag) = (Fd(self.file.as_raw_fd()), operation.offset, operation.tag);
        let bytes = operation.bytes();
        // At most the size of a buffer.
        let (data, length) = (bytes.as_mut_ptr(), bytes.len() as u32);
        let entry = match operation.action {
            Action::Read => opcode::Read::new(file, data, length).offset(offset).build(),
            Action::Write => opcode::Write::new(file, data, length).offset(offset).build(),
            Action::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        };
        let Some(place @ None) = self.operations.get_mut(tag) else {
            let result = Err(io::Error::other("two operations with one tag"));
            return self.failed.push_back(Finished { operation, result });
        };
        // Moving the operation does not move what its buffer has on the heap.
        *place = Some(operation);
        if let Err(error) = self.push(&entry.user_data(tag as u64)) {
            if let Some(operation) = self.operations.get_mut(tag).and_then(Option::take) {
                // It is not for the owner to try again.
                let result = Err(io::Error::other(error));
                self.failed.push_back(Finished { operation, result });
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        let is_empty = self.ring.submission().is_empty();
        if is_empty {
            return Ok(());
        }
        self.enter(0)
    }

    fn finished(&mut self) -> Option<Finished> {
        if let Some(failed) = self.failed.pop_front() {
            return Some(failed);
        }
        loop {
            let entry = self.ring.completion().next()?;
            let place = self.operations.get_mut(entry.user_data() as usize);
            // Others have no tag of an operation.
            let Some(operation) = place.and_then(Option::take) else { continue };
            let result = match entry.result() {
                error @ ..0 => Err(io::Error::from_raw_os_error(-error)),
                // Not negative.
                count => Ok(count as usize),
            };
            return Some(Finished { operation, result });
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let is_empty = self.failed.is_empty() && self.ring.completion().is_empty();
        if is_empty {
            return self.enter(1);
        }
        Ok(())
    }

    fn event(&self) -> RawFd {
        // Readable while something is finished and not collected.
        self.ring.as_raw_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel may still write into these buffers: its owner drops an engine that failed.
        self.operations.drain(..).flatten().for_each(mem::forget);
    }
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let under_way = self.operations.iter().flatten().count();
        f.debug_struct("Uring").field("under_way", &under_way).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use twostage::skips::not_tested;

    use super::*;

    #[test]
    fn a_ring_opens_no_files() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let Ok(mut uring) = Uring::new(file, 4) else {
            return not_tested("no io_uring is to be had");
        };
        let here = Fd(libc::AT_FDCWD);
        let entry = opcode::OpenAt::new(here, c"/".as_ptr()).build();
        uring.push(&entry).unwrap();
        uring.enter(1).unwrap();
        let result = uring.ring.completion().next().unwrap().result();
        assert_eq!(result, -libc::EACCES);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that wait for a disk, one operation each.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::JoinHandle;

use twostage::sync::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::{Action, Engine, Finished, Operation};
use crate::process::jail::{self, Kind};

/// Threads of a disk at most. They are started when there is something for them to do.
const MOST: usize = 16;

/// Threads that perform operations.
#[derive(Debug)]
pub(super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    file: Arc<File>,
    work: Mutex<Work>,
    /// There is something to do, or it is over.
    to_do: Condvar,
    /// Something is finished.
    done: Condvar,
    event: EventFd,
}

#[derive(Debug, Default)]
struct Work {
    waiting: VecDeque<Operation>,
    finished: VecDeque<Finished>,
    /// Operations that threads perform now.
    under_way: usize,
    /// Threads without an operation.
    idle: usize,
    over: bool,
}

impl Threads {
    /// An engine for `file`.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn new(file: Arc<File>) -> io::Result<Self> {
        let shared = Shared {
            file,
            work: Mutex::default(),
            to_do: Condvar::default(),
            done: Condvar::default(),
            event: EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new() })
    }
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    fn begin(&mut self, operation: Operation) {
        let mut work = self.shared.work.lock();
        work.waiting.push_back(operation);
        let more = work.waiting.len() > work.idle && self.threads.len() < MOST;
        drop(work);
        self.shared.to_do.notify_one();
        if !more {
            return;
        }
        let shared = self.shared.clone();
        match jail::start("disk", Kind::Disk, move || perform(&shared)) {
            Ok(thread) => self.threads.push(thread),
            Err(error) if self.threads.is_empty() => {
                let mut work = self.shared.work.lock();
                if let Some(operation) = work.waiting.pop_back() {
                    work.finished.push_back(Finished { operation, result: Err(error) });
                    // Read by nobody, so it cannot be full: see `Engine::event`.
                    let _ = self.shared.event.write(1);
                }
            }
            // Those that there are do it.
            Err(_) => {}
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn finished(&mut self) -> Option<Finished> {
        self.shared.work.lock().finished.pop_front()
    }

    fn wait(&mut self) -> io::Result<()> {
        let work = self.shared.work.lock();
        drop(self.shared.done.wait_while(work, |work| {
            work.finished.is_empty() && (work.under_way > 0 || !work.waiting.is_empty())
        }));
        Ok(())
    }

    fn event(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut work = self.shared.work.lock();
        work.over = true;
        // What was not begun is not done.
        work.waiting.clear();
        let waits = work.under_way > 0;
        drop(work);
        self.shared.to_do.notify_all();
        // A thread that waits for the disk ends, and releases it, when the disk answers. Others do
        // now, so that the disk is free when this returns.
        if !waits {
            self.threads.drain(..).for_each(|thread| drop(thread.join()));
        }
    }
}

/// Performs operations until it is over.
fn perform(shared: &Shared) {
    let mut work = shared.work.lock();
    loop {
        work.idle += 1;
        work = shared.to_do.wait_while(work, |work| work.waiting.is_empty() && !work.over);
        work.idle -= 1;
        let Some(mut operation) = work.waiting.pop_front() else { return };
        work.under_way += 1;
        drop(work);
        let result = once(&shared.file, &mut operation);
        work = shared.work.lock();
        work.under_way -= 1;
        work.finished.push_back(Finished { operation, result });
        shared.done.notify_all();
        // It fails only after 2^64 - 2 writes without a read: it is readable then, too.
        let _ = shared.event.write(1);
    }
}

/// Performs `operation`; perhaps not all of it.
fn once(file: &File, operation: &mut Operation) -> io::Result<usize> {
    let (action, offset) = (operation.action, operation.offset);
    match action {
        Action::Read => file.read_at(operation.bytes(), offset),
        Action::Write => file.write_at(operation.bytes(), offset),
        Action::Flush => file.sync_data().map(|()| 0),
    }
}

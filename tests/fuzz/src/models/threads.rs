// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads of executions: to start one takes longer than most executions.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, MutexGuard};
use std::thread;

use twostage::threads::{NewThread, ThreadStart};

/// Runs what needs a thread on one of an earlier execution, if one has nothing to do.
#[derive(Debug)]
pub struct IdleThreads;

impl IdleThreads {
    fn all() -> MutexGuard<'static, Vec<Sender<NewThread>>> {
        static ALL: Mutex<Vec<Sender<NewThread>>> = Mutex::new(Vec::new());
        ALL.lock().expect("nothing panics with it")
    }

    /// A new thread, which is idle after whatever it runs.
    fn start() -> Sender<NewThread> {
        let (thread, work) = mpsc::channel::<NewThread>();
        let idle = thread.clone();
        thread::spawn(move || {
            for next in work {
                next.run();
                Self::all().push(idle.clone());
            }
        });
        thread
    }
}

impl ThreadStart for IdleThreads {
    fn start(&self, thread: NewThread) -> io::Result<()> {
        let idle = Self::all().pop();
        let sent = idle.unwrap_or_else(Self::start).send(thread);
        sent.map_err(|_| io::Error::other("no thread takes it"))
    }
}

/// Starts none: nobody reads a queue.
#[derive(Debug)]
pub struct NoThreads;

impl ThreadStart for NoThreads {
    fn start(&self, thread: NewThread) -> io::Result<()> {
        drop(thread);
        Ok(())
    }
}

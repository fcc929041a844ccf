// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Threads that read a queue of the host and deliver what is in it: events of an SMMUv3, page
//! requests of a VT-d.

use crate::sync::{Condvar, Mutex};
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use crate::iommufd::{Errno, HostError, ObjectId, Readiness};
use crate::jail;
use crate::threads::{Started, ThreadStart};
use crate::warn_limited;

/// The first and the longest pause after a read failed for lack of memory; each pause is twice as
/// long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How reading a queue ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Drained {
    /// It is empty for now.
    Empty,
    /// It is time to stop.
    Stopped,
    /// It cannot be read any more.
    Broken(HostError),
}

/// Reads a queue until it is empty: `next` reads and delivers one thing, if there is one. Temporary
/// failures are retried after a `pause`, which returns whether to continue.
pub(super) fn drain(
    mut next: impl FnMut() -> crate::iommufd::Result<bool>,
    pause: impl Fn(Duration) -> bool,
) -> Drained {
    let mut next_pause = FIRST_PAUSE;
    loop {
        match next() {
            Ok(true) => next_pause = FIRST_PAUSE,
            Ok(false) => return Drained::Empty,
            Err(error) if passes(error.errno) => {
                if next_pause == FIRST_PAUSE {
                    warn_limited!("{error}; retrying until it works");
                }
                if !pause(next_pause) {
                    return Drained::Stopped;
                }
                next_pause = (next_pause * 2).min(LONGEST_PAUSE);
            }
            Err(error) => return Drained::Broken(error),
        }
    }
}

/// Whether a read that failed with `errno` may succeed later: what is in the queue is still there.
fn passes(errno: Errno) -> bool {
    errno == Errno::ENOMEM
}

/// What the thread waits for.
#[derive(Debug, Default)]
pub(super) struct Signal {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    readable: bool,
    stop: bool,
    /// The thread waits.
    idle: bool,
    /// The thread has ended.
    over: bool,
}

impl Signal {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock()
    }

    /// Waits until there is something to read (true) or it is time to stop (false).
    fn wait(&self) -> bool {
        let mut wanted = self.wanted();
        wanted.idle = true;
        self.changed.notify_all();
        let nothing = |wanted: &mut Wanted| !wanted.readable && !wanted.stop;
        let mut wanted = self.changed.wait_while(wanted, nothing);
        // Anything that arrives after the queue was found empty is signalled again.
        (wanted.readable, wanted.idle) = (false, false);
        !wanted.stop
    }

    /// Waits until the thread has delivered all that can be read now; false when it has not after
    /// `time`.
    pub fn quiesce(&self, time: Duration) -> bool {
        let mut wanted = self.wanted();
        // Whether or not it was noticed already.
        wanted.readable = true;
        self.changed.notify_all();
        let busy = |wanted: &mut Wanted| !wanted.over && (wanted.readable || !wanted.idle);
        !self.changed.wait_timeout_while(wanted, time, busy).1
    }

    /// Whether the thread has ended.
    pub fn is_over(&self) -> bool {
        self.wanted().over
    }

    fn end(&self) {
        self.wanted().over = true;
        self.changed.notify_all();
    }

    /// Waits for `time`; false when it is time to stop.
    pub fn pause(&self, time: Duration) -> bool {
        let going = |wanted: &mut Wanted| !wanted.stop;
        !self.changed.wait_timeout_while(self.wanted(), time, going).0.stop
    }

    pub fn stop(&self) {
        self.wanted().stop = true;
        self.changed.notify_all();
    }
}

impl Readiness for Signal {
    fn changed(&self, readable: bool) {
        self.wanted().readable |= readable;
        self.changed.notify_all();
    }
}

/// A thread that reads one queue. It takes no lock of nesting: the holder of one may be waiting for
/// the virtual IOMMU, which the thread calls.
#[derive(Debug)]
pub(super) struct QueueThread {
    object: ObjectId,
    pub(super) signal: Arc<Signal>,
    pub(super) thread: Option<Started>,
}

impl QueueThread {
    /// Has `threads` start a thread called `name` for the queue `object`: whenever that becomes
    /// readable, which `watch` arranges, it calls `drain` with how to pause, as long as that leaves
    /// the queue empty.
    ///
    /// # Errors
    /// There is no thread for it, or none that waits for the queue. `drain` is dropped.
    pub fn start(
        threads: &dyn ThreadStart,
        name: &str,
        object: ObjectId,
        watch: impl FnOnce(Arc<Signal>) -> crate::iommufd::Result<()>,
        mut drain: impl FnMut(&dyn Fn(Duration) -> bool) -> Drained + Send + 'static,
    ) -> io::Result<Self> {
        let signal = Arc::<Signal>::default();
        let waited_for = signal.clone();
        let read = move || {
            let pause = |time| waited_for.pause(time);
            while waited_for.wait() && drain(&pause) == Drained::Empty {}
            waited_for.end();
        };
        let thread = Started::new(threads, name.into(), &jail::EVENTS, read)?;
        // Dropped, the thread ends.
        let started = Self { object, signal, thread: Some(thread) };
        watch(started.signal.clone()).map_err(io::Error::other)?;
        Ok(started)
    }

    /// The queue.
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// For [`Signal::quiesce`], without any lock.
    pub fn signal(&self) -> Arc<Signal> {
        self.signal.clone()
    }

    /// Ends the thread and what it holds of the queue, which can then be destroyed.
    pub fn stop(self) -> ObjectId {
        self.object
    }
}

impl Drop for QueueThread {
    /// Ends the thread, and what it holds with it.
    fn drop(&mut self) {
        self.signal.stop();
        // The last owner of the virtual IOMMU may be the thread itself, in a call to it: then it
        // ends by itself, right after.
        if let Some(thread) = self.thread.take() {
            thread.join();
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the library starts a thread, a VMM may take part: to put the thread in a jail
//! ([`crate::jail`]) or a cgroup, or to run it on a thread of its own.
//!
//! The threads are those of event queues, none else: [`KernelHost::with_threads`] says who starts
//! the one that waits for a queue of the kernel, [`SmmuNesting::with_threads`] and
//! [`Smmuv3Builder::threads`] say it of the one that brings events to the virtual SMMU, and the
//! same of a virtual VT-d say it of the one that brings page requests.
//!
//! [`KernelHost::with_threads`]: crate::iommufd::KernelHost
//! [`SmmuNesting::with_threads`]: crate::nesting::smmuv3::SmmuNesting::with_threads
//! [`Smmuv3Builder::threads`]: crate::unit::Smmuv3Builder::threads

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use crate::jail::ThreadKind;
use crate::sync::{Condvar, Mutex};

/// Starts the library's threads.
pub trait ThreadStart: fmt::Debug + Send + Sync {
    /// Has some thread call [`NewThread::run`], soon, and does not wait for that. What this does on
    /// the new thread before then, such as installing a filter, holds for all that the library does
    /// there.
    ///
    /// # Errors
    /// There is no thread for it. Whoever needed it fails.
    fn start(&self, thread: NewThread) -> io::Result<()>;
}

/// What happens by default: each runs on a new thread of the standard library, with its name.
#[derive(Debug, Clone, Copy, Default)]
pub struct StdThreads;

impl ThreadStart for StdThreads {
    fn start(&self, thread: NewThread) -> io::Result<()> {
        let builder = thread::Builder::new().name(thread.name().to_owned());
        builder.spawn(|| thread.run()).map(drop)
    }
}

/// Work of the library that needs a thread. If it is dropped without being run, that is logged as
/// an error: events do not arrive.
#[must_use = "dropped, it does not run"]
pub struct NewThread {
    name: String,
    kind: &'static ThreadKind,
    // Fields are dropped in this order: what the work holds is released when it is over.
    run: Box<dyn FnOnce() + Send>,
    ending: Ending,
}

impl NewThread {
    /// A name for the thread, of which Linux shows the first 15 bytes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it does.
    pub fn kind(&self) -> &'static ThreadKind {
        self.kind
    }

    /// Does the work on this thread; returns when it is told to end, or cannot go on.
    pub fn run(self) {
        let Self { run, mut ending, .. } = self;
        ending.begins();
        run();
    }
}

impl fmt::Debug for NewThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewThread").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How far the work is.
#[derive(Debug, Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// It was taken to be run.
    taken: bool,
    by: Option<ThreadId>,
    over: bool,
}

impl State {
    /// It will never be run, though it was taken for that.
    fn is_forgotten(&self) -> bool {
        self.taken && self.over && self.by.is_none()
    }
}

/// Says that the work is over, when dropped.
struct Ending {
    name: String,
    progress: Arc<Progress>,
    begun: bool,
}

fn say_forgotten(name: &str) {
    log::error!("the thread {name} was not run: the VMM's ThreadStart dropped it");
}

impl Ending {
    fn begins(&mut self) {
        self.begun = true;
        self.progress.state.lock().by = Some(thread::current().id());
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if self.begun && thread::panicking() {
            log::error!("the thread {} panicked", self.name);
        }
        let mut state = self.progress.state.lock();
        state.over = true;
        if state.is_forgotten() {
            say_forgotten(&self.name);
        }
        drop(state);
        self.progress.changed.notify_all();
    }
}

/// A thread that was started, for whoever needs it.
#[derive(Debug)]
pub(crate) struct Started(Arc<Progress>);

impl Started {
    /// Has `threads` start `run`.
    pub fn new(
        threads: &dyn ThreadStart,
        name: String,
        kind: &'static ThreadKind,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let progress = Arc::<Progress>::default();
        let ending = Ending { name: name.clone(), progress: progress.clone(), begun: false };
        // If there is no thread for it, that is an error, and it is dropped with that.
        threads.start(NewThread { name: name.clone(), kind, run: Box::new(run), ending })?;
        let mut state = progress.state.lock();
        state.taken = true;
        if state.is_forgotten() {
            say_forgotten(&name);
        }
        drop(state);
        Ok(Self(progress))
    }

    /// Waits until the work is over and all that it held is released, except on its own thread,
    /// which releases it right after.
    pub fn join(self) {
        let mut state = self.0.state.lock();
        if state.by != Some(thread::current().id()) {
            state = self.0.changed.wait_while(state, |state| !state.over);
        }
        drop(state);
    }

    /// Whether the work is over.
    #[cfg(test)]
    pub fn is_over(&self) -> bool {
        self.0.state.lock().over
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{channel, Sender};

    use super::*;
    use crate::jail::{EVENTS, QUEUE};
    use crate::patience::wait_until;

    /// Hands threads to whoever has the other end.
    #[derive(Debug)]
    struct Pool(Mutex<Sender<NewThread>>);

    impl ThreadStart for Pool {
        fn start(&self, thread: NewThread) -> io::Result<()> {
            self.0.lock().send(thread).map_err(|_| io::ErrorKind::Other.into())
        }
    }

    #[test]
    fn a_thread_of_the_standard_library_has_the_name() {
        let (sender, receiver) = channel();
        let run = move || sender.send(thread::current().name().map(str::to_owned)).unwrap();
        let started = Started::new(&StdThreads, "queue 7".into(), &QUEUE, run).unwrap();
        assert_eq!(receiver.recv().unwrap().as_deref(), Some("queue 7"));
        started.join();
    }

    #[test]
    fn the_caller_runs_it_when_it_likes() {
        let (sender, threads) = channel();
        let (held, released) = channel::<()>();
        let work = move || drop(held);
        let pool = Pool(Mutex::new(sender));
        let started = Started::new(&pool, "smmu-events".into(), &EVENTS, work).unwrap();
        let thread = threads.recv().unwrap();
        assert_eq!((thread.name(), thread.kind().name), ("smmu-events", EVENTS.name));
        assert!(!started.is_over());
        thread.run();
        assert!(started.is_over());
        started.join();
        assert!(released.recv().is_err(), "what it held is released");
    }

    #[test]
    fn work_that_is_not_run_is_waited_for_no_longer() {
        let (sender, threads) = channel();
        let pool = Pool(Mutex::new(sender));
        let never = || unreachable!("it is not run");
        let started = Started::new(&pool, "queue 1".into(), &QUEUE, never).unwrap();
        drop(threads.recv().unwrap());
        started.join();
        drop(threads);
        assert!(Started::new(&pool, "queue 1".into(), &QUEUE, || ()).is_err());
    }

    #[test]
    fn a_panic_ends_the_wait() {
        let (held, released) = channel::<()>();
        let work = move || {
            let _held = held;
            panic!("on purpose");
        };
        Started::new(&StdThreads, "queue 2".into(), &QUEUE, work).unwrap().join();
        assert!(released.recv().is_err());
    }

    #[test]
    fn work_does_not_wait_for_itself() {
        let itself = Arc::new(Mutex::new(None::<Started>));
        let of_itself = itself.clone();
        let (done, is_done) = channel();
        let work = move || {
            wait_until("the other thread", || of_itself.lock().is_some());
            of_itself.lock().take().unwrap().join();
            done.send(()).unwrap();
        };
        let started = Started::new(&StdThreads, "queue 3".into(), &QUEUE, work).unwrap();
        *itself.lock() = Some(started);
        is_done.recv().unwrap();
    }
}

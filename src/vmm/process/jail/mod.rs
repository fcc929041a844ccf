// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The jail of the process (`--jail`): what a guest that has taken over a thread can still do.
//!
//! In order:
//! 1. [`prepare`] makes the filters, before there are other threads.
//! 2. Everything that the command line names is opened, and the threads that need nothing else are
//!    started. Each of them gives up every privilege and installs the filter of its [`Kind`] before
//!    it does anything else, but for the side core, which opens files. Whoever starts it waits for
//!    that.
//! 3. [`lock`]: the main thread gives up what it does not need any more: files (`landlock`),
//!    capabilities, its user, and with a filter most system calls. The vCPUs are started after
//!    that, and all other threads by these: they inherit it, and each has its own filter on top.
//!
//! The filter of a thread allows what threads of its kind do, and what those do that it starts
//! ([`kinds`]). A refused call ends the process: one line, and an exit code of its own
//! ([`refusal`]).
//!
//! Without `--on-reset restart` nothing is opened after [`lock`]. With it the main thread opens the
//! files of the command line again for each life, so it keeps access to these and no others, the
//! capabilities for that, and its user.
//!
//! With `--jail log` there are only filters, and what they would refuse is done, and recorded by
//! the kernel (in its log, or that of auditd, by the thread's name). Landlock cannot do that.

mod filter;
mod ioctls;
mod kinds;
mod privileges;
mod refusal;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::convert::Infallible;
use std::fmt::Write;
use std::io;
use std::sync::mpsc::{channel, Sender};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};

use rustix::process::{set_dumpable_behavior, DumpableBehavior};
use seccompiler::{apply_filter, BpfProgram};
use twostage::threads::{NewThread, ThreadStart};

use crate::process::last_line::Line;
use crate::process::{exit_code, limits};
pub(crate) use kinds::Kind;
pub(crate) use privileges::{can_become, Access, Reopened, User};

/// `--jail`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Mode {
    /// What is not allowed is refused.
    On,
    /// There is no jail.
    #[default]
    Off,
    /// System calls that are not allowed are recorded, and made.
    Log,
}

/// How the process is jailed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    pub mode: Mode,
    /// The user that the process becomes, if any.
    pub user: Option<User>,
    /// What the main thread opens again, if it builds machines in the jail.
    pub reopened: Option<Vec<Reopened>>,
}

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
#[error("--jail: {what}: {source}")]
pub struct JailError {
    what: &'static str,
    source: io::Error,
}

impl JailError {
    fn of<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self { what, source: io::Error::other(source) }
    }
}

const NO_FILTERS: &str = "this kernel, or a filter around this process, lets it have no filter of \
                          system calls; --jail off runs without";

/// The jail of this process, if it has one.
static JAIL: OnceLock<Jail> = OnceLock::new();

thread_local! {
    /// This thread has given up its privileges, and has a filter.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[derive(Debug)]
struct Jail {
    settings: Settings,
    /// By kind.
    filters: Vec<BpfProgram>,
    processes: BpfProgram,
}

/// Prepares the jail of the process: called once, before other threads are started.
///
/// # Errors
/// A filter cannot be made, or the kernel has none.
pub(crate) fn prepare(settings: Settings) -> Result<(), JailError> {
    if settings.mode == Mode::Off {
        return Ok(());
    }
    twostage::jail::prepare().map_err(JailError::of("a thread"))?;
    let make = |kind: &Kind| filter::of(*kind, &settings).map_err(JailError::of("a filter"));
    let filters = Kind::ALL.iter().map(make).collect::<Result<_, _>>()?;
    let processes = filter::no_processes().map_err(JailError::of("a filter"))?;
    refusal::report_refusals();
    if settings.user.is_some() {
        privileges::no_limit_of_processes();
    }
    // There is only one.
    let _ = JAIL.set(Jail { settings, filters, processes });
    Ok(())
}

impl Jail {
    /// The current thread is of that kind from now on. `inside`: it was started by one in the jail.
    fn enter(&self, kind: Kind, inside: bool) -> Result<(), JailError> {
        if self.settings.mode == Mode::On {
            if !inside {
                privileges::no_files()?;
                privileges::become_user(self.settings.user)?;
            }
            privileges::no_capabilities()?;
        }
        self.filter(kind, inside)
    }

    /// `inside`: there is a filter already, inherited.
    fn filter(&self, kind: Kind, inside: bool) -> Result<(), JailError> {
        let Some(filter) = self.filters.get(kind as usize) else { return Ok(()) };
        let others = (!inside).then_some(&self.processes);
        for filter in others.into_iter().chain([filter]) {
            apply_filter(filter).map_err(JailError::of(NO_FILTERS))?;
        }
        INSIDE.set(true);
        Ok(())
    }
}

/// The main thread has opened everything, and is jailed from now on, and so are all others. From
/// the second call on, this does nothing.
///
/// # Errors
/// The system refuses something.
pub(crate) fn lock() -> Result<(), JailError> {
    let Some(jail) = JAIL.get().filter(|_| !INSIDE.get()) else { return Ok(()) };
    if jail.settings.mode == Mode::On {
        match &jail.settings.reopened {
            None => {
                privileges::no_files()?;
                privileges::become_user(jail.settings.user)?;
                privileges::no_capabilities()?;
            }
            Some(reopened) => {
                privileges::only_files(reopened)?;
                privileges::capabilities_to_reopen()?;
            }
        }
        let dumpable = set_dumpable_behavior(DumpableBehavior::NotDumpable);
        dumpable.map_err(JailError::of("PR_SET_DUMPABLE"))?;
    }
    jail.filter(Kind::Main, false)
}

/// The current thread is in the jail: what it makes is made there.
pub(crate) fn is_inside() -> bool {
    INSIDE.get()
}

/// The place in the jail of a thread that is started now.
#[derive(Debug)]
pub(crate) struct Place {
    kind: Kind,
    inside: bool,
    /// Whoever starts the thread waits until this is dropped: it was taken, or there is no thread.
    _settled: Sender<Infallible>,
}

impl Place {
    /// The current thread, which was started, takes it. If that fails, the process ends.
    pub fn take(self) {
        let Some(jail) = JAIL.get() else { return };
        if let Err(error) = jail.enter(self.kind, self.inside) {
            let name = thread::current().name().unwrap_or_default().to_owned();
            let advice = limits::advice(&error.to_string());
            // Of several threads one says it. What does not fit is cut off.
            let mut line = Line::new();
            let _ = writeln!(line, "twostage: error: thread {name}: {error}{advice}");
            line.end(exit_code::OS_ERROR);
        }
    }
}

/// Starts a thread of that kind, which does `work` in the jail.
///
/// # Errors
/// There is no thread.
pub(crate) fn start<T: Send + 'static>(
    name: &str,
    kind: Kind,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    start_with_place(name, kind, |place| {
        place.take();
        work()
    })
}

/// Starts a thread of that kind. `work` takes its place in the jail when it has opened what it
/// needs.
///
/// If the current thread is outside of the jail, this waits until it has: a thread that gets no
/// place ends the process, and its line is to be the only one.
///
/// # Errors
/// There is no thread.
pub(crate) fn start_with_place<T: Send + 'static>(
    name: &str,
    kind: Kind,
    work: impl FnOnce(Place) -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let inside = is_inside();
    let (_settled, settled) = channel();
    let place = Place { kind, inside, _settled };
    let thread = thread::Builder::new().name(name.to_owned()).spawn(|| work(place))?;
    if !inside && JAIL.get().is_some() {
        let Err(_) = settled.recv();
    }
    Ok(thread)
}

/// Threads of the library, in the jail.
#[derive(Debug)]
pub(crate) struct JailedThreads;

impl ThreadStart for JailedThreads {
    fn start(&self, new: NewThread) -> io::Result<()> {
        let (name, kind) = (new.name().to_owned(), Kind::of_library(new.kind()));
        start(&name, kind, || new.run()).map(drop)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as events: handlers only set a bit and wake the event loop. Signals that were inherited
//! as ignored stay ignored. They come to a thread of their own, which the host never holds: the
//! kernel would rather give them to the main thread, which may be in a call that does not return.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use libc::{
    c_int, c_void, siginfo_t, SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGPWR, SIGQUIT,
    SIGSTKFLT, SIGTERM, SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU, SIGXFSZ,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::signal::{register_signal_handler, SIGRTMAX, SIGRTMIN};

use crate::process::disposition::{self, is_ignored};
use crate::process::jail::{self, Kind};
use crate::process::{bell, overdue};
use crate::{Error, Result};

/// Bits of the signals that came and were not taken yet; number 1 is the lowest.
static PENDING: AtomicU64 = AtomicU64::new(0);
/// Readable when there are any.
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// Polling interval.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// The signals for the event loop, besides real-time ones: all that would end the process and are
/// no errors of its own, and SIGCONT.
const SIGNALS: [c_int; 14] = [
    SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGTERM, SIGSTKFLT, SIGCONT, SIGXCPU,
    SIGVTALRM, SIGPROF, SIGIO, SIGPWR,
];

/// Those by which somebody asks for the end, and asks again. The kernel sends others again by
/// itself.
const REQUESTS: [c_int; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Those that do not end the machine.
const OTHERS: [c_int; 2] = [SIGUSR1, SIGCONT];

/// All of them.
fn handled() -> impl Iterator<Item = c_int> {
    SIGNALS.into_iter().chain(SIGRTMIN()..=SIGRTMAX()).filter(|signal| *signal != kick_signal())
}

extern "C" fn note(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // Only async-signal-safe operations: atomics and writes (write(2)), whose errno nobody in
    // between reads.
    if !OTHERS.contains(&signal) {
        overdue::asked_by_signal(signal, REQUESTS.contains(&signal));
    }
    put_back(signal);
}

extern "C" fn interrupt_system_call(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Called at the process's start: a requested report is held until there is something to report,
/// and exceeding the file size limit becomes an error of the writer.
pub(crate) fn hold() -> Result<()> {
    handle(SIGUSR1, note)?;
    handle(SIGXFSZ, interrupt_system_call)
}

/// Starts the thread that signals come to, even those that were inherited as blocked: it ends a
/// process that should end and does not. Called before there are other threads, which inherit what
/// is blocked.
pub(crate) fn start() -> Result<()> {
    bell::hang()?;
    let set =
        |signals: &[c_int], taken| disposition::take(signals, taken).map_err(Error::os("signals"));
    // In the background, access to the terminal becomes an error instead of a stop.
    set(&[SIGTTIN, SIGTTOU], false)?;
    install_kick()?;
    let all: Vec<_> = handled().collect();
    set(&all, false)?;
    let of_thread = all.clone();
    let thread = jail::start("signals", Kind::Signals, move || {
        // They were blocked: they are signals.
        let _ = disposition::take(&of_thread, true);
        overdue::watch();
    });
    if thread.is_err() {
        // Nobody else takes them while the process says so.
        set(&all, true)?;
    }
    thread.map(drop).map_err(Error::os("signals thread"))
}

/// Turns signals into events, for the whole process from now on; except those of errors in the
/// process.
pub(crate) fn install() -> Result<&'static EventFd> {
    let event = match EVENT.get() {
        Some(event) => event,
        None => {
            let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
            EVENT.get_or_init(|| event)
        }
    };
    hold()?;
    for signal in handled() {
        handle(signal, note)?;
    }
    install_kick()?;
    // Signals held so far have woken nobody yet.
    if PENDING.load(Ordering::SeqCst) != 0 {
        wake();
    }
    Ok(event)
}

/// Makes [`kick_signal`] interrupt the threads that this one starts from now on, without further
/// effect, also if it was inherited as blocked.
pub(crate) fn install_kick() -> Result<()> {
    register_signal_handler(kick_signal(), interrupt_system_call)
        .map_err(Error::os("signal handler"))?;
    disposition::take(&[kick_signal()], true).map_err(Error::os("signals"))
}

/// Sets `handler` for `signal`, unless it is ignored.
fn handle(signal: c_int, handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void)) -> Result<()> {
    if is_ignored(signal) {
        return Ok(());
    }
    register_signal_handler(signal, handler).map_err(Error::os("signal handler"))
}

fn bit(signal: c_int) -> u64 {
    u32::try_from(signal - 1).ok().and_then(|shift| 1u64.checked_shl(shift)).unwrap_or(0)
}

/// Leaves `signal` for the next call of [`take`].
pub(crate) fn put_back(signal: c_int) {
    PENDING.fetch_or(bit(signal), Ordering::SeqCst);
    wake();
}

fn wake() {
    if let Some(event) = EVENT.get() {
        // A full counter is readable, too.
        let _ = event.write(1);
    }
}

/// The signal that makes a vCPU thread leave KVM.
pub(crate) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Takes the signals that came since the last call.
pub(crate) fn take() -> impl Iterator<Item = c_int> {
    if let Some(event) = EVENT.get() {
        // Nothing to read is no error: the bits count.
        let _ = event.read();
    }
    let pending = PENDING.swap(0, Ordering::SeqCst);
    (1..=SIGRTMAX()).filter(move |signal| pending & bit(*signal) != 0)
}

/// Takes one signal that ends a machine, if there is any.
pub(crate) fn take_end() -> Option<c_int> {
    let ends = PENDING.load(Ordering::SeqCst) & !OTHERS.iter().fold(0, |bits, s| bits | bit(*s));
    let end = (1..=SIGRTMAX()).find(|signal| ends & bit(*signal) != 0)?;
    PENDING.fetch_and(!bit(end), Ordering::SeqCst);
    Some(end)
}

/// Sleeps until there are signals to take, at most for `limit`.
pub(crate) fn sleep(limit: Duration) {
    let wait = |event: &EventFd| {
        let epoll = Epoll::new()?;
        let wanted = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), wanted)?;
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        epoll.wait(limit, &mut [EpollEvent::default()])
    };
    match EVENT.get().map(wait) {
        // Interrupted or not: the next call of [`take`] gets them.
        Some(Ok(_)) => {}
        Some(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
        _ => thread::sleep(limit),
    }
}

/// Waits until `over`, or until a signal comes that ends a machine, which is returned. Others are
/// left for the next machine.
pub(crate) fn wait_until(over: impl Fn() -> bool) -> Option<c_int> {
    let mut later = Vec::new();
    let mut end = None;
    while end.is_none() && !over() {
        let come = take();
        let (others, ends): (Vec<_>, Vec<_>) = come.partition(|s| OTHERS.contains(s));
        later.extend(others);
        end = ends.first().copied();
        if end.is_none() {
            sleep(BETWEEN_LOOKS);
        }
    }
    later.into_iter().for_each(put_back);
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_a_bit_of_its_own() {
        let mut all = 0;
        for signal in 1..=64 {
            assert_eq!(all & bit(signal), 0);
            all |= bit(signal);
        }
        assert_eq!(all, u64::MAX);
        assert_eq!((bit(0), bit(65)), (0, 0));
    }

    #[test]
    fn an_end_is_taken_apart_from_other_signals() {
        // Nothing else in this process's tests takes or notes signals.
        [SIGUSR1, SIGTERM, SIGHUP].into_iter().for_each(put_back);
        assert_eq!([take_end(), take_end(), take_end()], [Some(SIGHUP), Some(SIGTERM), None]);
        assert_eq!(take().collect::<Vec<_>>(), [SIGUSR1]);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end that somebody asked for and that does not come: a host that does not answer, such as a
//! file on a server that is gone, holds a thread as long as it likes. After [`PATIENCE`], or when
//! somebody asks again, the process says what it waits for, and ends.
//!
//! Whoever may wait says so before ([`enter`]). That it takes too long is found by a thread of its
//! own ([`watch`]), as any other may be the one that waits. Signals that ask for the end come to
//! that thread.

use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::c_int;

use crate::console::output;
use crate::process::{bell, disposition, exit_code, last_line};

/// From the first request on.
const PATIENCE: Duration = Duration::from_secs(10);
/// What comes so soon is still the first request: timeout(1) sends its signal twice. An end that
/// was asked for does not wait longer for slow readers.
const ONE_REQUEST: Duration = Duration::from_secs(1);
/// How long standard error is waited for.
const LAST_LINE: Duration = Duration::from_secs(1);
/// Polling interval, once the end has been asked for.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// What the main thread does, and may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Everything else.
    Work,
    /// Writes a report.
    Report,
    /// Waits for the side core.
    SideCore,
    /// Waits for vCPUs, which may be in a system call.
    Vcpus,
    /// Waits for the guest's output to be written.
    Output,
    /// Releases what the machine has of the host.
    Release,
    /// Waits for its last messages to be written.
    Messages,
}

impl Step {
    const ALL: [(Self, &'static str); 7] = [
        (Self::Work, "its main thread"),
        (Self::Report, "the file of the report, which is not written"),
        (Self::SideCore, "the side core, in a call of the host"),
        (Self::Vcpus, "a vCPU, in a call of the host (a trace, an assigned device, memory)"),
        (Self::Output, "the file or the reader of the guest's output"),
        (Self::Release, "the host, to take back what the machine had of it"),
        (Self::Messages, "the reader of these messages"),
    ];
}

static STEP: AtomicU8 = AtomicU8::new(Step::Work as u8);
/// The signal that ends the machine, once one came, or [`KEY`].
static ASKED: AtomicU8 = AtomicU8::new(0);
/// `Ctrl-A x` was typed.
const KEY: u8 = u8::MAX;
/// How often somebody asked for the end.
static REQUESTS: AtomicU32 = AtomicU32::new(0);

/// The main thread is at `step` from now on.
pub(crate) fn enter(step: Step) {
    STEP.store(step as u8, Ordering::Relaxed);
}

/// Does `work`, which is that step.
pub(crate) fn during<T>(step: Step, work: impl FnOnce() -> T) -> T {
    let before = STEP.swap(step as u8, Ordering::Relaxed);
    let result = work();
    STEP.store(before, Ordering::Relaxed);
    result
}

/// `signal` ends the machine; `by_somebody`: who sends it again asks again. For signal handlers.
pub(crate) fn asked_by_signal(signal: c_int, by_somebody: bool) {
    // Signals are below 65.
    asked(signal as u8, by_somebody);
}

/// `Ctrl-A x` ends the machine.
pub(crate) fn asked_by_key() {
    asked(KEY, false);
}

/// The clock runs from the first time on.
fn asked(by: u8, by_somebody: bool) {
    // Who came first counts.
    let _ = ASKED.compare_exchange(0, by, Ordering::SeqCst, Ordering::SeqCst);
    REQUESTS.fetch_add(by_somebody.into(), Ordering::SeqCst);
    bell::ring();
}

/// Waits for the end of the process, and brings it about if it is overdue.
pub(crate) fn watch() {
    bell::wait();
    let since = Instant::now();
    let mut first = None;
    loop {
        last_line::end_if_said();
        let (requests, elapsed) = (REQUESTS.load(Ordering::SeqCst), since.elapsed());
        let again = elapsed >= ONE_REQUEST && requests > *first.get_or_insert(requests);
        if again || elapsed >= PATIENCE {
            let (by, step) = (ASKED.load(Ordering::SeqCst), STEP.load(Ordering::SeqCst));
            output::say_until(&line(by, elapsed.as_secs(), again, step), LAST_LINE);
            disposition::last_words();
            disposition::exit_now(exit_code_of(by).into());
        }
        thread::sleep(BETWEEN_LOOKS);
    }
}

/// The exit code of an overdue end that was asked for by a signal, or [`KEY`].
fn exit_code_of(by: u8) -> u8 {
    match by {
        KEY => exit_code::OS_ERROR,
        signal => exit_code::SIGNAL_BASE.wrapping_add(signal),
    }
}

fn line(by: u8, seconds: u64, again: bool, step: u8) -> String {
    let first = match by {
        KEY => "Ctrl-A x was typed".to_owned(),
        signal => format!("signal {signal} came"),
    };
    let more = if again { ", and a signal now" } else { "" };
    let named = Step::ALL.iter().find(|(known, _)| *known as u8 == step);
    let step = named.map_or("", |(_, name)| name);
    format!(
        "twostage: error: {first} {seconds} s ago{more}, and the machine has not ended: it waits \
         for {step}; it ends now"
    )
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::fd::OwnedFd;
    use std::process::{Command, Stdio};

    use rustix::event::{eventfd, EventfdFlags};
    use twostage::patience::wait_until;

    use crate::process::last_line::Line;

    use super::*;

    #[test]
    fn each_step_has_a_line() {
        for (step, name) in Step::ALL {
            let end = format!("it waits for {name}; it ends now");
            let text = line(15, 10, false, step as u8);
            assert!(text.contains("error: signal 15 came 10 s ago, and the machine"), "{text}");
            assert!(text.ends_with(&end), "{text}");
            let text = line(KEY, 3, true, step as u8);
            assert!(text.contains("Ctrl-A x was typed 3 s ago, and a signal now"), "{text}");
        }
        assert_eq!([exit_code_of(15), exit_code_of(KEY)], [143, exit_code::OS_ERROR]);
    }

    /// Is ready to be written to, and then takes no line whose eighth byte is a letter: it is added
    /// to a counter that has no room for it.
    fn stuck() -> OwnedFd {
        let file = eventfd(0, EventfdFlags::empty()).unwrap();
        let line = u64::from_ne_bytes(*b"tttttttt");
        rustix::io::write(&file, &(u64::MAX - 1 - (line >> 1)).to_ne_bytes()).unwrap();
        file
    }

    const CHILD: &str = "TWOSTAGE_TEST_LAST_LINE";

    /// The child; nothing in an ordinary run of the tests.
    #[test]
    fn last_line_of_a_child() {
        if env::var_os(CHILD).is_some() {
            bell::hang().unwrap();
            thread::spawn(watch);
            let mut line = Line::new();
            std::fmt::Write::write_str(&mut line, "twostage: the end\n").unwrap();
            line.end(77);
        }
    }

    #[test]
    fn a_last_line_that_nobody_takes_holds_up_no_end() {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "process::overdue::tests::last_line_of_a_child", "--nocapture"]);
        command.env(CHILD, "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(stuck());
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut status = None;
        wait_until("the end of the child", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(status.unwrap().code(), Some(77));
    }
}

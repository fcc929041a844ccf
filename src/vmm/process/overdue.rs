// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The end that somebody asked for and that does not come: a host that does not answer, such as a
//! file on a server that is gone, holds a thread as long as it likes. After [`PATIENCE`] the
//! process says what it waits for, and ends.
//!
//! Whoever may wait says so before ([`enter`]). That it takes too long is found by a timer signal,
//! as the thread that waits cannot.

use std::fmt::Write;
use std::sync::atomic::{AtomicU8, Ordering};

use libc::c_int;

use crate::process::disposition;
use crate::process::exit_code;
use crate::process::last_line::Line;

/// From the signal that ends the machine on, in seconds.
pub(crate) const PATIENCE: u32 = 10;

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
/// The signal that ends the machine, once one came.
static ASKED: AtomicU8 = AtomicU8::new(0);

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

/// `signal` ends the machine: the clock runs from the first one on. For signal handlers.
pub(crate) fn asked(signal: c_int) {
    // Signals are below 65.
    let first = ASKED.compare_exchange(0, signal as u8, Ordering::Relaxed, Ordering::Relaxed);
    if first.is_ok() {
        disposition::set_alarm(PATIENCE);
    }
}

/// Whether a signal that ends the machine has come.
pub(crate) fn is_asked() -> bool {
    ASKED.load(Ordering::Relaxed) != 0
}

/// The time is over. For signal handlers.
pub(crate) fn end() -> ! {
    let signal = ASKED.load(Ordering::Relaxed);
    let mut line = Line::new();
    describe(&mut line, signal, STEP.load(Ordering::Relaxed));
    line.end(exit_code::SIGNAL_BASE.wrapping_add(signal))
}

fn describe(line: &mut Line, signal: u8, step: u8) {
    let named = Step::ALL.iter().find(|(known, _)| *known as u8 == step);
    let step = named.map_or("", |(_, name)| name);
    // What does not fit is cut off.
    let _ = writeln!(
        line,
        "twostage: error: signal {signal} came {PATIENCE} s ago, and the machine has not ended: it \
         waits for {step}; it ends now"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_a_line_that_fits() {
        for (step, name) in Step::ALL {
            let mut line = Line::new();
            describe(&mut line, 15, step as u8);
            let text = std::str::from_utf8(line.bytes()).unwrap();
            let end = format!("it waits for {name}; it ends now\n");
            assert!(text.contains("signal 15 came 10 s ago") && text.ends_with(&end), "{text}");
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The terminal on standard input: raw while a guest has it, and what it was afterwards.
//!
//! It belongs to the whole process and to others besides: to the shell, which takes it away when
//! the process goes to the background. Whoever is there leaves it alone.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{tcgetattr, tcgetpgrp, tcsetattr, OptionalActions, Termios};

use crate::process::disposition;

/// What the terminal was before the process changed it.
static BEFORE: OnceLock<Termios> = OnceLock::new();
/// It is raw, and to be what it was.
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal.
pub(crate) fn is_there() -> bool {
    io::stdin().is_terminal()
}

/// Whether the terminal is this process's to read from and to change. One that controls no process
/// of this session is.
pub(crate) fn is_ours() -> bool {
    tcgetpgrp(stdin()).map_or(true, |foreground| foreground == getpgrp())
}

/// What was typed is as it was typed (`cfmakeraw`); what is written stays as it is, for others
/// write lines to the same terminal.
fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes = before.output_modes;
    raw
}

/// Makes the terminal raw, until [`restore`] or the process's death by a signal. Whether it is for
/// the first time.
pub(crate) fn make_raw() -> io::Result<bool> {
    let first = BEFORE.get().is_none();
    let now = tcgetattr(stdin())?;
    let before = BEFORE.get_or_init(|| now);
    disposition::before_death(restore);
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw(before))?;
    Ok(first)
}

/// The process goes on after it was stopped: the shell had the terminal meanwhile.
pub(crate) fn resume() {
    if let Some(before) = BEFORE.get().filter(|_| RAW.load(Ordering::SeqCst) && is_ours()) {
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &raw(before)) {
            log::warn!("the terminal cannot be made raw again: {error}");
        }
    }
}

/// Makes the terminal what it was. Called by signal handlers, too: does nothing but system calls.
pub(crate) fn restore() {
    let Some(before) = BEFORE.get().filter(|_| RAW.swap(false, Ordering::SeqCst)) else { return };
    // In the background it is the shell's, unless nobody has changed it since.
    let left_raw = || {
        let raw = raw(before);
        tcgetattr(stdin()).is_ok_and(|now| {
            (now.input_modes, now.local_modes) == (raw.input_modes, raw.local_modes)
        })
    };
    if is_ours() || left_raw() {
        // It may be gone: there is nothing left to do, and nobody to tell.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The terminal on standard input: raw while a guest uses it, restored afterwards.
//!
//! It belongs to the whole process and is shared with others: the shell takes it when the process
//! goes to the background, and processes in the background must not touch it.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{tcgetattr, tcgetpgrp, tcsetattr, OptionalActions, Termios};

use crate::process::disposition;

/// The terminal's settings before the process changed them.
static BEFORE: OnceLock<Termios> = OnceLock::new();
/// It is raw and must be restored.
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal.
pub(crate) fn is_there() -> bool {
    io::stdin().is_terminal()
}

/// Whether this process may read and change the terminal, which need not be the session's
/// controlling terminal.
pub(crate) fn is_ours() -> bool {
    tcgetpgrp(stdin()).map_or(true, |foreground| foreground == getpgrp())
}

/// Input as in `cfmakeraw`; output processing stays, as others write lines to the same terminal.
fn raw(before: &Termios) -> Termios {
    let mut raw = before.clone();
    raw.make_raw();
    raw.output_modes = before.output_modes;
    raw
}

/// Makes the terminal raw, until [`restore`] or the process's death by a signal. Returns whether it
/// is the first time.
pub(crate) fn make_raw() -> io::Result<bool> {
    let first = BEFORE.get().is_none();
    let now = tcgetattr(stdin())?;
    let before = BEFORE.get_or_init(|| now);
    disposition::before_death(restore);
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw(before))?;
    Ok(first)
}

/// The process continues after it was stopped: the shell had the terminal meanwhile.
pub(crate) fn resume() {
    if let Some(before) = BEFORE.get().filter(|_| RAW.load(Ordering::SeqCst) && is_ours()) {
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &raw(before)) {
            log::warn!("the terminal cannot be made raw again: {error}");
        }
    }
}

/// Restores the terminal. Called by signal handlers, too: only makes system calls.
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
        // If it is gone, nothing can be done.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

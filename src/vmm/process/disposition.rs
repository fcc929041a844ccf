// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What signals do to the process, where no crate has it: which ones it was started to ignore, and
//! what is done before one ends it.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};

/// The signals of errors in the process itself, which end it at once.
const FATAL: [c_int; 7] = [SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP];

/// What is done before the process dies of one of [`FATAL`].
static LAST: OnceLock<fn()> = OnceLock::new();
/// What each of them did before: Rust's own handlers tell of a stack that is full.
static EARLIER: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// What `signal` does.
fn action(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: without a new action, sigaction only writes the present one where it was told to.
    match unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } {
        // SAFETY: it was written.
        0 => Some(unsafe { action.assume_init() }),
        _ => None,
    }
}

/// Whether `signal` is ignored: whoever started the process wanted that, unless the process did.
pub(crate) fn is_ignored(signal: c_int) -> bool {
    action(signal).is_some_and(|action| action.sa_sigaction == libc::SIG_IGN)
}

/// Has `last` done before an error in the process ends it with a signal. `last` may do what signal
/// handlers may.
pub(crate) fn before_death(last: fn()) {
    if LAST.set(last).is_err() {
        return;
    }
    for (signal, earlier) in FATAL.into_iter().zip(&EARLIER) {
        let Some(action) = action(signal).filter(|action| action.sa_sigaction != libc::SIG_IGN)
        else {
            continue;
        };
        let action = *earlier.get_or_init(|| action);
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = die;
        let mut ours = action;
        ours.sa_sigaction = handler as *const () as usize;
        // Where there is another stack, which a stack that is full needs.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `ours` is an action as the system gave it, with a handler of the type that its
        // flags say.
        if unsafe { libc::sigaction(signal, &ours, std::ptr::null_mut()) } != 0 {
            log::debug!("signal {signal} cannot be caught");
        }
    }
}

/// Does what is to be done before death, and lets the process die of `signal`.
extern "C" fn die(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    if let Some(last) = LAST.get() {
        last();
    }
    // SAFETY: the kernel gives a handler with SA_SIGINFO what it may read.
    let by_a_fault = unsafe { (*info).si_code } > 0 && matches!(signal, SIGSEGV | SIGBUS);
    let earlier = FATAL.into_iter().zip(&EARLIER).find(|(fatal, _)| *fatal == signal);
    let Some(earlier) = earlier.and_then(|(_, earlier)| earlier.get()) else { return };
    let mut action = *earlier;
    if !by_a_fault {
        action.sa_sigaction = libc::SIG_DFL;
    }
    // SAFETY: `action` is what the system gave, or the same with the default, which needs no
    // handler.
    unsafe {
        libc::sigaction(signal, &action, std::ptr::null_mut());
        // A fault comes again by itself, and then tells where; all else is sent once more, and
        // comes when the handler is left.
        if !by_a_fault {
            libc::raise(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_known() {
        // Rust ignores it in every program, and nobody ignores the other.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGSEGV));
    }
}

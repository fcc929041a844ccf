// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signal dispositions not covered by a crate: which signals the process inherited as ignored, and
//! what is done before a fatal one.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};

/// The signals of errors in the process, which end it at once.
const FATAL: [c_int; 7] = [SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP];

/// Called before the process dies of one of [`FATAL`].
static LAST: OnceLock<fn()> = OnceLock::new();
/// Their previous actions: Rust's handlers report stack overflows.
static EARLIER: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// The current action of `signal`.
fn action(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: without a new action, sigaction only writes the current one to the given place.
    match unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) } {
        // SAFETY: it was written.
        0 => Some(unsafe { action.assume_init() }),
        _ => None,
    }
}

/// Whether `signal` is ignored: by the parent's choice, unless the process did it.
pub(crate) fn is_ignored(signal: c_int) -> bool {
    action(signal).is_some_and(|action| action.sa_sigaction == libc::SIG_IGN)
}

/// Makes `last` run before a fatal signal ends the process. It must be async-signal-safe.
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
        // On the alternate stack if there is one, for stack overflows.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `ours` is an action from the system, with a handler of the type that its flags
        // say.
        if unsafe { libc::sigaction(signal, &ours, std::ptr::null_mut()) } != 0 {
            log::debug!("signal {signal} cannot be caught");
        }
    }
}

/// Runs `last`, and lets the process die of `signal`.
extern "C" fn die(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    if let Some(last) = LAST.get() {
        last();
    }
    // SAFETY: the kernel passes readable information to a handler with SA_SIGINFO.
    let by_a_fault = unsafe { (*info).si_code } > 0 && matches!(signal, SIGSEGV | SIGBUS);
    let earlier = FATAL.into_iter().zip(&EARLIER).find(|(fatal, _)| *fatal == signal);
    let Some(earlier) = earlier.and_then(|(_, earlier)| earlier.get()) else { return };
    let mut action = *earlier;
    if !by_a_fault {
        action.sa_sigaction = libc::SIG_DFL;
    }
    // SAFETY: `action` is from the system, or the same with the default, which needs no handler.
    unsafe {
        libc::sigaction(signal, &action, std::ptr::null_mut());
        // A fault is raised again when the handler returns, at the same place; others are sent
        // again, and arrive after the handler.
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

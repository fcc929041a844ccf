// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signals as events: handlers only set a bit and wake the event loop.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::signal::{register_signal_handler, SIGRTMIN};

use super::{Error, Result};

/// Bits of the signals that came and were not taken yet.
static PENDING: AtomicU64 = AtomicU64::new(0);
/// Readable when there are any.
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// The signals that reach the event loop.
const SIGNALS: [c_int; 5] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1];

extern "C" fn note(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    // Only what a handler may do: an atomic and a write(2), whose errno nobody in between reads.
    put_back(signal);
}

extern "C" fn interrupt_system_call(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Turns SIGHUP, SIGINT, SIGQUIT, SIGTERM and SIGUSR1 into events, for the whole process and from now on.
pub(super) fn install() -> Result<&'static EventFd> {
    let event = match EVENT.get() {
        Some(event) => event,
        None => {
            let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
            EVENT.get_or_init(|| event)
        }
    };
    for signal in SIGNALS {
        register_signal_handler(signal, note).map_err(Error::os("signal handler"))?;
    }
    register_signal_handler(kick_signal(), interrupt_system_call)
        .map_err(Error::os("signal handler"))?;
    Ok(event)
}

/// Leaves `signal` to the next who takes signals.
pub(super) fn put_back(signal: c_int) {
    PENDING.fetch_or(1 << signal, Ordering::SeqCst);
    if let Some(event) = EVENT.get() {
        // A full counter is readable all the same.
        let _ = event.write(1);
    }
}

/// The signal that makes a vCPU thread leave KVM.
pub(super) fn kick_signal() -> c_int {
    SIGRTMIN()
}

/// Takes the signals that came since the last call.
pub(super) fn take() -> impl Iterator<Item = c_int> {
    if let Some(event) = EVENT.get() {
        // Nothing to read is no error: the bits are what counts.
        let _ = event.read();
    }
    let pending = PENDING.swap(0, Ordering::SeqCst);
    SIGNALS.into_iter().filter(move |signal| pending & (1 << signal) != 0)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stopping a machine, and the reason.

use std::fmt;
use std::sync::{Arc, OnceLock};

use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::process::exit_code;
use crate::{Error, Result};

/// Why a machine stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u8),
    /// The guest powered the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset(ResetCause),
    /// KVM could not run a vCPU any further.
    Stuck(String),
    /// This signal came.
    Signal(i32),
    /// The user typed `Ctrl-A x`.
    Escape,
    /// A thread of the machine ended unexpectedly: a bug.
    Software(String),
}

/// How the guest reset the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "each architecture has some of them")]
pub enum ResetCause {
    /// The keyboard controller's reset line.
    KeyboardController,
    /// The reset register, as ACPI names it or at its port.
    ResetRegister,
    /// A PSCI call.
    Psci,
    /// A triple fault.
    TripleFault {
        /// The vCPU.
        vcpu: u8,
        /// Its instruction pointer, if known: KVM resets the vCPU on AMD processors, which do not
        /// report it.
        rip: Option<u64>,
    },
}

impl StopReason {
    /// The exit code for the reason.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::DebugExit(value) => *value,
            Self::PowerOff | Self::Escape => 0,
            Self::Reset(_) => exit_code::GUEST_RESET,
            Self::Stuck(_) => exit_code::GUEST_STUCK,
            // Signal numbers are below 65.
            Self::Signal(number) => exit_code::SIGNAL_BASE.wrapping_add(*number as u8),
            Self::Software(_) => exit_code::SOFTWARE,
        }
    }

    /// The same reason, unless `objects` of the host were left behind and nothing worse happened.
    pub(crate) fn unless_left_behind(self, objects: usize) -> Self {
        match self {
            Self::Stuck(_) | Self::Software(_) => self,
            _ if objects == 0 => self,
            _ => Self::Software(format!("{objects} host objects are left behind")),
        }
    }

    /// Whether the machine ended as its guest or its user wanted.
    pub fn is_orderly(&self) -> bool {
        match self {
            Self::DebugExit(_) | Self::PowerOff | Self::Escape => true,
            // Others come from a limit or by mistake.
            Self::Signal(number) => matches!(*number, SIGHUP | SIGINT | SIGQUIT | SIGTERM),
            Self::Reset(_) | Self::Stuck(_) | Self::Software(_) => false,
        }
    }
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DebugExit(value) => write!(f, "the guest ended the machine with {value}"),
            Self::PowerOff => f.write_str("the guest switched the machine off"),
            Self::Reset(ResetCause::KeyboardController) => {
                f.write_str("the guest reset the machine through the keyboard controller")
            }
            Self::Reset(ResetCause::ResetRegister) => {
                f.write_str("the guest reset the machine through its reset register")
            }
            Self::Reset(ResetCause::Psci) => {
                f.write_str("the guest reset the machine through PSCI")
            }
            Self::Reset(ResetCause::TripleFault { vcpu, rip }) => {
                write!(f, "the guest reset the machine with a triple fault of vCPU {vcpu}")?;
                rip.map_or(Ok(()), |rip| write!(f, " at RIP {rip:#x}"))
            }
            Self::Stuck(what) | Self::Software(what) => f.write_str(what),
            Self::Signal(SIGXCPU) => {
                write!(f, "signal {SIGXCPU}: the CPU time limit (RLIMIT_CPU) is reached")
            }
            Self::Signal(number) => write!(f, "signal {number} ended the machine"),
            Self::Escape => f.write_str("the user ended the machine with Ctrl-A x"),
        }
    }
}

/// Stops a machine. Clones stop the same machine; the first reason counts.
#[derive(Debug, Clone)]
pub(crate) struct Stopper {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    reason: OnceLock<StopReason>,
    event: EventFd,
}

impl Stopper {
    pub fn new() -> Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        Ok(Self { inner: Arc::new(Inner { reason: OnceLock::new(), event }) })
    }

    /// Stops the machine because of `reason`; `false` if it was stopped already.
    pub fn stop(&self, reason: StopReason) -> bool {
        let first = self.inner.reason.set(reason).is_ok();
        if first {
            if let Err(error) = self.inner.event.write(1) {
                // Unreachable in practice: the counter of an eventfd written once is not full.
                log::error!("cannot wake the event loop: {error}");
            }
        }
        first
    }

    /// Why the machine was stopped, if it was.
    pub fn reason(&self) -> Option<&StopReason> {
        self.inner.reason.get()
    }

    /// Becomes readable when the machine is stopped.
    pub fn event(&self) -> &EventFd {
        &self.inner.event
    }
}

/// Stops the machine when the thread that holds it panics, which is called so.
pub(crate) struct PanicGuard<'a>(pub &'a Stopper, pub &'static str);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop(StopReason::Software(format!("{} panicked", self.1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let stopper = Stopper::new().unwrap();
        assert_eq!(stopper.reason(), None);
        assert!(stopper.stop(StopReason::DebugExit(3)));
        assert!(!stopper.stop(StopReason::Signal(15)));
        assert_eq!(stopper.reason(), Some(&StopReason::DebugExit(3)));
        assert_eq!(stopper.event().read().unwrap(), 1);
    }

    #[test]
    fn a_panic_stops_the_machine() {
        let stopper = Stopper::new().unwrap();
        drop(PanicGuard(&stopper, "nobody"));
        assert_eq!(stopper.reason(), None);
        let thread = stopper.clone();
        let thread = std::thread::spawn(move || {
            let _guard = PanicGuard(&thread, "a test");
            panic!("on purpose");
        });
        assert!(thread.join().is_err());
        assert_eq!(stopper.reason(), Some(&StopReason::Software("a test panicked".to_owned())));
    }

    #[test]
    fn what_is_left_behind_is_a_bug_unless_something_worse_happened() {
        let reset = StopReason::Reset(ResetCause::ResetRegister);
        for reason in [StopReason::PowerOff, StopReason::DebugExit(0), reset] {
            assert_eq!(reason.clone().unless_left_behind(0), reason);
            let left = reason.unless_left_behind(2);
            assert_eq!(left.exit_code(), exit_code::SOFTWARE);
            assert!(left.to_string().contains("2 host objects"));
        }
        let stuck = StopReason::Stuck("here".to_owned());
        assert_eq!(stuck.clone().unless_left_behind(2), stuck);
    }

    #[test]
    fn codes_are_those_documented() {
        assert_eq!(StopReason::DebugExit(255).exit_code(), 255);
        assert_eq!(StopReason::Signal(15).exit_code(), 143);
        assert_eq!(StopReason::PowerOff.exit_code(), 0);
        assert!(StopReason::PowerOff.is_orderly());
        assert!(StopReason::Signal(15).is_orderly() && !StopReason::Signal(SIGXCPU).is_orderly());
        assert_eq!((StopReason::Escape.exit_code(), StopReason::Escape.is_orderly()), (0, true));
        let at = |rip| StopReason::Reset(ResetCause::TripleFault { vcpu: 1, rip });
        let fault = at(Some(0x10));
        assert_eq!(fault.exit_code(), exit_code::GUEST_RESET);
        assert!(fault.to_string().ends_with("vCPU 1 at RIP 0x10"));
        assert!(at(None).to_string().ends_with("vCPU 1"));
        assert!(!fault.is_orderly());
    }
}

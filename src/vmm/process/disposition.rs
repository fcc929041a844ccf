// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Signal dispositions not covered by a crate: which signals the process inherited as ignored, what
//! is done before a fatal one, and what about a system call that a filter refuses.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
use vmm_sys_util::signal::create_sigset;

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
        // `refused` does this, too, and a filter does not even let it be asked for.
        if signal == SIGSYS && ON_REFUSAL.get().is_some() {
            continue;
        }
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

/// Does what is done before the process dies.
pub(crate) fn last_words() {
    if let Some(last) = LAST.get() {
        last();
    }
}

/// The current thread, and what it starts from now on, take `signals`, or leave them to others.
///
/// # Errors
/// One of them is no signal.
pub(crate) fn take(signals: &[c_int], does: bool) -> io::Result<()> {
    let set = create_sigset(signals)?;
    let how = if does { libc::SIG_UNBLOCK } else { libc::SIG_BLOCK };
    // SAFETY: it reads the set, which lives until the call returns, and writes nothing.
    match unsafe { libc::pthread_sigmask(how, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Ends the process, without anything that it does at its end. For signal handlers.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: it only makes a system call, and does not return.
    unsafe { libc::_exit(code) }
}

/// A system call that a filter refused.
#[derive(Debug)]
pub(crate) struct Refused {
    /// Its number.
    pub number: c_int,
    /// It is of another architecture (`int 0x80`): the number means something else.
    pub foreign: bool,
    /// Its second argument: what an `ioctl` requests.
    pub second: u64,
    /// The name of the thread, with zeros behind it.
    pub thread: [u8; 16],
}

/// What is done about refused calls: returns the error for the caller.
static ON_REFUSAL: OnceLock<fn(&Refused) -> c_int> = OnceLock::new();

/// Makes `answer` decide about refused calls (`SECCOMP_RET_TRAP`). It must be async-signal-safe.
pub(crate) fn on_refusal(answer: fn(&Refused) -> c_int) {
    let Some(mut ours) = action(SIGSYS).filter(|_| ON_REFUSAL.set(answer).is_ok()) else { return };
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = refused;
    ours.sa_sigaction = handler as *const () as usize;
    ours.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `ours` is an action from the system, with a handler of the type that its flags say.
    if unsafe { libc::sigaction(SIGSYS, &ours, std::ptr::null_mut()) } != 0 {
        log::debug!("signal {SIGSYS} cannot be caught");
    }
    // A parent that blocks it hands that down, and threads inherit what is set here.
    if let Err(error) = vmm_sys_util::signal::unblock_signal(SIGSYS) {
        log::debug!("signal {SIGSYS} stays blocked: {error:?}");
    }
}

/// `si_code` of a call that a filter refused.
const SYS_SECCOMP: c_int = 1;

/// The start of `siginfo_t` for SIGSYS (Linux's `include/uapi/asm-generic/siginfo.h`, 64-bit).
#[repr(C)]
struct SigsysInfo {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _padding: c_int,
    _address: *mut c_void,
    number: c_int,
    arch: u32,
}

/// This architecture (`AUDIT_ARCH_X86_64`, `AUDIT_ARCH_AARCH64`).
const ARCHITECTURE: u32 = if cfg!(target_arch = "x86_64") { 0xc000_003e } else { 0xc000_00b7 };

/// Answers a refused call, or lets the process die of a signal that somebody sent.
extern "C" fn refused(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes readable information to a handler with SA_SIGINFO, larger than
    // this.
    let SigsysInfo { code, number, arch, .. } = unsafe { info.cast::<SigsysInfo>().read() };
    let Some(answer) = ON_REFUSAL.get().filter(|_| code == SYS_SECCOMP) else {
        last_words();
        // In the jail, the first call is refused: that ends the process by this signal, too.
        // SAFETY: the default needs no handler; the signal arrives again after this one.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    };
    let mut thread = [0; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes to the given place.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    // SAFETY: the kernel passes the thread's state, which nobody else has while the handler runs.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext };
    let (foreign, second) = (arch != ARCHITECTURE, second_argument(registers));
    let refused = Refused { number, foreign, second, thread };
    fail_with(registers, answer(&refused));
}

/// The second argument of the system call that was refused.
#[cfg(target_arch = "x86_64")]
fn second_argument(registers: &libc::mcontext_t) -> u64 {
    // A constant index, which the compiler checks.
    registers.gregs[libc::REG_RSI as usize] as u64
}

/// The system call that was refused fails with that error.
#[cfg(target_arch = "x86_64")]
fn fail_with(registers: &mut libc::mcontext_t, error: c_int) {
    registers.gregs[libc::REG_RAX as usize] = -i64::from(error);
}

/// The second argument of the system call that was refused.
#[cfg(target_arch = "aarch64")]
fn second_argument(registers: &libc::mcontext_t) -> u64 {
    // A constant index, which the compiler checks.
    registers.regs[1]
}

/// The system call that was refused fails with that error.
#[cfg(target_arch = "aarch64")]
fn fail_with(registers: &mut libc::mcontext_t, error: c_int) {
    // As the kernel returns errors: a negative number.
    registers.regs[0] = (-i64::from(error)) as u64;
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

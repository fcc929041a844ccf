// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Seccomp filters, made of the tables of [`super::kinds`].

use std::collections::BTreeMap;
use std::env;

use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use twostage::jail::{Ioctl, IOCTL};

use super::kinds::{Allowed, Kind};
use super::{Mode, Settings};

/// The filter of a kind of thread.
///
/// # Errors
/// There is none for this machine.
pub(super) fn of(kind: Kind, settings: &Settings) -> Result<BpfProgram, BackendError> {
    let Allowed { calls, ioctls } = kind.allowed(settings.reopened.is_some());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for number in calls {
        rules.insert(number, conditions(number)?);
    }
    // No rules would mean any ioctl.
    if let (Some(number), [_, ..]) = (IOCTL.number(), ioctls.as_slice()) {
        let request = |ioctl: &Ioctl| rule(&[(1, Eq, u64::from(ioctl.request))]);
        rules.insert(number.into(), ioctls.iter().map(request).collect::<Result<_, _>>()?);
    }
    let otherwise = match settings.mode {
        Mode::Log => SeccompAction::Log,
        Mode::On | Mode::Off => SeccompAction::Trap,
    };
    build(rules, otherwise, SeccompAction::Allow)
}

/// The C library starts threads by `clone`, whose flags a filter sees, where there is no `clone3`,
/// whose flags it does not.
///
/// # Errors
/// As [`of`].
pub(super) fn no_processes() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    build(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

fn build(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = env::consts::ARCH.try_into()?;
    let of_others = u32::from(otherwise.clone());
    let mut program: BpfProgram = SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()?;
    // A call of another architecture (`int 0x80`), whose numbers mean something else, is one that
    // is not listed. `seccompiler` would kill the process for it, without a line.
    for instruction in &mut program {
        if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_KILL_PROCESS) {
            instruction.k = of_others;
        }
    }
    Ok(program)
}

/// The code of an instruction that returns a constant (BPF_RET | BPF_K).
const RETURN: u16 = 6;

/// A rule: these arguments, all of which are 32-bit numbers, have these values.
fn rule(arguments: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, BackendError> {
    let condition = |(at, operator, value): &(u8, SeccompCmpOp, u64)| {
        SeccompCondition::new(*at, Dword, operator.clone(), *value)
    };
    SeccompRule::new(arguments.iter().map(condition).collect::<Result<_, _>>()?)
}

/// Which calls of the system call `number` are allowed, by any thread; empty: all.
fn conditions(number: i64) -> Result<Vec<SeccompRule>, BackendError> {
    let one_of = |values: &[libc::c_int]| -> Result<Vec<SeccompRule>, BackendError> {
        values.iter().map(|value| rule(&[(0, Eq, *value as u32 as u64)])).collect()
    };
    match number {
        // Nothing becomes executable.
        libc::SYS_mmap | libc::SYS_mprotect => {
            let executable = libc::PROT_EXEC as u64;
            Ok(vec![rule(&[(2, MaskedEq(executable), 0)])?])
        }
        // Threads, no processes.
        libc::SYS_clone => {
            let thread = (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
            Ok(vec![rule(&[(0, MaskedEq(thread), thread)])?])
        }
        // The calling thread's.
        libc::SYS_sched_setaffinity => one_of(&[0]),
        // Not what reports refusals.
        libc::SYS_rt_sigaction => Ok(vec![rule(&[(0, Ne, libc::SIGSYS as u64)])?]),
        // Signals to this process.
        libc::SYS_tgkill => one_of(&[std::process::id() as libc::c_int]),
        libc::SYS_socket => one_of(&[libc::AF_UNIX]),
        libc::SYS_seccomp => one_of(&[libc::SECCOMP_SET_MODE_FILTER as libc::c_int]),
        libc::SYS_prctl => {
            one_of(&[libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_NO_NEW_PRIVS])
        }
        // Not the ones that have signals sent.
        libc::SYS_fcntl => {
            let commands = [
                libc::F_GETFD,
                libc::F_GETFL,
                libc::F_SETFL,
                libc::F_DUPFD_CLOEXEC,
                libc::F_OFD_GETLK,
                libc::F_OFD_SETLK,
            ];
            commands.iter().map(|command| rule(&[(1, Eq, *command as u64)])).collect()
        }
        _ => Ok(Vec::new()),
    }
}

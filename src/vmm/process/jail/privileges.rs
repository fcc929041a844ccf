// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a thread gives up besides system calls.
//!
//! All of it is the thread's own, and inherited by the threads that it starts.

use std::io;
use std::path::PathBuf;
use std::thread;

use landlock::{
    Access as _, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, ABI,
};
use rustix::process::{
    getppid, getrlimit, parent_process_death_signal, set_parent_process_death_signal, setrlimit,
    Gid, Resource, Rlimit, Uid,
};
use rustix::thread::{
    capabilities, set_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid, CapabilitySet, CapabilitySets,
};

use super::JailError;

/// A user and a group, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct User {
    pub uid: u32,
    pub gid: u32,
}

/// How something is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// To be read, or listed, as a device, too.
    Read,
    /// To be read and written, likewise.
    Write,
}

/// A file that is opened again, or a folder with such files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reopened {
    pub path: PathBuf,
    pub access: Access,
}

/// No file can be opened by its path, and no TCP port used, on kernels with Landlock.
pub(super) fn no_files() -> Result<(), JailError> {
    only_files(&[])
}

/// The same, except for `reopened`.
pub(super) fn only_files(reopened: &[Reopened]) -> Result<(), JailError> {
    set_no_new_privs(true).map_err(JailError::of("PR_SET_NO_NEW_PRIVS"))?;
    let status = restrict(reopened).map_err(JailError::of("Landlock"))?;
    if status.ruleset == RulesetStatus::NotEnforced {
        match reopened.is_empty() {
            // Filters refuse every call that would open one.
            true => log::info!("--jail: this kernel has no Landlock"),
            false => log::warn!("--jail: this kernel has no Landlock: any file can be opened"),
        }
    }
    Ok(())
}

fn restrict(reopened: &[Reopened]) -> Result<RestrictionStatus, RulesetError> {
    let abi = ABI::V6;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .create()?;
    // A read-only disk is asked for the size of its blocks.
    let read = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::IoctlDev;
    let write = AccessFs::WriteFile | AccessFs::Truncate;
    for Reopened { path, access } in reopened {
        let access = match access {
            Access::Read => read,
            Access::Write => read | write,
        };
        // What is not there, or is no file of a file system, has no rule: opening it again fails.
        let rule = PathFd::new(path).map(|file| PathBeneath::new(file, access));
        if let Ok(rule) = rule {
            if let Err(error) = (&mut ruleset).add_rule(rule) {
                log::debug!("--jail: {}: {error}", path.display());
            }
        }
    }
    ruleset.restrict_self()
}

/// Becomes `user`, if there is one, for good. What the parent has asked for at its death stays: a
/// change of user takes that back.
pub(super) fn become_user(user: Option<User>) -> Result<(), JailError> {
    let Some(user) = user else { return Ok(()) };
    let at_death = parent_process_death_signal().unwrap_or_default();
    let parent = getppid();
    change_to(user).map_err(JailError::of("becoming another user; --uid 0 stays as it is"))?;
    if at_death.is_some() {
        set_parent_process_death_signal(at_death).map_err(JailError::of("PR_SET_PDEATHSIG"))?;
        if getppid() != parent {
            // It has died meanwhile.
            let died = io::Error::other("the parent has died");
            return Err(JailError::of("PR_SET_PDEATHSIG")(died));
        }
    }
    Ok(())
}

/// Whether this process can become `user`: a thread tries. Not so in a container without the
/// capabilities, in a user namespace that does not have the user, or where a filter refuses it.
pub(crate) fn can_become(user: User) -> bool {
    match thread::Builder::new().spawn(move || change_to(user).is_ok()) {
        Ok(thread) => thread.join().unwrap_or(false),
        // Nothing is known: it is tried later, when there is a line for it.
        Err(_) => true,
    }
}

/// Of the calling thread.
fn change_to(User { uid, gid }: User) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// Processes of the new user are counted, together with others of that user; root's are not.
/// Raises the limit, which was not for them.
pub(super) fn no_limit_of_processes() {
    let none = Rlimit { current: None, maximum: None };
    // Without CAP_SYS_RESOURCE up to the maximum.
    let maximum = getrlimit(Resource::Nproc).maximum;
    let most = || setrlimit(Resource::Nproc, Rlimit { current: maximum, maximum });
    if let Err(error) = setrlimit(Resource::Nproc, none).or_else(|_| most()) {
        log::debug!("--jail: RLIMIT_NPROC stays: {error}");
    }
}

/// Drops all capabilities.
pub(super) fn no_capabilities() -> Result<(), JailError> {
    set_no_new_privs(true).map_err(JailError::of("PR_SET_NO_NEW_PRIVS"))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).map_err(JailError::of("dropping capabilities"))
}

/// Drops all but those that opening the files of the command line again may need: a file of
/// another user, a tap, and guest memory that stays in place.
pub(super) fn capabilities_to_reopen() -> Result<(), JailError> {
    let failed = || JailError::of("dropping capabilities");
    let kept = CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::IPC_LOCK;
    let had = capabilities(None).map_err(failed())?;
    let sets = CapabilitySets {
        effective: had.effective & kept,
        permitted: had.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(failed())
}

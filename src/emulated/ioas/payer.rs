// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who is charged for pinned pages, and their limit.

use std::sync::Arc;

use super::Source;
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::{Credentials, LockedMemory};
use twostage::iommufd::Errno;

/// Which memory-lock limit applies (`IOMMU_OPTION_RLIMIT_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RlimitMode {
    /// The user's, over all processes.
    #[default]
    User,
    /// The process's, as in VFIO.
    Process,
}

/// Who is charged for some pages; nobody if they belong to no process.
#[derive(Debug)]
pub(crate) struct Payer(Option<Process>);

#[derive(Debug)]
struct Process {
    who: Credentials,
    /// None if no limit applied to the process that mapped the pages: they are only counted.
    mode: Option<RlimitMode>,
}

impl Payer {
    /// Who pays for pages of `source`.
    pub fn of(source: &Source, mode: RlimitMode) -> Self {
        Self(source.credentials().map(|who| {
            let mode = (!who.ipc_lock).then_some(mode);
            Process { who, mode }
        }))
    }

    /// Charges `bytes` more; `source` has the current limit.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn charge(&self, source: &Source, bytes: u64) -> Outcome<()> {
        let Some(process) = &self.0 else { return Ok(()) };
        process.lock(bytes, || source.credentials().map_or(u64::MAX, |now| now.memlock_limit))
    }

    /// Uncharges `bytes`.
    pub fn discharge(&self, bytes: u64) {
        let Some(process) = &self.0 else { return };
        process.who.pinned.unlock(bytes);
        if let Some(account) = process.account() {
            account.unlock(bytes);
        }
    }

    /// The payer that would replace this one if the pages were `who`'s; none if nothing changes.
    pub fn successor(&self, who: &Credentials) -> Option<Self> {
        let Self(Some(Process { who: old, mode })) = self else { return None };
        let same_process = Arc::ptr_eq(&old.process, &who.process);
        let same = match mode {
            Some(RlimitMode::User) => Arc::ptr_eq(&old.user, &who.user) && same_process,
            Some(RlimitMode::Process) | None => same_process,
        };
        (!same).then(|| Self(Some(Process { who: who.clone(), mode: *mode })))
    }

    /// Charges `bytes` with the limit at the time when this payer was created.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn take_over(&self, bytes: u64) -> Outcome<()> {
        let Some(process) = &self.0 else { return Ok(()) };
        process.lock(bytes, || process.who.memlock_limit)
    }
}

impl Process {
    fn lock(&self, bytes: u64, limit: impl FnOnce() -> u64) -> Outcome<()> {
        if let Some(account) = self.account() {
            lock(account, bytes, limit())?;
        }
        // Without a limit.
        self.who.pinned.lock(bytes, u64::MAX);
        Ok(())
    }

    fn account(&self) -> Option<&LockedMemory> {
        self.mode.map(|mode| match mode {
            RlimitMode::User => &*self.who.user,
            RlimitMode::Process => &*self.who.process,
        })
    }
}

fn lock(account: &LockedMemory, bytes: u64, limit: u64) -> Outcome<()> {
    if !account.lock(bytes, limit) {
        return refuse(
            Errno::ENOMEM,
            format!("{bytes:#x} more bytes exceed the memory-lock limit"),
        );
    }
    Ok(())
}

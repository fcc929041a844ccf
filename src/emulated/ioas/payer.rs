// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! On whose account pages are pinned, and the limit of that account.

use std::sync::Arc;

use super::Source;
use crate::emulated::refusal::{refuse, Outcome};
use crate::emulated::user_space::{Credentials, LockedMemory};
use crate::iommufd::Errno;

/// Whose memory-lock limit counts (`IOMMU_OPTION_RLIMIT_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RlimitMode {
    /// The user's, over all processes.
    #[default]
    User,
    /// The process's, as VFIO does it.
    Process,
}

/// On whose account some pages are pinned.
#[derive(Debug)]
pub(crate) struct Payer {
    who: Credentials,
    /// None for a process without a limit.
    mode: Option<RlimitMode>,
}

impl Payer {
    /// Who pays for pages of `source`.
    pub fn of(source: &Source, mode: RlimitMode) -> Self {
        let who = source.credentials().unwrap_or_else(Credentials::privileged);
        let mode = (!who.ipc_lock).then_some(mode);
        Self { who, mode }
    }

    /// Pays for `bytes` more; `source` knows the limit as it is now.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn charge(&self, source: &Source, bytes: u64) -> Outcome<()> {
        let limit = source.credentials().map_or(u64::MAX, |now| now.memlock_limit);
        self.lock(bytes, limit)
    }

    /// Pays no longer for `bytes`.
    pub fn discharge(&self, bytes: u64) {
        if let Some(account) = self.account() {
            account.unlock(bytes);
        }
    }

    /// Who would pay in place of this one if the pages were `who`'s; none when that is no change.
    pub fn successor(&self, who: &Credentials) -> Option<Self> {
        let same_process = Arc::ptr_eq(&self.who.process, &who.process);
        let same = match self.mode {
            None => true,
            Some(RlimitMode::User) => Arc::ptr_eq(&self.who.user, &who.user) && same_process,
            Some(RlimitMode::Process) => same_process,
        };
        (!same).then(|| Self { who: who.clone(), mode: self.mode })
    }

    /// Pays for `bytes` with the limit as it was when this payer was made.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn take_over(&self, bytes: u64) -> Outcome<()> {
        self.lock(bytes, self.who.memlock_limit)
    }

    fn lock(&self, bytes: u64, limit: u64) -> Outcome<()> {
        match self.account() {
            Some(account) if !account.lock(bytes, limit) => {
                refuse(Errno::ENOMEM, format!("{bytes:#x} bytes more pass the memory-lock limit"))
            }
            _ => Ok(()),
        }
    }

    fn account(&self) -> Option<&LockedMemory> {
        match self.mode {
            None => None,
            Some(RlimitMode::User) => Some(&self.who.user),
            Some(RlimitMode::Process) => Some(&self.who.process),
        }
    }
}

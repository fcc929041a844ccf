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

/// On whose account some pages are pinned; nobody's when no limit applied to who mapped them.
#[derive(Debug)]
pub(crate) struct Payer(Option<(Credentials, RlimitMode)>);

impl Payer {
    /// Who pays for pages of `source`.
    pub fn of(source: &Source, mode: RlimitMode) -> Self {
        Self(source.credentials().filter(|who| !who.ipc_lock).map(|who| (who, mode)))
    }

    /// Pays for `bytes` more; `source` knows the limit as it is now.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn charge(&self, source: &Source, bytes: u64) -> Outcome<()> {
        let Some(account) = self.account() else { return Ok(()) };
        let limit = source.credentials().map_or(u64::MAX, |now| now.memlock_limit);
        lock(account, bytes, limit)
    }

    /// Pays no longer for `bytes`.
    pub fn discharge(&self, bytes: u64) {
        if let Some(account) = self.account() {
            account.unlock(bytes);
        }
    }

    /// Who would pay in place of this one if the pages were `who`'s; none when that is no change.
    pub fn successor(&self, who: &Credentials) -> Option<Self> {
        let Self(Some((old, mode))) = self else { return None };
        let same_process = Arc::ptr_eq(&old.process, &who.process);
        let same = match mode {
            RlimitMode::User => Arc::ptr_eq(&old.user, &who.user) && same_process,
            RlimitMode::Process => same_process,
        };
        (!same).then(|| Self(Some((who.clone(), *mode))))
    }

    /// Pays for `bytes` with the limit as it was when this payer was made.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn take_over(&self, bytes: u64) -> Outcome<()> {
        match (self.account(), &self.0) {
            (Some(account), Some((who, _))) => lock(account, bytes, who.memlock_limit),
            _ => Ok(()),
        }
    }

    fn account(&self) -> Option<&LockedMemory> {
        self.0.as_ref().map(|(who, mode)| match mode {
            RlimitMode::User => &*who.user,
            RlimitMode::Process => &*who.process,
        })
    }
}

fn lock(account: &LockedMemory, bytes: u64, limit: u64) -> Outcome<()> {
    if !account.lock(bytes, limit) {
        return refuse(Errno::ENOMEM, format!("{bytes:#x} bytes more pass the memory-lock limit"));
    }
    Ok(())
}

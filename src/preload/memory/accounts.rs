// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accounts of locked memory: users and processes, as far as they use this machine.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use twostage_emulated::uapi::LockedMemory;

use crate::callers::process::Process;

/// What iommufds have pinned of a process's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pinned {
    /// All of it.
    pub pinned: u64,
    /// The part that counts as locked by the process.
    pub locked: u64,
}

/// Accounts by ID, with their owner: an earlier owner of the ID has a separate account.
type Book = Mutex<BTreeMap<u32, (u64, Weak<LockedMemory>)>>;

/// What users and processes have locked. Empty accounts are not kept.
#[derive(Debug, Default)]
pub struct Accounts {
    users: Book,
    processes: Book,
    pinned: Book,
}

impl Accounts {
    /// The account of the user `uid`.
    pub fn user(&self, uid: u32) -> Arc<LockedMemory> {
        account(&self.users, uid, 0)
    }

    /// The account of the process `pid` that started at `start_time`: see [`Process::start_time`].
    pub fn process(&self, pid: i32, start_time: u64) -> Arc<LockedMemory> {
        account(&self.processes, pid.unsigned_abs(), start_time)
    }

    /// What that process has pinned, on any account.
    pub fn pinned(&self, pid: i32, start_time: u64) -> Arc<LockedMemory> {
        account(&self.pinned, pid.unsigned_abs(), start_time)
    }

    /// What is pinned of `process`.
    pub fn pinned_of(&self, process: &Process) -> Pinned {
        let (pid, time) = (process.id(), process.start_time());
        Pinned { pinned: self.pinned(pid, time).bytes(), locked: self.process(pid, time).bytes() }
    }
}

fn account(book: &Book, id: u32, whose: u64) -> Arc<LockedMemory> {
    let mut book = book.lock();
    let known = book.get(&id).filter(|(of, _)| *of == whose);
    if let Some(account) = known.and_then(|(_, account)| account.upgrade()) {
        return account;
    }
    book.retain(|_, (_, account)| account.strong_count() > 0);
    let account = Arc::default();
    book.insert(id, (whose, Arc::downgrade(&account)));
    account
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_one_while_it_is_in_use() {
        let accounts = Accounts::default();
        let (first, again) = (accounts.process(7, 5), accounts.process(7, 5));
        assert!(Arc::ptr_eq(&first, &again));
        assert!(!Arc::ptr_eq(&first, &accounts.process(8, 5)));
        assert!(!Arc::ptr_eq(&first, &accounts.user(7)));
    }

    #[test]
    fn who_has_the_number_of_another_has_an_account_of_its_own() {
        let accounts = Accounts::default();
        let (before, now) = (accounts.process(7, 5), accounts.process(7, 9));
        assert!(!Arc::ptr_eq(&before, &now));
        assert!(Arc::ptr_eq(&now, &accounts.process(7, 9)));
    }
}

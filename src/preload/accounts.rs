// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! On whose account memory is locked: users and processes, as far as they use this machine.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use twostage::emulated::uapi::LockedMemory;

/// What iommufds have pinned of a process's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pinned {
    /// All of it.
    pub pinned: u64,
    /// What counts as locked by the process.
    pub locked: u64,
}

type Book = Mutex<BTreeMap<u32, Weak<LockedMemory>>>;

/// What users and processes have locked. An account that locks nothing is not kept.
#[derive(Debug, Default)]
pub struct Accounts {
    users: Book,
    processes: Book,
    pinned: Book,
}

impl Accounts {
    /// The account of the user `uid`.
    pub fn user(&self, uid: u32) -> Arc<LockedMemory> {
        account(&self.users, uid)
    }

    /// The account of the process `pid`.
    pub fn process(&self, pid: i32) -> Arc<LockedMemory> {
        account(&self.processes, pid.unsigned_abs())
    }

    /// What the process `pid` has pinned, on whichever account.
    pub fn pinned(&self, pid: i32) -> Arc<LockedMemory> {
        account(&self.pinned, pid.unsigned_abs())
    }

    /// What is pinned of the process `pid`.
    pub fn pinned_of(&self, pid: i32) -> Pinned {
        Pinned { pinned: self.pinned(pid).bytes(), locked: self.process(pid).bytes() }
    }
}

fn account(book: &Book, id: u32) -> Arc<LockedMemory> {
    let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(account) = book.get(&id).and_then(Weak::upgrade) {
        return account;
    }
    book.retain(|_, account| account.strong_count() > 0);
    let account = Arc::default();
    book.insert(id, Arc::downgrade(&account));
    account
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_one_while_it_is_in_use() {
        let accounts = Accounts::default();
        let (first, again) = (accounts.process(7), accounts.process(7));
        assert!(Arc::ptr_eq(&first, &again));
        assert!(!Arc::ptr_eq(&first, &accounts.process(8)));
        assert!(!Arc::ptr_eq(&first, &accounts.user(7)));
    }
}

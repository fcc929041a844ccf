// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! This process's descriptors, as far as this library knows them: the table of them, the threads
//! that it holds for, and the library's own.
//!
//! Hooks look up every descriptor of the program, also in signal handlers: no lock, one load.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use crate::sys;

/// Higher numbers are never ours: an open that would return one fails with `EMFILE`.
const CAPACITY: usize = 1 << 16;

const NOT_OURS: u32 = 0;
const INTERNAL: u32 = 1;
const CLOSING: u32 = 2;
const FIRST_SLOT: u32 = 3;

static TABLE: [AtomicU32; CAPACITY] = [const { AtomicU32::new(NOT_OURS) }; CAPACITY];

/// The entry of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Not ours.
    NotOurs,
    /// The program must not touch it.
    Internal,
    /// A descriptor of an emulated file that a thread is closing: others must not use it any more.
    Closing,
    /// The emulated file with this number (of a file, not of a descriptor).
    File(u32),
}

impl Entry {
    fn of(raw: u32) -> Self {
        match raw {
            NOT_OURS => Self::NotOurs,
            INTERNAL => Self::Internal,
            CLOSING => Self::Closing,
            slot => Self::File(slot - FIRST_SLOT),
        }
    }

    fn raw(self) -> u32 {
        match self {
            Self::NotOurs => NOT_OURS,
            Self::Internal => INTERNAL,
            Self::Closing => CLOSING,
            Self::File(slot) => slot + FIRST_SLOT,
        }
    }
}

fn entry(fd: RawFd) -> Option<&'static AtomicU32> {
    TABLE.get(usize::try_from(fd).ok()?)
}

/// The entry of `fd`.
pub fn get(fd: RawFd) -> Entry {
    entry(fd).map_or(Entry::NotOurs, |entry| Entry::of(entry.load(Ordering::Acquire)))
}

/// Whether `fd` is, or was a moment ago, an emulated file.
pub fn is_file(fd: RawFd) -> bool {
    matches!(get(fd), Entry::File(_) | Entry::Closing)
}

/// Sets the entry of `fd`; returns the old one, or `None` if the number is too high.
pub fn set(fd: RawFd, to: Entry) -> Option<Entry> {
    Some(Entry::of(entry(fd)?.swap(to.raw(), Ordering::AcqRel)))
}

/// Replaces the entry of `fd`, unless it is not `from` any more; returns whether it did.
pub fn replace(fd: RawFd, from: Entry, to: Entry) -> bool {
    let (from, to) = (from.raw(), to.raw());
    let replace = |entry: &AtomicU32| {
        entry.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    };
    entry(fd).is_some_and(replace)
}

/// All numbers from `first` to `last` that are ours.
pub fn ours(first: u32, last: u32) -> impl Iterator<Item = (RawFd, Entry)> {
    let last = last.min(CAPACITY as u32 - 1);
    (first..=last).filter_map(|fd| {
        let fd = RawFd::try_from(fd).ok()?;
        Some((fd, get(fd))).filter(|(_, entry)| *entry != Entry::NotOurs)
    })
}

/// A descriptor that the program must not touch.
#[derive(Debug)]
pub struct Internal<T: AsRawFd = OwnedFd>(T);

impl Internal {
    /// Moves `fd` to a number that programs do not expect.
    pub fn new(fd: OwnedFd) -> Self {
        Self::marked(moved(fd))
    }
}

impl AsFd for Internal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Internal<Arc<File>> {
    /// The same for a file that others share. It must be kept until nobody does
    /// ([`Self::is_shared`]): whoever drops the last share closes the number.
    pub fn shared(file: File) -> Self {
        Self::marked(Arc::new(moved(file.into()).into()))
    }

    /// One more share.
    pub fn share(&self) -> Arc<File> {
        self.0.clone()
    }

    /// Whether anybody else has a share.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// `fd` with a number that programs do not expect.
fn moved(fd: OwnedFd) -> OwnedFd {
    sys::duplicate(fd.as_raw_fd()).unwrap_or(fd)
}

impl<T: AsRawFd> Internal<T> {
    fn marked(fd: T) -> Self {
        // A number beyond the table is unlikely to be closed by accident.
        set(fd.as_raw_fd(), Entry::Internal);
        Self(fd)
    }

    /// The number.
    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl<T: AsRawFd> Drop for Internal<T> {
    fn drop(&mut self) {
        set(self.raw(), Entry::NotOurs);
    }
}

thread_local! {
    /// The table holds for all threads, except those that unshared their descriptors
    /// (`CLOSE_RANGE_UNSHARE`).
    static APART: Cell<bool> = const { Cell::new(false) };
}

/// This thread has unshared its descriptors.
pub fn leave() {
    APART.set(true);
}

/// Whether this thread has unshared its descriptors.
pub fn is_apart() -> bool {
    APART.get()
}

/// Whether the process has at most this thread and `ours` others. False if `/proc` is not
/// available.
pub fn is_alone(ours: usize) -> bool {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return false };
    let live = |task: std::io::Result<std::fs::DirEntry>| match task {
        Ok(task) => {
            std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| is_live(&stat))
        }
        Err(_) => true,
    };
    tasks.map(live).filter(|live| *live).count() <= 1 + ours
}

/// Whether a thread with this `stat` in `/proc` is not exiting: a joined thread may still be listed
/// there.
fn is_live(stat: &str) -> bool {
    const PF_EXITING: u64 = 4;
    // The name may contain anything.
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse().ok());
    flags.is_none_or(|flags: u64| flags & PF_EXITING == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries() {
        assert_eq!(set(60_000, Entry::File(3)), Some(Entry::NotOurs));
        assert_eq!(set(60_001, Entry::Internal), Some(Entry::NotOurs));
        assert_eq!([60_000, 60_001, 60_002].map(is_file), [true, false, false]);
        let found: Vec<_> = ours(60_000, u32::MAX).collect();
        assert_eq!(found, [(60_000, Entry::File(3)), (60_001, Entry::Internal)]);
        assert!(!replace(60_000, Entry::File(4), Entry::Closing));
        assert!(replace(60_000, Entry::File(3), Entry::Closing));
        assert_eq!((get(60_000), is_file(60_000)), (Entry::Closing, true));
        assert_eq!(set(60_000, Entry::NotOurs), Some(Entry::Closing));
        assert_eq!(get(60_000), Entry::NotOurs);
    }

    #[test]
    fn numbers_that_cannot_be_ours() {
        for fd in [-1, CAPACITY as RawFd, RawFd::MAX] {
            assert_eq!(get(fd), Entry::NotOurs);
            assert_eq!(set(fd, Entry::Internal), None);
        }
    }

    #[test]
    fn threads_that_end() {
        let stat = |flags| format!("7 (a) (b) R 1 7 7 0 -1 {flags} 93 0 0");
        assert!(is_live(&stat("4194304")));
        assert!(!is_live(&stat("4194308")));
        assert!(is_live("what no kernel writes"));
    }

    #[test]
    fn threads_are_seen() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        assert!(!is_alone(0));
        assert!(is_alone(1 << 20));
        drop(end);
        assert!(other.join().is_ok());
    }
}

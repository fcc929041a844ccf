// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that makes calls, this one or one on whose behalf calls are made: its memory and its
//! descriptors.
//!
//! Another process is identified by a pidfd, as its ID may be reused. What the kernel looks up by
//! ID is only valid while the process still exists.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};
use twostage::sync::Mutex;

use rustix::event::PollFlags;
use twostage::iommufd::Errno;

use crate::sys;
use crate::table::Internal;

/// A process.
#[derive(Debug, Clone)]
pub struct Process {
    pid: i32,
    other: Option<Arc<Other>>,
}

/// A process that is not this one.
#[derive(Debug)]
struct Other {
    pidfd: Internal,
    /// Its start time, which identifies it together with its ID.
    start_time: u64,
}

/// The other processes, each with one pidfd, however many mappings are of its memory.
#[derive(Debug, Default)]
pub struct Processes(Mutex<BTreeMap<i32, Weak<Other>>>);

impl Processes {
    /// The process that currently has the ID `pid`.
    ///
    /// # Errors
    /// `ESRCH` there is none.
    pub fn of(&self, pid: i32) -> Result<Process, Errno> {
        match pid {
            // What somebody else says may be any number.
            ..=0 => Err(Errno::from_raw(libc::ESRCH)),
            own if own == sys::process_id() => Ok(Process::own()),
            _ => self.other(pid, sys::pidfd_open(pid)?),
        }
    }

    /// The process that created the socket at the other end of `channel` and waits there.
    ///
    /// # Errors
    /// `ESRCH` it is gone.
    pub fn behind(&self, channel: RawFd) -> Result<Process, Errno> {
        let pid = sys::peer_process(channel)?;
        if pid == sys::process_id() {
            return Ok(Process::own());
        }
        // Before Linux 6.5 by its ID, which is valid as long as it holds the other end.
        let pidfd = sys::peer_pidfd(channel).or_else(|_| sys::pidfd_open(pid))?;
        let process = self.other(pid, pidfd)?;
        match sys::events(channel).contains(PollFlags::HUP) {
            false => Ok(process),
            true => Err(Errno::from_raw(libc::ESRCH)),
        }
    }

    fn other(&self, pid: i32, pidfd: OwnedFd) -> Result<Process, Errno> {
        let gone = Errno::from_raw(libc::ESRCH);
        let start_time = sys::start_time(pid).ok_or(gone)?;
        let other = Other { pidfd: Internal::new(pidfd), start_time };
        let other = self.known(pid, other);
        let process = Process { pid, other: Some(other) };
        process.is_there().then_some(process).ok_or(gone)
    }

    /// `other`, with the ID `pid`, or the existing object for it.
    fn known(&self, pid: i32, other: Other) -> Arc<Other> {
        let mut processes = self.0.lock();
        let known = processes.get(&pid).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.start_time == other.start_time) {
            return known;
        }
        processes.retain(|_, process| process.strong_count() > 0);
        let other = Arc::new(other);
        processes.insert(pid, Arc::downgrade(&other));
        other
    }
}

impl Process {
    /// This process.
    pub fn own() -> Self {
        Self { pid: sys::process_id(), other: None }
    }

    /// Whether it still exists.
    pub fn is_there(&self) -> bool {
        let ended = |other: &Arc<Other>| sys::events(other.pidfd.raw()).contains(PollFlags::IN);
        !self.other.as_ref().is_some_and(ended)
    }

    /// `found`, looked up by ID, if the process still exists.
    fn if_there<T>(&self, found: Option<T>) -> Option<T> {
        found.filter(|_| self.is_there())
    }

    /// Fills `bytes` from `address` on, up to the first unreadable byte; returns their number.
    pub fn read_some(&self, address: u64, bytes: &mut [u8]) -> usize {
        self.if_there(sys::read_memory(self.pid, address, bytes).ok()).unwrap_or(0)
    }

    /// Writes `bytes` from `address` on, up to the first unwritable byte; returns their number.
    pub fn write_some(&self, address: u64, bytes: &[u8]) -> usize {
        if !self.is_there() {
            return 0;
        }
        // SAFETY: the program passed the memory to a call that writes there, or mapped it for
        // devices to write.
        unsafe { sys::write_memory(self.pid, address, bytes) }.unwrap_or(0)
    }

    /// Its ID.
    pub fn id(&self) -> i32 {
        self.pid
    }

    /// Distinguishes it from others with the same ID: its start time, or 0 for this process.
    pub fn start_time(&self) -> u64 {
        self.other.as_ref().map_or(0, |other| other.start_time)
    }

    /// Whether it is this process.
    pub fn is_own(&self) -> bool {
        self.other.is_none()
    }

    /// The path in `/proc` of its descriptor `fd`.
    fn link(&self, fd: i32) -> String {
        format!("/proc/{}/fd/{fd}", self.pid)
    }

    /// The file open as `fd`, with the same access mode; with another one if that is not possible.
    pub fn same_file(&self, fd: i32) -> Option<File> {
        let Some(other) = &self.other else {
            return sys::duplicate(fd).ok().map(File::from);
        };
        let same = sys::pidfd_getfd(other.pidfd.raw(), fd).map(File::from);
        same.ok().or_else(|| self.if_there(self.file_anew(fd)))
    }

    /// The file open as `fd`, reopened: readable and writable if possible.
    fn file_anew(&self, fd: i32) -> Option<File> {
        let writable = File::options().read(true).write(true).open(self.link(fd));
        writable.or_else(|_| File::open(self.link(fd))).ok()
    }

    /// The inode of the socket open as `fd`: see [`sys::inode`].
    pub fn socket(&self, fd: i32) -> Option<u64> {
        if self.is_own() {
            return sys::inode(fd).ok();
        }
        let link = self.if_there(std::fs::read_link(self.link(fd)).ok())?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    /// Whether anything is open as `fd`.
    pub fn has_open(&self, fd: i32) -> bool {
        if self.is_own() {
            return sys::status(fd).is_ok();
        }
        self.if_there(std::fs::symlink_metadata(self.link(fd)).ok()).is_some()
    }

    /// Its user; `u32::MAX` if it is gone.
    pub fn user_id(&self) -> u32 {
        if self.is_own() {
            return sys::user_id();
        }
        // A process that is gone locks nothing any more, so the account does not matter.
        let owner = self.if_there(std::fs::metadata(format!("/proc/{}", self.pid)).ok());
        owner.map_or(u32::MAX, |of| of.uid())
    }
}

/// Reopens `file`, readable and writable if at all possible.
pub fn anew(file: File) -> File {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(link).unwrap_or(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_number_that_is_no_id_is_that_of_no_process() {
        let processes = Processes::default();
        for pid in [0, -1, i32::MIN, i32::MAX] {
            assert_eq!(processes.of(pid).unwrap_err().raw(), libc::ESRCH, "{pid}");
        }
    }

    #[test]
    fn what_a_number_leads_to_counts_only_while_the_process_is_there() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let processes = Processes::default();
        let process = processes.of(child.id() as i32).unwrap();
        assert!(process.is_there() && !process.is_own() && process.start_time() > 0);
        let again = processes.of(child.id() as i32).unwrap();
        let [one, two] = [&process, &again].map(|it| it.other.as_ref().unwrap());
        assert!(Arc::ptr_eq(one, two), "one pidfd for both");
        assert!(process.has_open(0) && !process.has_open(77));
        assert!(process.same_file(0).is_some() && process.same_file(77).is_none());
        assert_eq!(process.user_id(), sys::user_id());
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!process.is_there());
        // As if another process had the ID now.
        let reused = Process { pid: sys::process_id(), other: process.other.clone() };
        let word = 7u64;
        assert_eq!(reused.read_some(&raw const word as u64, &mut [0; 8]), 0);
        assert_eq!(reused.write_some(&raw const word as u64, &[1; 8]), 0);
        assert!(!reused.has_open(2) && reused.socket(2).is_none());
        assert!(reused.same_file(2).is_none());
        assert_eq!((reused.user_id(), word), (u32::MAX, 7));
    }
}

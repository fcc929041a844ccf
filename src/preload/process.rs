// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that makes calls, this one or one that calls are forwarded for: its memory and its
//! descriptors.

use std::os::unix::fs::MetadataExt;

use crate::sys;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pid: i32,
    own: bool,
}

impl Process {
    /// This process.
    pub fn own() -> Self {
        Self { pid: sys::process_id(), own: true }
    }

    /// The process `pid`.
    pub fn of(pid: i32) -> Self {
        Self { pid, own: pid == sys::process_id() }
    }

    /// Fills `bytes` from `address` on, up to the first that cannot be read; returns how many were.
    pub fn read_some(&self, address: u64, bytes: &mut [u8]) -> usize {
        sys::read_memory(self.pid, address, bytes).unwrap_or(0)
    }

    /// Writes `bytes` from `address` on, up to the first that cannot be; returns how many were.
    pub fn write_some(&self, address: u64, bytes: &[u8]) -> usize {
        // SAFETY: the program named the memory in a call that writes there, or mapped it for
        // devices to write.
        unsafe { sys::write_memory(self.pid, address, bytes) }.unwrap_or(0)
    }

    /// Its number.
    pub fn id(&self) -> i32 {
        self.pid
    }

    /// Whether it is this process.
    pub fn is_own(&self) -> bool {
        self.own
    }

    /// What `/proc` calls the descriptor `fd` of the process.
    pub fn link(&self, fd: i32) -> String {
        format!("/proc/{}/fd/{fd}", self.pid)
    }

    /// Which socket the process has open as `fd`: see [`sys::inode`].
    pub fn socket(&self, fd: i32) -> Option<u64> {
        if self.own {
            return sys::inode(fd).ok();
        }
        let link = std::fs::read_link(self.link(fd)).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    /// Whether anything is open as `fd`.
    pub fn has_open(&self, fd: i32) -> bool {
        if self.own {
            return sys::status(fd).is_ok();
        }
        std::fs::symlink_metadata(self.link(fd)).is_ok()
    }

    /// Whom it runs as; `u32::MAX` when it is gone.
    pub fn user_id(&self) -> u32 {
        if self.own {
            return sys::user_id();
        }
        // A process that is gone locks nothing any more; nobody's account is as good as another.
        std::fs::metadata(format!("/proc/{}", self.pid)).map_or(u32::MAX, |of| of.uid())
    }
}

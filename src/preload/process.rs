// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that makes calls: this one, or one that calls are forwarded for.

use std::fs::File;

use twostage::emulated::uapi::{UserFault, UserSpace};
use twostage::iommufd::UserMemory;

use crate::{pins, sys};

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

    /// Another process.
    pub fn other(pid: i32) -> Self {
        Self { pid, own: pid == sys::process_id() }
    }

    /// The file that the process has open as `fd`.
    pub fn open_file(&self, fd: i32) -> Option<File> {
        if self.own {
            return sys::duplicate(fd, 0).ok().map(File::from);
        }
        // The link opens the file anew, with the rights it has itself.
        let link = format!("/proc/{}/fd/{fd}", self.pid);
        let writable = File::options().read(true).write(true).open(&link);
        writable.or_else(|_| File::open(&link)).ok()
    }

    /// Which file the process has open as `fd`, when that is a socket: see [`sys::inode`].
    pub fn socket(&self, fd: i32) -> Option<u64> {
        if self.own {
            return sys::inode(fd).ok();
        }
        let link = std::fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    /// Whether the process has anything open as `fd`.
    pub fn has_open(&self, fd: i32) -> bool {
        if self.own {
            return sys::status(fd).is_ok();
        }
        std::fs::symlink_metadata(format!("/proc/{}/fd/{fd}", self.pid)).is_ok()
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
}

impl UserSpace for Process {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        match self.read_some(address, bytes) as u64 {
            read if read == length => Ok(()),
            _ => Err(UserFault { address, length }),
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        match self.write_some(address, bytes) as u64 {
            written if written == length => Ok(()),
            _ => Err(UserFault { address, length }),
        }
    }

    fn memory(&self, address: u64, length: u64) -> Result<UserMemory, UserFault> {
        pins::pin(self.pid, self.own, address, length, false)
            .map_err(|_| UserFault { address, length })
    }
}

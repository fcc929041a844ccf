// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process that makes calls: this one, or one that calls are forwarded for.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use twostage::emulated::uapi::{self, Credentials, UserFault, UserSpace};
use twostage::emulated::EmulatedHost;
use twostage::iommufd::{Errno, UserMemory};

use crate::config::Capability;
use crate::state::{self, Own};
use crate::world::World;
use crate::{pins, sys};

/// What iommufds have pinned of a process's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pinned {
    /// All of it.
    pub pinned: u64,
    /// What counts as locked by the process.
    pub locked: u64,
}

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

    /// What `/proc` calls the descriptor `fd` of the process.
    fn link(&self, fd: i32) -> String {
        format!("/proc/{}/fd/{fd}", self.pid)
    }

    /// Which socket the process has open as `fd`: see [`sys::inode`].
    fn socket(&self, fd: i32) -> Option<u64> {
        if self.own {
            return sys::inode(fd).ok();
        }
        let link = std::fs::read_link(self.link(fd)).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }

    fn has_open(&self, fd: i32) -> bool {
        if self.own {
            return sys::status(fd).is_ok();
        }
        std::fs::symlink_metadata(self.link(fd)).is_ok()
    }

    /// The file of this process that the process has open as `fd`.
    pub fn emulated_file(&self, fd: i32) -> Option<Arc<Own>> {
        self.socket(fd).and_then(|inode| state::current().own(inode))
    }

    /// The iommufd that the process has open as `fd`.
    ///
    /// # Errors
    /// `EBADF` nothing is open there; `EBADFD` something else is.
    pub fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        let own = self.emulated_file(fd);
        match own.as_ref().and_then(|own| own.file.as_iommufd()) {
            Some(host) => Ok(host.clone()),
            // Another process's is of another machine.
            None if self.has_open(fd) => Err(Errno::from_raw(libc::EBADFD)),
            None => Err(Errno::from_raw(libc::EBADF)),
        }
    }

    fn user_id(&self) -> u32 {
        if self.own {
            return sys::user_id();
        }
        // A process that is gone locks nothing any more; nobody's account is as good as another.
        std::fs::metadata(format!("/proc/{}", self.pid)).map_or(u32::MAX, |of| of.uid())
    }
}

impl UserSpace for Process {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(*self)
    }

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

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        pins::pin(self.pid, self.own, address, length, writable)
            .map_err(|_| UserFault { address, length })
    }

    fn file(&self, fd: i32) -> Option<Arc<File>> {
        if self.own {
            return sys::duplicate(fd).ok().map(|fd| Arc::new(fd.into()));
        }
        // The link opens the file anew: one that the process itself may only read is read-only.
        let writable = File::options().read(true).write(true).open(self.link(fd));
        writable.or_else(|_| File::open(self.link(fd))).ok().map(Arc::new)
    }

    fn credentials(&self) -> Credentials {
        let (accounts, pid) = (&state::current().accounts, if self.own { 0 } else { self.pid });
        // One that is gone, or that this one may not look at, has no rights.
        let own = sys::capabilities(pid).unwrap_or(0);
        let given = state::current().world().map_or(0, World::capabilities);
        let may = |capability: Capability| (own | given) & capability.bit() != 0;
        Credentials {
            user: accounts.user(self.user_id()),
            process: accounts.process(self.pid),
            pinned: accounts.pinned(self.pid),
            memlock_limit: sys::memlock_limit(pid).unwrap_or(0),
            ipc_lock: may(Capability::IpcLock),
            sys_resource: may(Capability::SysResource),
            sys_rawio: may(Capability::SysRawio),
        }
    }
}

impl uapi::Process for Process {
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        let own = self.emulated_file(fd);
        match own.as_ref().and_then(|own| own.file.as_iommufd()) {
            Some(host) => Ok(host.clone()),
            // Another process's is of another machine.
            None if self.has_open(fd) => Err(Errno::from_raw(libc::EBADFD)),
            None => Err(Errno::from_raw(libc::EBADF)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_that_lead_nowhere_are_faults() {
        let process = Process::own();
        let mut bytes = [0; 8];
        assert_eq!(process.read(0x10, &mut bytes).unwrap_err().address, 0x10);
        assert!(process.write(0x10, &bytes).is_err());
        assert!(process.memory(0x10, 8, false).is_err());
        let constant = "read-only".as_ptr() as u64;
        assert!(process.memory(constant, 8, true).is_err());
        assert_eq!(process.memory(constant, 8, false).unwrap().length(), 8);
    }

    #[test]
    fn descriptors_that_are_no_iommufd() {
        let process = Process::own();
        assert_eq!(process.iommufd(-1).unwrap_err().raw(), libc::EBADF);
        assert_eq!(process.iommufd(2).unwrap_err().raw(), libc::EBADFD);
        assert!(process.file(-1).is_none());
    }

    #[test]
    fn a_process_pays_for_itself() {
        let (one, again) = (Process::own().credentials(), Process::own().credentials());
        assert!(Arc::ptr_eq(&one.process, &again.process) && Arc::ptr_eq(&one.user, &again.user));
        let init = Process::of(1).credentials();
        assert!(!Arc::ptr_eq(&one.process, &init.process));
    }
}

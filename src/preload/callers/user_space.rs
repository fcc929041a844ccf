// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A process as the emulated host's user: its memory, descriptors and accounts.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use twostage::iommufd::{Errno, UserMemory};
use twostage_emulated::uapi::{Credentials, UserFault, UserSpace};
use twostage_emulated::EmulatedHost;

use crate::callers::process::{self, Process};
use crate::config::Capability;
use crate::state::{self, Own};
use crate::world::World;
use crate::{memory::taken, sys};

impl Process {
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
            // One of another process belongs to another machine.
            None if self.has_open(fd) => Err(Errno::from_raw(libc::EBADFD)),
            None => Err(Errno::from_raw(libc::EBADF)),
        }
    }
}

impl UserSpace for Process {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(self.clone())
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
        let pins = &state::current().pins;
        let pinned = pins.pin(self.id(), self.is_own(), address, length, writable).ok();
        // The ID may have been reused by now.
        pinned.filter(|_| self.is_there()).ok_or(UserFault { address, length })
    }

    fn file(&self, fd: i32) -> Option<Arc<File>> {
        let same = self.same_file(fd)?;
        if !sys::is_memory(&same) {
            return Some(Arc::new(same));
        }
        let file = Arc::new(process::anew(same));
        if let Ok(status) = sys::status(file.as_raw_fd()) {
            state::current().pins.mapped_file(taken::key(&status), &file);
        }
        Some(file)
    }

    fn is_memory(&self, file: &File) -> bool {
        sys::is_memory(file)
    }

    fn credentials(&self) -> Credentials {
        let (accounts, pid) =
            (&state::current().accounts, if self.is_own() { 0 } else { self.id() });
        let limit = sys::memlock_limit(pid).unwrap_or(0);
        // One that is gone, or inaccessible, has no capabilities.
        let own = sys::capabilities(pid).unwrap_or(0);
        let (own, limit) = if self.is_there() { (own, limit) } else { (0, 0) };
        let given = state::current().world().map_or(0, World::capabilities);
        let may = |capability: Capability| (own | given) & capability.bit() != 0;
        Credentials {
            user: accounts.user(self.user_id()),
            process: accounts.process(self.id(), self.start_time()),
            pinned: accounts.pinned(self.id(), self.start_time()),
            memlock_limit: limit,
            ipc_lock: may(Capability::IpcLock),
            sys_resource: may(Capability::SysResource),
            sys_rawio: may(Capability::SysRawio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::callers::process::Processes;

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
        let init = Processes::default().of(1).unwrap().credentials();
        assert!(!Arc::ptr_eq(&one.process, &init.process));
    }
}

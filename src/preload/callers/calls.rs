// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls on emulated files, from this process and, as their owner, from others; and the processes
//! that make them, as the emulated host's users: their memory, descriptors and accounts.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use twostage::iommufd::{Errno, UserMemory};
use twostage_emulated::uapi::{self, Credentials, TestFile, UserFault, UserSpace};
use twostage_emulated::{DmaBuf, EmulatedHost, EventFile};

use crate::callers::process::{self, Process};
use crate::callers::remote::{self, Request};
use crate::config::Capability;
use crate::files::file::{Answer, Call, Caller, File};
use crate::files::iommufd::{Events, OpenTestFile};
use crate::memory::{accounts::Pinned, taken};
use crate::state::{self, Kind, Own, Slot, State};
use crate::world::World;
use crate::{sys, table, trace};

/// Answers a call on `fd`; `None` if it is not an emulated file. `EBADF` if it is being closed.
pub fn call(state: &State, fd: RawFd, call: Call) -> Option<Result<i64, Errno>> {
    let slot = match state.find(fd).transpose()? {
        Ok(slot) => slot,
        Err(errno) => return Some(Err(errno)),
    };
    let result = match slot.kind {
        Kind::Own(own) => {
            let caller = CallingProcess::own();
            let mut result = make(state, &own, &caller, call);
            if result.is_err_and(|errno| errno == Errno::EBUSY) {
                // Perhaps busy only because of a process that is gone.
                state.end_hung_up();
                result = make(state, &own, &caller, call);
            }
            if !state.waiting.is_empty() {
                let _serving = state.serving();
                state.waiting.resume();
            }
            result
        }
        Kind::Foreign => remote::call(fd, call),
    };
    state.pins.sweep();
    if result.is_ok_and(|answer| answer.take_message) {
        // Fails if another thread was faster, through a duplicate of the descriptor.
        let _ = sys::receive(fd, &mut [0], false);
    }
    Some(result.map(|answer| answer.value))
}

/// Makes `call` on a file of this process. Its effects on others are left to the caller: DMA that
/// waits for a page must continue ([`Waiting::resume`](crate::files::file::Waiting::resume),
/// while serving) before the writer of the response, or whoever ended the attachment, gets the
/// result.
fn make(state: &State, own: &Own, caller: &CallingProcess, call: Call) -> Result<Answer, Errno> {
    let result = trace::call(&*own.file, caller, call);
    match call {
        Call::Write { .. } => state.waiting.written(&own.file),
        Call::Ioctl { .. } => {
            if let (Some(event), Some(service)) = (own.file.wake_event(), state.service()) {
                service.watch_event(&event, &own.file)?;
            }
        }
        Call::Read { .. } => {}
    }
    result
}

/// What iommufds accessible to this process have pinned of process `pid`.
pub fn pinned(state: &State, pid: i32) -> Pinned {
    let mut all = pinned_here(state, pid);
    let mut asked = BTreeSet::new();
    for (fd, _) in table::ours(0, u32::MAX) {
        // Each owner once.
        let foreign = matches!(state.find(fd), Ok(Some(Slot { kind: Kind::Foreign, .. })));
        if let Some(owner) = sys::peer_process(fd).ok().filter(|_| foreign) {
            let pinned = if asked.insert(owner) { remote::pinned(fd, pid).ok() } else { None };
            let pinned = pinned.unwrap_or_default();
            all.pinned += pinned.pinned;
            all.locked += pinned.locked;
        }
    }
    all
}

/// What the iommufds of this process have pinned of the process that currently has the ID `pid`.
fn pinned_here(state: &State, pid: i32) -> Pinned {
    let process = state.processes.of(pid);
    process.map_or(Pinned::default(), |process| state.accounts.pinned_of(&process))
}

/// Takes one call of another process on the file whose descriptors have `inode`, or ends the file
/// when its last descriptor is closed; or wakes a file whose eventfd has been written.
pub fn serve(inode: u64) {
    let state = state::current();
    if state.service().is_some_and(|service| service.wake(inode)) {
        return;
    }
    match answer_one(state, inode) {
        Ok(true) => {}
        // No more requests.
        Ok(false) => state.hung_up(inode),
        Err(errno) => log::warn!("a call from another process: {errno}"),
    }
}

/// Takes one call on the file with `inode`, and answers it; returns whether there was one.
///
/// # Errors
/// The message is invalid, or the caller is gone.
fn answer_one(state: &State, inode: u64) -> Result<bool, Errno> {
    let _serving = state.serving();
    let Some(own) = state.own(inode) else { return Ok(false) };
    let Some((request, channel)) = remote::take_request(own.end.raw())? else { return Ok(false) };
    let channel = Arc::new(channel);
    match request {
        Request::Call(call) => {
            let process = state.processes.behind(channel.as_raw_fd())?;
            let caller = CallingProcess::remote(process, channel.clone());
            let result = make(state, &own, &caller, call);
            state.waiting.resume();
            remote::answer_call(&channel, result)?;
        }
        Request::Pinned(pid) => {
            remote::answer_pinned(&channel, pinned_here(state, pid))?;
        }
    }
    Ok(true)
}

/// The caller of a call: a process, and how it receives descriptors.
#[derive(Debug)]
struct CallingProcess {
    process: Process,
    /// To another process.
    channel: Option<Arc<OwnedFd>>,
}

impl CallingProcess {
    /// This process.
    fn own() -> Self {
        Self { process: Process::own(), channel: None }
    }

    /// `process`, which waits for an answer on `channel`.
    fn remote(process: Process, channel: Arc<OwnedFd>) -> Self {
        Self { process, channel: Some(channel) }
    }
}

impl UserSpace for CallingProcess {
    fn share(&self) -> Arc<dyn UserSpace> {
        self.process.share()
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        self.process.read(address, bytes)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        self.process.write(address, bytes)
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        self.process.memory(address, length, writable)
    }

    fn file(&self, fd: i32) -> Option<Arc<fs::File>> {
        self.process.file(fd)
    }

    fn credentials(&self) -> Credentials {
        self.process.credentials()
    }

    fn dma_buf(&self, fd: i32) -> Option<Arc<DmaBuf>> {
        uapi::Process::test_file(self, fd)?.dma_buf().cloned()
    }
}

impl Caller for CallingProcess {
    fn process(&self) -> &Process {
        &self.process
    }

    fn open(&self, file: Arc<dyn File>) -> Result<i32, Errno> {
        match &self.channel {
            None => state::current().install(file, true),
            Some(channel) => remote::install(channel, file),
        }
    }

    fn file_at(&self, fd: i32) -> Result<Arc<dyn File>, Errno> {
        match self.process.emulated_file(fd) {
            Some(own) => Ok(own.file.clone()),
            None if self.process.has_open(fd) => Err(Errno::EINVAL),
            None => Err(Errno::EBADF),
        }
    }
}

impl uapi::Process for CallingProcess {
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
        self.process.iommufd(fd)
    }

    fn install(&self, file: EventFile) -> Result<i32, Errno> {
        self.open(Arc::new(Events::new(file)))
    }

    fn install_test_file(&self, file: Arc<dyn TestFile>) -> Result<i32, Errno> {
        self.open(Arc::new(OpenTestFile(file)))
    }

    fn test_file(&self, fd: i32) -> Option<Arc<dyn TestFile>> {
        self.process.emulated_file(fd)?.file.as_test_file().cloned()
    }
}

impl Process {
    /// The file of this process that the process has open as `fd`.
    fn emulated_file(&self, fd: i32) -> Option<Arc<Own>> {
        self.socket(fd).and_then(|inode| state::current().own(inode))
    }

    /// The iommufd that the process has open as `fd`.
    ///
    /// # Errors
    /// `EBADF` nothing is open there; `EBADFD` something else is.
    fn iommufd(&self, fd: i32) -> Result<Arc<EmulatedHost>, Errno> {
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
            _ => Err(UserFault::new(address, length)),
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        match self.write_some(address, bytes) as u64 {
            written if written == length => Ok(()),
            _ => Err(UserFault::new(address, length)),
        }
    }

    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault> {
        let pins = &state::current().pins;
        let pinned = pins.pin(self.id(), self.is_own(), address, length, writable).ok();
        // The ID may have been reused by now.
        pinned.filter(|_| self.is_there()).ok_or(UserFault::new(address, length))
    }

    fn file(&self, fd: i32) -> Option<Arc<fs::File>> {
        let same = self.same_file(fd)?;
        let is_memory = sys::is_memory(&same);
        let file = if is_memory { process::anew(same) } else { same };
        let status = sys::status(file.as_raw_fd()).ok().filter(|_| is_memory);
        Some(state::current().pins.mapped_file(status.as_ref().map(taken::key), file))
    }

    fn is_memory(&self, file: &fs::File) -> bool {
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

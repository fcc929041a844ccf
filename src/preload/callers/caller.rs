// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The caller of a call: a process, and how it receives descriptors.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use twostage::iommufd::{Errno, UserMemory};
use twostage_emulated::uapi::{self, Credentials, TestFile, UserFault, UserSpace};
use twostage_emulated::{DmaBuf, EmulatedHost, EventFile};

use crate::callers::process::Process;
use crate::files::events::Events;
use crate::files::file::{Caller, File};
use crate::files::test_file::OpenTestFile;
use crate::{callers::remote, state};

/// A calling process.
#[derive(Debug)]
pub struct CallingProcess {
    process: Process,
    /// To another process.
    channel: Option<Arc<OwnedFd>>,
}

impl CallingProcess {
    /// This process.
    pub fn own() -> Self {
        Self { process: Process::own(), channel: None }
    }

    /// `process`, which waits for an answer on `channel`.
    pub fn remote(process: Process, channel: Arc<OwnedFd>) -> Self {
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

    fn file(&self, fd: i32) -> Option<Arc<std::fs::File>> {
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

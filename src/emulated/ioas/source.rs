// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where a mapping's pages come from, which is only accessed when a page is pinned, and who is
//! charged for those that are.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::PAGE_SIZE;
use crate::host::dma_buf::DmaBuf;
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::{Credentials, LockedMemory, UserSpace};
use twostage::iommufd::{Errno, UserMemory};

/// A source of pages.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// Memory of this process.
    Memory(UserMemory),
    /// A user's address space, from this address on.
    User(Arc<dyn UserSpace>, u64),
    /// A file that a user has open, from this offset on.
    File(Arc<dyn UserSpace>, Arc<File>, u64),
    /// Device memory, from this offset on.
    DmaBuf(Arc<DmaBuf>, u64),
}

impl Source {
    /// Its start address or offset, in bytes: with the alignment of the pages.
    pub fn start(&self) -> u64 {
        match self {
            Self::Memory(memory) => memory.user_va(),
            Self::User(_, start) | Self::File(_, _, start) | Self::DmaBuf(_, start) => *start,
        }
    }

    /// Who is charged for pinned pages, if anyone.
    pub fn credentials(&self) -> Option<Credentials> {
        match self {
            Self::Memory(_) | Self::DmaBuf(..) => None,
            Self::User(user, _) | Self::File(user, ..) => Some(user.credentials()),
        }
    }

    /// Pins the memory at `offset` from the start: as many of `length` bytes as are contiguous, at
    /// least one.
    ///
    /// # Errors
    /// `EFAULT` there is no such memory; `EINVAL` the file has no such pages.
    pub fn pin(&self, offset: u64, length: u64, writable: bool) -> Outcome<UserMemory> {
        match self {
            Self::Memory(memory) => part(memory, offset, length),
            Self::DmaBuf(buf, start) => part(buf.memory(), start + offset, length),
            // Does not overflow: the end of the source was checked to be below 2^64.
            Self::User(user, start) => Ok(user.memory(start + offset, length, writable)?),
            Self::File(user, file, start) => {
                if !user.is_memory(file) {
                    return refuse(Errno::EINVAL, "the file is not backed by memory");
                }
                pin_file(file, start + offset, length, writable)
            }
        }
    }
}

fn part(memory: &UserMemory, offset: u64, length: u64) -> Outcome<UserMemory> {
    memory.part(offset, length).or_else(|error| refuse(Errno::EFAULT, error.to_string()))
}

/// Maps `length` bytes at `offset` of `file`, in whole pages. If devices do not write, it need not
/// be writable, as it may be sealed.
fn pin_file(file: &Arc<File>, offset: u64, length: u64, writable: bool) -> Outcome<UserMemory> {
    let in_page = offset % PAGE_SIZE;
    let end = offset.checked_add(length).and_then(|end| end.checked_next_multiple_of(PAGE_SIZE));
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    let Some(end) = end.filter(|end| *end <= size) else {
        return refuse(
            Errno::EINVAL,
            format!("{length:#x} bytes at {offset:#x} are not in a file of {size:#x} bytes"),
        );
    };
    let start = offset - in_page;
    let pages = FileOffset::from_arc(file.clone(), start);
    let memory = usize::try_from(end - start)
        .ok()
        .and_then(|size| map(&pages, size, true).or_else(|| map(&pages, size, writable)))
        .and_then(|region| UserMemory::new(Arc::new(region), in_page, length).ok());
    match memory {
        Some(memory) => Ok(memory),
        None => refuse(Errno::EINVAL, "the file cannot be mapped"),
    }
}

/// Maps `size` bytes of a file.
fn map(pages: &FileOffset, size: usize, writable: bool) -> Option<GuestRegionMmap> {
    // PROT_READ, PROT_WRITE, MAP_SHARED and MAP_NORESERVE.
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(1 | i32::from(writable) << 1)
        .with_mmap_flags(1 | 0x4000)
        .with_file_offset(pages.clone());
    GuestRegionMmap::new(builder.build().ok()?, GuestAddress(0))
}

/// Which memory-lock limit applies (`IOMMU_OPTION_RLIMIT_MODE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RlimitMode {
    /// The user's, over all processes.
    #[default]
    User,
    /// The process's, as in VFIO.
    Process,
}

/// Who is charged for some pages; nobody if they belong to no process.
#[derive(Debug)]
pub(crate) struct Payer(Option<Process>);

#[derive(Debug)]
struct Process {
    who: Credentials,
    /// None if no limit applied to the process that mapped the pages: they are only counted.
    mode: Option<RlimitMode>,
}

impl Payer {
    /// Who pays for pages of `source`.
    pub fn of(source: &Source, mode: RlimitMode) -> Self {
        Self(source.credentials().map(|who| {
            let mode = (!who.ipc_lock).then_some(mode);
            Process { who, mode }
        }))
    }

    /// Charges `bytes` more; `source` has the current limit.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn charge(&self, source: &Source, bytes: u64) -> Outcome<()> {
        let Some(process) = &self.0 else { return Ok(()) };
        process.lock(bytes, || source.credentials().map_or(u64::MAX, |now| now.memlock_limit))
    }

    /// Uncharges `bytes`.
    pub fn discharge(&self, bytes: u64) {
        let Some(process) = &self.0 else { return };
        process.who.pinned.unlock(bytes);
        if let Some(account) = process.account() {
            account.unlock(bytes);
        }
    }

    /// The payer that would replace this one if the pages were `who`'s; none if nothing changes.
    pub fn successor(&self, who: &Credentials) -> Option<Self> {
        let Self(Some(Process { who: old, mode })) = self else { return None };
        let same_process = Arc::ptr_eq(&old.process, &who.process);
        let same = match mode {
            Some(RlimitMode::User) => Arc::ptr_eq(&old.user, &who.user) && same_process,
            Some(RlimitMode::Process) | None => same_process,
        };
        (!same).then(|| Self(Some(Process { who: who.clone(), mode: *mode })))
    }

    /// Charges `bytes` with the limit at the time when this payer was created.
    ///
    /// # Errors
    /// `ENOMEM` the limit is reached.
    pub fn take_over(&self, bytes: u64) -> Outcome<()> {
        let Some(process) = &self.0 else { return Ok(()) };
        process.lock(bytes, || process.who.memlock_limit)
    }
}

impl Process {
    fn lock(&self, bytes: u64, limit: impl FnOnce() -> u64) -> Outcome<()> {
        if let Some(account) = self.account() {
            lock(account, bytes, limit())?;
        }
        // Without a limit.
        self.who.pinned.lock(bytes, u64::MAX);
        Ok(())
    }

    fn account(&self) -> Option<&LockedMemory> {
        self.mode.map(|mode| match mode {
            RlimitMode::User => &*self.who.user,
            RlimitMode::Process => &*self.who.process,
        })
    }
}

fn lock(account: &LockedMemory, bytes: u64, limit: u64) -> Outcome<()> {
    if !account.lock(bytes, limit) {
        return refuse(
            Errno::ENOMEM,
            format!("{bytes:#x} more bytes exceed the memory-lock limit"),
        );
    }
    Ok(())
}

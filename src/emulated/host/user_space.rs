// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory of the process that makes an ioctl, its permissions, and what its memory locks.

use std::any::Any;
use std::fmt::Debug;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::host::dma_buf::DmaBuf;
use crate::host::refusal::Refusal;
use twostage::iommufd::{Errno, UserMemory};

/// A pointer to something that is not the user's memory: `EFAULT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length:#x} bytes at {address:#x} are not the user's memory")]
#[non_exhaustive]
pub struct UserFault {
    /// First byte of the access.
    pub address: u64,
    /// Length of the access.
    pub length: u64,
}

impl UserFault {
    /// An access to `length` bytes at `address`.
    pub fn new(address: u64, length: u64) -> Self {
        Self { address, length }
    }
}

impl From<UserFault> for Refusal {
    fn from(fault: UserFault) -> Self {
        Self { errno: Errno::EFAULT, detail: fault.to_string().into() }
    }
}

/// Memory charged to an account, in bytes.
#[derive(Debug, Default)]
pub struct LockedMemory {
    bytes: AtomicU64,
}

impl LockedMemory {
    /// Number of bytes charged.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Charges `bytes` more, unless that exceeds `limit`; returns whether it did.
    pub(crate) fn lock(&self, bytes: u64, limit: u64) -> bool {
        let more = |locked: u64| locked.checked_add(bytes).filter(|locked| *locked <= limit);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Uncharges `bytes` charged by [`Self::lock`].
    pub(crate) fn unlock(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The accounts of a process for locked memory, and its permissions.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The total of all processes of the user.
    pub user: Arc<LockedMemory>,
    /// The process's total. Processes are the same if this is the same object.
    pub process: Arc<LockedMemory>,
    /// What the process has pinned, charged to any account or none.
    pub pinned: Arc<LockedMemory>,
    /// `RLIMIT_MEMLOCK`, in bytes.
    pub memlock_limit: u64,
    /// `CAP_IPC_LOCK`: no limit applies to what the process maps.
    pub ipc_lock: bool,
    /// `CAP_SYS_RESOURCE`: may choose which account is charged.
    pub sys_resource: bool,
    /// `CAP_SYS_RAWIO`: may use devices without an IOMMU.
    pub sys_rawio: bool,
}

impl Credentials {
    /// A process with all permissions, of a separate user.
    pub fn privileged() -> Self {
        Self {
            user: Arc::default(),
            process: Arc::default(),
            pinned: Arc::default(),
            memlock_limit: u64::MAX,
            ipc_lock: true,
            sys_resource: true,
            sys_rawio: true,
        }
    }
}

/// The process that makes an ioctl.
pub trait UserSpace: Debug + Send + Sync {
    /// The same process, to be kept by a mapping: its memory is accessed when a page is pinned,
    /// perhaps much later, while another process makes an ioctl.
    fn share(&self) -> Arc<dyn UserSpace>;

    /// Fills `bytes` from `address` on (`copy_from_user`).
    ///
    /// # Errors
    /// Not all of it can be read.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault>;

    /// Writes `bytes` from `address` on (`copy_to_user`).
    ///
    /// # Errors
    /// Not all of it can be written; a part may have been.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault>;

    /// Pins the memory at `address`: of the `length` bytes from there on as many as are contiguous,
    /// at least one. It stays the same memory as long as the result exists, whatever the process
    /// does with its address space.
    ///
    /// # Errors
    /// Nothing is mapped at `address`, it is `writable` and cannot be written, or the process is
    /// gone.
    fn memory(&self, address: u64, length: u64, writable: bool) -> Result<UserMemory, UserFault>;

    /// The device memory open as `fd`, if it is that.
    fn dma_buf(&self, fd: i32) -> Option<Arc<DmaBuf>> {
        let _ = fd;
        None
    }

    /// The file open as `fd`, readable and writable if at all possible: a device's access does not
    /// depend on how the process has opened it.
    fn file(&self, fd: i32) -> Option<Arc<File>> {
        let _ = fd;
        None
    }

    /// Whether `file`, which the process has open, is backed by memory (shmem, hugetlbfs): pages of
    /// other files cannot be pinned.
    fn is_memory(&self, file: &File) -> bool {
        let _ = file;
        true
    }

    /// The process's current credentials.
    fn credentials(&self) -> Credentials {
        Credentials::privileged()
    }
}

/// Memory regions owned by a caller in this process, at their addresses.
#[derive(Debug, Clone)]
pub struct RegionSpace {
    regions: Vec<Arc<GuestRegionMmap>>,
    who: Credentials,
}

/// No memory.
impl Default for RegionSpace {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl RegionSpace {
    /// An address space that consists of `regions`, of a process with all permissions.
    pub fn new(regions: Vec<Arc<GuestRegionMmap>>) -> Self {
        Self { regions, who: Credentials::privileged() }
    }

    /// The same address space, of another process.
    pub fn with_credentials(self, who: Credentials) -> Self {
        Self { who, ..self }
    }

    /// The region of `address`, the offset in it, and how many bytes are left there.
    fn find(&self, address: u64) -> Option<(&Arc<GuestRegionMmap>, u64, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.as_ptr() as u64)?;
            let left = region.len().checked_sub(offset).filter(|left| *left > 0)?;
            Some((region, offset, left))
        })
    }

    /// The region that contains all of `length` bytes at `address`, and the offset in it.
    fn find_all(
        &self,
        address: u64,
        length: u64,
    ) -> Result<(&GuestRegionMmap, MemoryRegionAddress), UserFault> {
        match self.find(address) {
            Some((region, offset, left)) if length <= left => {
                Ok((region, MemoryRegionAddress(offset)))
            }
            _ => Err(UserFault { address, length }),
        }
    }
}

impl UserSpace for RegionSpace {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(self.clone())
    }

    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        let (region, offset) = self.find_all(address, length)?;
        region.read_slice(bytes, offset).map_err(|_| UserFault { address, length })
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        let (region, offset) = self.find_all(address, length)?;
        region.write_slice(bytes, offset).map_err(|_| UserFault { address, length })
    }

    fn memory(&self, address: u64, length: u64, _: bool) -> Result<UserMemory, UserFault> {
        let fault = UserFault { address, length };
        let (region, offset, left) = self.find(address).ok_or(fault)?;
        UserMemory::new(region.clone(), offset, length.min(left)).map_err(|_| fault)
    }

    fn credentials(&self) -> Credentials {
        self.who.clone()
    }
}

/// A file opened by an operation of Linux's selftests (feature `selftest`), or a dma-buf. Dropping
/// it closes it.
#[doc(hidden)]
pub trait TestFile: Any + Debug + Send + Sync {
    /// Its name, for logs.
    fn name(&self) -> &'static str;

    /// The device memory, if it is that.
    fn dma_buf(&self) -> Option<&Arc<DmaBuf>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn locked_memory_stays_within_its_limit() {
        let locked = LockedMemory::default();
        assert!(locked.lock(0x3000, 0x4000));
        assert!(!locked.lock(0x2000, 0x4000));
        assert!(!locked.lock(u64::MAX, u64::MAX), "no wrap");
        assert!(locked.lock(0x1000, 0x4000));
        locked.unlock(0x2000);
        assert_eq!(locked.bytes(), 0x2000);
    }

    #[test]
    fn memory_ends_with_its_region() {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let (space, start) = (RegionSpace::new(vec![region.clone()]), region.as_ptr() as u64);
        assert_eq!(space.memory(start + 0x1000, 0x9000, true).unwrap().length(), 0x3000);
        let fault = UserFault { address: start + 0x4000, length: 1 };
        assert_eq!(space.memory(start + 0x4000, 1, true).unwrap_err(), fault);
        assert!(space.read(start + 0x3fff, &mut [0; 2]).is_err());
        space.write(start + 0x3ffe, &[1, 2]).unwrap();
    }
}

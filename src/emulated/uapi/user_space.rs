// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that user pointers lead to.

use std::sync::Arc;

use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::emulated::refusal::Refusal;
use crate::iommufd::{Errno, UserMemory};

/// A pointer that leads to no memory of the user: `EFAULT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{length:#x} bytes at {address:#x} are not the user's memory")]
pub struct UserFault {
    /// First byte that was wanted.
    pub address: u64,
    /// How many bytes were wanted.
    pub length: u64,
}

impl From<UserFault> for Refusal {
    fn from(fault: UserFault) -> Self {
        Self { errno: Errno::EFAULT, detail: fault.to_string().into() }
    }
}

/// The address space of whoever makes an ioctl.
pub trait UserSpace {
    /// Fills `bytes` from `address` on (`copy_from_user`).
    ///
    /// # Errors
    /// When not all of it can be read.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault>;

    /// Writes `bytes` from `address` on (`copy_to_user`).
    ///
    /// # Errors
    /// When not all of it can be written; a part may then be.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault>;

    /// The memory at `address`, to be mapped in an IOAS.
    ///
    /// # Errors
    /// When it is not memory of one mapping of the user.
    fn memory(&self, address: u64, length: u64) -> Result<UserMemory, UserFault>;
}

/// The regions of memory that a caller in this process owns, at the addresses where they are.
#[derive(Debug, Clone, Default)]
pub struct RegionSpace {
    regions: Vec<Arc<GuestRegionMmap>>,
}

impl RegionSpace {
    /// An address space that consists of `regions`.
    pub fn new(regions: Vec<Arc<GuestRegionMmap>>) -> Self {
        Self { regions }
    }

    /// The region that `length` bytes at `address` lie in, and the offset in it.
    fn find(&self, address: u64, length: u64) -> Result<(&Arc<GuestRegionMmap>, u64), UserFault> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = address.checked_sub(region.as_ptr() as u64)?;
                (offset.checked_add(length)? <= region.len()).then_some((region, offset))
            })
            .ok_or(UserFault { address, length })
    }
}

impl UserSpace for RegionSpace {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        let (region, offset) = self.find(address, length)?;
        let fault = UserFault { address, length };
        region.read_slice(bytes, MemoryRegionAddress(offset)).map_err(|_| fault)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let length = bytes.len() as u64;
        let (region, offset) = self.find(address, length)?;
        let fault = UserFault { address, length };
        region.write_slice(bytes, MemoryRegionAddress(offset)).map_err(|_| fault)
    }

    fn memory(&self, address: u64, length: u64) -> Result<UserMemory, UserFault> {
        let (region, offset) = self.find(address, length)?;
        UserMemory::new(region.clone(), offset, length).map_err(|_| UserFault { address, length })
    }
}

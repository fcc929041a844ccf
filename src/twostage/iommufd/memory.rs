// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of this process for mapping in an IOAS.

use std::fmt;
use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// A piece of this process's memory that stays mapped while the value exists.
///
/// The uAPI identifies memory by `user_va` only; here the owner of the mapping accompanies the
/// address, so that neither a host that pins pages nor one that reads them later can have a
/// dangling pointer. Cloning is cheap and refers to the same memory.
#[derive(Clone)]
pub struct UserMemory {
    region: Arc<GuestRegionMmap>,
    offset: u64,
    length: u64,
}

/// The requested piece is not within the region.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{length:#x} bytes at offset {offset:#x} do not lie in a region of {region:#x} bytes")]
pub struct UserMemoryError {
    offset: u64,
    length: u64,
    region: u64,
}

impl UserMemory {
    /// `length` bytes of `region` from `offset` on; both in bytes.
    ///
    /// # Errors
    /// The piece is not within the region.
    pub fn new(
        region: Arc<GuestRegionMmap>,
        offset: u64,
        length: u64,
    ) -> std::result::Result<Self, UserMemoryError> {
        match offset.checked_add(length) {
            Some(end) if end <= region.len() => Ok(Self { region, offset, length }),
            _ => Err(UserMemoryError { offset, length, region: region.len() }),
        }
    }

    /// All of `region`.
    pub fn whole(region: Arc<GuestRegionMmap>) -> Self {
        let length = region.len();
        Self { region, offset: 0, length }
    }

    /// The `length` bytes at `offset` of this piece; both in bytes.
    ///
    /// # Errors
    /// They are not within this piece.
    pub fn part(&self, offset: u64, length: u64) -> std::result::Result<Self, UserMemoryError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => {
                Self::new(self.region.clone(), self.offset + offset, length)
            }
            _ => Err(UserMemoryError { offset, length, region: self.length }),
        }
    }

    /// The region of the piece.
    pub fn region(&self) -> &Arc<GuestRegionMmap> {
        &self.region
    }

    /// Offset of the piece in the region, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the piece, in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The address of the piece in this process: the uAPI's `user_va`.
    pub fn user_va(&self) -> u64 {
        self.region.as_ptr() as u64 + self.offset
    }
}

impl fmt::Debug for UserMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserMemory({:#x}+{:#x})", self.user_va(), self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn a_piece_lies_in_its_region() {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let piece = UserMemory::new(region.clone(), 0x1000, 0x3000).unwrap();
        assert_eq!(piece.user_va(), UserMemory::whole(region.clone()).user_va() + 0x1000);
        assert!(UserMemory::new(region.clone(), 0x1000, 0x3001).is_err());
        assert!(UserMemory::new(region, u64::MAX, 2).is_err());
        assert_eq!(piece.part(0x1000, 0x2000).unwrap().offset(), 0x2000);
        assert!(piece.part(0x1000, 0x2001).is_err());
        assert!(piece.part(u64::MAX, 2).is_err());
    }
}

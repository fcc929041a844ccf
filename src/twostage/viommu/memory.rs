// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory as a virtual IOMMU uses it: reading tables, writing status words.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// The guest used an address outside its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest physical address {address:#x} (+{length:#x} bytes) is not guest memory")]
pub struct BadAddress {
    /// GPA in bytes.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Access to guest memory by guest physical address.
pub trait TableMemory: Send + Sync {
    /// Fills `bytes` from `address`.
    ///
    /// # Errors
    /// Not all of it is guest memory; `bytes` is then unspecified.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress>;

    /// Writes `bytes` to `address`.
    ///
    /// # Errors
    /// Not all of it is guest memory; part of it may have been written.
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BadAddress>;

    /// Stores 32 bits at `address` (4-byte aligned) atomically, after all earlier stores.
    ///
    /// # Errors
    /// It is not guest memory.
    fn store_u32(&self, address: u64, value: u32) -> Result<(), BadAddress>;

    /// Loads the 64-bit word at `address` (8-byte aligned) atomically.
    ///
    /// # Errors
    /// It is not guest memory.
    fn load_u64(&self, address: u64) -> Result<u64, BadAddress>;
}

impl<M: GuestMemoryBackend + Send + Sync> TableMemory for M {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        let length = bytes.len() as u64;
        self.read_slice(bytes, GuestAddress(address)).map_err(|_| BadAddress { address, length })
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        let length = bytes.len() as u64;
        self.write_slice(bytes, GuestAddress(address)).map_err(|_| BadAddress { address, length })
    }

    fn store_u32(&self, address: u64, value: u32) -> Result<(), BadAddress> {
        self.store(value.to_le(), GuestAddress(address), Ordering::SeqCst)
            .map_err(|_| BadAddress { address, length: 4 })
    }

    fn load_u64(&self, address: u64) -> Result<u64, BadAddress> {
        self.load::<u64>(GuestAddress(address), Ordering::SeqCst)
            .map(u64::from_le)
            .map_err(|_| BadAddress { address, length: 8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn memory_that_is_not_there_is_named() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        memory.store_u32(0xffc, 7).unwrap();
        let mut bytes = [0; 4];
        TableMemory::read(&memory, 0xffc, &mut bytes).unwrap();
        assert_eq!(bytes, 7u32.to_le_bytes());
        assert_eq!(memory.load_u64(0xff8).unwrap(), 7 << 32);
        let error = TableMemory::read(&memory, 0xffe, &mut bytes).unwrap_err();
        assert_eq!(error, BadAddress { address: 0xffe, length: 4 });
        assert!(memory.store_u32(u64::MAX - 3, 0).is_err());
        TableMemory::write(&memory, 0x10, &[1, 2]).unwrap();
        assert_eq!(memory.load_u64(0x10).unwrap(), 0x201);
        let error = TableMemory::write(&memory, 0xfff, &[1, 2]).unwrap_err();
        assert_eq!(error, BadAddress { address: 0xfff, length: 2 });
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU uses of its machine: guest memory, with tables and status words, and
//! message-signalled interrupts, its own and those of devices, which it remaps.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory, VolatileSlice,
};

use crate::spec::pci::Bdf;

/// The guest used an address outside its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("guest physical address {address:#x} (+{length:#x} bytes) is not guest memory")]
#[non_exhaustive]
pub struct BadAddress {
    /// GPA in bytes.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
}

impl BadAddress {
    /// Not all of `length` bytes at `address` are guest memory.
    pub const fn new(address: u64, length: u64) -> Self {
        Self { address, length }
    }
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

    /// Stores `new` in the 64-bit word at `address` (8-byte aligned) if that is `old`, atomically;
    /// whether it was.
    ///
    /// # Errors
    /// It is not guest memory.
    fn compare_exchange_u64(&self, address: u64, old: u64, new: u64) -> Result<bool, BadAddress>;
}

impl<M: GuestMemoryBackend + Send + Sync> TableMemory for M {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        let length = bytes.len() as u64;
        match within_region(self, address, bytes.len()) {
            // No longer than `bytes`, so all of it is copied.
            Some(slice) => {
                slice.copy_to(bytes);
                Ok(())
            }
            None => self
                .read_slice(bytes, GuestAddress(address))
                .map_err(|_| BadAddress { address, length }),
        }
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        let length = bytes.len() as u64;
        match within_region(self, address, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                Ok(())
            }
            None => self
                .write_slice(bytes, GuestAddress(address))
                .map_err(|_| BadAddress { address, length }),
        }
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

    fn compare_exchange_u64(&self, address: u64, old: u64, new: u64) -> Result<bool, BadAddress> {
        let bad = BadAddress { address, length: 8 };
        let slice = within_region(self, address, 8).ok_or(bad)?;
        let word = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| bad)?;
        let (old, new) = (old.to_le(), new.to_le());
        let stored = word.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if stored {
            slice.bitmap().mark_dirty(0, 8);
        }
        Ok(stored)
    }
}

/// The `length` bytes at `address` if one region has them all, as nearly always: the walk over
/// regions costs more than the copy.
#[inline]
fn within_region<M: GuestMemoryBackend>(
    memory: &M,
    address: u64,
    length: usize,
) -> Option<VolatileSlice<'_, MS<'_, M>>> {
    let (region, at) = memory.to_region_addr(GuestAddress(address))?;
    region.get_slice(at, length).ok()
}

/// A message-signalled interrupt.
///
/// After remapping, bits 63:40 of the address hold bits 31:8 of the destination, a 32-bit APIC ID;
/// bits 7:0 are in their usual place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// The address written to.
    pub address: u64,
    /// The data written.
    pub data: u32,
}

/// The sink of interrupts that need no (further) remapping: the LAPICs.
pub trait InterruptSink: Send + Sync {
    /// Writes `data` to `address` (0xFEEx_xxxx on x86).
    fn send_msi(&self, address: u64, data: u32);
}

/// How a virtual IOMMU handles the interrupts of the functions behind it. May be called from any
/// thread, also by an [`InterruptListener`].
///
/// ```
/// # use std::sync::Arc;
/// # use twostage::viommu::vtd::{Invalidation, RequesterConfig, VtdConfig, VtdHostSide, VtdIommu};
/// # use twostage::viommu::{HostSideError, Requester};
/// use twostage::spec::pci::Bdf;
/// use twostage::viommu::{InterruptRemapper, InterruptSink, MsiMessage};
///
/// struct Lapics;
/// impl InterruptSink for Lapics {
///     fn send_msi(&self, address: u64, data: u32) {
///         println!("{data:#x} to {address:#x}");
///     }
/// }
/// /// An emulated device sends the message that the guest gave it.
/// fn interrupt(remapper: &dyn InterruptRemapper, device: Bdf, message: MsiMessage) {
///     if !remapper.send_remapped(device, message, &Lapics) {
///         println!("blocked; the guest finds a fault record");
///     }
/// }
/// # #[derive(Debug)]
/// # struct Host;
/// # impl VtdHostSide for Host {
/// #     fn configure(&self, _: Requester, _: &RequesterConfig) -> Result<(), HostSideError> {
/// #         Ok(())
/// #     }
/// #     fn invalidate(&self, _: &[Invalidation]) -> Result<(), HostSideError> {
/// #         Ok(())
/// #     }
/// # }
/// # impl InterruptSink for Host {
/// #     fn send_msi(&self, _: u64, _: u32) {}
/// # }
/// # let memory = Arc::new(vm_memory::GuestMemoryMmap::<()>::new());
/// # let host = Arc::new(Host);
/// # let config = VtdConfig::default().with_interrupt_remapping(true);
/// # let unit = VtdIommu::new(&config, memory, host.clone(), host, None)?;
/// # let device = Bdf::new(0, 4, 0).ok_or("no such slot")?;
/// // From `Vtd::interrupt_remapper`, for example.
/// let remapper: &dyn InterruptRemapper = &*unit;
/// interrupt(remapper, device, MsiMessage { address: 0xfee0_0000, data: 0x41 });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait InterruptRemapper: Send + Sync {
    /// `source` sends `message`: `sink` receives the remapped message. Returns `false` when it is
    /// blocked; the fault has then been recorded. A change completes only after interrupts under
    /// the old state have been delivered to `sink`, which therefore must not block.
    fn send_remapped(&self, source: Bdf, message: MsiMessage, sink: &dyn InterruptSink) -> bool;

    /// The translation of a `message` that `source` will send, for senders that bypass the virtual
    /// IOMMU; valid until [`InterruptListener::interrupts_changed`]. `None` when it would be
    /// blocked, or when changes would not be notified, as while there is no listener: then each
    /// message must be sent through the IOMMU. Records no fault.
    fn translate(&self, source: Bdf, message: MsiMessage) -> Option<MsiMessage>;
}

/// A cache of [`InterruptRemapper::translate`] results.
pub trait InterruptListener: Send + Sync {
    /// Every translation may have changed. When this returns, no old translation may be in use:
    /// only then is the guest told that its change is complete. Called with locks of the virtual
    /// IOMMU held: only [`InterruptRemapper`]s may be called.
    fn interrupts_changed(&self);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{GuestMemoryMmap, MmapRegion};

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

    #[test]
    fn whoever_tracks_writes_sees_those_of_the_models() {
        let ranges = [(GuestAddress(0x8000), 0x4000)];
        let memory = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap();
        let bitmap = MmapRegion::bitmap(memory.iter().next().unwrap());
        TableMemory::read(&memory, 0x8000, &mut [0; 0x4000]).unwrap();
        memory.load_u64(0x8000).unwrap();
        assert_eq!(bitmap.get_and_reset(), [0]);
        memory.store_u32(0x9ffc, 7).unwrap();
        assert_eq!(bitmap.get_and_reset(), [0b10]);
        TableMemory::write(&memory, 0xafff, &[1, 2]).unwrap();
        assert_eq!(bitmap.get_and_reset(), [0b1100]);
        assert_eq!(memory.compare_exchange_u64(0x8008, 1, 2), Ok(false));
        assert_eq!(bitmap.get_and_reset(), [0]);
        assert_eq!(memory.compare_exchange_u64(0x8008, 0, 2), Ok(true));
        assert_eq!((memory.load_u64(0x8008), bitmap.get_and_reset()), (Ok(2), vec![0b1]));
        let bad = BadAddress { address: 0xc000, length: 8 };
        assert_eq!(memory.compare_exchange_u64(0xc000, 0, 2), Err(bad));
    }

    #[test]
    fn what_is_in_two_regions_is_read_and_written_whole() {
        let ranges = [0, 0x1000].map(|start| (GuestAddress(start), 0x1000));
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        TableMemory::write(&memory, 0xffe, &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 4];
        TableMemory::read(&memory, 0xffe, &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        TableMemory::read(&memory, 0x1000, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], [3, 4]);
    }
}

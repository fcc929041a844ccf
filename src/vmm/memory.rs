// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: backs the RAM ranges of the architecture.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::arch::layout::{ram_ranges, FIXED};
use crate::{Error, Result};

/// Granularity of RAM and KVM, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Why guest memory cannot be allocated.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero.
    #[error("a guest needs memory; size=0 gives it none")]
    Zero,
    /// Not a multiple of the page size.
    #[error("size={0} is not a multiple of 4096 bytes")]
    NotPages(u64),
    /// More than the host has.
    #[error("size={size} is more than the {host} bytes of memory this host has")]
    BeyondHost {
        /// Bytes requested.
        size: u64,
        /// Bytes the host has.
        host: u64,
    },
    /// The host's memory could not be determined or mapped.
    #[error("cannot map {size} bytes: {detail}")]
    Map {
        /// Bytes requested.
        size: u64,
        /// The system's error.
        detail: String,
    },
}

/// The RAM of a machine. Clones are handles to the same memory.
#[derive(Debug, Clone)]
pub struct MachineMemory {
    regions: Vec<Arc<GuestRegionMmap>>,
    map: GuestMemoryMmap,
}

impl MachineMemory {
    /// `size` bytes of zeroed RAM, at the architecture's addresses.
    ///
    /// # Errors
    /// `size` is not possible on this host.
    pub fn new(size: u64) -> std::result::Result<Self, MemoryError> {
        Self::made_of(size, |_| Ok(None))
    }

    /// The same in anonymous files (memfd), which a kernel's IOMMU can map directly, without
    /// addresses of this process.
    ///
    /// # Errors
    /// As [`MachineMemory::new`].
    pub fn in_files(size: u64) -> std::result::Result<Self, MemoryError> {
        Self::made_of(size, |length| {
            let file = memory_file()?;
            file.set_len(length)?;
            Ok(Some(FileOffset::new(file, 0)))
        })
    }

    /// RAM whose pieces are backed by what `back` returns for their length: a file, or anonymous
    /// memory.
    fn made_of(
        size: u64,
        back: impl Fn(u64) -> io::Result<Option<FileOffset>>,
    ) -> std::result::Result<Self, MemoryError> {
        check_size(size, host_memory())?;
        let map_error = |detail: String| MemoryError::Map { size, detail };
        let regions = ram_ranges(size)
            .into_iter()
            .map(|(start, length)| {
                let file = back(length).map_err(|e| map_error(e.to_string()))?;
                let length = usize::try_from(length).map_err(|e| map_error(e.to_string()))?;
                GuestRegionMmap::from_range(GuestAddress(start), length, file)
                    .map(Arc::new)
                    .map_err(|e| map_error(e.to_string()))
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let map = GuestMemoryMmap::from_arc_regions(regions.clone())
            .map_err(|e| map_error(e.to_string()))?;
        Ok(Self { regions, map })
    }

    /// The memory by guest-physical address.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// The contiguous pieces, ascending.
    pub fn regions(&self) -> &[Arc<GuestRegionMmap>] {
        &self.regions
    }

    /// The pieces as (first address, length in bytes), ascending.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions.iter().map(|region| (region.start_addr().raw_value(), region.len()))
    }

    /// Guest-physical address of the first byte of `region`.
    pub fn start_of(&self, region: &GuestRegionMmap) -> u64 {
        region.start_addr().raw_value()
    }

    /// Length of the first of the pieces, where kernels are loaded, in bytes.
    pub fn low_size(&self) -> u64 {
        self.ranges().next().map_or(0, |(_, length)| length)
    }

    /// Whether all of `length` bytes from `start` on are RAM.
    pub fn contains(&self, start: u64, length: u64) -> bool {
        let Ok(length) = usize::try_from(length) else { return false };
        self.map.check_range(GuestAddress(start), length)
    }

    /// Number of KVM memory slots it uses, from 0 on.
    pub(super) fn slots(&self) -> u32 {
        // A machine has at most two regions.
        self.regions.len() as u32
    }

    /// Registers the memory with `vm`.
    pub(super) fn register(&self, vm: &VmFd) -> Result<()> {
        for (slot, region) in self.regions.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                // A machine has at most two regions.
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped with exactly this length, no other slot names it, and
            // the machine drops its vCPUs and its VM before it drops the memory.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(Error::kvm("setting the guest's memory"))?;
        }
        Ok(())
    }
}

/// An anonymous file in memory.
fn memory_file() -> io::Result<File> {
    // SAFETY: the name is zero-terminated, and only read.
    let descriptor = unsafe { libc::memfd_create(c"guest RAM".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just opened, and nobody else has it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// What occupies `address` in a machine with `size` bytes of RAM, if anything.
pub fn occupant(size: u64, address: u64) -> Option<&'static str> {
    let in_ram = |(start, length): (u64, u64)| address >= start && address - start < length;
    if ram_ranges(size).into_iter().any(in_ram) {
        return Some("RAM");
    }
    let fixed = |(start, last, _): &&(u64, u64, _)| (*start..=*last).contains(&address);
    FIXED.iter().find(fixed).map(|(_, _, name)| *name)
}

fn check_size(size: u64, host: Option<u64>) -> std::result::Result<(), MemoryError> {
    if size == 0 {
        return Err(MemoryError::Zero);
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::NotPages(size));
    }
    match host {
        Some(host) if size > host => Err(MemoryError::BeyondHost { size, host }),
        _ => Ok(()),
    }
}

/// The host's memory in bytes; unknown without `/proc`.
fn host_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::RAM_START;

    #[test]
    fn sizes_no_host_can_give_are_refused() {
        assert!(matches!(check_size(0, None), Err(MemoryError::Zero)));
        assert!(matches!(check_size(4097, None), Err(MemoryError::NotPages(4097))));
        assert!(matches!(check_size(8192, Some(4096)), Err(MemoryError::BeyondHost { .. })));
        assert!(check_size(4096, Some(4096)).is_ok());
        assert!(host_memory().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn memory_in_files_is_memory() {
        let memory = MachineMemory::in_files(0x10000).unwrap();
        let region = &memory.regions()[0];
        assert_eq!(region.file_offset().unwrap().file().metadata().unwrap().len(), 0x10000);
        assert!(MachineMemory::new(0x10000).unwrap().regions()[0].file_offset().is_none());
    }

    #[test]
    fn what_is_ram_is_known() {
        let memory = MachineMemory::new(0x10000).unwrap();
        assert!(memory.contains(RAM_START, 0x10000));
        assert!(!memory.contains(RAM_START + 0xffff, 2));
        assert!(!memory.contains(u64::MAX, 2));
        assert_eq!(memory.low_size(), 0x10000);
    }
}

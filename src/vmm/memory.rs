// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory: where RAM lies in the guest-physical address space, and what backs it.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::{Error, Result};
use crate::spec::vtd::interrupt::INTERRUPT_RANGE;

/// End of the RAM below 4 GiB, and start of PCI configuration space (ECAM).
pub const LOW_RAM_END: u64 = 0xb000_0000;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// PCI configuration space: one bus per MiB.
pub const ECAM_START: u64 = LOW_RAM_END;
/// Buses there are: the root bus. A kernel looks for devices on every bus that it is told of, one exit
/// or two for each: on 256 buses that is a quarter of the time it takes to boot.
pub const PCI_BUSES: u64 = 1;
/// Length of configuration space, in bytes.
pub const ECAM_SIZE: u64 = PCI_BUSES << 20;
/// First address of PCI memory BARs.
pub const PCI_MMIO_START: u64 = 0xe000_0000;
/// Last address of PCI memory BARs, included.
pub const PCI_MMIO_LAST: u64 = 0xfebf_ffff;
/// Where the registers of a virtual VT-d are unless the user says otherwise.
pub const VTD_REGISTERS: u64 = 0xfed9_0000;
/// Where KVM keeps its task-state segment, just below the usual place of a BIOS.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// What stands at fixed addresses besides RAM, both ends included.
const FIXED: [(u64, u64, &str); 5] = [
    (ECAM_START, ECAM_START + (ECAM_SIZE - 1), "PCI configuration space"),
    (PCI_MMIO_START, PCI_MMIO_LAST, "PCI memory"),
    (0xfec0_0000, 0xfec0_0fff, "the IOAPIC"),
    (*INTERRUPT_RANGE.start(), *INTERRUPT_RANGE.end(), "the LAPICs and interrupt messages"),
    // An identity page table, then three pages of task-state segment.
    (KVM_TSS - 0x1000, KVM_TSS + 0x2fff, "KVM"),
];

/// What RAM and KVM deal in, in bytes.
const PAGE_SIZE: u64 = 4096;

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memory at all.
    #[error("a guest needs memory; size=0 gives it none")]
    Zero,
    /// Not whole pages.
    #[error("size={0} is not a multiple of 4096 bytes")]
    NotPages(u64),
    /// More than the host has.
    #[error("size={size} is more than the {host} bytes of memory this host has")]
    BeyondHost {
        /// Bytes asked for.
        size: u64,
        /// Bytes the host has.
        host: u64,
    },
    /// The host's memory could not be asked for or mapped.
    #[error("cannot map {size} bytes: {detail}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the system said.
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
    /// `size` bytes of zeroed RAM, below and if need be above 4 GiB.
    ///
    /// # Errors
    /// When `size` is no memory size for this host.
    pub fn new(size: u64) -> std::result::Result<Self, MemoryError> {
        check_size(size, host_memory())?;
        let map_error = |detail: String| MemoryError::Map { size, detail };
        let regions = ranges(size)
            .into_iter()
            .map(|(start, length)| {
                let length = usize::try_from(length).map_err(|e| map_error(e.to_string()))?;
                GuestRegionMmap::from_range(GuestAddress(start), length, None)
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

    /// How much of the memory below 4 GiB there is, in bytes.
    pub fn low_size(&self) -> u64 {
        self.ranges().next().map_or(0, |(_, length)| length)
    }

    /// Whether all of `length` bytes from `start` on are RAM.
    pub fn contains(&self, start: u64, length: u64) -> bool {
        let Ok(length) = usize::try_from(length) else { return false };
        self.map.check_range(GuestAddress(start), length)
    }

    /// Makes the memory the memory of `vm`.
    pub(super) fn register(&self, vm: &VmFd) -> Result<()> {
        for (slot, region) in self.regions.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                // A machine has two regions at the most.
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped with exactly this length, no other slot names it, and
            // the machine drops its vCPUs and its VM before it drops the memory.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(Error::kvm("giving the guest its memory"))?;
        }
        Ok(())
    }
}

/// What is at `address` in a machine with `size` bytes of RAM, if anything is.
pub fn occupant(size: u64, address: u64) -> Option<&'static str> {
    let in_ram = |(start, length): (u64, u64)| address >= start && address - start < length;
    if ranges(size).into_iter().any(in_ram) {
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

/// Where `size` bytes of RAM lie: (first address, length).
fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_RAM_END {
        vec![(0, size)]
    } else {
        vec![(0, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END)]
    }
}

/// The host's memory in bytes; unknown where `/proc` is not mounted.
fn host_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(ranges(4 << 30), [(0, LOW_RAM_END), (HIGH_RAM_START, 0x5000_0000)]);
    }

    #[test]
    fn it_is_known_who_stands_where() {
        assert_eq!(occupant(512 << 20, VTD_REGISTERS), None);
        assert_eq!(occupant(512 << 20, 0), Some("RAM"));
        assert_eq!(occupant(512 << 20, 512 << 20), None);
        assert_eq!(occupant(4 << 30, HIGH_RAM_START), Some("RAM"));
        assert_eq!(
            occupant(512 << 20, ECAM_START + ECAM_SIZE - 1),
            Some("PCI configuration space")
        );
        assert_eq!(occupant(512 << 20, 0xfee0_1000), Some("the LAPICs and interrupt messages"));
        assert_eq!(occupant(512 << 20, KVM_TSS), Some("KVM"));
        // A size that no host has is refused elsewhere; it is no reason to panic.
        assert_eq!(occupant(!0xfff, 0), Some("RAM"));
    }

    #[test]
    fn sizes_no_host_can_give_are_refused() {
        assert!(matches!(check_size(0, None), Err(MemoryError::Zero)));
        assert!(matches!(check_size(4097, None), Err(MemoryError::NotPages(4097))));
        assert!(matches!(check_size(8192, Some(4096)), Err(MemoryError::BeyondHost { .. })));
        assert!(check_size(4096, Some(4096)).is_ok());
        assert!(host_memory().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn what_is_ram_is_known() {
        let memory = MachineMemory::new(0x10000).unwrap();
        assert!(memory.contains(0, 0x10000));
        assert!(!memory.contains(0xffff, 2));
        assert!(!memory.contains(u64::MAX, 2));
        assert_eq!(memory.low_size(), 0x10000);
    }
}

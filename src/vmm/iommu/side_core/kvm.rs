// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the side core uses of KVM: a memory slot for a register page, and the ring into which KVM
//! puts writes to coalesced zones instead of exiting.
#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::Duration;

use kvm_bindings::{kvm_userspace_memory_region, KVM_COALESCED_MMIO_PAGE_OFFSET, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use crate::arch;
use crate::process::stop::{StopReason, Stopper};
use twostage::sync::Mutex;
use twostage::viommu::{PageLender, RegisterPage, PAGE_SIZE};

/// What KVM has for a side core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abilities {
    /// Read-only slots: guests read registers without exits.
    pub read_only: bool,
    /// A slot can come and go without the cost of all others.
    pub lending: bool,
}

impl Abilities {
    /// Those of `vm`, prepared for it; an error names what is missing for any side core.
    pub fn of(vm: &VmFd) -> Result<Self, &'static str> {
        if !vm.check_extension(kvm_ioctls::Cap::CoalescedMmio) {
            return Err("KVM_CAP_COALESCED_MMIO");
        }
        let coherent = arch::memory_is_coherent(vm);
        let read_only = coherent && vm.check_extension(kvm_ioctls::Cap::ReadonlyMem);
        Ok(Self { read_only, lending: read_only && arch::keep_other_slots(vm) })
    }
}

/// How often KVM may refuse to take something away from the guest, and the time in between.
const TRIES: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(50);

/// Takes something away from the guest with `take`. KVM may be short of memory for a moment; if it
/// refuses for a second, `stopper` stops the machine, which would do what the guest is not told:
/// `what` is not done. May be called with any lock held.
pub(super) fn insist(
    stopper: &Stopper,
    what: &str,
    mut take: impl FnMut() -> Result<(), kvm_ioctls::Error>,
) {
    for left in (0..TRIES).rev() {
        let Err(error) = take() else { return };
        if left == 0 || stopper.reason().is_some() {
            stopper.stop(StopReason::Stuck(format!("KVM does not {what}: {error}")));
            return;
        }
        thread::sleep(BETWEEN);
    }
}

/// How a register page is mapped into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapped {
    /// Reads are free, writes exit.
    ReadOnly,
    /// Both are free.
    Memory,
}

/// The memory slot of a register page.
pub(super) struct PageSlot {
    vm: Arc<VmFd>,
    number: u32,
    address: u64,
    page: Arc<RegisterPage>,
    stopper: Stopper,
    now: Mutex<Option<Mapped>>,
}

impl PageSlot {
    /// Slot `number` of `vm`, which must be unused, for `page` at the guest's `address`; nothing is
    /// mapped yet. `stopper` stops the machine if KVM does not take it back.
    pub fn new(
        vm: Arc<VmFd>,
        number: u32,
        address: u64,
        page: Arc<RegisterPage>,
        stopper: Stopper,
    ) -> Self {
        Self { vm, number, address, page, stopper, now: Mutex::new(None) }
    }

    /// Maps the page, instead of how it was before. A slot cannot be changed in place: accesses
    /// exit in between.
    ///
    /// # Errors
    /// KVM's error. If it keeps the old slot, that stays.
    pub fn map(&self, how: Option<Mapped>) -> Result<(), kvm_ioctls::Error> {
        let mut now = self.now.lock();
        if *now == how {
            return Ok(());
        }
        if now.is_some() {
            self.set(0, 0)?;
            *now = None;
        }
        if let Some(how) = how {
            let flags = if how == Mapped::ReadOnly { KVM_MEM_READONLY } else { 0 };
            self.set(PAGE_SIZE as u64, flags)?;
            *now = Some(how);
        }
        Ok(())
    }

    fn set(&self, memory_size: u64, flags: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: self.number,
            guest_phys_addr: self.address,
            memory_size,
            userspace_addr: self.page.address(),
            flags,
        };
        // SAFETY: the page has this length, and lives until this value is dropped, which takes the
        // slot away from the guest. Its memory is only accessed by atomic operations. No other slot
        // has this number.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

impl PageLender for PageSlot {
    fn lend(&self) -> bool {
        let mapped = self.map(Some(Mapped::Memory));
        mapped.inspect_err(|error| log::warn!("KVM does not map registers: {error}")).is_ok()
    }

    fn take_back(&self) {
        insist(&self.stopper, "take registers back", || self.map(None));
    }
}

impl Drop for PageSlot {
    fn drop(&mut self) {
        if let Err(error) = self.map(None) {
            log::error!("registers stay mapped into the guest: {error}");
            // The guest may still access it.
            std::mem::forget(self.page.clone());
        }
    }
}

impl fmt::Debug for PageSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSlot({} at {:#x}, {:?})", self.number, self.address, *self.now.lock())
    }
}

/// Layout of the ring: two indices, then entries (`kvm_coalesced_mmio_ring`).
const FIRST: usize = 0;
const LAST: usize = 4;
const ENTRIES: usize = 8;
const ENTRY: usize = 24;
const ENTRY_LENGTH: usize = 8;
const ENTRY_DATA: usize = 16;

/// Entries that fit the page of the ring.
fn capacity() -> u32 {
    ((page_size() - ENTRIES) / ENTRY) as u32
}

fn page_size() -> usize {
    crate::vfio::page_size() as usize
}

/// The ring of a virtual machine. KVM adds entries; one thread at a time takes them.
pub(super) struct Ring {
    memory: MmapRegion,
    taken: Mutex<()>,
}

/// A write of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingWrite {
    pub address: u64,
    pub length: usize,
    pub data: [u8; 8],
}

impl Ring {
    /// The ring of the virtual machine that `vcpu` is one of.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(vcpu: RawFd) -> io::Result<Self> {
        // SAFETY: the caller has the vCPU, which is open for the call.
        let vcpu = unsafe { BorrowedFd::borrow_raw(vcpu) };
        let file = File::from(vcpu.try_clone_to_owned()?);
        let offset = u64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * page_size() as u64;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let file = Some(FileOffset::new(file, offset));
        let memory = MmapRegion::build(file, page_size(), protection, flags)
            .map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Self { memory, taken: Mutex::new(()) })
    }

    /// Whether there is anything to take.
    pub fn is_empty(&self) -> bool {
        self.index(FIRST) == self.index(LAST)
    }

    /// Takes what is there now, in order. Until it returns, nobody else takes anything, so that
    /// whoever finds nothing knows that all of it is done.
    pub fn take(&self, mut done: impl FnMut(RingWrite)) {
        let _taken: MutexGuard<'_, ()> = self.taken.lock();
        let last = self.index(LAST) % capacity();
        let mut first = self.index(FIRST) % capacity();
        while first != last {
            done(self.entry(first));
            first = (first + 1) % capacity();
            if let Ok(index) = self.memory.get_atomic_ref::<AtomicU32>(FIRST) {
                index.store(first, Ordering::Release);
            }
        }
    }

    fn index(&self, at: usize) -> u32 {
        // The two are inside the page.
        let index = self.memory.get_atomic_ref::<AtomicU32>(at);
        index.map_or(0, |index| index.load(Ordering::Acquire))
    }

    fn entry(&self, number: u32) -> RingWrite {
        let at = ENTRIES + number as usize * ENTRY;
        let slice = self.memory.as_volatile_slice();
        // Entries are inside the page.
        let address = slice.read_obj(at).unwrap_or(0);
        let length: u32 = slice.read_obj(at + ENTRY_LENGTH).unwrap_or(0);
        let data = slice.read_obj(at + ENTRY_DATA).unwrap_or([0; 8]);
        RingWrite { address, length: (length as usize).min(8), data }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ring({} to {})", self.index(FIRST), self.index(LAST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::Kvm;
    use twostage::skips::not_tested;

    #[test]
    fn the_layout_of_the_ring_is_that_of_the_kernel() {
        use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
        use std::mem::{offset_of, size_of};
        assert_eq!(size_of::<kvm_coalesced_mmio>(), ENTRY);
        assert_eq!(offset_of!(kvm_coalesced_mmio, phys_addr), 0);
        assert_eq!(offset_of!(kvm_coalesced_mmio, len), ENTRY_LENGTH);
        assert_eq!(offset_of!(kvm_coalesced_mmio, data), ENTRY_DATA);
        assert_eq!(offset_of!(kvm_coalesced_mmio_ring, first), FIRST);
        assert_eq!(offset_of!(kvm_coalesced_mmio_ring, last), LAST);
        assert_eq!(offset_of!(kvm_coalesced_mmio_ring, coalesced_mmio), ENTRIES);
    }

    #[test]
    fn what_is_in_the_ring_is_taken_once_and_in_order() {
        let ring = Ring { memory: MmapRegion::new(page_size()).unwrap(), taken: Mutex::new(()) };
        let slice = ring.memory.as_volatile_slice();
        let (start, count) = (capacity() - 2, 5);
        slice.write_obj(start, FIRST).unwrap();
        for number in 0..count {
            let at = ENTRIES + ((start + number) % capacity()) as usize * ENTRY;
            slice.write_obj(u64::from(number), at).unwrap();
            slice.write_obj(4u32, at + ENTRY_LENGTH).unwrap();
            slice.write_obj([number as u8; 8], at + ENTRY_DATA).unwrap();
        }
        assert!(!ring.is_empty());
        slice.write_obj((start + count) % capacity(), LAST).unwrap();
        let mut taken = Vec::new();
        ring.take(|write| taken.push((write.address, write.length, write.data[0])));
        assert_eq!(taken, [(0, 4, 0), (1, 4, 1), (2, 4, 2), (3, 4, 3), (4, 4, 4)]);
        ring.take(|write| panic!("{write:?}"));
        assert!(ring.is_empty());
    }

    #[test]
    fn what_kvm_refuses_for_a_moment_is_tried_again_and_ends_the_machine_after_a_second() {
        let stopper = Stopper::new().unwrap();
        let refusing = |mut times: u32, calls: &mut u32| {
            insist(&stopper, "stop", || {
                *calls += 1;
                times = times.saturating_sub(1);
                if times == 0 {
                    Ok(())
                } else {
                    Err(kvm_ioctls::Error::new(libc::ENOMEM))
                }
            });
        };
        let mut calls = 0;
        refusing(3, &mut calls);
        assert_eq!((calls, stopper.reason()), (3, None));
        refusing(u32::MAX, &mut calls);
        assert_eq!(calls, 3 + TRIES);
        let reason = stopper.reason().unwrap().to_string();
        assert!(reason.starts_with("KVM does not stop: "), "{reason}");
        // A machine that stops anyway is not kept.
        refusing(u32::MAX, &mut calls);
        assert_eq!(calls, 3 + TRIES + 1);
    }

    #[test]
    fn a_page_is_mapped_and_taken_away() {
        let Ok(kvm) = Kvm::new() else {
            not_tested("no /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let page = RegisterPage::new().unwrap();
        let stopper = Stopper::new().unwrap();
        let slot = PageSlot::new(vm.clone(), 3, 0x10_0000, page.clone(), stopper);
        slot.map(Some(Mapped::ReadOnly)).unwrap();
        assert!(slot.lend());
        slot.take_back();
        slot.map(Some(Mapped::ReadOnly)).unwrap();
        drop(slot);
        assert_eq!((Arc::strong_count(&vm), Arc::strong_count(&page)), (1, 1));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parts of a device's file mapped into this process and, as KVM memory slots, into the guest.
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;

use crate::pci::layout::CONFIG_SIZE;
use crate::pci::{ConfigLender, ConfigPage, PageLoan};
use twostage::warn_limited;

/// Mapped memory, unmapped when it is dropped. This process does not access it: it is for mapping
/// into a guest.
pub struct Mapping {
    address: NonNull<libc::c_void>,
    length: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and nothing here dereferences it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `length` bytes at `offset` of `file`, shared, readable and writable.
    ///
    /// # Errors
    /// The error of `mmap(2)`.
    pub fn new(file: &File, offset: u64, length: u64) -> io::Result<Self> {
        let invalid = |_| io::Error::from_raw_os_error(libc::EOVERFLOW);
        let (length, offset) =
            (usize::try_from(length).map_err(invalid)?, i64::try_from(offset).map_err(invalid)?);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses a place where nothing is; the file is open for the call.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address) {
            Some(address) if address.as_ptr() != libc::MAP_FAILED => Ok(Self { address, length }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its address in this process.
    pub fn address(&self) -> u64 {
        self.address.as_ptr() as u64
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped with this length, by this value alone, and not unmapped before.
        if unsafe { libc::munmap(self.address.as_ptr(), self.length) } != 0 {
            log::error!("a device stays mapped: {}", io::Error::last_os_error());
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x}+{:#x})", self.address(), self.length)
    }
}

/// This machine's page size: the granularity of mappings.
pub fn page_size() -> u64 {
    // SAFETY: the call has no other effect than to tell.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX requires it.
    u64::try_from(size).unwrap_or(4096)
}

/// Memory that is mapped into the guest while this exists.
pub trait Loan: Send {}

/// Maps memory of this process into the guest.
pub trait Lender: Send + Sync {
    /// Maps `mapping` into the guest at `address`. Both are whole pages.
    ///
    /// # Errors
    /// KVM's error.
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>>;
}

/// Maps memory into the guest of one virtual machine. Clones are the same.
#[derive(Clone)]
pub struct KvmSlots(Arc<Slots>);

struct Slots {
    vm: Arc<VmFd>,
    /// The numbers below are used by the guest's RAM.
    first: u32,
    used: Mutex<BTreeSet<u32>>,
}

impl KvmSlots {
    /// Slots of `vm` from number `first` on, which must be unused.
    pub fn new(vm: Arc<VmFd>, first: u32) -> Self {
        Self(Arc::new(Slots { vm, first, used: Mutex::default() }))
    }
}

impl Slots {
    fn used(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.used.lock()
    }
}

impl KvmSlots {
    /// Maps the `length` bytes at `memory` of this process, which `keeper` keeps, to `address`.
    ///
    /// # Safety
    /// They are mapped until `keeper` is dropped, and nobody has a reference to them.
    unsafe fn map(
        &self,
        (address, memory, length): (u64, u64, u64),
        flags: u32,
        keeper: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<Slot> {
        let slots = &self.0;
        let mut used = slots.used();
        let number = (slots.first..).find(|slot| !used.contains(slot)).unwrap_or(u32::MAX);
        let region = kvm_userspace_memory_region {
            slot: number,
            guest_phys_addr: address,
            memory_size: length,
            userspace_addr: memory,
            flags,
        };
        // SAFETY: the memory lives until `Slot` has taken the slot away from the guest, by the
        // caller's promise. No other slot has this number.
        unsafe { slots.vm.set_user_memory_region(region) }?;
        used.insert(number);
        Ok(Slot { slots: slots.clone(), number, address, memory, keeper })
    }
}

impl Lender for KvmSlots {
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>> {
        let place = (address, mapping.address(), mapping.length());
        // SAFETY: the mapping has this length while it exists. Nobody here has a reference to what
        // the guest changes in it.
        Ok(Box::new(unsafe { self.map(place, 0, mapping) }?))
    }
}

impl ConfigLender for KvmSlots {
    fn lend_config(&self, address: u64, page: Arc<ConfigPage>) -> io::Result<Box<dyn PageLoan>> {
        let place = (address, page.address(), CONFIG_SIZE as u64);
        // SAFETY: the page has this length while it exists, and is only accessed by atomic stores.
        Ok(Box::new(unsafe { self.map(place, KVM_MEM_READONLY, page) }?))
    }
}

impl fmt::Debug for KvmSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KvmSlots").field(&self.0.used()).finish()
    }
}

/// A slot that is in use.
struct Slot {
    slots: Arc<Slots>,
    number: u32,
    address: u64,
    memory: u64,
    keeper: Arc<dyn Any + Send + Sync>,
}

impl Loan for Slot {}

impl PageLoan for Slot {}

impl Drop for Slot {
    fn drop(&mut self) {
        let region = kvm_userspace_memory_region {
            slot: self.number,
            guest_phys_addr: self.address,
            memory_size: 0,
            userspace_addr: self.memory,
            flags: 0,
        };
        // SAFETY: a slot of no length refers to no memory: this takes it away from the guest.
        match unsafe { self.slots.vm.set_user_memory_region(region) } {
            Ok(()) => drop(self.slots.used().remove(&self.number)),
            Err(error) => {
                warn_limited!("a device's memory stays with the guest: {error}");
                // The guest may still access it, so it must stay mapped.
                std::mem::forget(self.keeper.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;
    use twostage::skips::not_tested;

    use super::*;

    #[test]
    fn a_file_is_mapped_or_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let mapping = Mapping::new(&file, 0x1000, 0x1000).unwrap();
        assert_eq!((mapping.address() % 0x1000, mapping.length()), (0, 0x1000));
        assert!(Mapping::new(&file, 1, 0x1000).is_err());
        assert!(Mapping::new(&file, 0, 0).is_err());
        assert!(Mapping::new(&file, u64::MAX, 1).is_err());
    }

    #[test]
    fn memory_is_lent_and_taken_back() {
        let Ok(kvm) = Kvm::new() else {
            not_tested("no /dev/kvm");
            return;
        };
        let slots = KvmSlots::new(Arc::new(kvm.create_vm().unwrap()), 2);
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x2000).unwrap();
        let mapping = Arc::new(Mapping::new(&file, 0, 0x2000).unwrap());
        let first = slots.lend(0x10_0000, mapping.clone()).unwrap();
        let second = slots.lend(0x20_0000, mapping.clone()).unwrap();
        assert!(slots.lend(0x10_1000, mapping.clone()).is_err(), "something is there");
        assert_eq!(format!("{slots:?}"), "KvmSlots({2, 3})");
        drop(first);
        let third = slots.lend(0x10_1000, mapping.clone()).unwrap();
        drop((second, third));
        assert_eq!((format!("{slots:?}"), Arc::strong_count(&mapping)), ("KvmSlots({})".into(), 1));
    }

    #[test]
    fn configuration_space_is_lent_and_taken_back() {
        let Ok(kvm) = Kvm::new() else {
            not_tested("no /dev/kvm");
            return;
        };
        let slots = KvmSlots::new(Arc::new(kvm.create_vm().unwrap()), 2);
        let page = Arc::new(ConfigPage::new(&[0; CONFIG_SIZE]).unwrap());
        let lent = slots.lend_config(0xb000_0000, page.clone()).unwrap();
        assert!(slots.lend_config(0xb000_0000, page.clone()).is_err(), "something is there");
        assert_eq!((format!("{slots:?}"), Arc::strong_count(&page)), ("KvmSlots({2})".into(), 2));
        drop(lent);
        assert_eq!((format!("{slots:?}"), Arc::strong_count(&page)), ("KvmSlots({})".into(), 1));
    }
}

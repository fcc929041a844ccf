// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Device memory as KVM memory slots.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::bars::{Lender, Loan};
use super::mapping::Mapping;
use twostage::warn_limited;

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

impl Lender for KvmSlots {
    fn lend(&self, address: u64, mapping: Arc<Mapping>) -> io::Result<Box<dyn Loan>> {
        let slots = &self.0;
        let mut used = slots.used();
        let slot = (slots.first..).find(|slot| !used.contains(slot)).unwrap_or(u32::MAX);
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: address,
            memory_size: mapping.length(),
            userspace_addr: mapping.address(),
            flags: 0,
        };
        // SAFETY: the mapping has this length, and lives until `Slot` has taken the slot away from
        // the guest. Nobody here has a reference to what the guest changes in it. No other slot has
        // this number.
        unsafe { slots.vm.set_user_memory_region(region) }?;
        used.insert(slot);
        Ok(Box::new(Slot { slots: slots.clone(), slot, address, mapping }))
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
    slot: u32,
    address: u64,
    mapping: Arc<Mapping>,
}

impl Loan for Slot {}

impl Drop for Slot {
    fn drop(&mut self) {
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            guest_phys_addr: self.address,
            memory_size: 0,
            userspace_addr: self.mapping.address(),
            flags: 0,
        };
        // SAFETY: a slot of no length refers to no memory: this takes it away from the guest.
        match unsafe { self.slots.vm.set_user_memory_region(region) } {
            Ok(()) => drop(self.slots.used().remove(&self.slot)),
            Err(error) => {
                warn_limited!("a device's memory stays with the guest: {error}");
                // The guest may still access it, so it must stay mapped.
                std::mem::forget(self.mapping.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn memory_is_lent_and_taken_back() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("no /dev/kvm: not tested");
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
}

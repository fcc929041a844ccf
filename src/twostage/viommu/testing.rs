// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Shared by the tests of both models: refusals of the host, and a guest's access to registers and
//! memory, and to registers as memory.

use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{HostSideError, PageLender};

/// Guest memory for tables, queues and status words.
pub(super) const MEMORY_SIZE: u64 = 0x10_0000;

pub(super) fn guest_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)]).unwrap()
}

/// The contents of guest memory.
pub(super) fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_SIZE as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Guest memory with the same contents.
pub(super) fn copy_of(memory: &GuestMemoryMmap) -> GuestMemoryMmap {
    let copy = guest_memory();
    copy.write_slice(&contents(memory), GuestAddress(0)).unwrap();
    copy
}

/// Where `snapshot`, in JSON, has an object, and the snapshot with one more field there.
#[cfg(feature = "serde")]
pub(super) fn with_unknown_fields(
    snapshot: &serde_json::Value,
) -> Vec<(String, serde_json::Value)> {
    fn objects(value: &serde_json::Value, place: &str, found: &mut Vec<String>) {
        if value.is_object() {
            found.push(place.into());
        }
        let fields = value.as_object().into_iter().flatten();
        fields.for_each(|(name, field)| objects(field, &format!("{place}/{name}"), found));
        let items = value.as_array().into_iter().flatten().enumerate();
        items.for_each(|(index, item)| objects(item, &format!("{place}/{index}"), found));
    }
    let mut places = Vec::new();
    objects(snapshot, "", &mut places);
    let changed = places.into_iter().map(|place| {
        let mut changed = snapshot.clone();
        changed.pointer_mut(&place).unwrap()["new"] = 1.into();
        (place, changed)
    });
    changed.collect()
}

/// Which calls the host refuses.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    which: Mutex<Which>,
    /// Blocking fails as well.
    blocks_nothing: AtomicBool,
}

#[derive(Debug, Default)]
enum Which {
    #[default]
    Nothing,
    Everything,
    /// One call, after this many.
    After(i64),
}

impl Refusals {
    /// Refuses everything from here on, or nothing.
    pub fn everything(&self, refuse: bool) {
        *self.which.lock() = if refuse { Which::Everything } else { Which::Nothing };
    }

    /// Refuses one call, after this many.
    pub fn after(&self, calls: i64) {
        *self.which.lock() = Which::After(calls);
    }

    /// What [`any_refusal`] says, for one step of a life.
    pub fn during<T>(&self, refusal: Option<(i64, bool)>, step: impl FnOnce() -> T) -> T {
        if let Some((after, blocks_nothing)) = refusal {
            self.after(after);
            self.block_nothing(blocks_nothing);
        }
        let result = step();
        self.everything(false);
        self.block_nothing(false);
        result
    }

    /// Sets whether blocking fails as well.
    pub fn block_nothing(&self, nothing: bool) {
        self.blocks_nothing.store(nothing, Ordering::Relaxed);
    }

    /// The result of the next call.
    pub fn next_call(&self) -> Result<(), HostSideError> {
        let refused = match &mut *self.which.lock() {
            Which::Nothing => false,
            Which::Everything => true,
            Which::After(calls) => {
                *calls -= 1;
                *calls == -1
            }
        };
        if !refused {
            return Ok(());
        }
        let source = Arc::new(std::io::Error::other("refused"));
        let still_reachable = self.blocks_nothing.load(Ordering::Relaxed);
        Err(HostSideError { what: "test".into(), still_reachable, source })
    }
}

/// A guest's accesses to its memory and to the registers of its IOMMU.
pub(super) trait GuestAccess {
    fn memory(&self) -> &GuestMemoryMmap;
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    fn mmio_write(&self, offset: u64, data: &[u8]);

    fn write(&self, address: u64, words: &[u64]) {
        for (index, word) in (0..).zip(words) {
            self.memory().write_obj(*word, GuestAddress(address + 8 * index)).unwrap();
        }
    }

    fn read32(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn read64(&self, offset: u64) -> u64 {
        let mut data = [0xff; 8];
        self.mmio_read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.mmio_write(offset, &value.to_le_bytes());
    }

    fn write64(&self, offset: u64, value: u64) {
        self.mmio_write(offset, &value.to_le_bytes());
    }

    /// Makes an access from [`any_access`].
    fn access(&self, access: &AnyAccess) {
        let mut data = [0; 16];
        data[..8].copy_from_slice(&access.value.to_le_bytes());
        if access.write {
            self.mmio_write(access.offset, &data[..access.size]);
        } else {
            self.mmio_read(access.offset, &mut data[..access.size]);
        }
    }
}

/// A guest's access to the page, as a hypervisor gives it: to memory, or by exits.
#[derive(Default)]
pub(super) struct Slot {
    pub there: RwLock<bool>,
    /// It is being taken away: some accesses exit already.
    pub going: AtomicBool,
    pub refuses: AtomicBool,
    pub lends: AtomicU64,
}

impl PageLender for Slot {
    fn lend(&self) -> bool {
        if self.refuses.load(Ordering::Relaxed) {
            return false;
        }
        *self.there.write().unwrap() = true;
        self.lends.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn take_back(&self) {
        self.going.store(true, Ordering::Release);
        thread::yield_now();
        *self.there.write().unwrap() = false;
        self.going.store(false, Ordering::Release);
    }
}

impl Slot {
    pub fn is_there(&self) -> bool {
        *self.there.read().unwrap()
    }

    /// A vCPU makes an access: `memory` if the page is there, or else `exit`.
    pub fn access<T>(&self, memory: impl FnOnce() -> T, exit: impl FnOnce() -> T) -> T {
        let there = self.there.read().unwrap();
        if *there && !self.going.load(Ordering::Acquire) {
            return memory();
        }
        drop(there);
        exit()
    }
}

/// Seldom: the call of a step that is refused, and whether blocking fails as well.
pub(super) fn any_refusal() -> impl Strategy<Value = Option<(i64, bool)>> {
    prop::option::weighted(0.2, (0..4i64, any::<bool>()))
}

/// A register access, possibly invalid.
#[derive(Debug, Clone)]
pub(super) struct AnyAccess {
    pub offset: u64,
    pub value: u64,
    pub size: usize,
    pub write: bool,
}

/// Accesses at such offsets, most of them aligned and of a valid size.
pub(super) fn any_access(offset: impl Strategy<Value = u64>) -> impl Strategy<Value = AnyAccess> {
    let aligned = offset
        .prop_flat_map(|offset| prop_oneof![Just(offset & !7), Just(offset & !3), Just(offset)]);
    let value = prop_oneof![any::<u64>(), (0..64u32).prop_map(|bit| 1 << bit), 0..MEMORY_SIZE];
    let size = prop_oneof![Just(4), Just(8), 0..12usize];
    (aligned, value, size, any::<bool>()).prop_map(|(offset, value, size, write)| AnyAccess {
        offset,
        value,
        size,
        write,
    })
}

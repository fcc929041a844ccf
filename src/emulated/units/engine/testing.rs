// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Helpers for the tests of both units: guest memory behind a stage 2, and requests to it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion, VolatileMemory};

use crate::units::stage2::{Mapping, Stage2};
use crate::{DmaAttributes, DmaError, DmaPort};
use twostage::iommufd::{Protection, UserMemory};

/// A request without PASID.
pub const PLAIN: DmaAttributes = DmaAttributes { pasid: None, privileged: false, execute: false };

/// A request with PASID.
pub fn pasid(pasid: u32) -> DmaAttributes {
    DmaAttributes { pasid: Some(pasid), ..PLAIN }
}

/// The same request for supervisor privilege.
pub fn privileged(attributes: DmaAttributes) -> DmaAttributes {
    DmaAttributes { privileged: true, ..attributes }
}

/// The same request with execute permission requested.
pub fn execute(attributes: DmaAttributes) -> DmaAttributes {
    DmaAttributes { execute: true, ..attributes }
}

/// The word read by a request.
pub fn read(port: &mut DmaPort, attributes: DmaAttributes, iova: u64) -> Result<u64, DmaError> {
    let mut bytes = [0; 8];
    port.read(attributes, iova, &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

/// The word written by a request.
pub fn write(
    port: &mut DmaPort,
    attributes: DmaAttributes,
    iova: u64,
    word: u64,
) -> Result<u64, DmaError> {
    port.write(attributes, iova, &word.to_le_bytes()).map(|()| word)
}

/// GPA where the first half of guest memory starts.
pub const LOW: u64 = 0x0010_0000;
/// GPA where the second half starts: aligned to 1 GiB.
pub const HIGH: u64 = 0x4000_0000;
/// Bytes of each half.
pub const HALF: u64 = 16 << 20;
/// GPA of a page that stage 2 maps for reading only.
pub const READ_ONLY: u64 = 0x5000_0000;
/// GPA that stage 2 does not map.
pub const NOWHERE: u64 = 0x6000_0000;

/// Guest memory, and the stage 2 that maps it: at other addresses than the guest's, and with the
/// halves swapped, so that using a GPA as an offset reads something else.
#[derive(Debug)]
pub struct Memory {
    pub stage2: Arc<Stage2>,
    pub region: Arc<GuestRegionMmap<AtomicBitmap>>,
    next_table: Cell<u64>,
}

impl Memory {
    pub fn new() -> Self {
        let start = GuestAddress(0x10_0000_0000);
        let length = 2 * HALF + 0x1000;
        let region = GuestRegionMmap::from_range(start, length as usize, None).unwrap();
        let memory =
            Self { stage2: Arc::default(), region: Arc::new(region), next_table: Cell::new(LOW) };
        memory.map_stage2(LOW, HALF, HALF, Protection::READ_WRITE);
        memory.map_stage2(HIGH, 0, HALF, Protection::READ_WRITE);
        memory.map_stage2(READ_ONLY, 2 * HALF, 0x1000, Protection::READ_ONLY);
        memory
    }

    /// Maps what is at `offset` of the region.
    pub fn map_stage2(&self, gpa: u64, offset: u64, length: u64, protection: Protection) {
        let memory = UserMemory::new(Arc::clone(&self.region), offset, length).unwrap();
        let last = gpa + length - 1;
        self.stage2.insert(Mapping { start: gpa, last, memory, protection });
    }

    /// Offset of `gpa` in the region.
    pub fn offset(&self, gpa: u64) -> usize {
        let mapping = self.stage2.lookup(gpa).expect("a GPA of guest memory");
        mapping.target(gpa) as usize
    }

    /// Address of `gpa` in this process.
    pub fn address(&self, gpa: u64) -> usize {
        self.region.as_ptr().addr() + self.offset(gpa)
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        self.region.get_atomic_ref(self.offset(gpa)).unwrap()
    }

    pub fn poke(&self, gpa: u64, word: u64) {
        self.word(gpa).store(word.to_le(), Ordering::SeqCst);
    }

    pub fn peek(&self, gpa: u64) -> u64 {
        u64::from_le(self.word(gpa).load(Ordering::SeqCst))
    }

    /// The pages that were written, by address: of those of `gpas`, whose marks are forgotten. No
    /// other page may be marked.
    pub fn marked(&self, gpas: &[u64]) -> Vec<u64> {
        let bitmap = MmapRegion::bitmap(&self.region);
        let page = |gpa: &u64| self.offset(*gpa) & !0xfff;
        let marked = |gpa: &&u64| bitmap.is_addr_set(page(gpa));
        let found = gpas.iter().filter(marked).copied().collect();
        gpas.iter().for_each(|gpa| bitmap.reset_addr_range(page(gpa), 0x1000));
        assert!(bitmap.get_and_reset().iter().all(|word| *word == 0), "other pages");
        found
    }

    /// GPA of new, empty memory of this size, a power of two, aligned to it.
    pub fn table(&self, size: u64) -> u64 {
        let gpa = self.next_table.get().next_multiple_of(size);
        self.next_table.set(gpa + size);
        assert!(gpa + size <= LOW + HALF);
        gpa
    }
}

/// A sink that records what it gets.
#[derive(Debug)]
pub struct Sink<T>(Mutex<Vec<T>>);

impl<T> Default for Sink<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Sink<T> {
    pub fn put(&self, item: T) {
        self.0.lock().push(item);
    }

    /// Returns and clears the record.
    pub fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.0.lock())
    }
}

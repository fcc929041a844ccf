// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's side of a test: drivers of the virtual IOMMUs.
//!
//! [`vtd::Driver`] and [`smmuv3::Driver`] build tables and queues in the guest's memory ([`Pages`])
//! and program the unit by its registers ([`Mmio`]), as an operating system does. The package's
//! `examples/vtd.rs` and `examples/smmuv3.rs` are whole programs.
//!
//! They are for tests: an address that is not guest memory, and a unit that does not acknowledge
//! what was written, are the end of the test, so these panic. What a test may want to see (a queue
//! that stopped, a fault) is returned.

pub mod smmuv3;
pub mod vtd;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use twostage::unit::{Smmuv3, Vtd};
use twostage::viommu::smmuv3::Smmu;
use twostage::viommu::vtd::VtdIommu;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes of a page, and of a table.
pub const PAGE: u64 = 0x1000;

/// The registers of a unit, for a guest's loads and stores at offsets in bytes.
pub trait Mmio {
    /// Loads `bytes` at `offset`.
    fn read(&self, offset: u64, bytes: &mut [u8]);

    /// Stores `bytes` at `offset`.
    fn write(&self, offset: u64, bytes: &[u8]);

    /// Loads 32 bits.
    fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Loads 64 bits.
    fn read64(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Stores 32 bits.
    fn write32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Stores 64 bits.
    fn write64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }
}

macro_rules! have_registers {
    ($($unit:ty),*) => {$(
        impl Mmio for $unit {
            fn read(&self, offset: u64, bytes: &mut [u8]) {
                self.mmio_read(offset, bytes);
            }

            fn write(&self, offset: u64, bytes: &[u8]) {
                self.mmio_write(offset, bytes);
            }
        }
    )*};
}

have_registers!(VtdIommu, Smmu, Vtd, Smmuv3);

impl<M: Mmio + ?Sized> Mmio for Arc<M> {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        (**self).read(offset, bytes);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        (**self).write(offset, bytes);
    }
}

/// 64-bit words of guest memory, whatever its bitmap.
trait Words: Send + Sync {
    fn load(&self, gpa: u64) -> vm_memory::guest_memory::Result<u64>;
    fn store(&self, gpa: u64, value: u64) -> vm_memory::guest_memory::Result<()>;
}

impl<M: GuestMemoryBackend + Send + Sync> Words for M {
    fn load(&self, gpa: u64) -> vm_memory::guest_memory::Result<u64> {
        Bytes::load(self, GuestAddress(gpa), Ordering::SeqCst)
    }

    fn store(&self, gpa: u64, value: u64) -> vm_memory::guest_memory::Result<()> {
        Bytes::store(self, value, GuestAddress(gpa), Ordering::SeqCst)
    }
}

/// The guest's memory, and which pages of it are free. Every address is a GPA, in bytes. Clones
/// share both.
#[derive(Clone)]
pub struct Pages {
    memory: Arc<dyn Words>,
    free: Arc<AtomicU64>,
}

impl Pages {
    /// `memory`, free from the page at `free` on.
    pub fn new<M: GuestMemoryBackend + Send + Sync + 'static>(memory: Arc<M>, free: u64) -> Self {
        Self { memory, free: Arc::new(AtomicU64::new(free)) }
    }

    /// A page filled with zeros.
    ///
    /// # Panics
    /// None is left.
    pub fn page(&self) -> u64 {
        let page = self.free.fetch_add(PAGE, Ordering::Relaxed);
        (page..page + PAGE).step_by(8).for_each(|at| self.store(at, 0));
        page
    }

    /// The first free page.
    pub fn free(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Loads the 64-bit word at `gpa` atomically.
    ///
    /// # Panics
    /// It is not guest memory, or not aligned.
    pub fn load(&self, gpa: u64) -> u64 {
        self.memory
            .load(gpa)
            .unwrap_or_else(|error| panic!("the guest's load at {gpa:#x}: {error}"))
    }

    /// Stores the 64-bit word at `gpa` atomically.
    ///
    /// # Panics
    /// It is not guest memory, or not aligned.
    pub fn store(&self, gpa: u64, value: u64) {
        let stored = self.memory.store(gpa, value);
        stored.unwrap_or_else(|error| panic!("the guest's store at {gpa:#x}: {error}"));
    }

    /// Stores `words` from `gpa` on, the last one first: what makes an entry valid is in its first.
    fn store_words(&self, gpa: u64, words: &[u64]) {
        for (number, word) in words.iter().enumerate().rev() {
            self.store(gpa + 8 * number as u64, *word);
        }
    }
}

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("free", &self.free).finish_non_exhaustive()
    }
}

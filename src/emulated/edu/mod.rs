// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The educational device, 1234:11e8, as in QEMU's `docs/specs/edu`: its registers, and DMA between
//! memory and a buffer of 4 KiB.
//!
//! The user provides the configuration space, interrupt delivery, the thread that does the DMA, and
//! memory access ([`Requests`]). One register is Twostage's: 0xA0 sets the PASID of the DMA, where
//! the user says that it exists: while software has the function's PASID capability enabled.

mod dma;
pub mod registers;

pub use dma::{Engine, Failure, Requests, Transfer};
pub use registers::{Effect, Registers};

/// Length of BAR 0, in bytes.
pub const BAR_SIZE: u32 = 1 << 20;
/// The buffer's address in the device's own address space.
pub const BUFFER_START: u64 = 0x4_0000;
/// Length of the buffer, in bytes.
pub const BUFFER_SIZE: usize = 4096;
/// Length of the memory of a device that has a BAR of memory, in bytes: nothing happens when that
/// is accessed.
pub const MEMORY_SIZE: usize = 0x4000;
/// The number of vectors of a device with MSI-X.
pub const VECTORS: u32 = 4;

/// The vectors whose messages a device with MSI-X sends for new `causes`: one for each byte of the
/// interrupt status register, so the first is for factorials and the second for DMA.
pub fn vectors(causes: u32) -> impl Iterator<Item = u32> {
    (0..VECTORS).zip(causes.to_le_bytes()).filter(|(_, byte)| *byte != 0).map(|(vector, _)| vector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_byte_of_causes_has_a_vector() {
        let of = |causes| vectors(causes).collect::<Vec<_>>();
        assert_eq!(of(registers::CAUSE_FACTORIAL), [0]);
        assert_eq!(of(registers::CAUSE_DMA), [1]);
        assert_eq!(of(0x8000_0010), [0, 3]);
        assert!(of(0).is_empty());
    }
}

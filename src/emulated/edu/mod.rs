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

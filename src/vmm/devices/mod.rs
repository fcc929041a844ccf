// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulated devices, and how they reach memory.

mod dma_master;
pub mod edu;
mod message_writes;
pub mod virtio;

pub use dma_master::{DirectMemory, DmaError, DmaMaster};
pub use message_writes::MessageWrites;

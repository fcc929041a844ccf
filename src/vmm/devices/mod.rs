// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulated devices, and how they reach memory.

pub(crate) mod debug_exit;
mod dma_master;
pub mod edu;
mod message_writes;
mod request_gate;
pub mod virtio;

pub use dma_master::{DirectMemory, DmaError, DmaMaster};
pub use message_writes::MessageWrites;
pub use request_gate::{NotNow, Permit, RequestGate};

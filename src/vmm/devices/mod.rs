// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulated devices, and how they reach memory.

mod dma_master;
pub mod edu;

pub use dma_master::{DirectMemory, DmaError, DmaMaster};

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arm SMMUv3: registers, tables, commands and events.
//!
//! Source: Arm System Memory Management Unit Architecture Specification, SMMU architecture version 3
//! (IHI 0070). Fields carry the specification's names. All words are little-endian in memory; values
//! here are in host order.

pub mod command;
pub mod queue;
pub mod regs;

use std::fmt;

/// Who makes a request, as the stream table knows it (§3.2): for a PCI function, its Requester ID.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StreamId(pub u32);

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamId({:#x})", self.0)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Arm SMMUv3: registers, tables, commands, events and page requests.
//!
//! Source: Arm System Memory Management Unit Architecture Specification, version 3 (IHI 0070); the
//! format of the translation tables is that of the Arm Architecture Reference Manual (DDI 0487),
//! VMSAv8-64. Fields have the specification's names. All words are little-endian in memory; values
//! here are in host order. What no unit of this crate supports (Secure state, 56-bit addresses,
//! 128-bit descriptors) has no layout here: such bits count as reserved.

pub mod command;
pub mod context;
pub mod event;
pub mod page_request;
pub mod queue;
pub mod regs;
pub mod stream_table;
pub mod translation;

use std::fmt;

use super::pci::{Bdf, Pasid};

/// The widest physical address in bits that the tables and registers here can hold.
pub const ADDRESS_WIDTH: u8 = 52;

/// A StreamID: identifies a stream of transactions, and its stream table entry (§3.2).
///
/// Behind one SMMU a PCI function's StreamID is its Requester ID.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StreamId(pub u32);

impl StreamId {
    /// The 32 bits of the StreamID.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The PCI function with this StreamID; `None` if it is wider than a Requester ID.
    pub const fn bdf(self) -> Option<Bdf> {
        if self.0 > u16::MAX as u32 {
            return None;
        }
        Some(Bdf::from_raw(self.0 as u16))
    }
}

impl From<Bdf> for StreamId {
    fn from(bdf: Bdf) -> Self {
        Self(bdf.raw().into())
    }
}

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

/// A SubstreamID: selects a context descriptor of a stream (§3.2). 20 bits; for PCI, the PASID.
pub type SubstreamId = Pasid;

/// The address size in bits of a three-bit field (IDR5.OAS, CD.IPS, STE.S2PS); `None` for an
/// encoding beyond 52 bits.
pub const fn address_size(bits: u8) -> Option<u8> {
    match bits {
        0 => Some(32),
        1 => Some(36),
        2 => Some(40),
        3 => Some(42),
        4 => Some(44),
        5 => Some(48),
        6 => Some(52),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_a_requester() {
        let bdf = Bdf::new(1, 2, 3).unwrap();
        assert_eq!(StreamId::from(bdf), StreamId(0x113));
        assert_eq!(StreamId(0x113).bdf(), Some(bdf));
        assert_eq!(StreamId(0x1_0000).bdf(), None);
        assert_eq!(format!("{} {0:?}", StreamId(8)), "0x8 StreamId(0x8)");
    }

    #[test]
    fn address_sizes_ascend() {
        let sizes: Vec<_> = (0..8).map(address_size).collect();
        assert_eq!(sizes[0], Some(32));
        assert_eq!(sizes[5], Some(48));
        assert_eq!(sizes[6], Some(ADDRESS_WIDTH));
        assert_eq!(sizes[7], None);
        assert!(sizes[..7].windows(2).all(|pair| pair[0] < pair[1]));
    }
}

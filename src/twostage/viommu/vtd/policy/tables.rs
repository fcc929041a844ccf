// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's remapping tables, and what they say about a requester.

use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::{above_width, HOST_ADDRESS_WIDTH};
use crate::viommu::vtd::caps::Capabilities;
use crate::viommu::vtd::host_side::{DomainTag, Stage1};
use crate::viommu::{BadAddress, TableMemory};

/// The inputs of the decision: guest memory, the unit's features, and the root table as latched by
/// SRTP.
#[derive(Clone, Copy)]
pub(in crate::viommu::vtd) struct Tables<'a> {
    pub memory: &'a dyn TableMemory,
    pub caps: &'a Capabilities,
    /// `None` until the guest sets a root table.
    pub root: Option<Rtaddr>,
}

/// Why a requester is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::vtd) struct Blocked {
    pub reason: FaultReason,
    /// An entry on the way, including this one, has FPD set.
    pub fault_disabled: bool,
}

impl Blocked {
    pub const fn recorded(reason: FaultReason) -> Self {
        Self { reason, fault_disabled: false }
    }
}

/// The configuration of a requester that the tables serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::vtd) struct Served {
    /// The guest-owned tables, or `None` for pass-through.
    pub stage1: Option<Stage1>,
    pub tag: DomainTag,
    pub fault_disabled: bool,
}

impl Tables<'_> {
    /// The latched root table, if its mode and address are valid.
    pub fn root(&self) -> Result<Rtaddr, Blocked> {
        let invalid = Blocked::recorded(FaultReason::RootTableAddressInvalid);
        let root = self.root.ok_or(invalid)?;
        let supported = match root.mode() {
            TranslationTableMode::Legacy => true,
            TranslationTableMode::Scalable => self.caps.ecap.smts(),
            TranslationTableMode::Reserved | TranslationTableMode::AbortDma => false,
        };
        if !supported || self.is_beyond_width(root.root_table()) {
            return Err(invalid);
        }
        Ok(root)
    }

    /// Whether the table pointer `address` has bits beyond the unit's address width.
    pub fn is_beyond_width(&self, address: u64) -> bool {
        address & above_width(HOST_ADDRESS_WIDTH) != 0
    }

    /// The width of `aw`, if second-stage tables may have it.
    pub fn second_stage_width(&self, aw: u8) -> Option<AddressWidth> {
        AddressWidth::from_bits(aw).filter(|width| self.offers_width(*width))
    }

    /// The width of the widest possible second-stage table.
    pub fn widest_second_stage(&self) -> Option<AddressWidth> {
        AddressWidth::ALL.into_iter().rfind(|width| self.offers_width(*width))
    }

    fn offers_width(&self, width: AddressWidth) -> bool {
        self.caps.cap.sagaw() >> width.into_bits() & 1 != 0
    }

    /// `N` 64-bit words at `address`, each read atomically.
    pub fn words<const N: usize>(&self, address: u64) -> Result<[u64; N], BadAddress> {
        let mut words = [0; N];
        for (word, offset) in words.iter_mut().zip((0..).step_by(8)) {
            // Tables are page-aligned and below the address width, so the sum does not wrap.
            *word = self.memory.load_u64(address + offset)?;
        }
        Ok(words)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's remapping tables, and what can be said of a requester from them.

use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::{above_width, HOST_ADDRESS_WIDTH};
use crate::viommu::vtd::caps::Capabilities;
use crate::viommu::vtd::host_side::{DomainTag, Stage1};
use crate::viommu::{BadAddress, TableMemory};

/// What decides: guest memory, what the unit offers, and the root table as SRTP latched it.
#[derive(Clone, Copy)]
pub(in crate::viommu::vtd) struct Tables<'a> {
    pub memory: &'a dyn TableMemory,
    pub caps: &'a Capabilities,
    /// `None` while the guest has never set a root table.
    pub root: Option<Rtaddr>,
}

/// Why a requester is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::vtd) struct Blocked {
    pub reason: FaultReason,
    /// An entry on the way, this one included, has FPD set.
    pub fault_disabled: bool,
}

impl Blocked {
    pub const fn recorded(reason: FaultReason) -> Self {
        Self { reason, fault_disabled: false }
    }
}

/// What the tables say of a requester that they serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::viommu::vtd) struct Served {
    /// The guest-owned tables, or none for pass-through.
    pub stage1: Option<Stage1>,
    pub tag: DomainTag,
    pub fault_disabled: bool,
}

impl Tables<'_> {
    /// The latched root table, if its mode and address are possible.
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

    /// Whether the table pointer `address` (bytes) has bits that the unit's addresses do not have.
    pub fn is_beyond_width(&self, address: u64) -> bool {
        address & above_width(HOST_ADDRESS_WIDTH) != 0
    }

    /// The width that `aw` names, if second-stage tables may have it.
    pub fn second_stage_width(&self, aw: u8) -> Option<AddressWidth> {
        AddressWidth::from_bits(aw).filter(|width| self.offers_width(*width))
    }

    /// The width of the widest second-stage table there may be.
    pub fn widest_second_stage(&self) -> Option<AddressWidth> {
        AddressWidth::ALL.into_iter().rfind(|width| self.offers_width(*width))
    }

    fn offers_width(&self, width: AddressWidth) -> bool {
        self.caps.cap.sagaw() >> width.into_bits() & 1 != 0
    }

    /// `N` 64-bit words at `address` (bytes), each read in one piece.
    pub fn words<const N: usize>(&self, address: u64) -> Result<[u64; N], BadAddress> {
        let mut words = [0; N];
        for (word, offset) in words.iter_mut().zip((0..).step_by(8)) {
            // Tables are page aligned and below the address width, so the sum does not wrap.
            *word = self.memory.load_u64(address + offset)?;
        }
        Ok(words)
    }
}

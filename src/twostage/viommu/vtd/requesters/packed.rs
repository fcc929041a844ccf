// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of a PASID in a few bytes: there may be 2^20 of them behind each function.

use bitfield_struct::bitfield;

use crate::spec::pci::Pasid;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::vtd::host_side::{
    DomainTag, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdSecondStage,
};
use crate::viommu::vtd::requesters::Given;

/// Kinds of policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Blocked,
    Bypass,
    FirstStage,
    SecondStage,
}

impl Kind {
    const fn into_bits(self) -> u8 {
        self as u8
    }

    /// Of two bits.
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Blocked,
            1 => Self::Bypass,
            2 => Self::FirstStage,
            _ => Self::SecondStage,
        }
    }
}

/// Never stored.
const UNKNOWN: FaultReason = FaultReason::RootTableAddressInvalid;

/// Everything but the domain.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Word {
    /// The page of the top table.
    #[bits(40)]
    page: u64,
    #[bits(2)]
    kind: Kind,
    /// FSPM or AW.
    #[bits(2)]
    width: u8,
    supervisor_requests: bool,
    write_protect: bool,
    extended_accessed: bool,
    fault_disabled: bool,
    applied: bool,
    /// Fault reason.
    reason: u8,
    #[bits(7)]
    __: u8,
}

/// A [`Given`] of a request with PASID, whose tag has that PASID.
// Packed: its alignment would cost another four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(Rust, packed(4))]
pub(in crate::viommu::vtd) struct PackedGiven {
    word: Word,
    domain: u16,
}

impl PackedGiven {
    pub fn new(given: Given) -> Self {
        let Given { decision: RequesterConfig { policy, tag, fault_disabled }, applied } = given;
        let word = Word::new().with_fault_disabled(fault_disabled).with_applied(applied);
        // Tables are below the host's address width: 52 bits.
        let page = |table: u64| table >> PAGE_SHIFT & ((1 << Word::PAGE_BITS) - 1);
        let word = match policy {
            Policy::Blocked(reason) => word.with_kind(Kind::Blocked).with_reason(reason.code()),
            Policy::Bypass => word.with_kind(Kind::Bypass),
            Policy::Stage1(Stage1::VtdFirstStage(tables)) => word
                .with_kind(Kind::FirstStage)
                .with_page(page(tables.table))
                .with_width(tables.paging_mode.into_bits())
                .with_supervisor_requests(tables.supervisor_requests)
                .with_write_protect(tables.write_protect)
                .with_extended_accessed(tables.extended_accessed),
            Policy::Stage1(Stage1::VtdSecondStage(tables)) => word
                .with_kind(Kind::SecondStage)
                .with_page(page(tables.table))
                .with_width(tables.address_width.into_bits()),
        };
        Self { word, domain: tag.domain }
    }

    /// The configuration of `pasid`.
    pub fn of(self, pasid: Pasid) -> Given {
        let Self { word, domain } = self;
        let table = word.page() << PAGE_SHIFT;
        // A word contains what `new` wrote: the value that matters is never reserved.
        let paging_mode = PagingMode::from_bits(word.width()).unwrap_or(PagingMode::Level4);
        let address_width = AddressWidth::from_bits(word.width()).unwrap_or(AddressWidth::Bits39);
        let reason = FaultReason::from_code(word.reason()).unwrap_or(UNKNOWN);
        let fault_disabled = word.fault_disabled();
        let policy = match word.kind() {
            Kind::Bypass => Policy::Bypass,
            Kind::FirstStage => Policy::Stage1(Stage1::VtdFirstStage(VtdFirstStage {
                table,
                paging_mode,
                supervisor_requests: word.supervisor_requests(),
                write_protect: word.write_protect(),
                extended_accessed: word.extended_accessed(),
            })),
            Kind::SecondStage => {
                Policy::Stage1(Stage1::VtdSecondStage(VtdSecondStage { table, address_width }))
            }
            Kind::Blocked => Policy::Blocked(reason),
        };
        let tag = DomainTag { domain, pasid: pasid.raw() };
        let decision = RequesterConfig { policy, tag, fault_disabled };
        Given { decision, applied: word.applied() }
    }

    /// The same, to be given to the host again.
    pub fn unapplied(self) -> Self {
        Self { word: { self.word }.with_applied(false), ..self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy() -> impl Strategy<Value = Policy> {
        let first = |(page, five, srs, wp, eaf)| {
            Policy::Stage1(Stage1::VtdFirstStage(VtdFirstStage {
                table: page << 12,
                paging_mode: if five { PagingMode::Level5 } else { PagingMode::Level4 },
                supervisor_requests: srs,
                write_protect: wp,
                extended_accessed: eaf,
            }))
        };
        let second = |(page, address_width)| {
            let table: u64 = page << 12;
            Policy::Stage1(Stage1::VtdSecondStage(VtdSecondStage { table, address_width }))
        };
        let page = || 0u64..1 << 40;
        prop_oneof![
            prop::sample::select(FaultReason::ALL).prop_map(Policy::Blocked),
            Just(Policy::Bypass),
            (page(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(first),
            (page(), prop::sample::select(&AddressWidth::ALL[..])).prop_map(second),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_lost(
            policy in policy(),
            domain: u16,
            raw in 1u32..1 << 20,
            fault_disabled: bool,
            applied: bool,
        ) {
            let tag = DomainTag { domain, pasid: raw };
            let decision = RequesterConfig { policy, tag, fault_disabled };
            let (given, pasid) = (Given { decision, applied }, Pasid::new(raw).unwrap());
            let packed = PackedGiven::new(given);
            prop_assert_eq!(packed.of(pasid), given);
            let unapplied = Given { applied: false, ..given };
            prop_assert_eq!(packed.unapplied().of(pasid), unapplied);
        }
    }

    #[test]
    fn it_is_small() {
        assert_eq!((size_of::<PackedGiven>(), align_of::<PackedGiven>()), (12, 4));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configurations of a function's PASIDs ([`Pasids`]), in a few bytes each.

use std::ops::RangeInclusive;

use bitfield_struct::bitfield;

use super::Given;
use crate::runs::Runs;
use crate::spec::pci::Pasid;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::vtd::host_side::{
    DomainTag, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdNested, VtdSecondStage,
};

/// The configurations of the PASIDs of a function.
#[derive(Debug, Clone, Default)]
pub(super) struct Pasids {
    given: Runs<PackedGiven>,
    /// The second stages below first ones, of PASIDs that nest. They are kept apart, as few differ
    /// from those of their neighbours, and most guests have none.
    below: Runs<Word>,
}

impl Pasids {
    /// The configuration of `pasid`.
    pub fn get(&self, pasid: Pasid) -> Option<Given> {
        let given = self.given.get(pasid.raw())?;
        let below = given.nests().then(|| self.below.get(pasid.raw())).flatten();
        Some(given.of(pasid, below))
    }

    /// Sets or removes the configuration of `pasid`.
    pub fn set(&mut self, pasid: Pasid, given: Option<Given>) {
        let (given, below) = given.map(PackedGiven::new).unzip();
        self.given.set(pasid.raw(), given);
        self.below.set(pasid.raw(), below.flatten());
    }

    /// Marks all of them as not applied by the host.
    pub fn unapply_all(&mut self) {
        self.given.for_each_value(|given| *given = given.unapplied());
    }

    /// The first configured one from `pasid`.
    pub fn next(&self, pasid: u32) -> Option<Pasid> {
        Pasid::new(self.given.next(pasid)?)
    }

    /// Runs of adjacent PASIDs whose configurations are the same, but for their tags; and that of
    /// the first.
    pub fn ranges(&self) -> impl Iterator<Item = (RangeInclusive<u32>, Given)> + '_ {
        let pieces = self.given.ranges().flat_map(|(pasids, given)| {
            let nested = given.nests().then(|| self.below.ranges_in(pasids.clone()));
            let other = nested.is_none().then_some((pasids, given, None));
            let nested = nested.into_iter().flatten();
            nested.map(move |(pasids, below)| (pasids, given, Some(below))).chain(other)
        });
        pieces.filter_map(|(pasids, given, below)| {
            let given = given.of(Pasid::new(*pasids.start())?, below);
            Some((pasids, given))
        })
    }

    /// The number of entries stored.
    #[cfg(test)]
    pub fn kept(&self) -> usize {
        self.given.runs() + self.below.runs()
    }
}

/// Whether the configuration of `pasid` can be stored as it is: its tables are at page boundaries
/// below 2^52, and the tag is its own.
pub(in crate::viommu::vtd) fn can_keep(pasid: Pasid, given: Given) -> bool {
    let (packed, below) = PackedGiven::new(given);
    packed.of(pasid, below) == given
}

/// Kinds of policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Blocked,
    Bypass,
    FirstStage,
    SecondStage,
    Nested,
}

impl Kind {
    const fn into_bits(self) -> u8 {
        self as u8
    }

    /// Of three bits.
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Blocked,
            1 => Self::Bypass,
            2 => Self::FirstStage,
            3 => Self::SecondStage,
            _ => Self::Nested,
        }
    }
}

/// Never stored.
const UNKNOWN: FaultReason = FaultReason::RootTableAddressInvalid;

/// Everything but the domain, and the second stage below a first one; or that second stage.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Word {
    /// The page of the top table.
    #[bits(40)]
    page: u64,
    #[bits(3)]
    kind: Kind,
    /// FSPM of a first stage, AW of a second.
    #[bits(2)]
    width: u8,
    supervisor_requests: bool,
    write_protect: bool,
    extended_accessed: bool,
    /// Of a second stage.
    accessed_dirty: bool,
    fault_disabled: bool,
    applied: bool,
    /// Fault reason.
    reason: u8,
    #[bits(5)]
    __: u8,
}

/// Tables are below the host's address width: 52 bits.
fn page(table: u64) -> u64 {
    table >> PAGE_SHIFT & ((1 << Word::PAGE_BITS) - 1)
}

impl Word {
    fn with_first(self, first: VtdFirstStage) -> Self {
        self.with_page(page(first.table))
            .with_width(first.paging_mode.into_bits())
            .with_supervisor_requests(first.supervisor_requests)
            .with_write_protect(first.write_protect)
            .with_extended_accessed(first.extended_accessed)
    }

    fn first(self) -> VtdFirstStage {
        VtdFirstStage {
            table: self.page() << PAGE_SHIFT,
            // A word contains what was written: the value that matters is never reserved.
            paging_mode: PagingMode::from_bits(self.width()).unwrap_or(PagingMode::Level4),
            supervisor_requests: self.supervisor_requests(),
            write_protect: self.write_protect(),
            extended_accessed: self.extended_accessed(),
        }
    }

    fn with_second(self, second: VtdSecondStage) -> Self {
        self.with_page(page(second.table))
            .with_width(second.address_width.into_bits())
            .with_accessed_dirty(second.accessed_dirty)
    }

    fn second(self) -> VtdSecondStage {
        VtdSecondStage {
            table: self.page() << PAGE_SHIFT,
            // Never reserved where it matters, as above.
            address_width: AddressWidth::from_bits(self.width()).unwrap_or(AddressWidth::Bits39),
            accessed_dirty: self.accessed_dirty(),
        }
    }
}

/// A [`Given`] of a request with PASID, whose tag has that PASID, in a few bytes: there may be 2^20
/// of them behind each function. A second stage below a first one is kept elsewhere.
// Packed: its alignment would cost another four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(Rust, packed(4))]
struct PackedGiven {
    word: Word,
    domain: u16,
}

impl PackedGiven {
    /// `given`, and the second stage below its first one.
    fn new(given: Given) -> (Self, Option<Word>) {
        let Given { decision: RequesterConfig { policy, tag, fault_disabled }, applied } = given;
        let word = Word::new().with_fault_disabled(fault_disabled).with_applied(applied);
        let (word, below) = match policy {
            Policy::Blocked(reason) => {
                (word.with_kind(Kind::Blocked).with_reason(reason.code()), None)
            }
            Policy::Bypass => (word.with_kind(Kind::Bypass), None),
            Policy::Stage1(Stage1::VtdFirstStage(first)) => {
                (word.with_kind(Kind::FirstStage).with_first(first), None)
            }
            Policy::Stage1(Stage1::VtdSecondStage(second)) => {
                (word.with_kind(Kind::SecondStage).with_second(second), None)
            }
            Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })) => {
                let below = Word::new().with_kind(Kind::SecondStage).with_second(second);
                (word.with_kind(Kind::Nested).with_first(first), Some(below))
            }
        };
        (Self { word, domain: tag.domain }, below)
    }

    /// Whether a second stage below its first one is kept elsewhere.
    fn nests(self) -> bool {
        { self.word }.kind() == Kind::Nested
    }

    /// The configuration of `pasid`, with `below` as made by [`PackedGiven::new`].
    fn of(self, pasid: Pasid, below: Option<Word>) -> Given {
        let Self { word, domain } = self;
        let reason = FaultReason::from_code(word.reason()).unwrap_or(UNKNOWN);
        let policy = match (word.kind(), below) {
            (Kind::Bypass, _) => Policy::Bypass,
            (Kind::FirstStage, _) => Policy::Stage1(Stage1::VtdFirstStage(word.first())),
            (Kind::SecondStage, _) => Policy::Stage1(Stage1::VtdSecondStage(word.second())),
            (Kind::Nested, Some(below)) => Policy::Stage1(Stage1::VtdNested(VtdNested {
                first: word.first(),
                second: below.second(),
            })),
            // Never: both are set together.
            (Kind::Nested, None) => Policy::Blocked(UNKNOWN),
            (Kind::Blocked, _) => Policy::Blocked(reason),
        };
        let tag = DomainTag { domain, pasid: pasid.raw() };
        let decision = RequesterConfig { policy, tag, fault_disabled: word.fault_disabled() };
        Given { decision, applied: word.applied() }
    }

    /// The same, to be given to the host again.
    fn unapplied(self) -> Self {
        Self { word: { self.word }.with_applied(false), ..self }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn policy() -> impl Strategy<Value = Policy> {
        let page = || (0u64..1 << 40).prop_map(|page| page << 12);
        let first = || {
            (page(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
                |(table, five, supervisor_requests, write_protect, extended_accessed)| {
                    let paging_mode = if five { PagingMode::Level5 } else { PagingMode::Level4 };
                    VtdFirstStage {
                        table,
                        paging_mode,
                        supervisor_requests,
                        write_protect,
                        extended_accessed,
                    }
                },
            )
        };
        let second = || {
            (page(), prop::sample::select(&AddressWidth::ALL[..]), any::<bool>()).prop_map(
                |(table, address_width, accessed_dirty)| VtdSecondStage {
                    table,
                    address_width,
                    accessed_dirty,
                },
            )
        };
        let nested = (first(), second()).prop_map(|(first, second)| VtdNested { first, second });
        prop_oneof![
            prop::sample::select(FaultReason::ALL).prop_map(Policy::Blocked),
            Just(Policy::Bypass),
            first().prop_map(|first| Policy::Stage1(Stage1::VtdFirstStage(first))),
            second().prop_map(|second| Policy::Stage1(Stage1::VtdSecondStage(second))),
            nested.prop_map(|both| Policy::Stage1(Stage1::VtdNested(both))),
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
            let (packed, below) = PackedGiven::new(given);
            prop_assert_eq!(packed.of(pasid, below), given);
            prop_assert_eq!(below.is_some(), packed.nests());
            let unapplied = Given { applied: false, ..given };
            prop_assert_eq!(packed.unapplied().of(pasid, below), unapplied);
        }

        #[test]
        fn neighbours_share_what_they_have_in_common(
            policies in proptest::collection::vec(policy(), 1..4),
            changes in proptest::collection::vec((1u32..12, 0usize..5), 0..40),
        ) {
            // The same first stages over other second ones, and the reverse.
            let mixed = policies.iter().zip(policies.iter().cycle().skip(1)).filter_map(pair);
            let policies: Vec<_> = policies.iter().copied().chain(mixed).collect();
            let (mut pasids, mut model) = (Pasids::default(), BTreeMap::new());
            for (raw, choice) in changes {
                let (pasid, tag) = (Pasid::new(raw).unwrap(), DomainTag { domain: 1, pasid: raw });
                let given = policies.get(choice).map(|&policy| {
                    Given::applied(RequesterConfig { policy, tag, fault_disabled: false })
                });
                pasids.set(pasid, given);
                match given {
                    Some(given) => model.insert(raw, given),
                    None => model.remove(&raw),
                };
            }
            let nested = |given: &Given| {
                matches!(given.decision.policy, Policy::Stage1(Stage1::VtdNested(_)))
            };
            for raw in 1..12 {
                prop_assert_eq!(pasids.get(Pasid::new(raw).unwrap()), model.get(&raw).copied());
                let below = model.get(&raw).is_some_and(nested);
                prop_assert_eq!(pasids.below.get(raw).is_some(), below);
            }
            // Runs are whole: each differs from the one before, or there is a gap.
            let mut before: Option<(u32, Policy)> = None;
            for (run, given) in pasids.ranges() {
                let policy = given.decision.policy;
                prop_assert!(before.is_none_or(|it| it != (run.start() - 1, policy)));
                prop_assert_eq!(given.decision.tag.pasid, *run.start());
                before = Some((*run.end(), policy));
                for raw in run {
                    let found = model.remove(&raw).map(|given| given.decision.policy);
                    prop_assert_eq!(found, Some(policy));
                }
            }
            prop_assert!(model.is_empty());
        }
    }

    /// The first stage of one over the second stage of another, if both nest.
    fn pair((over, below): (&Policy, &Policy)) -> Option<Policy> {
        match (over, below) {
            (Policy::Stage1(Stage1::VtdNested(over)), Policy::Stage1(Stage1::VtdNested(below))) => {
                let second = below.second;
                Some(Policy::Stage1(Stage1::VtdNested(VtdNested { second, ..*over })))
            }
            _ => None,
        }
    }

    #[test]
    fn it_is_small() {
        assert_eq!((size_of::<PackedGiven>(), align_of::<PackedGiven>()), (12, 4));
    }
}

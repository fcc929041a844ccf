// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The configuration of every requester ([`Ledger`]), and by which tables.

use std::collections::BTreeMap;

use bitfield_struct::bitfield;

use super::host_side::{
    DomainTag, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdNested, VtdSecondStage,
};
use super::state::{FunctionState, PasidState, Translating};
use crate::runs::Runs;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::regs::Rtaddr;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::ledger::{Entries, Ledger};
use crate::viommu::Requester;

/// The configuration of a requester.
pub(super) type Given = crate::viommu::ledger::Given<RequesterConfig>;

/// All requesters and their configurations.
pub(super) type Requesters = Ledger<Functions>;

/// The requesters of one function.
#[derive(Debug, Clone, Default)]
struct Function {
    /// Requests without PASID; `None` before the first configuration.
    rid: Option<Given>,
    pasids: Runs<PackedGiven>,
}

/// The published state.
#[derive(Debug, Clone, Default)]
pub(super) struct Functions {
    translating: bool,
    root: Option<Rtaddr>,
    functions: BTreeMap<Bdf, Function>,
}

impl Entries for Functions {
    type Requester = Requester;
    type Decision = RequesterConfig;

    fn is_block(config: &RequesterConfig) -> bool {
        matches!(config.policy, Policy::Blocked(_))
    }

    fn get(&self, requester: Requester) -> Option<Given> {
        let function = self.functions.get(&requester.rid)?;
        match requester.pasid {
            None => function.rid,
            Some(pasid) => function.pasids.get(pasid.raw()).map(|given| given.of(pasid)),
        }
    }

    fn set(&mut self, requester: Requester, given: Given) {
        let Some(function) = self.functions.get_mut(&requester.rid) else { return };
        match requester.pasid {
            None => function.rid = Some(given),
            Some(pasid) => function.pasids.set(pasid.raw(), Some(PackedGiven::new(given))),
        }
    }

    fn unapply_all(&mut self) {
        for function in self.functions.values_mut() {
            function.rid.iter_mut().for_each(|given| given.applied = false);
            function.pasids.for_each_value(|given| *given = given.unapplied());
        }
    }
}

/// The state needed to explain a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Standing {
    /// Translation is enabled, or is being enabled.
    pub translating: bool,
    /// The root table in use.
    pub root: Option<Rtaddr>,
    /// The configuration of the requester; `None` for a PASID without a present table entry.
    pub given: Option<Given>,
}

impl Requesters {
    /// Adds a function without configuration; `false` if it exists already.
    pub fn add(&self, rid: Bdf) -> bool {
        let mut published = self.write();
        let absent = !published.functions.contains_key(&rid);
        published.functions.entry(rid).or_default();
        absent
    }

    /// Removes a function, and returns its configured PASIDs; `None` if it does not exist.
    pub fn remove(&self, rid: Bdf) -> Option<GivenPasids> {
        let function = self.write().functions.remove(&rid)?;
        Some(GivenPasids { rid, pasids: function.pasids })
    }

    /// Every function, in ascending order.
    pub fn functions(&self) -> Vec<Bdf> {
        self.read().functions.keys().copied().collect()
    }

    /// Their part of a snapshot.
    pub fn snapshot(&self) -> (Translating, Vec<FunctionState>) {
        let published = self.read();
        let pasids = |function: &Function| -> Vec<_> {
            let runs = function.pasids.ranges().filter_map(|(pasids, given)| {
                let (first, last) = pasids.into_inner();
                let decision = given.of(Pasid::new(first)?).into();
                Some(PasidState { first, last, decision })
            });
            runs.collect()
        };
        let functions = published.functions.iter().map(|(&rid, function)| FunctionState {
            rid,
            decision: function.rid.map(Into::into),
            pasids: pasids(function),
        });
        let Functions { translating: enabled, root, .. } = *published;
        (Translating { enabled, root }, functions.collect())
    }

    /// Whether `rid` is a function of this unit.
    pub fn contains(&self, rid: Bdf) -> bool {
        self.read().functions.contains_key(&rid)
    }

    /// The first function from `rid`.
    pub fn function_from(&self, rid: Bdf) -> Option<Bdf> {
        self.read().functions.range(rid..).next().map(|(rid, _)| *rid)
    }

    /// The first configured PASID of `rid` from `pasid`.
    pub fn pasid_from(&self, rid: Bdf, pasid: u32) -> Option<Pasid> {
        Pasid::new(self.read().functions.get(&rid)?.pasids.next(pasid)?)
    }

    /// The number of entries stored for the PASIDs of `rid`.
    #[cfg(test)]
    pub(crate) fn kept(&self, rid: Bdf) -> usize {
        self.read().functions.get(&rid).map_or(0, |function| function.pasids.runs())
    }

    /// From now on faults are explained by the tables at `root`, or not at all.
    pub fn set_translating(&self, translating: bool, root: Option<Rtaddr>) {
        let mut published = self.write();
        published.translating = translating;
        published.root = root;
    }

    /// The state needed to explain a fault of `requester`; `None` if it is not a function of this
    /// unit.
    pub fn standing(&self, requester: Requester) -> Option<Standing> {
        let published = self.read();
        published.functions.get(&requester.rid)?;
        Some(Standing {
            translating: published.translating,
            root: published.root,
            given: published.get(requester),
        })
    }

    /// Removes the configuration of one PASID.
    pub fn forget_pasid(&self, rid: Bdf, pasid: Pasid) {
        if let Some(function) = self.write().functions.get_mut(&rid) {
            function.pasids.set(pasid.raw(), None);
        }
    }

    /// Whether translation is enabled, or a failed attempt to enable it was not undone.
    pub fn is_translating(&self) -> bool {
        self.read().translating
    }
}

/// Whether the configuration of `pasid` can be stored as it is: its tables are at page boundaries
/// below 2^52, and the tag is its own.
pub(super) fn can_keep(pasid: Pasid, given: Given) -> bool {
    PackedGiven::new(given).of(pasid) == given
}

/// Configured PASIDs of a removed function.
#[derive(Debug)]
pub(super) struct GivenPasids {
    rid: Bdf,
    pasids: Runs<PackedGiven>,
}

impl GivenPasids {
    /// The first of them from `pasid`.
    pub fn from(&self, pasid: u32) -> Option<Requester> {
        let pasid = Pasid::new(self.pasids.next(pasid)?);
        Some(Requester { rid: self.rid, pasid })
    }
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

/// Everything but the domain.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Word {
    /// The page of the top table.
    #[bits(40)]
    page: u64,
    #[bits(3)]
    kind: Kind,
    /// FSPM.
    #[bits(2)]
    width: u8,
    supervisor_requests: bool,
    write_protect: bool,
    extended_accessed: bool,
    fault_disabled: bool,
    applied: bool,
    /// Fault reason.
    reason: u8,
    #[bits(6)]
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
}

/// A second stage, alone or below a first one.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct SecondWord {
    /// The page of the top table.
    #[bits(40)]
    page: u64,
    /// AW.
    #[bits(2)]
    width: u8,
    accessed_dirty: bool,
    #[bits(21)]
    __: u32,
}

impl SecondWord {
    fn of(tables: VtdSecondStage) -> Self {
        Self::new()
            .with_page(page(tables.table))
            .with_width(tables.address_width.into_bits())
            .with_accessed_dirty(tables.accessed_dirty)
    }

    fn tables(self) -> VtdSecondStage {
        VtdSecondStage {
            table: self.page() << PAGE_SHIFT,
            // Never reserved where it matters, as above.
            address_width: AddressWidth::from_bits(self.width()).unwrap_or(AddressWidth::Bits39),
            accessed_dirty: self.accessed_dirty(),
        }
    }
}

/// A [`Given`] of a request with PASID, whose tag has that PASID, in a few bytes: there may be 2^20
/// of them behind each function.
// Packed: its alignment would cost another four bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(Rust, packed(4))]
struct PackedGiven {
    word: Word,
    second: SecondWord,
    domain: u16,
}

impl PackedGiven {
    fn new(given: Given) -> Self {
        let Given { decision: RequesterConfig { policy, tag, fault_disabled }, applied } = given;
        let word = Word::new().with_fault_disabled(fault_disabled).with_applied(applied);
        let (word, second) = match policy {
            Policy::Blocked(reason) => {
                (word.with_kind(Kind::Blocked).with_reason(reason.code()), None)
            }
            Policy::Bypass => (word.with_kind(Kind::Bypass), None),
            Policy::Stage1(Stage1::VtdFirstStage(first)) => {
                (word.with_kind(Kind::FirstStage).with_first(first), None)
            }
            Policy::Stage1(Stage1::VtdSecondStage(second)) => {
                (word.with_kind(Kind::SecondStage), Some(second))
            }
            Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })) => {
                (word.with_kind(Kind::Nested).with_first(first), Some(second))
            }
        };
        let second = second.map_or(SecondWord::new(), SecondWord::of);
        Self { word, second, domain: tag.domain }
    }

    /// The configuration of `pasid`.
    fn of(self, pasid: Pasid) -> Given {
        let Self { word, second, domain } = self;
        let reason = FaultReason::from_code(word.reason()).unwrap_or(UNKNOWN);
        let policy = match word.kind() {
            Kind::Bypass => Policy::Bypass,
            Kind::FirstStage => Policy::Stage1(Stage1::VtdFirstStage(word.first())),
            Kind::SecondStage => Policy::Stage1(Stage1::VtdSecondStage(second.tables())),
            Kind::Nested => Policy::Stage1(Stage1::VtdNested(VtdNested {
                first: word.first(),
                second: second.tables(),
            })),
            Kind::Blocked => Policy::Blocked(reason),
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
            let packed = PackedGiven::new(given);
            prop_assert_eq!(packed.of(pasid), given);
            let unapplied = Given { applied: false, ..given };
            prop_assert_eq!(packed.unapplied().of(pasid), unapplied);
        }
    }

    #[test]
    fn it_is_small() {
        assert_eq!((size_of::<PackedGiven>(), align_of::<PackedGiven>()), (20, 4));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! From the guest's tables to the policy of a requester. Pure functions.
//!
//! If several things are wrong with the tables, the guest is told of the one that the translation
//! process (§3.4, §6.2.2, §7.1.3) meets first. Only what holds for every request of a requester is
//! decided here; what depends on the request (rights, privilege) is up to the translation.

mod legacy;
mod scalable;

use super::config::Capabilities;
use super::host_side::{
    DomainTag, Policy, RequesterConfig, Stage1, VtdFirstStage, VtdNested, VtdSecondStage,
};
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::regs::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::{above_width, HOST_ADDRESS_WIDTH, PAGE_SHIFT};
use crate::viommu::{BadAddress, Requester, TableMemory};
use scalable::{PasidTable, PasidTables};

/// The inputs of the decision: guest memory, the unit's features, and the root table as latched by
/// SRTP.
#[derive(Clone, Copy)]
pub(super) struct Tables<'a> {
    pub memory: &'a dyn TableMemory,
    pub caps: &'a Capabilities,
    /// `None` until the guest sets a root table.
    pub root: Option<Rtaddr>,
}

/// Why a requester is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocked {
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
struct Served {
    /// The guest-owned tables, or `None` for pass-through.
    stage1: Option<Stage1>,
    tag: DomainTag,
    fault_disabled: bool,
}

/// What the tables say about a request with PASID.
#[derive(Debug, Clone, Copy)]
pub(super) struct PasidConfig {
    pub config: RequesterConfig,
    /// An entry in the PASID table says that: a present one, or one with FPD that is not present.
    ///
    /// Only that is remembered of a PASID. Whatever else blocks it (a context or directory entry,
    /// or the lack of any) does so for all the PASIDs that its function does not have, too: these
    /// would be more than the unit offers, and a guest would fill memory with them.
    ///
    /// An entry with FPD that is not present stays remembered until an invalidation names it.
    /// Linux leaves such entries behind where it takes a PASID away before its device is done, and
    /// since December 2024 (`intel_pasid_tear_down_entry`) it clears them later without one, even
    /// with caching mode. Stray DMA of that PASID then stays unrecorded until the PASID is used
    /// again, as it may (§6.1): it is blocked all the same.
    pub has_entry: bool,
}

impl PasidConfig {
    /// That of a PASID without an entry.
    pub fn without_entry(requester: Requester, blocked: Blocked) -> Self {
        Self { config: blocked_config(requester, blocked), has_entry: false }
    }
}

impl Tables<'_> {
    /// The configuration for `requester`'s untranslated requests.
    pub fn config(&self, requester: Requester) -> RequesterConfig {
        let served = self.root().and_then(|root| match root.mode() {
            TranslationTableMode::Scalable => scalable::serve(self, root, requester),
            _ => legacy::serve(self, root, requester),
        });
        to_config(requester, served)
    }

    /// The configuration for `requester`, which has a PASID, and whether it has an entry; by one
    /// read of the tables.
    pub fn pasid_config(&self, requester: Requester) -> PasidConfig {
        let of_entry = self.root().and_then(|root| match root.mode() {
            TranslationTableMode::Scalable => scalable::entry(self, root, requester),
            // Legacy mode blocks them all.
            _ => legacy::serve(self, root, requester).map(Ok),
        });
        match of_entry {
            Ok(said) => PasidConfig { config: to_config(requester, said), has_entry: true },
            Err(blocked) => PasidConfig::without_entry(requester, blocked),
        }
    }

    /// The configuration for `requester`, whose PASID has none of its own: it had no entry in the
    /// sense of [`PasidConfig::has_entry`] when the tables were last read. Tables that would serve
    /// it by now do not yet.
    ///
    /// Why it had none is not known any more. If the way to an entry was missing then (a directory
    /// entry, say), and the guest has made it since without telling, the reason is still that of an
    /// entry that is not present: one that no unit would give, which would have met the way as it
    /// was or as it is.
    pub fn config_without_entry(&self, requester: Requester) -> RequesterConfig {
        let now = self.config(requester);
        match (now.policy, self.root()) {
            (Policy::Blocked(_), _) | (_, Err(_)) => now,
            (_, Ok(root)) => {
                blocked_config(requester, scalable::without_entry(self, root, requester))
            }
        }
    }

    /// The PASID tables of `rid`; `None` if its requests have no PASID.
    ///
    /// PASID 0 cannot be configured separately: hosts use it for the requests without PASID, so
    /// that it cannot be attached apart from its requester.
    pub fn pasid_tables(&self, rid: Bdf) -> Option<PasidTables<'_>> {
        let root = self.root().ok().filter(|root| root.mode() == TranslationTableMode::Scalable)?;
        PasidTables::of(self, root, rid)
    }

    /// Whether page requests of `rid` are served: PRE of its context entry, which only scalable
    /// mode has.
    pub fn page_requests(&self, rid: Bdf) -> Result<(), Blocked> {
        let root = self.root()?;
        match root.mode() {
            TranslationTableMode::Scalable => scalable::page_requests(self, root, rid),
            _ => Err(Blocked::recorded(FaultReason::PageRequestInLegacyMode)),
        }
    }

    /// The latched root table, if its mode and address are valid.
    fn root(&self) -> Result<Rtaddr, Blocked> {
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
    fn is_beyond_width(&self, address: u64) -> bool {
        is_beyond_width(address)
    }

    /// The width of `aw`, if second-stage tables may have it.
    fn second_stage_width(&self, aw: u8) -> Option<AddressWidth> {
        AddressWidth::from_bits(aw).filter(|width| offers_width(self.caps, *width))
    }

    /// The width of the widest possible second-stage table.
    fn widest_second_stage(&self) -> Option<AddressWidth> {
        AddressWidth::ALL.into_iter().rfind(|width| offers_width(self.caps, *width))
    }

    /// `N` 64-bit words at `address`, each read atomically.
    fn words<const N: usize>(&self, address: u64) -> Result<[u64; N], BadAddress> {
        let mut words = [0; N];
        for (word, offset) in words.iter_mut().zip((0..).step_by(8)) {
            // Tables are page-aligned and below the address width, so the sum does not wrap.
            *word = self.memory.load_u64(address + offset)?;
        }
        Ok(words)
    }
}

/// Whether the table pointer `address` has bits beyond the unit's address width.
fn is_beyond_width(address: u64) -> bool {
    address & above_width(HOST_ADDRESS_WIDTH) != 0
}

/// Whether second-stage tables may have this width.
fn offers_width(caps: &Capabilities, width: AddressWidth) -> bool {
    caps.cap.sagaw() >> width.into_bits() & 1 != 0
}

/// Whether some tables of a guest lead to `policy` on a unit with `caps`.
pub(super) fn is_possible(policy: Policy, caps: &Capabilities) -> bool {
    let Capabilities { cap, ecap } = caps;
    let Policy::Stage1(stage1) = policy else { return true };
    let first_offered = |first: VtdFirstStage| {
        let not_offered = first.paging_mode == PagingMode::Level5 && !cap.fs5lp()
            || first.supervisor_requests && !ecap.srs()
            || first.extended_accessed && !ecap.eafs();
        ecap.fsts() && !not_offered
    };
    let second_offered = |second: VtdSecondStage| {
        offers_width(caps, second.address_width) && (!second.accessed_dirty || ecap.ssads())
    };
    let offered = match stage1 {
        Stage1::VtdFirstStage(first) => first_offered(first),
        Stage1::VtdSecondStage(second) => second_offered(second),
        Stage1::VtdNested(VtdNested { first, second }) => {
            ecap.nest() && first_offered(first) && second_offered(second)
        }
    };
    let usable = |table: u64| table.trailing_zeros() >= PAGE_SHIFT && !is_beyond_width(table);
    offered && stage1.tables().all(usable)
}

impl PasidTable<'_> {
    /// The configuration for requests of `requester`, whose PASID is in this table, if it has an
    /// entry in the sense of [`PasidConfig::has_entry`].
    pub fn config(&self, requester: Requester) -> Option<RequesterConfig> {
        Some(to_config(requester, self.entry(requester.pasid?).ok()?))
    }
}

fn to_config(requester: Requester, served: Result<Served, Blocked>) -> RequesterConfig {
    match served {
        Ok(Served { stage1, tag, fault_disabled }) => {
            let policy = stage1.map_or(Policy::Bypass, Policy::Stage1);
            RequesterConfig { policy, tag, fault_disabled }
        }
        Err(blocked) => blocked_config(requester, blocked),
    }
}

/// The configuration of a blocked requester.
pub(super) fn blocked_config(requester: Requester, blocked: Blocked) -> RequesterConfig {
    let Blocked { reason, fault_disabled } = blocked;
    RequesterConfig {
        policy: Policy::Blocked(reason),
        tag: DomainTag { domain: 0, pasid: requester.pasid.map_or(0, Pasid::raw) },
        fault_disabled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::viommu::vtd::config::VtdConfig;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    fn reason(caps: &Capabilities, root: Option<Rtaddr>, pasid: Option<u32>) -> u8 {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let tables = Tables { memory: &memory, caps, root };
        let pasid = pasid.and_then(Pasid::new);
        match tables.config(Requester { rid: Bdf::from_raw(0x20), pasid }).policy {
            Policy::Blocked(reason) => reason.code(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_impossible_root_table_address_blocks_everyone() {
        let caps = VtdConfig::default().capabilities().unwrap();
        assert_eq!(reason(&caps, None, None), 0x30);
        assert_eq!(reason(&caps, Some(Rtaddr::new().with_ttm(2)), None), 0x30);
        assert_eq!(reason(&caps, Some(Rtaddr::new().with_ttm(3)), None), 0x30);
        let beyond = Rtaddr::new().with_ttm(1).with_rta(1 << (52 - 12));
        assert_eq!(reason(&caps, Some(beyond), None), 0x30);
        let config = VtdConfig { scalable_mode: false, second_stage: true, ..Default::default() };
        let caps = config.capabilities().unwrap();
        assert_eq!(reason(&caps, Some(Rtaddr::new().with_ttm(1)), None), 0x30);
    }

    #[test]
    fn the_mode_chooses_the_tables() {
        let caps = VtdConfig::default().capabilities().unwrap();
        assert_eq!(reason(&caps, Some(Rtaddr::new()), None), 0x01);
        assert_eq!(reason(&caps, Some(Rtaddr::new()), Some(1)), 0x31);
        assert_eq!(reason(&caps, Some(Rtaddr::new().with_ttm(1)), None), 0x39);
        assert_eq!(reason(&caps, Some(Rtaddr::new().with_ttm(1)), Some(1)), 0x39);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Decisions from scalable-mode tables, and the reason for each possible error in them.

use super::*;
use crate::spec::vtd::regs::Rtaddr;
use crate::spec::vtd::root::AddressWidth;
use crate::viommu::vtd::host_side::{DomainTag, VtdFirstStage, VtdNested, VtdSecondStage};
use crate::viommu::vtd::policy::Tables;

/// Well-formed tables for [`RID`], to be corrupted.
struct Spoiled {
    config: VtdConfig,
    memory: GuestMemoryMmap,
    root: u64,
}

const ROOT_ENTRY: u64 = ROOT + 0x10;
const CONTEXT_ENTRY: u64 = CONTEXT + 0x100;
const ABOVE: u64 = 1 << 52;
const NO_MEMORY: u64 = 1 << 40;

impl Spoiled {
    fn new(config: VtdConfig) -> Self {
        let guest = Guest::new(VtdConfig::default());
        guest.write_tables();
        guest.write_pasid(5, 0x6000);
        Self { config, memory: guest.memory, root: ROOT }
    }

    fn with(self, address: u64, change: impl FnOnce(u64) -> u64) -> Self {
        let word: u64 = self.memory.read_obj(GuestAddress(address)).unwrap();
        self.memory.write_obj(change(word), GuestAddress(address)).unwrap();
        self
    }

    fn decide(&self, requester: Requester) -> RequesterConfig {
        let caps = self.config.capabilities().unwrap();
        let root = Some(Rtaddr::new().with_ttm(1).with_rta(self.root >> 12));
        Tables { memory: &self.memory, caps: &caps, root }.config(requester)
    }

    fn policy(&self) -> Policy {
        self.decide(Requester::rid(RID)).policy
    }
}

fn default_tables() -> Spoiled {
    Spoiled::new(VtdConfig::default())
}

#[test]
fn well_formed_tables_are_served() {
    let tables = default_tables();
    let config = tables.decide(Requester::rid(RID));
    assert_eq!(config.policy, first_stage(FIRST_STAGE));
    assert_eq!(config.tag, DomainTag { domain: DOMAIN, pasid: 0 });
    let config = tables.decide(with_pasid(5));
    assert_eq!(config.policy, first_stage(0x6000));
    assert_eq!(config.tag, DomainTag { domain: DOMAIN, pasid: 5 });
    // RID_PASID selects the entry of requests without PASID.
    let config = tables.with(CONTEXT_ENTRY + 8, |_| 5).decide(Requester::rid(RID));
    assert_eq!(config.policy, first_stage(0x6000));
    assert_eq!(config.tag, DomainTag { domain: DOMAIN, pasid: 5 });
}

#[test]
fn functions_from_0x80_on_are_in_the_upper_half() {
    let tables = default_tables().with(ROOT_ENTRY + 8, |_| 0x6001);
    tables.memory.write_obj(DIRECTORY | 1, GuestAddress(0x6000)).unwrap();
    let config = tables.decide(Requester::rid(UPPER_RID));
    assert_eq!(config.policy, first_stage(FIRST_STAGE));
    let lower_gone = tables.with(ROOT_ENTRY, |_| 0);
    assert_eq!(lower_gone.policy(), blocked(0x39));
    assert_eq!(lower_gone.decide(Requester::rid(UPPER_RID)).policy, first_stage(FIRST_STAGE));
}

#[test]
fn each_check_has_its_reason() {
    // Address of a word, bits to flip in it, reason.
    let cases: &[(u64, u64, u8)] = &[
        (ROOT_ENTRY, 1, 0x39),
        (ROOT_ENTRY, 2, 0x3a),
        (ROOT_ENTRY, ABOVE, 0x3a),
        (ROOT_ENTRY, NO_MEMORY, 0x40),
        (CONTEXT_ENTRY, 1, 0x41),
        (CONTEXT_ENTRY, 1 << 5, 0x42),
        (CONTEXT_ENTRY, 1 << 8, 0x42),
        (CONTEXT_ENTRY, ABOVE, 0x42),
        (CONTEXT_ENTRY + 8, 1 << 21, 0x42),
        (CONTEXT_ENTRY + 16, 1, 0x42),
        (CONTEXT_ENTRY + 24, 1 << 63, 0x42),
        // DTE, PRE and RID_PRIV, not offered.
        (CONTEXT_ENTRY, 1 << 2, 0x42),
        (CONTEXT_ENTRY, 1 << 4, 0x42),
        (CONTEXT_ENTRY + 8, 1 << 20, 0x42),
        // RID_PASID beyond 2^13 (PDTS 0).
        (CONTEXT_ENTRY + 8, 1 << 13, 0x48),
        (CONTEXT_ENTRY, NO_MEMORY, 0x50),
        (DIRECTORY, 1, 0x51),
        (DIRECTORY, 4, 0x52),
        (DIRECTORY, ABOVE, 0x52),
        (DIRECTORY, NO_MEMORY, 0x58),
        (PASID_TABLE, 1, 0x59),
        (PASID_TABLE, 1 << 10, 0x5a),
        (PASID_TABLE + 8, 1 << 16, 0x5a),
        (PASID_TABLE + 16, 1 << 8, 0x5a),
        (PASID_TABLE + 16, ABOVE, 0x5a),
        (PASID_TABLE + 24, 1, 0x5a),
        (PASID_TABLE + 56, 1, 0x5a),
        // SSEE, SSADE and ERE, not offered.
        (PASID_TABLE, 1 << 5, 0x5a),
        (PASID_TABLE, 1 << 9, 0x5a),
        (PASID_TABLE + 16, 2, 0x5a),
        // PGTT reserved (000, 101), second-stage and nested not offered; FSPM 5-level, reserved.
        (PASID_TABLE, 1 << 6, 0x5b),
        (PASID_TABLE, 1 << 8, 0x5b),
        (PASID_TABLE, 3 << 6, 0x5b),
        (PASID_TABLE, 2 << 6, 0x5b),
        (PASID_TABLE + 16, 1 << 2, 0x5b),
        (PASID_TABLE + 16, 2 << 2, 0x5b),
    ];
    for &(address, bits, reason) in cases {
        let tables = default_tables().with(address, |word| word ^ bits);
        assert_eq!(tables.policy(), blocked(reason), "{address:#x} {bits:#x}");
    }
    let outside = Spoiled { root: NO_MEMORY, ..default_tables() };
    assert_eq!(outside.policy(), blocked(0x38));
}

#[test]
fn the_first_thing_that_is_wrong_is_told() {
    let tables = default_tables()
        .with(PASID_TABLE, |word| word ^ (1 << 10 | 1 << 6))
        .with(PASID_TABLE + 16, |word| word | 3 << 2);
    assert_eq!(tables.policy(), blocked(0x5a));
    let tables = tables.with(DIRECTORY, |word| word | 4);
    assert_eq!(tables.policy(), blocked(0x52));
    let tables = tables.with(CONTEXT_ENTRY + 8, |_| 1 << 13 | 1 << 21);
    assert_eq!(tables.policy(), blocked(0x42));
    let tables = tables.with(ROOT_ENTRY, |word| (word & !1) | 2);
    assert_eq!(tables.policy(), blocked(0x39));
}

#[test]
fn requests_with_pasid_have_checks_of_their_own() {
    let tables = Spoiled::new(VtdConfig { pasid_bits: Some(20), ..Default::default() });
    assert_eq!(tables.decide(with_pasid(1 << 13)).policy, blocked(0x46));
    assert_eq!(tables.decide(with_pasid((1 << 13) - 1)).policy, blocked(0x51));
    // The directory has more than the unit offers.
    let narrow = Spoiled::new(VtdConfig { pasid_bits: Some(3), ..Default::default() });
    assert_eq!(narrow.decide(with_pasid(8)).policy, blocked(0x46));
    assert_eq!(narrow.decide(with_pasid(5)).policy, first_stage(0x6000));
    let off = tables.with(CONTEXT_ENTRY, |word| word & !(1 << 3));
    assert_eq!(off.decide(with_pasid(5)).policy, blocked(0x45));
    assert_eq!(off.policy(), first_stage(FIRST_STAGE));
    // PASIDE without PASIDs offered.
    let none = Spoiled::new(VtdConfig { pasid_bits: Some(0), ..Default::default() });
    assert_eq!(none.policy(), blocked(0x42));
}

#[test]
fn fpd_of_any_entry_on_the_way_counts() {
    for address in [CONTEXT_ENTRY, DIRECTORY, PASID_TABLE] {
        let tables = default_tables().with(address, |word| word | 2);
        let config = tables.decide(Requester::rid(RID));
        assert_eq!((config.policy, config.fault_disabled), (first_stage(FIRST_STAGE), true));
        // Even if it is not present.
        let tables = tables.with(address, |word| word & !1);
        let config = tables.decide(Requester::rid(RID));
        assert!(matches!(config.policy, Policy::Blocked(_)), "{address:#x}");
        assert!(config.fault_disabled, "{address:#x}");
    }
    // After the wrong entry, it does not count.
    let tables =
        default_tables().with(DIRECTORY, |word| word | 4).with(PASID_TABLE, |word| word | 2);
    assert_eq!(tables.policy(), blocked(0x52));
}

#[test]
fn fields_of_the_entry_reach_the_policy() {
    let tables = default_tables().with(PASID_TABLE + 16, |word| word | 1 << 7 | 1 << 4 | 1);
    let expected = VtdFirstStage {
        table: FIRST_STAGE,
        paging_mode: PagingMode::Level4,
        supervisor_requests: true,
        write_protect: true,
        extended_accessed: true,
    };
    assert_eq!(tables.policy(), Policy::Stage1(Stage1::VtdFirstStage(expected)));
    let config = VtdConfig { address_width: 57, ..Default::default() };
    let tables = Spoiled::new(config).with(PASID_TABLE + 16, |word| word | 1 << 2);
    let Policy::Stage1(Stage1::VtdFirstStage(five_level)) = tables.policy() else { panic!() };
    assert_eq!(five_level.paging_mode, PagingMode::Level5);
    let pass_through = default_tables().with(PASID_TABLE, |_| 4 << 6 | 1);
    assert_eq!(pass_through.policy(), Policy::Bypass);
}

#[test]
fn fields_of_what_is_not_offered_are_reserved() {
    let without = VtdConfig {
        supervisor_requests: false,
        extended_accessed: false,
        snoop_control: false,
        ..Default::default()
    };
    for (offset, bit) in [(8, 1 << 24), (16, 1), (16, 1 << 7)] {
        let address = PASID_TABLE + offset;
        let offered = default_tables().with(address, |word| word | bit).policy();
        assert!(matches!(offered, Policy::Stage1(_)), "{offset} {bit:#x}");
        let tables = Spoiled::new(without.clone()).with(address, |word| word | bit);
        assert_eq!(tables.policy(), blocked(0x5a), "{offset} {bit:#x}");
    }
}

#[test]
fn second_stage_tables_where_they_are_offered() {
    let config = VtdConfig { second_stage: true, ..Default::default() };
    let tables = Spoiled::new(config).with(PASID_TABLE, |_| 0x6000 | 2 << 6 | 2 << 2 | 1);
    let expected = VtdSecondStage {
        table: 0x6000,
        address_width: AddressWidth::Bits48,
        accessed_dirty: false,
    };
    assert_eq!(tables.policy(), Policy::Stage1(Stage1::VtdSecondStage(expected)));
    let wide = tables.with(PASID_TABLE, |word| word | 1 << 2);
    assert_eq!(wide.policy(), blocked(0x5b));
    let beyond = wide.with(PASID_TABLE, |word| word | ABOVE);
    assert_eq!(beyond.policy(), blocked(0x5a));
    let nested = beyond.with(PASID_TABLE, |_| 0x6000 | 3 << 6 | 2 << 2 | 1);
    assert_eq!(nested.policy(), blocked(0x5b));
}

/// A unit that nests, whose tables at 0x6000 are the second stage of what [`default_tables`] has as
/// its only one.
fn nested_tables(config: VtdConfig) -> Spoiled {
    let config = VtdConfig { second_stage: true, nest: true, ..config };
    Spoiled::new(config).with(PASID_TABLE, |_| 0x6000 | 3 << 6 | 2 << 2 | 1)
}

fn nested(accessed_dirty: bool) -> Policy {
    let Policy::Stage1(Stage1::VtdFirstStage(first)) = first_stage(FIRST_STAGE) else { panic!() };
    let address_width = AddressWidth::Bits48;
    let second = VtdSecondStage { table: 0x6000, address_width, accessed_dirty };
    Policy::Stage1(Stage1::VtdNested(VtdNested { first, second }))
}

#[test]
fn nested_tables_where_they_are_offered() {
    let config = nested_tables(VtdConfig::default()).decide(Requester::rid(RID));
    assert_eq!(config.policy, nested(false));
    assert_eq!(config.tag, DomainTag { domain: DOMAIN, pasid: 0 });
    // SRE, WPE and EAFE; FSPM of 5 levels, AW of 3: each stage has a width of its own.
    let wide = nested_tables(VtdConfig { address_width: 57, ..Default::default() })
        .with(PASID_TABLE, |word| word ^ 3 << 2)
        .with(PASID_TABLE + 16, |word| word | 1 << 7 | 1 << 4 | 1 << 2 | 1);
    let Policy::Stage1(Stage1::VtdNested(VtdNested { first, second })) = wide.policy() else {
        panic!("{:?}", wide.policy())
    };
    assert_eq!(
        (first.paging_mode, second.address_width),
        (PagingMode::Level5, AddressWidth::Bits39)
    );
    assert!(first.supervisor_requests && first.write_protect && first.extended_accessed);
}

#[test]
fn each_check_of_a_nested_entry_has_its_reason() {
    let cases: &[(u64, u64, u8)] = &[
        // Reserved fields, and those of features that are not offered: SSEE, ERE.
        (PASID_TABLE, 1 << 10, 0x5a),
        (PASID_TABLE + 8, 1 << 16, 0x5a),
        (PASID_TABLE + 16, 1 << 8, 0x5a),
        (PASID_TABLE + 24, 1, 0x5a),
        (PASID_TABLE + 56, 1 << 63, 0x5a),
        (PASID_TABLE, 1 << 5, 0x5a),
        (PASID_TABLE + 16, 2, 0x5a),
        // Both pointers.
        (PASID_TABLE, ABOVE, 0x5a),
        (PASID_TABLE + 16, ABOVE, 0x5a),
        // AW of 57 bits, 30 and a reserved one; FSPM of 5 levels, and a reserved one.
        (PASID_TABLE, 1 << 2, 0x5b),
        (PASID_TABLE, 2 << 2, 0x5b),
        (PASID_TABLE, 4 << 2, 0x5b),
        (PASID_TABLE + 16, 1 << 2, 0x5b),
        (PASID_TABLE + 16, 2 << 2, 0x5b),
    ];
    for &(address, bits, reason) in cases {
        let tables = nested_tables(VtdConfig::default()).with(address, |word| word ^ bits);
        assert_eq!(tables.policy(), blocked(reason), "{address:#x} {bits:#x}");
    }
    // A unit of either stage alone, or of both, that does not nest.
    for (second_stage, entry) in [(false, 0x5b), (true, 0x5b)] {
        let tables = nested_tables(VtdConfig::default());
        let config = VtdConfig { second_stage, ..Default::default() };
        assert_eq!(Spoiled { config, ..tables }.policy(), blocked(entry), "{second_stage}");
    }
}

#[test]
fn second_stage_flags_are_kept_where_they_are_offered() {
    const SSADE: u64 = 1 << 9;
    let flags = |tables: Spoiled| tables.with(PASID_TABLE, |word| word | SSADE).policy();
    let nesting = || nested_tables(VtdConfig::default());
    assert_eq!(flags(nesting()), nested(true));
    let second = nesting().with(PASID_TABLE, |word| word ^ (2 ^ 3) << 6);
    let Policy::Stage1(Stage1::VtdSecondStage(second)) = flags(second) else { panic!() };
    assert!(second.accessed_dirty);
    // Without a second stage the bit has no effect.
    let first = nesting().with(PASID_TABLE, |word| word ^ (1 ^ 3) << 6);
    assert_eq!(flags(first), first_stage(FIRST_STAGE));
    // Not offered: walks that do not snoop, and a unit that does not nest.
    let without = VtdConfig { coherent_walks: false, ..Default::default() };
    assert_eq!(flags(nested_tables(without)), blocked(0x5a));
    let config = VtdConfig { second_stage: true, ..Default::default() };
    assert_eq!(flags(Spoiled { config, ..nesting() }), blocked(0x5a));
}

#[test]
fn pasids_are_found_in_order_and_within_what_is_offered() {
    let tables = default_tables();
    // The same table in the second directory entry: PASID 69 is an alias of 5.
    tables.memory.write_obj(PASID_TABLE | 1, GuestAddress(DIRECTORY + 8)).unwrap();
    tables.memory.write_obj(1u64, GuestAddress(PASID_TABLE + 64 * 7)).unwrap();
    let find = |config: &VtdConfig| {
        let caps = config.capabilities().unwrap();
        let root = Some(Rtaddr::new().with_ttm(1).with_rta(ROOT >> 12));
        let tables = Tables { memory: &tables.memory, caps: &caps, root };
        let reached = tables.pasid_tables(RID).unwrap();
        let found: Vec<_> = (1..reached.pasids())
            .filter_map(|pasid| {
                let config = reached.table(pasid)?.config(with_pasid(pasid))?;
                Some((pasid, config.policy))
            })
            .collect();
        found
    };
    let served = first_stage(0x6000);
    let expected = [
        (5, served),
        (7, blocked(0x5b)),
        // PASID 64 is an alias of 0.
        (64, first_stage(FIRST_STAGE)),
        (69, served),
        (71, blocked(0x5b)),
    ];
    assert_eq!(find(&VtdConfig::default()), expected);
    let narrow = VtdConfig { pasid_bits: Some(3), ..Default::default() };
    assert_eq!(find(&narrow), expected[..2]);
}

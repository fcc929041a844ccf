// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables mirrored into IOASes, as on a host that cannot nest: the same guarantees, and
//! those that only mirrors need.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::IotlbScope;
use twostage_emulated::{ObjectKind, VtdUnitConfig};

use super::guest::{Completion, Entry};
use super::machine::{vtd_config, MachineOf};
use super::{iotlb, pages, pasid_pages};
use crate::common::{reads_are_fresh, A, B, PAGE};
use crate::conformance::{IOVA, NAME};

type Machine = MachineOf<true>;

crate::conformance::conformance! { Machine, mirrored }

mod second_stage {
    use super::super::machine::{MachineOf, SECOND_STAGE};

    type Machine = MachineOf<true, SECOND_STAGE>;

    crate::conformance::conformance! { Machine, mirrored }
}

mod legacy {
    use super::super::machine::{MachineOf, LEGACY};

    type Machine = MachineOf<true, LEGACY>;

    crate::conformance::conformance! { Machine, mirrored }
}

#[test]
fn devices_with_the_same_tables_share_one_mirror_whose_memory_is_pinned_once() {
    let machine = Machine::new();
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 1, true);
    guest.store(page, 7);
    let before = machine.graph().pinned_bytes;
    for (rid, pasid) in [(A, 0), (B, 0), (B, 5)] {
        guest.set_entry(rid, pasid, Entry::FirstStage { table, domain: NAME });
    }
    guest.enable();
    for (rid, pasid) in [(A, None), (B, None), (B, Some(5))] {
        assert_eq!(machine.read(rid, pasid, IOVA), Ok(7));
    }
    assert!(machine.read(A, Some(5), IOVA).is_err());
    let graph = machine.graph();
    assert_eq!(graph.of_kind(ObjectKind::Ioas).count(), 2, "{graph}");
    assert_eq!(graph.of_kind(ObjectKind::HwptNested).count(), 0, "{graph}");
    assert_eq!(graph.pinned_bytes, before, "{graph}");
    assert_eq!(machine.nesting.counters().mirrors, 1);
    let why = machine.nesting.mirrors_because();
    assert_eq!(why.as_deref(), Some("nesting=off was requested"));
    assert_eq!(machine.end(), 0);
}

#[test]
fn second_stage_tables_are_mirrored_with_their_rights_and_reasons() {
    // The unit itself walks none.
    let unit = VtdUnitConfig::default().with_guest_second_stage(false);
    let machine = Machine::with(unit, vtd_config().with_second_stage(true));
    let guest = &machine.guest;
    let (table, page, other) = (guest.page(), guest.page(), guest.page());
    guest.map_second_stage(table, IOVA, page, true);
    guest.store(page, 1);
    guest.store(other, 2);
    guest.set_entry(A, 0, Entry::SecondStage { table, domain: NAME });
    guest.enable();
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    guest.map_second_stage(table, IOVA, other, false);
    let exact = iotlb(IotlbScope::Pages { domain: NAME, range: pages(IOVA, 0) });
    assert_eq!(machine.read(A, None, IOVA), Ok(1), "nobody has invalidated it");
    assert_eq!(guest.submit(&[exact]), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2));
    assert_eq!(guest.load(other), 2);
    for (write, iova, reason) in [
        (true, IOVA, FaultReason::SecondStageDenied),
        (false, IOVA + PAGE, FaultReason::SecondStageDenied),
        (false, 1 << 48, FaultReason::AddressBeyondGuest),
    ] {
        let failed = match write {
            true => machine.write(A, None, iova, 3).is_err(),
            false => machine.read(A, None, iova).is_err(),
        };
        let (record, told) = guest.take_fault().expect("the guest is told");
        assert!(failed && record.address() == iova & !0xfff, "{iova:#x}");
        assert_eq!(told, Some(reason));
    }
    assert_eq!(machine.end(), 0);
}

/// The reason is not that of what was before, which blocked it.
#[test]
fn a_table_with_too_much_is_told_as_a_fault_of_that_table() {
    let machine = Machine::with(VtdUnitConfig::default(), vtd_config().with_second_stage(true));
    let guest = &machine.guest;
    guest.enable();
    // A table that points to itself names 2^36 pages.
    let table = guest.page();
    (0..512).for_each(|number| guest.store(table + number * 8, table | 3));
    guest.set_entry(A, 0, Entry::SecondStage { table, domain: NAME });
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    let (record, told) = guest.take_fault().expect("the guest is told");
    assert_eq!(told, Some(FaultReason::SecondStageDenied), "{:#x}", record.address());
    assert!(machine.read(A, None, 0).is_err());
    while guest.take_fault().is_some() {}
    assert_eq!(machine.end(), 0);
}

#[test]
fn what_is_left_of_a_torn_page_is_reached_all_along() {
    let machine = Machine::new();
    let guest = &machine.guest;
    let table = guest.page();
    let from = guest.page();
    let all: Vec<_> = (1..256).map(|_| guest.page()).collect();
    assert_eq!(all.last(), Some(&(from + 255 * PAGE)), "pages of the test are adjacent");
    (0..256).for_each(|n| guest.map(table, n * PAGE, from + n * PAGE, 1, true));
    (0..256).for_each(|n| guest.store(from + n * PAGE, n));
    guest.set_entry(A, 0, Entry::FirstStage { table, domain: NAME });
    guest.enable();
    assert_eq!(machine.nesting.counters().mirror_pieces, 1);
    for n in 0..255 {
        guest.unmap(table, n * PAGE);
        let one = pasid_pages(NAME, 0, Some(pages(n * PAGE, 0)));
        assert_eq!(guest.submit(&[one]), Completion::Done);
        assert!(machine.read(A, None, n * PAGE).is_err());
        assert_eq!(machine.read(A, None, (n + 1) * PAGE), Ok(n + 1));
    }
    // Not one for each page.
    assert_eq!(machine.nesting.counters().mirror_rebuilds, 65);
    assert_eq!(machine.end(), 0);
}

/// Pages of the random test: their translations, by page, as GPA and whether it may be written.
type Table = BTreeMap<u64, (u64, bool)>;

/// What a device finds at a page, and whether it may write there.
fn reached(machine: &Machine, page: u64) -> Option<(u64, bool)> {
    let found = machine.read(A, None, page * PAGE).ok()?;
    Some((found, machine.write(A, None, page * PAGE, found).is_ok()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Tables that change at random, with invalidations of random ranges, against the same page by
    /// page: what was invalidated since it changed is exactly as the table has it.
    #[test]
    fn what_is_invalidated_is_as_the_table_has_it(
        edits in prop::collection::vec(
            (0..64u64, 1..24u64, prop::option::of((0..128u64, any::<bool>())), 0..64u64, 0..7u8),
            1..24,
        ),
    ) {
        let machine = Machine::with(VtdUnitConfig::default(), vtd_config().with_second_stage(true));
        let guest = &machine.guest;
        let table = guest.page();
        let memory: Vec<_> = (0..128).map(|_| guest.page()).collect();
        memory.iter().for_each(|page| guest.store(*page, *page));
        guest.set_entry(A, 0, Entry::SecondStage { table, domain: NAME });
        guest.enable();
        let (mut now, mut unsaid) = (Table::new(), BTreeSet::new());
        for (at, count, to, from, mask) in edits {
            for page in at..(at + count).min(64) {
                match to {
                    Some((to, write)) => {
                        let gpa = memory[((to + page) % 128) as usize];
                        guest.map_second_stage(table, page * PAGE, gpa, write);
                        now.insert(page, (gpa, write));
                    }
                    None if now.remove(&page).is_some() => guest.unmap(table, page * PAGE),
                    None => continue,
                }
                unsaid.insert(page);
            }
            let range = pages(from * PAGE, mask);
            let scope = match mask {
                6 => IotlbScope::Domain(NAME),
                _ => IotlbScope::Pages { domain: NAME, range },
            };
            prop_assert_eq!(guest.submit(&[iotlb(scope)]), Completion::Done);
            let first = from >> mask << mask;
            unsaid.retain(|page| mask < 6 && !(first..first + (1 << mask)).contains(page));
            for page in (0..64).filter(|page| !unsaid.contains(page)) {
                prop_assert_eq!(reached(&machine, page), now.get(&page).copied(), "{}", page);
            }
        }
        while guest.take_fault().is_some() {}
        prop_assert_eq!(machine.end(), 0);
    }
}

/// Both devices read without a pause while the guest maps, tears, unmaps and switches tables; a
/// page that stays mapped is found all along, and what was invalidated is not found any more.
#[test]
fn reads_are_fresh_and_never_fail_while_what_surrounds_them_changes() {
    let machine = Machine::new();
    let guest = &machine.guest;
    let tables = [guest.page(), guest.page()];
    let around: Vec<_> = (0..16).map(|_| guest.page()).collect();
    for table in tables {
        guest.map(table, IOVA + 16 * PAGE, guest.page(), 1, true);
    }
    guest.set_entry(A, 0, Entry::FirstStage { table: tables[0], domain: NAME });
    guest.set_entry(B, 0, Entry::FirstStage { table: tables[0], domain: NAME });
    guest.enable();
    let all = || guest.submit(&[iotlb(IotlbScope::Domain(NAME))]);
    reads_are_fresh(&machine.memory, [A, B].map(|rid| machine.port(rid)), IOVA, |round, page| {
        // The page itself leads elsewhere, in both tables; B goes from one table to the other.
        tables.iter().for_each(|table| guest.map(*table, IOVA, page, 1, true));
        // Its neighbours come as one piece, go one by one, and come back.
        for (n, neighbour) in (1..).zip(&around) {
            match (round + n) % 3 {
                0 => guest.unmap(tables[0], IOVA + n * PAGE),
                _ => guest.map(tables[0], IOVA + n * PAGE, *neighbour, 1, round % 2 == 0),
            }
        }
        let invalidation = match round % 3 {
            0 => pasid_pages(NAME, 0, None),
            1 => pasid_pages(NAME, 0, Some(pages(IOVA, 5))),
            _ => iotlb(IotlbScope::Domain(NAME)),
        };
        assert_eq!(guest.submit(&[invalidation]), Completion::Done);
        if round % 4 == 0 {
            let table = tables[(round / 4 % 2) as usize];
            guest.set_entry(B, 0, Entry::FirstStage { table, domain: NAME });
            assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        }
    });
    assert_eq!(all(), Completion::Done);
    assert!(machine.nesting.counters().mirror_rebuilds > 100);
    assert_eq!(machine.end(), 0);
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables mirrored into IOASes, as on a host that cannot nest: the same guarantees, and
//! those that only mirrors need.

use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::IotlbScope;
use twostage_emulated::{ObjectKind, VtdUnitConfig};

use super::guest::{Completion, Entry};
use super::machine::{vtd_config, MachineOf};
use super::{iotlb, pages, pasid_pages};
use crate::common::{A, B, PAGE};
use crate::conformance::{IOVA, NAME};

type Machine = MachineOf<true>;

// Without those that count calls of nesting, or use its objects themselves.
crate::conformance::conformance! { Machine:
    large_pages_and_memory_above_4_gib
    before_translation_a_device_passes
    without_tables_a_device_is_blocked_from_the_moment_of_enabling
    bypass_is_a_decision
    a_changed_leaf_is_stale_before_the_invalidation_and_new_after
    faults_reach_the_guest
    changed_tables_count_from_their_flush_on
    an_invalidation_that_fails_once_is_made_good
    an_invalidation_that_cannot_be_done_stops_the_queue_and_leaves_nothing_stale
    a_device_that_comes_while_translation_is_enabled_is_blocked_all_along
    memory_that_is_taken_away_is_not_reached_any_more
    faults_and_invalidations_do_not_wait_for_each_other
    every_host_call_fails_in_turn
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is cached of a first stage over a second stage stays until it is invalidated, by addresses
//! of the one or the other, and no longer.

use super::nested::{host, own, Guest, IOVA, LOWER, PAGE, RW_SECOND};
use super::*;

/// Another page than [`HIGH`].
const OTHER: u64 = HIGH + (4 << 20);

/// [`Guest::small`] with a word in each page, and one more page in the second stage's tables.
fn filled() -> Guest {
    let guest = Guest::small();
    guest.map_second(PAGE + 0x1000, 1, OTHER);
    guest.poke(HIGH, 1);
    guest.poke(OTHER, 2);
    guest
}

fn pages(address: u64, pages: u64, leaf: bool) -> CacheRange {
    CacheRange::Pages(PageRange::new(address, pages, leaf))
}

#[test]
fn a_changed_first_stage_is_stale_until_its_invalidation() {
    for range in [page(IOVA, true), page(IOVA, false), pages(IOVA & !0xf_ffff, 256, true), ALL] {
        let guest = filled();
        let mut port = guest.port();
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        guest.map_first(IOVA, 1, PAGE + 0x1000, RW);
        // Other addresses, other tables, and the address that is the second stage's.
        guest.invalidate(1, page(IOVA + 0x1000, true));
        guest.invalidate(1, page(PAGE, false));
        guest.invalidate(2, range);
        guest.invalidate_second_stage(2, ALL);
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "{range:?}");
        guest.invalidate(1, range);
        assert_eq!(guest.read(&mut port, IOVA), Ok(2), "{range:?}");
    }
}

#[test]
fn a_changed_second_stage_is_stale_until_its_invalidation() {
    for range in [page(PAGE, true), page(PAGE, false), pages(PAGE & !0xf_ffff, 256, true), ALL] {
        let guest = filled();
        let mut port = guest.port();
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        guest.map_second(PAGE, 1, OTHER);
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "{range:?}");
        // Those of the first stage, at whatever address, leave the second stage cached; as do those
        // of other addresses.
        guest.invalidate(1, ALL);
        guest.invalidate(1, page(PAGE, false));
        guest.invalidate_second_stage(1, page(PAGE + 0x1000, false));
        guest.invalidate_second_stage(1, page(IOVA, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "{range:?}");
        guest.invalidate_second_stage(1, range);
        assert_eq!(guest.read(&mut port, IOVA), Ok(2), "{range:?}");
    }
}

#[test]
fn pages_that_are_left_take_no_other_walk_of_the_second_stage() {
    let guest = filled();
    guest.map_first(IOVA + 0x1000, 1, PAGE + 0x1000, RW);
    let mut port = guest.port();
    let mut walks = |iova| {
        let before = guest.unit.counters().walks;
        guest.read(&mut port, iova).unwrap();
        guest.unit.counters().walks - before
    };
    // Its own, those to four tables, and the one to the page.
    assert_eq!(walks(IOVA), 6);
    assert_eq!(walks(IOVA + 0x1000), 2);
    guest.invalidate(1, ALL);
    assert_eq!(walks(IOVA), 1);
    guest.invalidate_second_stage(1, page(PAGE, true));
    // That drops what both stages gave, and the page: not the second stage's of the tables.
    assert_eq!([walks(IOVA + 0x1000), walks(IOVA)], [1, 2]);
}

#[test]
fn a_first_stage_table_that_moves_is_stale_until_the_second_stage_is_invalidated() {
    for level in 1..=4 {
        let guest = filled();
        let mut port = guest.port();
        let address = guest.first_entry_address(IOVA, level);
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        // The same second-stage address, and another table there: it leads to another page.
        let moved = guest.table();
        for entry in 0..512 {
            guest.poke(moved + entry * 8, guest.peek((address & LOWER & !0xfff) + entry * 8));
        }
        let mut other = PAGE + 0x1000;
        for below in 1..level {
            let table = guest.first_table();
            guest.poke(
                (table & LOWER) + index(IOVA, below) * 8,
                other | if below == 1 { RW } else { TABLE },
            );
            other = table;
        }
        guest.poke(moved + (address & 0xfff), other | if level == 1 { RW } else { TABLE });
        guest.map_second(address, 1, moved);
        guest.invalidate(1, ALL);
        guest.invalidate_second_stage(1, page(PAGE, false));
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "level {level}");
        guest.invalidate_second_stage(1, page(address & !0xfff, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(2), "level {level}");
    }
}

#[test]
fn a_changed_second_stage_pointer_takes_more_than_leaves() {
    for level in 2..=4 {
        let guest = filled();
        let mut port = guest.port();
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        let root = guest.table();
        let leaf = guest.entry(root, 4, PAGE, 1, RW_SECOND);
        guest.poke(leaf, OTHER | RW_SECOND);
        let pointer = guest.peek(guest.entry(root, 4, PAGE, level, RW_SECOND));
        guest.poke(guest.second_entry(PAGE, level), pointer);
        guest.invalidate_second_stage(1, page(PAGE, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "level {level}");
        // Any page below the pointer will do, if it is not for leaves only.
        guest.invalidate_second_stage(1, page(PAGE + 0x3000, false));
        guest.invalidate_second_stage(1, page(PAGE, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(2), "level {level}");
    }
}

#[test]
fn first_stage_tables_stay_for_leaves_of_the_first_stage_and_go_with_any_of_the_second() {
    for level in 2..=4 {
        let guest = filled();
        let mut port = guest.port();
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        let mut table = PAGE + 0x1000;
        for below in 1..level {
            let next = guest.first_table();
            let bits = if below == 1 { RW } else { TABLE };
            guest.poke((next & LOWER) + index(IOVA, below) * 8, table | bits);
            table = next;
        }
        guest.poke(guest.first_entry(IOVA, level), table | TABLE);
        guest.invalidate(1, page(IOVA, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(1), "level {level}");
        guest.invalidate_second_stage(1, page(0x7000, true));
        assert_eq!(guest.read(&mut port, IOVA), Ok(2), "level {level}");
    }
}

#[test]
fn requesters_of_one_hwpt_share_its_second_stage_and_its_invalidations() {
    let guest = filled();
    let mut port = guest.port();
    for pasid in [1, 2] {
        guest.attach(Some(pasid), 1);
    }
    let who = [PLAIN, pasid(1), pasid(2)];
    assert_eq!(guest.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    guest.map_second(PAGE, 1, OTHER);
    // The first request of these two, to which the second stage's page is known.
    assert_eq!(who.map(|who| guest.read_u64(&mut port, who, IOVA)), [Ok(1); 3]);
    guest.invalidate_second_stage(1, page(PAGE, true));
    assert_eq!(who.map(|who| guest.read_u64(&mut port, who, IOVA)), [Ok(2); 3]);
    guest.map_first(IOVA, 1, READ_ONLY, RW);
    guest.map_second(READ_ONLY, 1, READ_ONLY);
    guest.invalidate(1, page(IOVA, true));
    assert_eq!(who.map(|who| guest.read_u64(&mut port, who, IOVA)), [Ok(0); 3]);
}

#[test]
fn nothing_of_either_stage_outlives_its_attachments_or_the_hosts_mapping() {
    let guest = filled();
    let mut port = guest.port();
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    // Replaced by other tables under another tag, and then back under the first.
    let second = SecondStage { root: guest.table(), ..guest.second };
    guest.attach_nested(None, 2, guest.first, second);
    let absent = own(FaultReason::FirstStageTopSecondStageDenied);
    assert_eq!(guest.read(&mut port, IOVA), absent);
    guest.map_second(PAGE, 1, OTHER);
    guest.attach(None, 1);
    assert_eq!(guest.read(&mut port, IOVA), Ok(2));
    guest.map_second(PAGE, 1, HIGH);
    guest.unit.remove(RID, None);
    guest.attach(None, 1);
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    // The host unmaps the page: what is cached of it, by all three stages, goes.
    guest.stage2.remove(HIGH).unwrap();
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    guest.unit.stage2_changed(&guest.stage2);
    assert_eq!(guest.read(&mut port, IOVA), host(FaultReason::SecondStageDenied));
}

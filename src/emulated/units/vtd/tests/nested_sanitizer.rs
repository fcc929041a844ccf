// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sanitizer sees through a first stage over a second stage.

use super::nested::{Guest, IOVA, LOWER, PAGE, RW_SECOND};
use super::*;
use crate::{DmaWay, InvalidatedPages, StaleUse, TlbInvalidation};

/// Another page than [`HIGH`].
const OTHER: u64 = HIGH + (4 << 20);

/// [`Guest::small`] with the sanitizer, and a word in each page.
fn guest() -> Guest {
    let guest = Guest::with(VtdUnitConfig::default().with_sanitize(true), false);
    guest.poke(HIGH, 1);
    guest.poke(OTHER, 2);
    guest
}

fn found(guest: &Guest) -> Vec<StaleUse> {
    guest.unit.sanitizer_report().unwrap().stale
}

fn one(guest: &Guest) -> StaleUse {
    let [stale] = found(guest)[..] else { panic!("one page: {:?}", found(guest)) };
    stale
}

fn range(address: u64, pages: u64, leaf: bool) -> InvalidatedPages {
    InvalidatedPages::Range { address, pages, leaf }
}

#[test]
fn a_stale_page_of_the_second_stage_is_named_with_its_own_invalidation() {
    let guest = guest();
    let mut port = guest.port();
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    let leaf = guest.map_second(PAGE, 1, OTHER);
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    let stale = StaleUse {
        rid: Bdf::from_raw(RID),
        pasid: None,
        iova: IOVA,
        write: false,
        second_stage: Some(PAGE),
        level: 1,
        old: Some(HIGH | RW_SECOND),
        new: Some(OTHER | RW_SECOND),
        invalidation: TlbInvalidation::VtdIotlb,
        needed: range(PAGE, 1, true),
        last: None,
        uses: 1,
        invalidated_since: false,
    };
    assert_eq!(found(&guest), [stale]);
    let text = stale.to_string();
    let told = "00:03.0, read at IOVA 0x123440200000: the second-stage entry of level 1 for \
                0x3040000000 was 0x40000003 when it was cached and is 0x40400003 now; needed: IOTLB \
                invalidation of 1 page from 0x3040000000, leaf entries; last seen: none";
    assert_eq!(text, told);
    // Invalidations of the first stage do not reach it, those of the second do.
    guest.invalidate(1, ALL);
    guest.invalidate_second_stage(1, page(PAGE + 0x1000, true));
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    assert_eq!(found(&guest), [StaleUse { uses: 2, ..stale }]);
    guest.invalidate_second_stage(1, page(PAGE, true));
    assert_eq!(guest.read(&mut port, IOVA), Ok(2));
    assert_eq!(found(&guest), [StaleUse { uses: 2, invalidated_since: true, ..stale }]);
    // Once more, to see what was last.
    guest.read(&mut port, IOVA + 8).unwrap();
    guest.map_first(IOVA + 0x1000, 1, PAGE, RW);
    guest.read(&mut port, IOVA + 0x1000).unwrap();
    guest.poke(leaf, 0);
    guest.write(&mut port, IOVA + 0x1000).unwrap();
    let second = found(&guest)[1];
    assert!(second.write && second.new == Some(0));
    assert_eq!(second.last, Some(range(PAGE, 1, true)), "not that of the first stage");
}

#[test]
fn a_stale_page_that_the_second_stage_has_for_writes_only_is_named() {
    const W_SECOND: u64 = 2;
    // As pages of 4 KiB and of 2 MiB.
    for level in 1..=2 {
        let guest = guest();
        let leaf = guest.map_second(PAGE, level, HIGH);
        let old = guest.peek(leaf) & !RW_SECOND | W_SECOND;
        guest.poke(leaf, old);
        let mut port = guest.port();
        assert_eq!(guest.write(&mut port, IOVA), Ok(0));
        let new = guest.peek(guest.map_second(PAGE, level, OTHER)) & !RW_SECOND | W_SECOND;
        guest.poke(leaf, new);
        assert_eq!(guest.write(&mut port, IOVA), Ok(0));
        let stale = one(&guest);
        assert_eq!((stale.second_stage, stale.write), (Some(PAGE), true), "level {level}");
        assert_eq!((stale.level, stale.old, stale.new), (level, Some(old), Some(new)));
        // Any page of it does, as it is cached whole.
        let last = PAGE + page_size(level) - 0x1000;
        guest.invalidate_second_stage(1, page(last, true));
        assert!(one(&guest).invalidated_since, "level {level}");
        guest.poke(HIGH, 1);
        assert_eq!(guest.write(&mut port, IOVA), Ok(0));
        assert_eq!((guest.peek(HIGH), one(&guest).uses), (1, 1), "level {level}");
    }
}

#[test]
fn a_stale_entry_on_the_way_to_a_first_stage_table_is_named() {
    for table in 1..=4 {
        for level in 1..=4 {
            let guest = guest();
            let mut port = guest.port();
            assert_eq!(guest.read(&mut port, IOVA), Ok(1));
            let entry = guest.first_entry_address(IOVA, table);
            // The same first-stage table at another place, by other tables of the second stage.
            let (root, moved) = (guest.table(), guest.table());
            for number in 0..512 {
                guest.poke(moved + number * 8, guest.peek((entry & LOWER & !0xfff) + number * 8));
            }
            guest.poke(guest.entry(root, 4, entry, 1, RW_SECOND), moved | RW_SECOND);
            let new = guest.peek(guest.entry(root, 4, entry, level, RW_SECOND));
            let below = guest.second_entry(entry, level);
            let old = guest.peek(below);
            guest.poke(below, new);
            // Which says the same: nothing differs but where it is.
            assert_eq!(guest.read(&mut port, IOVA), Ok(1));
            assert_eq!(found(&guest), []);
            // Until it does not. What changed first is what the guest forgot.
            let at = moved + (entry & 0xfff);
            guest.poke(at, 0);
            assert_eq!(guest.read(&mut port, IOVA), Ok(1));
            let stale = one(&guest);
            let context = format!("table {table}, level {level}");
            assert_eq!(stale.second_stage, Some(entry & !0xfff), "{context}");
            assert_eq!((stale.level, stale.old, stale.new), (level, Some(old), Some(new)));
            assert_eq!(stale.invalidation, TlbInvalidation::VtdIotlb);
            let span = page_size(level);
            assert_eq!(stale.needed, range(entry & !(span - 1), span >> 12, level == 1));
            guest.invalidate_second_stage(1, page(entry & !0xfff, true));
            assert_eq!(one(&guest).invalidated_since, level == 1, "{context}");
            guest.invalidate_second_stage(1, page(entry & !0xfff, false));
            assert!(one(&guest).invalidated_since, "{context}");
        }
    }
}

#[test]
fn a_stale_first_stage_is_named_as_ever_and_goes_with_any_invalidation_of_the_second() {
    for level in 1..=4 {
        let guest = guest();
        let mut port = guest.port();
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        let entry = guest.first_entry(IOVA, level);
        let old = guest.peek(entry);
        guest.poke(entry, 0);
        guest.invalidate(2, ALL);
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
        let stale = one(&guest);
        assert_eq!((stale.second_stage, stale.level, stale.old), (None, level, Some(old)));
        assert_eq!(stale.invalidation, TlbInvalidation::VtdPasidIotlb);
        let span = page_size(level);
        assert_eq!(stale.needed, range(IOVA & !(span - 1), span >> 12, level == 1));
        assert_eq!(stale.last, None);
        guest.invalidate_second_stage(1, page(0x7000, true));
        assert!(one(&guest).invalidated_since);
        let absent = Err((FaultReason::FirstStageNotPresent, false));
        assert_eq!(guest.read(&mut port, IOVA), absent);
    }
}

#[test]
fn what_needs_no_invalidation_of_either_stage_is_not_reported() {
    let guest = guest();
    let mut port = guest.port();
    let leaf = guest.second_entry(PAGE, 1);
    let (readable, writable) = (HIGH | 1, HIGH | 3);
    guest.poke(leaf, readable);
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    // More rights, other flags and ignored bits; fewer rights than no request needs.
    for word in [writable, writable | 0x300, writable | 0x70 << 52, readable] {
        guest.poke(leaf, word);
        assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    }
    // Its 2 MiB by one page instead of many.
    let directory = guest.second_entry(PAGE, 2);
    let pointer = guest.peek(directory);
    guest.poke(directory, HIGH | 0x83);
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    guest.poke(directory, pointer);
    // The host's stage 2 is not the guest's.
    let removed = guest.stage2.remove(HIGH).unwrap();
    assert_eq!(guest.read(&mut port, IOVA), Ok(1));
    drop(removed);
    assert_eq!(found(&guest), []);
    guest.map_stage2(HIGH, 0, HALF, Protection::READ_WRITE);
    guest.poke(leaf, writable);
    guest.invalidate_second_stage(1, ALL);
    guest.write(&mut port, IOVA).unwrap();
    guest.poke(leaf, readable);
    guest.read(&mut port, IOVA).unwrap();
    assert_eq!(found(&guest), []);
    // The second stage no longer allows this.
    guest.write(&mut port, IOVA).unwrap();
    let stale = one(&guest);
    assert_eq!((stale.write, stale.new, stale.uses), (true, Some(readable), 1));
}

#[test]
fn a_page_that_the_second_stage_splits_is_compared_piece_by_piece() {
    let guest = Guest::new(VtdUnitConfig::default().with_sanitize(true), (4, 4), false);
    let mut port = guest.port();
    guest.map_first(IOVA, 2, PAGE, RW);
    guest.map_second(PAGE, 2, HIGH);
    let mut bytes = [0; 0x3000];
    port.read(PLAIN, IOVA, &mut bytes).unwrap();
    let directory = guest.second_entry(PAGE, 2);
    let table = guest.table();
    for number in 0..512 {
        let to = if number == 2 { OTHER } else { HIGH + (number << 12) };
        guest.poke(table + number * 8, to | RW_SECOND);
    }
    guest.poke(directory, table | RW_SECOND);
    port.read(PLAIN, IOVA, &mut bytes).unwrap();
    let stale = one(&guest);
    assert_eq!((stale.iova, stale.second_stage), (IOVA + 0x2000, Some(PAGE + 0x2000)));
    assert_eq!((stale.level, stale.old), (2, Some(HIGH | 0x83)));
    assert_eq!(stale.needed, range(PAGE, 512, true));
}

/// Context and PASID tables that send all DMA one way.
#[derive(Debug)]
struct Way(DmaWay);

impl ContextTables for Way {
    fn way(&self, _: Bdf, _: Option<u32>) -> Option<DmaWay> {
        Some(self.0)
    }
}

#[test]
fn another_second_stage_is_another_context() {
    let guest = guest();
    let now = DmaWay::Nested { first: guest.first.root, second: 0x7000 };
    let tables: Arc<dyn ContextTables> = Arc::new(Way(now));
    guest.unit.set_context_tables(Arc::downgrade(&tables));
    guest.read(&mut guest.port(), IOVA).unwrap();
    let [stale] = guest.unit.sanitizer_report().unwrap().contexts[..] else { panic!("one") };
    let old = DmaWay::Nested { first: guest.first.root, second: guest.second.root };
    assert_eq!((stale.old, stale.new), (old, now));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the sanitizer reports, and what it ignores.

use super::*;
use crate::{InvalidatedPages, StaleUse, TlbInvalidation};

const IOVA: u64 = 0x0000_1234_4020_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);

/// A machine with the sanitizer whose device has IOVA mapped to OLD by one page of `level`; its top
/// table and the leaf's GPA.
fn machine(level: u8) -> (Machine, u64, u64) {
    let machine = Machine::new(VtdUnitConfig { sanitize: true, ..VtdUnitConfig::default() });
    machine.poke(OLD, 1);
    machine.poke(NEW, 2);
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, level, OLD, RW);
    machine.attach(None, 1, root, 4, 0);
    (machine, root, leaf)
}

fn found(machine: &Machine) -> Vec<StaleUse> {
    let SanitizerReport { contexts, stale, others } = machine.unit.sanitizer_report().unwrap();
    assert_eq!((contexts, others), (Vec::new(), 0));
    let uses: u64 = stale.iter().map(|found| found.uses).sum();
    assert_eq!(machine.unit.counters().stale_uses, uses);
    stale
}

fn range(address: u64, pages: u64, leaf: bool) -> InvalidatedPages {
    InvalidatedPages::Range { address, pages, leaf }
}

#[test]
fn a_stale_page_is_reported_once_with_all_there_is_to_know() {
    for level in [1, 2] {
        let (machine, _, leaf) = machine(level);
        let mut port = machine.port();
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        machine.invalidate(1, page(IOVA + page_size(level), true));
        machine.invalidate(2, ALL);
        let old = machine.peek(leaf);
        machine.poke(leaf, old - OLD + NEW);
        assert_eq!(found(&machine), []);
        // Still what was cached: the sanitizer does not change what a device sees.
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        machine.write_u64(&mut port, PLAIN, IOVA + 8, 3).unwrap();
        let stale = StaleUse {
            rid: Bdf::from_raw(RID),
            pasid: None,
            iova: IOVA,
            write: false,
            second_stage: None,
            level,
            old: Some(old),
            new: Some(old - OLD + NEW),
            invalidation: TlbInvalidation::VtdPasidIotlb,
            needed: range(IOVA, page_size(level) >> 12, true),
            last: Some(range(IOVA + page_size(level), 1, true)),
            uses: 2,
            invalidated_since: false,
        };
        assert_eq!(found(&machine), [stale]);
        machine.invalidate(1, page(IOVA, true));
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2));
        assert_eq!(found(&machine), [StaleUse { invalidated_since: true, ..stale }]);
    }
}

#[test]
fn requests_with_pasid_and_second_stage_tables_are_compared_too() {
    let (machine, root, leaf) = machine(1);
    let mut port = machine.port();
    machine.attach(Some(5), 1, root, 4, 0);
    let own = machine.table();
    let entry = machine.entry(own, 3, 0x5000, 1, 3);
    machine.poke(entry, OLD | 3);
    machine.attach_second_stage(Some(6), 2, own, 3);
    assert_eq!(machine.read_u64(&mut port, pasid(5), IOVA), Ok(1));
    assert_eq!(machine.read_u64(&mut port, pasid(6), 0x5000), Ok(1));
    machine.poke(leaf, 0);
    machine.poke(entry, 0);
    machine.write_u64(&mut port, pasid(5), IOVA, 3).unwrap();
    machine.read_u64(&mut port, pasid(6), 0x5000).unwrap();
    let found = found(&machine);
    let text: Vec<_> = found.iter().map(StaleUse::to_string).collect();
    let old = OLD | RW;
    assert_eq!(text, [
        format!("00:03.0 PASID 0x5, write at IOVA {IOVA:#x}: the entry of level 1 was {old:#x} \
                 when it was cached and is 0x0 now; needed: PASID-based IOTLB invalidation of 1 \
                 page from {IOVA:#x}, leaf entries; last seen: none"),
        "00:03.0 PASID 0x6, read at IOVA 0x5000: the entry of level 1 was 0x40000003 when it was \
         cached and is 0x0 now; needed: IOTLB invalidation of 1 page from 0x5000, leaf entries; \
         last seen: none".to_owned(),
    ]);
}

#[test]
fn a_changed_pointer_needs_more_than_a_leaf_invalidation() {
    for level in 2..=4 {
        let (machine, root, _) = machine(1);
        let mut port = machine.port();
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        let other = machine.table();
        machine.map(other, 4, IOVA, 1, NEW, RW);
        let entry = machine.entry(root, 4, IOVA, level, TABLE);
        let (old, new) =
            (machine.peek(entry), machine.peek(machine.entry(other, 4, IOVA, level, TABLE)));
        machine.poke(entry, new);
        machine.invalidate(1, page(IOVA, true));
        // Not cached as a page: the walk uses the cached pointer.
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        let start = IOVA & !(page_size(level) - 1);
        let [stale] = found(&machine)[..] else { panic!("one page") };
        assert_eq!((stale.level, stale.old, stale.new), (level, Some(old), Some(new)));
        assert_eq!(stale.needed, range(start, page_size(level) >> 12, false));
        assert_eq!(stale.last, Some(range(IOVA, 1, true)));
    }
}

#[test]
fn what_needs_no_invalidation_is_not_reported() {
    let (machine, root, leaf) = machine(1);
    let mut port = machine.port();
    let readable = machine.peek(leaf) & !2;
    machine.poke(leaf, readable);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    machine.write_u64(&mut port, PLAIN, IOVA, 5).unwrap_err();
    // More rights, and other flags and ignored bits.
    for word in [readable | 2, (readable | 2) & !0x60, readable | 0xe00] {
        machine.poke(leaf, word);
        machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    }
    // What is absent is not cached.
    machine.read_u64(&mut port, PLAIN, IOVA + 0x1000).unwrap_err();
    machine.map(root, 4, IOVA + 0x1000, 1, OLD, RW);
    machine.read_u64(&mut port, PLAIN, IOVA + 0x1000).unwrap();
    // Fewer rights, but none that the request needs.
    machine.invalidate(1, ALL);
    machine.poke(leaf, readable | 2);
    machine.write_u64(&mut port, PLAIN, IOVA, 5).unwrap();
    machine.poke(leaf, readable);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    assert_eq!(found(&machine), []);
    machine.write_u64(&mut port, PLAIN, IOVA, 5).unwrap();
    let [stale] = found(&machine)[..] else { panic!("one page") };
    assert!(stale.write && stale.uses == 1);
}

#[test]
fn a_large_page_that_is_split_is_stale_only_where_it_leads_elsewhere() {
    let (machine, _, leaf) = machine(2);
    let mut port = machine.port();
    let mut bytes = [0; 0x3000];
    port.read(PLAIN, IOVA, &mut bytes).unwrap();
    // The same 2 MiB by 512 pages, except the third.
    let table = machine.table();
    for number in 0..512 {
        let to = if number == 2 { NEW } else { OLD + (number << 12) };
        machine.poke(table + number * 8, to | RW);
    }
    let old = machine.peek(leaf);
    machine.poke(leaf, table | TABLE);
    port.read(PLAIN, IOVA, &mut bytes[..0x2000]).unwrap();
    assert_eq!(found(&machine), []);
    // One request for all of it: no byte is skipped.
    port.read(PLAIN, IOVA, &mut bytes).unwrap();
    let [stale] = found(&machine)[..] else { panic!("one page") };
    assert_eq!((stale.iova, stale.level, stale.old), (IOVA + 0x2000, 2, Some(old)));
    assert_eq!(stale.needed, range(IOVA, 512, true));
}

#[test]
fn a_change_of_stage_2_is_no_finding() {
    let (machine, _, _) = machine(1);
    let mut port = machine.port();
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    let removed = machine.stage2.remove(HIGH).unwrap();
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    drop(removed);
    assert_eq!(found(&machine), []);
}

#[test]
fn reports_are_bounded() {
    let (machine, root, _) = machine(1);
    let mut port = machine.port();
    let pages = || (0..100).map(|number| IOVA + (number << 12));
    for iova in pages() {
        machine.map(root, 4, iova, 1, OLD, RW);
        machine.read_u64(&mut port, PLAIN, iova).unwrap();
        machine.map(root, 4, iova, 1, NEW, RW);
    }
    for iova in pages().chain(pages()) {
        machine.read_u64(&mut port, PLAIN, iova).unwrap();
    }
    let report = machine.unit.sanitizer_report().unwrap();
    assert_eq!((report.stale.len(), report.others), (64, 72));
    assert!(report.stale.iter().all(|stale| stale.uses == 2));
    assert_eq!(machine.unit.counters().stale_uses, 200);
    machine.invalidate(1, page(IOVA, true));
    let text = machine.unit.sanitizer_report().unwrap().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "sanitizer: stale translations of 64 pages were used");
    assert!(lines[1].ends_with("; last seen: none; used 2 times, invalidated since"), "{text}");
    assert!(lines[2].ends_with("; last seen: none; used 2 times, invalidated never"), "{text}");
    assert_eq!(lines[65], "  and 72 uses beyond those");
    assert_eq!(lines.len(), 66);
}

#[test]
fn a_unit_that_does_not_sanitize_says_so() {
    let machine = Machine::new(VtdUnitConfig::default());
    assert_eq!(machine.unit.sanitizer_report(), None);
}

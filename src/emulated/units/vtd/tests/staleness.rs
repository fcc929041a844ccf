// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cached entries stay until they are invalidated, and no longer.

use super::*;

const IOVA: u64 = 0x0000_1234_4020_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);

/// A machine whose device has IOVA mapped to OLD by one page of `level`; the leaf's GPA.
fn machine(level: u8) -> (Machine, u64, u64) {
    let machine = Machine::new(VtdUnitConfig::default());
    machine.poke(OLD, 1);
    machine.poke(NEW, 2);
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, level, OLD, RW);
    machine.attach(None, 1, root, 4, 0);
    (machine, root, leaf)
}

fn pages(address: u64, pages: u64, leaf: bool) -> CacheRange {
    CacheRange::Pages(PageRange::new(address, pages, leaf))
}

#[test]
fn a_changed_leaf_is_stale_until_invalidated_at_any_granularity() {
    for (level, offset) in [(1, 0), (2, 0x1f_f000)] {
        let inside = IOVA + offset;
        for range in [
            page(inside, true),
            page(inside, false),
            pages(inside - 0x3000, 16, true),
            pages(inside & !0x3fff_ffff, 1 << 18, true),
            pages(0, 1 << 40, true),
            pages(0, 1 << 52, false),
            ALL,
        ] {
            let (machine, _, leaf) = machine(level);
            let mut port = machine.port();
            let mut second_port = port.clone();
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
            machine.poke(leaf, machine.peek(leaf) - OLD + NEW);
            for other in [page(IOVA - 0x1000, true), page(IOVA + page_size(level), false)] {
                machine.invalidate(1, other);
            }
            machine.invalidate(2, range);
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1), "{range:?}");
            assert_eq!(machine.read_u64(&mut second_port, PLAIN, IOVA), Ok(1), "{range:?}");
            machine.invalidate(1, range);
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2), "{range:?}");
            assert_eq!(machine.read_u64(&mut second_port, PLAIN, IOVA), Ok(2), "{range:?}");
        }
    }
}

#[test]
fn a_huge_page_is_stale_until_any_page_of_it_is_invalidated() {
    // Stage 2 has 1 GiB contiguously here: sparse memory, with only two words touched.
    let machine = Machine::new(VtdUnitConfig::default());
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 2 << 30, None).unwrap();
    let memory = UserMemory::whole(Arc::new(region));
    let start = 0x1_0000_0000;
    let protection = Protection::READ_WRITE;
    let last = start + (2 << 30) - 1;
    machine.stage2.insert(Mapping { start, last, memory, protection });
    machine.map_stage2(NOWHERE, 0, 0x1000, Protection::READ_WRITE);

    let mut port = machine.port();
    let root = machine.table();
    let iova = 0x80_4000_0000;
    let leaf = machine.map(root, 4, iova, 3, start, RW);
    machine.attach(None, 1, root, 4, 0);
    machine.install(Some(1), 2, None);
    for (gpa, word) in [(start, 1), (start + (1 << 30), 2)] {
        machine.write_u64(&mut port, pasid(1), gpa, word).unwrap();
    }
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(1));
    machine.poke(leaf, machine.peek(leaf) + (1 << 30));
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(1));
    machine.invalidate(1, page(iova + 0x2aaa_a000, true));
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(2));
    let hits = machine.unit.counters().iotlb_hits;
    machine.read_u64(&mut port, PLAIN, iova + 0x3fff_fff8).unwrap();
    assert_eq!(machine.unit.counters().iotlb_hits, hits + 1);
}

#[test]
fn a_leaf_invalidation_leaves_paging_structures_and_others_do_not() {
    for level in 2..=4 {
        for range in [page(IOVA, false), pages(0, 1 << 52, false), ALL] {
            let (machine, root, _) = machine(1);
            let mut port = machine.port();
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
            // Another path to IOVA, by another table below `level`.
            let other = machine.table();
            machine.map(other, 4, IOVA, 1, NEW, RW);
            let entry = machine.entry(root, 4, IOVA, level, TABLE);
            machine.poke(entry, machine.peek(machine.entry(other, 4, IOVA, level, TABLE)));
            machine.invalidate(1, page(IOVA, true));
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1), "level {level}");
            machine.invalidate(1, range);
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2), "level {level}");
        }
    }
}

#[test]
fn a_paging_structure_is_dropped_by_any_page_under_it() {
    let (machine, root, _) = machine(1);
    let mut port = machine.port();
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    let other = machine.table();
    machine.map(other, 4, IOVA, 1, NEW, RW);
    let entry = machine.entry(root, 4, IOVA, 2, TABLE);
    machine.poke(entry, machine.peek(machine.entry(other, 4, IOVA, 2, TABLE)));
    // Another page of the same directory entry: the table is dropped, the leaf stays.
    machine.invalidate(1, page(IOVA + 0x5000, false));
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    machine.invalidate(1, page(IOVA, true));
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2));
}

#[test]
fn what_is_absent_or_refused_is_never_cached() {
    let (machine, root, leaf) = machine(1);
    let mut port = machine.port();
    let good = machine.peek(leaf);
    for level in 1..=4 {
        let entry = machine.entry(root, 4, IOVA, level, TABLE);
        let word = machine.peek(entry);
        for bad in [0, word & !4, word | 0x80] {
            if level < 4 && bad == word | 0x80 {
                continue;
            }
            machine.invalidate(1, ALL);
            machine.poke(entry, bad);
            machine.read_u64(&mut port, PLAIN, IOVA).unwrap_err();
            machine.poke(entry, word);
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1), "level {level}");
        }
    }
    // More rights than are cached need no invalidation either.
    machine.poke(leaf, good & !2);
    machine.invalidate(1, ALL);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    machine.write_u64(&mut port, PLAIN, IOVA, 5).unwrap_err();
    machine.poke(leaf, good);
    machine.write_u64(&mut port, PLAIN, IOVA, 5).unwrap();
    // Fewer do.
    machine.poke(leaf, good & !2);
    machine.write_u64(&mut port, PLAIN, IOVA, 6).unwrap();
    machine.invalidate(1, page(IOVA, true));
    machine.write_u64(&mut port, PLAIN, IOVA, 7).unwrap_err();
    assert_eq!(machine.peek(OLD), 6);
}

#[test]
fn stage_2_is_stale_until_the_unit_is_told() {
    let (machine, _, _) = machine(1);
    let mut port = machine.port();
    machine.install(Some(4), 9, None);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    machine.read_u64(&mut port, pasid(4), OLD).unwrap();
    let removed = machine.stage2.remove(HIGH).unwrap();
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    assert_eq!(machine.read_u64(&mut port, pasid(4), OLD), Ok(1));
    // Stage 1's invalidations do not affect stage 2.
    machine.invalidate(1, ALL);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    machine.unit.stage2_changed(&Arc::default());
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    machine.unit.stage2_changed(&machine.stage2);
    let denied = Err((FaultReason::SecondStageDenied, true));
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), denied);
    assert_eq!(machine.read_u64(&mut port, pasid(4), OLD), denied);
    // A new mapping is visible at once.
    machine.map_stage2(HIGH, HALF, HALF, Protection::READ_ONLY);
    drop(removed);
    assert!(machine.read_u64(&mut port, PLAIN, IOVA).is_ok());
}

#[test]
fn a_changed_attachment_is_in_force_at_once_for_its_requester_alone() {
    let (machine, root, _) = machine(1);
    let mut port = machine.port();
    let other = machine.table();
    machine.map(other, 4, IOVA, 1, NEW, RW);
    for requester in [None, Some(0), Some(5), Some(13)] {
        machine.attach(requester, 1, root, 4, 0);
    }
    let mut read = |requester| {
        let attributes = DmaAttributes { pasid: requester, ..PLAIN };
        machine.read_u64(&mut port, attributes, IOVA)
    };
    for requester in [None, Some(0), Some(5), Some(13)] {
        assert_eq!(read(requester), Ok(1));
    }
    // 5 and 13 share a line of the PASID cache.
    machine.attach(Some(13), 2, other, 4, 0);
    let outcomes = [None, Some(0), Some(5), Some(13)].map(&mut read);
    assert_eq!(outcomes, [Ok(1), Ok(1), Ok(1), Ok(2)]);
    machine.unit.remove(RID, Some(5));
    machine.unit.remove(RID, Some(6));
    machine.attach(None, 2, other, 4, 0);
    let blocked = Err((FaultReason::PasidEntryNotPresent, false));
    let outcomes = [None, Some(0), Some(5), Some(13)].map(&mut read);
    assert_eq!(outcomes, [Ok(2), Ok(1), blocked, Ok(2)]);
}

#[test]
fn an_invalidation_is_for_every_requester_of_the_hwpt() {
    let (machine, root, leaf) = machine(1);
    let mut port = machine.port();
    let attributes = [PLAIN, pasid(1), pasid(2)];
    machine.attach(Some(1), 1, root, 4, 0);
    machine.attach(Some(2), 1, root, 4, 0);
    for range in [page(IOVA, true), ALL] {
        let before = machine.peek(leaf);
        let flipped = if before & NEW == NEW { before - NEW + OLD } else { before - OLD + NEW };
        let old = attributes.map(|who| machine.read_u64(&mut port, who, IOVA));
        machine.poke(leaf, flipped);
        assert_eq!(attributes.map(|who| machine.read_u64(&mut port, who, IOVA)), old);
        machine.invalidate(1, range);
        let new = attributes.map(|who| machine.read_u64(&mut port, who, IOVA));
        assert!(new.iter().zip(&old).all(|(new, old)| new != old), "{range:?}");
    }
}

#[test]
fn a_tag_that_comes_back_finds_nothing_of_its_past() {
    let (machine, _, _) = machine(1);
    let mut port = machine.port();
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    machine.unit.remove(RID, None);
    let other = machine.table();
    machine.map(other, 4, IOVA, 1, NEW, RW);
    machine.attach(None, 1, other, 4, 0);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2));
    // Nor does a new stage 2 hit anything of the old one, whose tag it may reuse.
    machine.unit.remove(RID, None);
    let tables = None;
    let stage2 = Arc::<Stage2>::default();
    machine.unit.install(RID, None, Translation { tag: CacheTag(1), tables, stage2, dirty: None });
    let denied = Err((FaultReason::SecondStageDenied, true));
    assert_eq!(machine.read_u64(&mut port, PLAIN, OLD), denied);
}

#[test]
fn caches_that_are_too_small_only_cost_walks() {
    let machine = Machine::new(VtdUnitConfig {
        iotlb_entries: 8,
        paging_structure_entries: 8,
        stage2_entries: 8,
        ..VtdUnitConfig::default()
    });
    let mut port = machine.port();
    let root = machine.table();
    for page in 0..512 {
        machine.map(root, 4, IOVA + (page << 21), 1, HIGH + (page << 12), RW);
        machine.poke(HIGH + (page << 12), page);
    }
    machine.attach(None, 1, root, 4, 0);
    for round in 1..=2 {
        for page in 0..512 {
            assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA + (page << 21)), Ok(page));
        }
        let counters = machine.unit.counters();
        assert_eq!(counters.iotlb_hits + counters.iotlb_misses, 512 * round);
        assert_eq!(counters.walks, counters.iotlb_misses);
        assert!(counters.iotlb_misses >= 504 * round, "{counters:?}");
        assert!(counters.iotlb_evictions >= 504 * round - 8, "{counters:?}");
    }
    machine.invalidate(1, ALL);
    let counters = machine.unit.counters();
    assert_eq!(counters.pasid_cache_hits, 2 * 512 - 1);
    assert_eq!(counters.invalidations, 1);
    assert!((1..=16).contains(&counters.invalidated_entries), "{counters:?}");
}

#[test]
fn many_ranges_are_one_look_through_the_caches() {
    let (machine, _, _) = machine(1);
    let mut port = machine.port();
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    let (sets, before) = machine.unit.gate.write(|engine| {
        let config = VtdUnitConfig::default();
        let entries = config.iotlb_entries + config.paging_structure_entries;
        (entries as u64 / 4, engine.common.caches.looks())
    });
    // Each spans more pages than there are sets, the last the one that was read.
    let wide = |at: u64| pages(at << 33, 1 << 20, false);
    let mut ranges: Vec<_> = (1000..1255).map(wide).collect();
    ranges.push(pages(IOVA, 1 << 11, false));
    machine.unit.invalidate(CacheTag(1), &ranges);
    let after = machine.unit.gate.write(|engine| engine.common.caches.looks());
    assert!(after - before <= 2 * sets, "{} sets are looked at", after - before);
    let counters = machine.unit.counters();
    assert_eq!(counters.invalidations, 256);
    // The page, and three tables on the way to it.
    assert_eq!(counters.invalidated_entries, 4);
}

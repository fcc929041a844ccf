// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cached entries stay until the right command comes, and are dropped by it.

use super::*;

const IOVA: u64 = 0x12_3456_7000;

/// Pages in [`HIGH`] that hold 1, 2, 3 in their first words.
fn marked(machine: &Machine) -> [u64; 3] {
    let pages = [1, 2, 3].map(|number| HIGH + number * 0x20_0000);
    for (number, page) in (1..).zip(pages) {
        machine.poke(page, number);
    }
    pages
}

fn asid(asid: u16) -> Invalidation {
    Invalidation::Asid { tag: VMID, asid }
}

fn ranged(address: u64, tg: u8, ttl: u8, num: u8, scale: u8) -> Invalidation {
    let range = AddressRange { address, leaf: true, tg, ttl, num, scale };
    Invalidation::Va { tag: VMID, asid: ASID, range }
}

#[test]
fn a_page_is_stale_until_a_command_names_it() {
    for granule in Granule::ALL {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let pages = marked(&machine);
        let (tables, mut port) = (machine.tables(granule), machine.port());
        let iova = IOVA & !(granule.size() - 1);
        let mut now = 1;
        tables.map(iova, 3, pages[0], RW);
        assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(1));
        let wrong = [
            asid(ASID + 1),
            va(iova + granule.size(), false),
            Invalidation::Va { tag: VMID, asid: ASID + 1, range: AddressRange::at(iova) },
            Invalidation::All { tag: CacheTag(9) },
            Invalidation::Contexts { sid: SID },
            Invalidation::DeviceTlb { sid: 8, substream: None, range: IovaRange::ALL },
        ];
        let right = [
            ALL,
            asid(ASID),
            va(iova, false),
            va(iova + granule.size() - 1, true),
            Invalidation::Vaa { tag: VMID, range: AddressRange::at(iova) },
        ];
        for command in right {
            let next = now % 3 + 1;
            tables.map(iova, 3, pages[next - 1], RW);
            for other in wrong {
                machine.invalidate(other);
                assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(now as u64), "{other:?}");
            }
            machine.invalidate(command);
            assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(next as u64), "{command:?}");
            now = next;
        }
    }
}

#[test]
fn a_block_goes_with_any_address_in_it_and_its_pieces_too() {
    for (granule, level, middle) in [(Granule::K4, 2, 0x12_3000), (Granule::K64, 2, 0x50_0000)] {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let (tables, mut port) = (machine.tables(granule), machine.port());
        // 512 MiB do not fit; only the part that exists is accessed.
        machine.poke(HIGH, 1);
        machine.poke(HIGH + 0x1000, 2);
        machine.poke(HIGH + 0x80_0000, 3);
        let iova = IOVA & !(granule.level_size(level) - 1);
        let leaf = tables.map(iova, level, HIGH, RW);
        assert_eq!(machine.read(&mut port, PLAIN, iova + 0x1000), Ok(2));
        assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(1));
        machine.poke(leaf, 0);
        assert_eq!(machine.read(&mut port, PLAIN, iova + 0x1000), Ok(2));
        machine.invalidate(va(iova + middle, true));
        let absent = stage1_event(EventId::Translation);
        assert_eq!(machine.read(&mut port, PLAIN, iova + 0x1000), absent, "{granule:?}");
        assert_eq!(machine.read(&mut port, PLAIN, iova), absent, "{granule:?}");
    }
}

#[test]
fn a_range_drops_what_it_names_and_its_hints_are_taken_at_their_word() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    machine.poke(HIGH, 5);
    let absent = stage1_event(EventId::Translation);
    let pages = [0, 1, 2, 3].map(|page| IOVA + page * 0x1000);
    for (command, dropped) in [
        // Two pages from the second on; as pages of level 2; of another granule.
        (ranged(pages[1], 1, 3, 1, 0), [false, true, true, false]),
        (ranged(pages[1], 1, 0, 1, 0), [false, true, true, false]),
        (ranged(pages[1], 1, 2, 1, 0), [false; 4]),
        (ranged(pages[1], 3, 3, 1, 0), [false; 4]),
        (ranged(pages[0], 1, 3, 0, 2), [true; 4]),
    ] {
        let leaves = pages.map(|page| tables.map(page, 3, HIGH, RW));
        machine.invalidate(ALL);
        for (page, leaf) in pages.into_iter().zip(leaves) {
            assert_eq!(machine.read(&mut port, PLAIN, page), Ok(5));
            machine.poke(leaf, 0);
        }
        machine.invalidate(command);
        for (page, dropped) in pages.into_iter().zip(dropped) {
            let outcome = machine.read(&mut port, PLAIN, page);
            assert_eq!(outcome, if dropped { absent } else { Ok(5) }, "{command:?} {page:#x}");
        }
    }
}

#[test]
fn without_ril_a_command_names_one_address() {
    let config = SmmuV3UnitConfig { range_invalidation: false, ..Default::default() };
    let machine = Machine::new(config);
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let leaves = [0, 0x1000].map(|page| tables.map(IOVA + page, 3, HIGH, RW));
    for page in [0, 0x1000] {
        assert_eq!(machine.read(&mut port, PLAIN, IOVA + page), Ok(0));
    }
    leaves.into_iter().for_each(|leaf| machine.poke(leaf, 0));
    machine.invalidate(ranged(IOVA, 3, 0, 31, 0));
    let absent = stage1_event(EventId::Translation);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), absent);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA + 0x1000), Ok(0));
}

#[test]
fn global_pages_are_of_every_asid() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let pages = marked(&machine);
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    tables.map(IOVA, 3, pages[0], RW.with_ng(false));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    // Another address space of the same VMID, where the page is elsewhere.
    let other = machine.tables(Granule::K4);
    let cd = Cd { qw0: other.cd().qw0.with_asid(ASID + 1), ..other.cd() };
    machine.attach(&cd);
    other.map(IOVA, 3, pages[1], RW);
    let mut port = machine.port();
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "the global page serves it");
    machine.invalidate(asid(ASID));
    machine.invalidate(asid(ASID + 1));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "by ASID global pages stay");
    machine.invalidate(Invalidation::Va { tag: VMID, asid: 99, range: AddressRange::at(IOVA) });
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2), "by address they go, whatever ASID");
}

#[test]
fn pointers_to_tables_stay_when_only_leaves_are_named() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let pages = marked(&machine);
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    tables.map(IOVA, 3, pages[0], RW);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    // Another table in place of the last one.
    let pointer = tables.entry(IOVA, 2);
    machine.poke(pointer, 0);
    tables.map(IOVA, 3, pages[1], RW);
    machine.invalidate(va(IOVA, true));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "by the old table");
    machine.invalidate(va(IOVA, false));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2));
    assert!(machine.unit.counters().table_hits > 0);
}

#[test]
fn what_is_absent_is_not_cached() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let absent = stage1_event(EventId::Translation);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), absent);
    machine.poke(HIGH, 4);
    let leaf = tables.map(IOVA, 3, HIGH, RW.with_af(false));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage1_event(EventId::Access));
    machine.poke(leaf, machine.peek(leaf) | Descriptor::AF);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(4));
}

#[test]
fn a_change_of_stage_2_drops_everything_through_it() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    tables.map(IOVA, 3, READ_ONLY, RW);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
    machine.stage2.remove(READ_ONLY).unwrap();
    machine.unit.stage2_changed(&machine.stage2);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage2_event(EventId::Translation));
}

#[test]
fn a_unit_without_caches_forgets_nothing_it_never_knew() {
    let config = SmmuV3UnitConfig {
        iotlb_entries: 0,
        paging_structure_entries: 0,
        stage2_entries: 0,
        ..Default::default()
    };
    let machine = Machine::new(config);
    let pages = marked(&machine);
    let (tables, mut port) = (machine.tables(Granule::K16), machine.port());
    let iova = IOVA & !0x3fff;
    for (number, page) in (1..).zip(pages) {
        tables.map(iova, 3, page, RW);
        assert_eq!(machine.read(&mut port, PLAIN, iova), Ok(number));
    }
    assert_eq!(machine.unit.counters().iotlb_hits, 0);
}

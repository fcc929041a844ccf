// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Access flags and the dirty state, which the unit updates in descriptors (§3.13).

use super::*;

const IOVA: u64 = 0x12_3456_7000;

/// Attaches `machine` to `tables` whose flags are updated: HA, and HD if `dirty`.
fn with_updates(machine: &Machine, tables: &Tables<'_>, dirty: bool) {
    let cd = tables.cd();
    machine.attach(&Cd { qw0: cd.qw0.with_ha(true).with_hd(dirty), ..cd });
}

#[test]
fn a_page_is_marked_accessed_and_dirty_when_it_first_is() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let tables = machine.tables(Granule::K4);
    with_updates(&machine, &tables, true);
    let clean = RW.with_af(false).with_ap_read_only(true).with_dbm(true);
    let leaf = tables.map(IOVA, 3, HIGH, clean);
    let mut port = machine.port();
    let state = || {
        let leaf = Descriptor::from_bits(machine.peek(leaf));
        (leaf.af(), !leaf.ap_read_only())
    };
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
    assert_eq!(state(), (true, false));
    // What a read has cached does not serve writes.
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 5), Ok(5));
    assert_eq!(state(), (true, true));
    let after = Descriptor::from_bits(machine.peek(leaf));
    let same = after.with_af(false).with_ap_read_only(true).into_bits();
    let was = clean.with_table(true).with_address(Granule::K4, HIGH).into_bits();
    assert_eq!(same, was, "nothing else has changed");
    // A page that becomes clean again: what is cached as dirty stays that until it is dropped.
    machine.poke(leaf, was | Descriptor::AF);
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 6), Ok(6));
    assert_eq!(state(), (true, false));
    machine.invalidate(ALL);
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 7), Ok(7));
    assert_eq!(state(), (true, true));
}

#[test]
fn only_dbm_makes_a_page_dirty_and_only_with_hd() {
    type Change = fn(Descriptor) -> Descriptor;
    let clean: Change = |leaf| leaf.with_ap_read_only(true).with_dbm(true);
    let no_user: Change =
        |leaf| leaf.with_ap_read_only(true).with_dbm(true).with_ap_unprivileged(false);
    for (change, limits, hd, allowed) in [
        (clean, 0, true, true),
        (clean, 0, false, false),
        // APTable of the table above.
        (clean, 1 << 62, true, false),
        (no_user, 0, true, false),
        (|leaf| leaf.with_ap_read_only(true), 0, true, false),
    ] as [(Change, u64, bool, bool); 5]
    {
        let machine = Machine::new(SmmuV3UnitConfig::default());
        let tables = machine.tables(Granule::K4);
        with_updates(&machine, &tables, hd);
        let leaf = tables.map(IOVA, 3, HIGH, change(RW));
        let pointer = tables.entry(IOVA, 2);
        machine.poke(pointer, machine.peek(pointer) | limits);
        let before = machine.peek(leaf);
        let outcome = machine.write(&mut machine.port(), PLAIN, IOVA, 1);
        let word = if allowed { before & !Descriptor::AP_READ_ONLY } else { before };
        let permission = stage1_event(EventId::Permission);
        assert_eq!(outcome, if allowed { Ok(1) } else { permission }, "{limits:#x} HD {hd}");
        assert_eq!(machine.peek(leaf), word, "{limits:#x} HD {hd}");
    }
}

#[test]
fn a_descriptor_that_stage_2_protects_is_not_updated() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let tables = machine.tables(Granule::K4);
    with_updates(&machine, &tables, true);
    // The table of the last level is in memory that the guest may only read.
    let leaf = RW.with_table(true).with_address(Granule::K4, HIGH);
    let table = Descriptor::new().with_valid(true).with_table(true);
    machine.poke(tables.entry(IOVA, 2), table.with_address(Granule::K4, READ_ONLY).into_bits());
    let entry = READ_ONLY + Granule::K4.index(IOVA, 3, tables.input_bits) * 8;
    machine.poke(entry, leaf.with_af(false).into_bits());
    let sink = machine.sink();
    let mut port = machine.port();
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage2_event(EventId::Permission));
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.second_address), (1, entry & !0xfff));
    assert!(record.qw1.rnw() && !record.qw1.ttrnw(), "the request reads, the update writes");
    // One whose flags are set already needs no update.
    machine.poke(entry, leaf.into_bits());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
}

#[test]
fn a_message_marks_the_page_of_its_doorbell() {
    let doorbell = NOWHERE..=NOWHERE + 0xfff;
    let config = SmmuV3UnitConfig::default().with_msi_doorbell(Some(doorbell));
    let send = |port: &mut DmaPort, iova| {
        let mut delivered = None;
        let result = port.write_message(PLAIN, iova, 7, |address| delivered = Some(address));
        (result.map_err(event), delivered)
    };
    let clean = RW.with_af(false).with_ap_read_only(true).with_dbm(true);
    for dirty in [true, false] {
        let machine = Machine::new(config.clone());
        let tables = machine.tables(Granule::K4);
        with_updates(&machine, &tables, dirty);
        let leaf = tables.map(IOVA, 3, NOWHERE, clean);
        let before = machine.peek(leaf);
        let mut port = machine.port();
        // Once from the top table, once perhaps from a cached one.
        for _ in 0..2 {
            machine.poke(leaf, before);
            let sent = send(&mut port, IOVA + 0x40);
            let served = (Ok(()), Some(NOWHERE + 0x40));
            let denied = (Err((Some(EventId::Permission), false)), None);
            assert_eq!(sent, if dirty { served } else { denied }, "HD {dirty}");
            let marked = before & !Descriptor::AP_READ_ONLY | Descriptor::AF;
            assert_eq!(machine.peek(leaf), if dirty { marked } else { before }, "HD {dirty}");
        }
        // Nobody is there, so nothing is accessed.
        let leaf = tables.map(IOVA + 0x1000, 3, NOWHERE + 0x1000, RW.with_af(false));
        let before = machine.peek(leaf);
        assert_eq!(send(&mut port, IOVA + 0x1000).1, None);
        assert_eq!(machine.peek(leaf), before);
        // HA alone.
        let leaf = tables.map(IOVA + 0x2000, 3, NOWHERE, RW.with_af(false));
        assert_eq!(send(&mut port, IOVA + 0x2000), (Ok(()), Some(NOWHERE)));
        assert!(Descriptor::from_bits(machine.peek(leaf)).af());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device uses the translations that it has asked for until CMD_ATC_INV.

use super::*;

const IOVA: u64 = 0x12_3456_7000;

#[test]
fn a_translation_is_used_until_cmd_atc_inv() {
    let config = SmmuV3UnitConfig::default().with_ats(true).with_sanitize(true);
    let machine = Machine::new(config);
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let [old, new] = [HIGH, HIGH + 0x20_0000];
    machine.poke(old, 1);
    machine.poke(new, 2);
    port.control().set_device_tlb(true);
    let inside = IovaRange { first: IOVA, last: IOVA + 0xfff };
    let outside = IovaRange { first: IOVA + 0x1000, last: IOVA + 0x1fff };
    let atc = |sid, substream, range| Invalidation::DeviceTlb { sid, substream, range };
    for range in [inside, IovaRange::ALL] {
        tables.map(IOVA, 3, old, RW);
        machine.invalidate(ALL);
        machine.invalidate(atc(SID, None, IovaRange::ALL));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        tables.map(IOVA, 3, new, RW);
        for other in
            [ALL, atc(SID, None, outside), atc(SID, Some(1), range), atc(SID + 1, None, range)]
        {
            machine.invalidate(other);
            assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "{other:?}");
        }
        machine.invalidate(atc(SID, None, range));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2));
    }
    let report = machine.unit.sanitizer_report().unwrap();
    let [stale] = report.stale[..] else { panic!("{report}") };
    assert_eq!((stale.invalidation, stale.invalidated_since), (TlbInvalidation::DeviceTlb, true));
}

#[test]
fn the_sanitizer_sets_no_flags_for_what_a_device_has() {
    let config = SmmuV3UnitConfig::default().with_ats(true).with_sanitize(true);
    let machine = Machine::new(config);
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    port.control().set_device_tlb(true);
    let cd = tables.cd();
    machine.attach(&Cd { qw0: cd.qw0.with_ha(true).with_hd(true), ..cd });
    let clean = RW.with_af(false).with_ap_read_only(true).with_dbm(true);
    let leaf = tables.map(IOVA, 3, HIGH, clean);
    let untouched = machine.peek(leaf);
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 5), Ok(5));
    assert_eq!(machine.peek(leaf), untouched & !Descriptor::AP_READ_ONLY | Descriptor::AF);
    // Software clears them, and has not told the device yet.
    machine.poke(leaf, untouched);
    machine.invalidate(ALL);
    let hits = machine.unit.counters().device_tlb_hits;
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 6), Ok(6));
    assert_eq!(machine.unit.counters().device_tlb_hits, hits + 1);
    assert_eq!(machine.peek(leaf), untouched, "the device asked for nothing");
    assert_eq!(machine.unit.sanitizer_report().unwrap().stale, []);
}

#[test]
fn a_device_keeps_nothing_of_a_stream_without_ats() {
    let machine = Machine::new(SmmuV3UnitConfig::default().with_ats(true).with_sanitize(true));
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    let [old, new] = [HIGH, HIGH + 0x20_0000];
    machine.poke(old, 1);
    machine.poke(new, 2);
    port.control().set_device_tlb(true);
    let context = machine.table(CD_SIZE);
    machine.poke_cd(context, &tables.cd());
    let entry = ste(context, 0, S1Format::Linear, 0);
    for ats in [true, false, true] {
        machine.install_with(ats, None, VMID, Some(entry));
        machine.invalidate(ALL);
        tables.map(IOVA, 3, old, RW);
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        let before = machine.unit.counters();
        tables.map(IOVA, 3, new, RW);
        machine.invalidate(ALL);
        let stale = if ats { 1 } else { 2 };
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(stale), "ATS: {ats}");
        let hits = machine.unit.counters().device_tlb_hits - before.device_tlb_hits;
        assert_eq!(hits, u64::from(ats));
        // Untranslated requests fault as those of a device without ATS, also where that would ask
        // for the page.
        let sink = machine.sink();
        machine.read(&mut port, PLAIN, IOVA + 0x1000).unwrap_err();
        assert_eq!(sink.take().len(), usize::from(!ats));
    }
}

#[test]
fn another_entry_of_the_stream_makes_its_device_forget() {
    let machine = Machine::new(SmmuV3UnitConfig::default().with_ats(true).with_sanitize(true));
    let mut port = machine.port();
    machine.poke(HIGH, 1);
    machine.poke(HIGH + 0x1000, 2);
    port.control().set_device_tlb(true);
    // Both have the VMID.
    machine.install(None, VMID, None);
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Ok(1));
    let tables = machine.tables(Granule::K4);
    tables.map(HIGH, 3, HIGH + 0x1000, RW);
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Ok(2));
    assert_eq!(machine.unit.sanitizer_report().unwrap().stale, []);
}

#[test]
fn an_address_that_is_beyond_smaller_tables_is_stale_in_a_device() {
    let machine = Machine::new(SmmuV3UnitConfig::default().with_ats(true).with_sanitize(true));
    let (tables, mut port) = (machine.tables(Granule::K4), machine.port());
    port.control().set_device_tlb(true);
    let beyond = IOVA | 1 << 40;
    // What tables of 40 bits would have for it if they ignored the bits above.
    for iova in [IOVA, beyond] {
        tables.map(iova, 3, HIGH, RW);
    }
    let cd = machine.attach(&tables.cd());
    machine.poke(HIGH, 1);
    assert_eq!(machine.read(&mut port, PLAIN, beyond), Ok(1));
    // Everybody is told, except the device.
    machine.poke_cd(cd, &Tables { input_bits: 40, ..tables }.cd());
    machine.invalidate(Invalidation::Context { sid: SID, substream: 0 });
    machine.invalidate(ALL);
    assert_eq!(machine.read(&mut port, PLAIN, beyond), Ok(1));
    let report = machine.unit.sanitizer_report().unwrap();
    let [stale] = report.stale[..] else { panic!("{report}") };
    assert_eq!((stale.iova, stale.invalidation), (beyond, TlbInvalidation::DeviceTlb));
}

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

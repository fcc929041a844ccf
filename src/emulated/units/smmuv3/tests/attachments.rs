// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's driver's entries in the stream table.

use super::*;

const IOVA: u64 = 0x1234_5000;
const OTHER: CacheTag = CacheTag(8);

#[test]
fn a_stream_without_an_entry_aborts_and_leaves_no_event() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Err((None, false)));
    machine.install(None, VMID, None);
    machine.poke(HIGH, 1);
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Ok(1));
    machine.unit.remove(SID, None);
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Err((None, false)));
    assert!(sink.take().is_empty());
    assert_eq!(machine.unit.counters().faults, 2);
}

#[test]
fn stage_2_alone_goes_by_stage_2() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let mut port = machine.port();
    machine.install(None, VMID, None);
    assert_eq!(machine.read(&mut port, PLAIN, READ_ONLY), Ok(0));
    let denied = stage2_event(EventId::Permission);
    assert_eq!(machine.write(&mut port, PLAIN, READ_ONLY, 1), denied);
    assert_eq!(machine.read(&mut port, PLAIN, NOWHERE), stage2_event(EventId::Translation));
    assert_eq!(machine.read(&mut port, PLAIN, 1 << 48), stage1_event(EventId::AddressSize));
    let substream = stage1_event(EventId::BadSubstreamId);
    assert_eq!(machine.read(&mut port, pasid(1), READ_ONLY), substream);
    // No command of the guest affects stage 2.
    let before = machine.unit.counters();
    machine.invalidate(ALL);
    assert_eq!(machine.read(&mut port, PLAIN, READ_ONLY), Ok(0));
    assert_eq!(machine.unit.counters().iotlb_misses, before.iotlb_misses);
}

#[test]
fn substreams_of_the_hosts_go_their_own_ways() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let mut port = machine.port();
    machine.poke(HIGH, 1);
    machine.install(Some(5), OTHER, None);
    assert_eq!(machine.read(&mut port, pasid(5), HIGH), Ok(1));
    assert_eq!(machine.read(&mut port, pasid(6), HIGH), stage1_event(EventId::BadCd));
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), stage1_event(EventId::StreamDisabled));
    machine.install(None, VMID, None);
    assert_eq!(machine.read(&mut port, PLAIN, HIGH), Ok(1));
    assert_eq!(machine.read(&mut port, pasid(6), HIGH), stage1_event(EventId::BadCd));
    machine.unit.remove(SID, Some(5));
    assert_eq!(machine.read(&mut port, pasid(5), HIGH), stage1_event(EventId::BadSubstreamId));
}

#[test]
fn translations_of_a_vmid_outlive_an_entry_and_go_with_its_last_one() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let mut port = machine.port();
    let tables = machine.tables(Granule::K4);
    let leaf = tables.map(IOVA, 3, HIGH, RW);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
    machine.poke(leaf, 0);
    // A new entry with the same tables: the TLB is not touched.
    machine.attach(&tables.cd());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(0));
    machine.unit.remove(SID, None);
    machine.attach(&tables.cd());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage1_event(EventId::Translation));
}

#[test]
fn vmids_and_asids_keep_translations_apart() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    machine.poke(HIGH, 1);
    machine.poke(HIGH + 0x1000, 2);
    let mut port = machine.port();
    let first = machine.tables(Granule::K4);
    first.map(IOVA, 3, HIGH, RW);
    let second = machine.tables(Granule::K4);
    second.map(IOVA, 3, HIGH + 0x1000, RW);
    let place = |tables: &Tables<'_>, asid| {
        let cd = tables.cd();
        let gpa = machine.table(CD_SIZE);
        machine.poke_cd(gpa, &Cd { qw0: cd.qw0.with_asid(asid), ..cd });
        ste(gpa, 0, S1Format::Linear, 0)
    };
    for (tag, asid) in [(VMID, ASID + 1), (OTHER, ASID)] {
        machine.install(None, VMID, Some(place(&first, ASID)));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
        machine.install(None, tag, Some(place(&second, asid)));
        assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(2), "{tag:?} {asid}");
    }
    // The same ASID for other tables is one address space to the TLB: a guest's bug that shows.
    machine.install(None, VMID, Some(place(&first, ASID)));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1));
    machine.install(None, VMID, Some(place(&second, ASID)));
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), Ok(1), "stale");
}

#[test]
fn a_write_that_ends_at_a_doorbell_is_a_message() {
    let doorbell = NOWHERE..=NOWHERE + 0xffff;
    let config = SmmuV3UnitConfig { msi_doorbell: Some(doorbell), ..Default::default() };
    let machine = Machine::new(config);
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    tables.map(IOVA, 3, NOWHERE, RW);
    tables.map(IOVA + 0x1000, 3, NOWHERE + 0x1_0000, RW);
    tables.map(IOVA + 0x2000, 3, NOWHERE, RW.with_ap_read_only(true));
    let message = |address| Err(DmaError::Interrupt { address });
    assert_eq!(port.write(PLAIN, IOVA + 0x40, &[0; 4]), message(NOWHERE + 0x40));
    let section = port.section(PLAIN);
    let translated = vm_memory::Iommu::translate(
        &section,
        GuestAddress(IOVA + 0x40),
        4,
        vm_memory::Permissions::Write,
    );
    assert!(translated.is_err());
    drop(section);
    assert!(sink.take().is_empty());
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage2_event(EventId::Translation));
    let beyond = machine.write(&mut port, PLAIN, IOVA + 0x1000, 1);
    assert_eq!(beyond, stage2_event(EventId::Translation));
    let denied = machine.write(&mut port, PLAIN, IOVA + 0x2000, 1);
    assert_eq!(denied, stage1_event(EventId::Permission));
    assert_eq!(sink.take().len(), 3);
    // Also with stage 1 bypassed.
    machine.install(None, VMID, None);
    assert_eq!(port.write(PLAIN, NOWHERE + 0x40, &[0; 4]), message(NOWHERE + 0x40));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host's driver's entries in the stream table, and event records of terminated transactions.

use super::*;
use twostage::spec::smmuv3::{StreamId, SubstreamId};
use twostage::sync::Mutex;

const IOVA: u64 = 0x1234_5000;
/// A byte in the middle of its page.
const BYTE: u64 = IOVA + 0x678;
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

#[test]
fn a_fault_of_stage_1_says_who_wanted_what_where() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    assert_eq!(machine.read(&mut port, PLAIN, BYTE), stage1_event(EventId::Translation));
    let record = sink.take()[0];
    assert_eq!(record.id(), Some(EventId::Translation));
    assert_eq!((record.stream(), record.substream()), (StreamId(SID.into()), None));
    assert_eq!((record.input_address, record.second_address), (BYTE, 0));
    assert_eq!((record.qw1.rnw(), record.qw1.s2(), record.qw1.class()), (true, false, 2));

    tables.map(BYTE, 3, HIGH, RW.with_ap_read_only(true));
    let denied = stage1_event(EventId::Permission);
    assert_eq!(machine.write(&mut port, PLAIN, BYTE, 1), denied);
    let record = sink.take()[0];
    assert_eq!((record.id(), record.qw1.rnw()), (Some(EventId::Permission), false));
}

#[test]
fn a_fault_with_pasid_says_so() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let root = machine.table(0x1000);
    let granule = Granule::K4;
    let tables = Tables { machine: &machine, root, granule, input_bits: 39, upper: false };
    let table = machine.table(0x1000);
    machine.poke_cd(table + 9 * CD_SIZE, &tables.cd());
    machine.install(None, VMID, Some(ste(table, 4, S1Format::Linear, 0)));
    let outcome = machine.read(&mut port, execute(privileged(pasid(9))), BYTE);
    assert_eq!(outcome, stage1_event(EventId::Translation));
    let record = sink.take()[0];
    assert_eq!(record.substream(), SubstreamId::new(9));
    assert!(record.qw1.pnu() && record.qw1.ind());
    let outcome = machine.read(&mut port, pasid(17), BYTE);
    assert_eq!(outcome, stage1_event(EventId::BadSubstreamId));
    let record = sink.take()[0];
    assert_eq!((record.substream(), record.qw0.ssv()), (SubstreamId::new(17), false));
}

#[test]
fn a_fault_of_stage_2_says_for_what_and_where() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    tables.map(BYTE, 3, NOWHERE, RW);
    let absent = stage2_event(EventId::Translation);
    assert_eq!(machine.read(&mut port, PLAIN, BYTE), absent);
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.qw1.s2()), (2, true));
    assert_eq!((record.input_address, record.second_address), (BYTE, NOWHERE));

    let pointer = Descriptor::new().with_valid(true).with_table(true);
    let pointer = pointer.with_address(Granule::K4, NOWHERE).into_bits();
    machine.poke(tables.entry(BYTE, 2), pointer);
    machine.invalidate(ALL);
    assert_eq!(machine.read(&mut port, PLAIN, BYTE), absent);
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.second_address), (1, NOWHERE), "CLASS is TT");

    // A block that covers all of stage 2's memory.
    tables.map(BYTE, 1, HIGH, RW);
    machine.invalidate(ALL);
    let outcome = machine.write(&mut port, PLAIN, READ_ONLY - HIGH, 1);
    assert_eq!(outcome, stage2_event(EventId::Permission));
}

#[test]
fn a_context_descriptor_without_r_records_no_fault_of_stage_1() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    let cd = tables.cd();
    machine.attach(&Cd { qw0: cd.qw0.with_r(false), ..cd });
    let absent = stage1_event(EventId::Translation);
    assert_eq!(machine.read(&mut port, PLAIN, BYTE), absent);
    assert_eq!(machine.read(&mut port, PLAIN, u64::MAX - 7), absent, "EPD1");
    assert!(sink.take().is_empty());
    tables.map(BYTE, 3, NOWHERE, RW);
    assert_eq!(machine.read(&mut port, PLAIN, BYTE), stage2_event(EventId::Translation));
    assert_eq!(sink.take().len(), 1, "stage 2 is the host's");
}

#[test]
fn whoever_is_told_may_invalidate() {
    /// Drops everything when an event comes.
    #[derive(Debug)]
    struct Invalidates(Arc<SmmuV3Unit>, Mutex<u32>);

    impl EventSink for Invalidates {
        fn event(&self, _: &EventRecord) {
            self.0.invalidate(&[ALL]);
            *self.1.lock() += 1;
        }
    }

    let machine = Machine::new(SmmuV3UnitConfig::default());
    let sink = Arc::new(Invalidates(machine.unit.clone(), Mutex::new(0)));
    machine.unit.set_event_sink(SID, sink.clone());
    let (_, mut port) = (machine.tables(Granule::K4), machine.port());
    assert!(machine.read(&mut port, PLAIN, BYTE).is_err());
    let section = port.section(PLAIN);
    let memory = vm_memory::GuestMemoryMmap::<()>::new();
    let behind = vm_memory::IommuMemory::new(memory, section, true, ());
    assert!(vm_memory::Bytes::write_slice(&behind, &[1], GuestAddress(BYTE)).is_err());
    drop(behind);
    assert_eq!(*sink.1.lock(), 2);
}

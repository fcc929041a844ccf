// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Event records of terminated transactions.

use super::*;
use twostage::spec::smmuv3::{StreamId, SubstreamId};

const IOVA: u64 = 0x1234_5678;

#[test]
fn a_fault_of_stage_1_says_who_wanted_what_where() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage1_event(EventId::Translation));
    let record = sink.take()[0];
    assert_eq!(record.id(), Some(EventId::Translation));
    assert_eq!((record.stream(), record.substream()), (StreamId(SID.into()), None));
    assert_eq!((record.input_address, record.second_address), (IOVA, 0));
    assert_eq!((record.qw1.rnw(), record.qw1.s2(), record.qw1.class()), (true, false, 2));

    tables.map(IOVA, 3, HIGH, RW.with_ap_read_only(true));
    let denied = stage1_event(EventId::Permission);
    assert_eq!(machine.write(&mut port, PLAIN, IOVA, 1), denied);
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
    let outcome = machine.read(&mut port, execute(privileged(pasid(9))), IOVA);
    assert_eq!(outcome, stage1_event(EventId::Translation));
    let record = sink.take()[0];
    assert_eq!(record.substream(), SubstreamId::new(9));
    assert!(record.qw1.pnu() && record.qw1.ind());
    let outcome = machine.read(&mut port, pasid(17), IOVA);
    assert_eq!(outcome, stage1_event(EventId::BadSubstreamId));
    let record = sink.take()[0];
    assert_eq!((record.substream(), record.qw0.ssv()), (SubstreamId::new(17), false));
}

#[test]
fn a_fault_of_stage_2_says_for_what_and_where() {
    let machine = Machine::new(SmmuV3UnitConfig::default());
    let (sink, mut port) = (machine.sink(), machine.port());
    let tables = machine.tables(Granule::K4);
    tables.map(IOVA, 3, NOWHERE, RW);
    let absent = stage2_event(EventId::Translation);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), absent);
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.qw1.s2()), (2, true));
    assert_eq!((record.input_address, record.second_address), (IOVA, NOWHERE));

    let pointer = Descriptor::new().with_valid(true).with_table(true);
    let pointer = pointer.with_address(Granule::K4, NOWHERE).into_bits();
    machine.poke(tables.entry(IOVA, 2), pointer);
    machine.invalidate(ALL);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), absent);
    let record = sink.take()[0];
    assert_eq!((record.qw1.class(), record.second_address), (1, NOWHERE), "CLASS is TT");

    // A block that covers all of stage 2's memory.
    tables.map(IOVA, 1, HIGH, RW);
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
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), absent);
    assert_eq!(machine.read(&mut port, PLAIN, u64::MAX - 7), absent, "EPD1");
    assert!(sink.take().is_empty());
    tables.map(IOVA, 3, NOWHERE, RW);
    assert_eq!(machine.read(&mut port, PLAIN, IOVA), stage2_event(EventId::Translation));
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
    assert!(machine.read(&mut port, PLAIN, IOVA).is_err());
    let section = port.section(PLAIN);
    let memory = vm_memory::GuestMemoryMmap::<()>::new();
    let behind = vm_memory::IommuMemory::new(memory, section, true, ());
    assert!(vm_memory::Bytes::write_slice(&behind, &[1], GuestAddress(IOVA)).is_err());
    drop(behind);
    assert_eq!(*sink.1.lock(), 2);
}

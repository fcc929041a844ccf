// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events, and interrupts: messages, wires, and messages to nowhere.

use super::*;
use crate::spec::pci::Pasid;
use crate::spec::smmuv3::event::Event1;

fn send(guest: &Guest, record: EventRecord) -> Option<EventRecord> {
    guest.smmu.event(record.to_words());
    guest.take_event()
}

/// A read at 0x7123 with SubstreamID 5 that the host's stage 2 refused, at GPA 0x9_9000.
fn stage2_fault(class: u8) -> EventRecord {
    EventRecord {
        qw1: Event1::new().with_rnw(true).with_s2(true).with_class(class).with_stag(7),
        input_address: 0x7123,
        second_address: 0x9_9000,
        ..EventRecord::new(EventId::Translation, STREAM, Pasid::new(5))
    }
}

#[test]
fn an_event_of_the_guests_tables_is_told_as_it_is() {
    let guest = Guest::running();
    let record = translation_fault(STREAM);
    assert_eq!(send(&guest, record), Some(record));
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    assert_eq!(guest.smmu.counters().events_recorded, 1);
}

#[test]
fn nothing_stalls() {
    let guest = Guest::running();
    let record = translation_fault(STREAM);
    let qw1 = record.qw1.with_stall(true).with_stag(0x1234);
    assert_eq!(send(&guest, EventRecord { qw1, ..record }), Some(record));
}

#[test]
fn a_refusal_of_the_hosts_stage_2_is_told_as_the_guests_own() {
    let guest = Guest::running();
    let access = Event1::new().with_rnw(true);
    let substream = Pasid::new(5);
    // For a context descriptor, a table, the page itself.
    let context = EventRecord {
        second_address: 0x9_9000,
        ..EventRecord::new(EventId::CdFetch, STREAM, substream)
    };
    assert_eq!(send(&guest, stage2_fault(0)), Some(context));
    let walk = EventRecord {
        qw1: access.with_class(1),
        input_address: 0x7123,
        second_address: 0x9_9000,
        ..EventRecord::new(EventId::WalkExternalAbort, STREAM, substream)
    };
    assert_eq!(send(&guest, stage2_fault(1)), Some(walk));
    let page = EventRecord {
        qw1: access.with_class(2),
        input_address: 0x7123,
        ..EventRecord::new(EventId::AddressSize, STREAM, substream)
    };
    assert_eq!(send(&guest, stage2_fault(2)), Some(page));
    assert_eq!(send(&guest, stage2_fault(3)), Some(page));
    // Untranslated transactions can only be beyond memory.
    guest.write_entry(STREAM, BYPASS_ENTRY);
    guest.submit(&[cfgi_ste(STREAM)]);
    assert_eq!(send(&guest, stage2_fault(2)), Some(page));
    assert_eq!(send(&guest, stage2_fault(0)), Some(page));
}

#[test]
fn what_an_entry_that_bypasses_does_not_let_pass_is_told_as_it_is() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BYPASS_ENTRY);
    guest.submit(&[cfgi_ste(STREAM)]);
    let substream = EventRecord::new(EventId::BadSubstreamId, STREAM, Pasid::new(5));
    assert_eq!(send(&guest, substream), Some(substream));
    let beyond = EventRecord { input_address: 1 << 48, ..translation_fault(STREAM) };
    let beyond =
        EventRecord { qw0: EventRecord::new(EventId::AddressSize, STREAM, None).qw0, ..beyond };
    assert_eq!(send(&guest, beyond), Some(beyond));
}

#[test]
fn a_blocked_stream_gets_the_event_of_its_blocking() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BAD_ENTRY);
    guest.submit(&[CFGI_ALL, SYNC]);
    let bad_ste = EventRecord::new(EventId::BadSte, STREAM, Pasid::new(5));
    assert_eq!(send(&guest, stage2_fault(1)), Some(bad_ste));
    // By an aborting entry.
    assert_eq!(guest.told(OTHER), None);
    assert_eq!(guest.smmu.counters().events_suppressed, 1);
}

#[test]
fn an_entry_that_cannot_be_read_is_told_with_its_address() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b1100);
    guest.write64(regs::STRTAB_BASE, MEMORY_SIZE);
    guest.write32(regs::CR0, 0b1101);
    let record = EventRecord {
        second_address: MEMORY_SIZE + 3 * 64,
        ..EventRecord::new(EventId::SteFetch, STREAM, None)
    };
    assert_eq!(send(&guest, translation_fault(STREAM)), Some(record));
}

#[test]
fn a_stream_beyond_the_table_is_told_where_the_guest_asks_for_it() {
    for (recinvsid, told) in [(0, None), (0b10, Some(EventId::BadStreamId))] {
        let guest = Guest::new(&SmmuConfig::default());
        guest.smmu.add_device(StreamId(16)).unwrap();
        guest.write_queue_registers();
        guest.write_table_registers();
        guest.write32(regs::CR2, recinvsid);
        guest.write32(regs::CR0, 0b1101);
        assert_eq!(guest.told(StreamId(16)), told);
    }
}

#[test]
fn without_translation_there_are_no_events() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b1100);
    assert_eq!(guest.told(STREAM), None);
    // Nor for a removed stream.
    guest.smmu.remove_device(STREAM);
    assert_eq!(guest.told(STREAM), None);
}

#[test]
fn a_disabled_queue_loses_events_silently() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b1001);
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.smmu.events_lost();
    assert_eq!((guest.read32(regs::EVENTQ_PROD), guest.errors()), (0, 0));
    assert_eq!(guest.interrupts(), []);
    assert_eq!(guest.smmu.counters().events_suppressed, 1);
}

#[test]
fn a_full_queue_overflows() {
    let guest = Guest::running();
    for _ in 0..20 {
        guest.smmu.event(translation_fault(STREAM).to_words());
    }
    // One for the first record, one for the loss.
    assert_eq!(guest.interrupts(), [Interrupt::Message(1), Interrupt::Message(1)]);
    assert_eq!(guest.read32(regs::EVENTQ_PROD), 1 << 31 | 16);
    let counters = guest.smmu.counters();
    assert_eq!((counters.events_recorded, counters.events_lost), (16, 4));
    // The driver takes all records, and acknowledges.
    let mut taken = 0;
    while guest.take_event().is_some() {
        taken += 1;
    }
    assert_eq!(taken, 16);
    guest.write32(regs::EVENTQ_CONS, 1 << 31 | 16);
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
}

#[test]
fn events_that_were_lost_on_their_way_are_an_overflow() {
    let guest = Guest::running();
    guest.smmu.events_lost();
    guest.smmu.events_lost();
    assert_eq!(guest.read32(regs::EVENTQ_PROD), 1 << 31);
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    guest.write32(regs::EVENTQ_CONS, 1 << 31);
    guest.smmu.events_lost();
    assert_eq!(guest.read32(regs::EVENTQ_PROD), 0);
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
}

#[test]
fn a_queue_that_is_no_memory_is_a_global_error() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b1001);
    guest.write64(regs::EVENTQ_BASE, MEMORY_SIZE | 4);
    guest.write32(regs::CR0, 0b1101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.smmu.event(translation_fault(STREAM).to_words());
    assert_eq!((guest.read32(regs::EVENTQ_PROD), guest.errors()), (0, 1 << 2));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    assert_eq!(guest.smmu.counters().events_lost, 2);
    guest.acknowledge_errors();
    assert_eq!(guest.errors(), 0);
}

#[test]
fn events_come_while_the_host_is_at_work() {
    let guest = Guest::running();
    *guest.host.faulting.lock() = Some(guest.smmu.clone());
    guest.submit(&[tlbi(1), SYNC]);
    assert_eq!(guest.take_event(), Some(translation_fault(STREAM)));
    // The reason of a block is never older than the block.
    guest.write_entry(STREAM, [0, 0]);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    assert_eq!(guest.take_event().unwrap().id(), Some(EventId::BadSte));
    *guest.host.faulting.lock() = None;
}

#[test]
fn numbers_that_no_event_has_are_passed_on() {
    let guest = Guest::running();
    let mut record = translation_fault(STREAM);
    record.qw0.set_id(0xe0);
    assert_eq!(send(&guest, record), Some(record));
}

fn sync_message(address: u64) -> Command {
    Command::Sync { signal: SyncSignal::Interrupt { address, data: 9 } }
}

#[test]
fn a_sync_can_interrupt() {
    let guest = Guest::running();
    guest.submit(&[tlbi(1), sync_message(DOORBELL)]);
    assert_eq!(guest.interrupts(), [Interrupt::Message(9)]);
    guest.submit(&[sync_message(WORD)]);
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(WORD)).unwrap(), 9);
    assert_eq!(guest.interrupts(), []);
    // Without an address it is the wire.
    guest.submit(&[sync_message(0)]);
    assert_eq!(guest.interrupts(), [Interrupt::Wire(SmmuInterrupt::CommandSync)]);
    guest.submit(&[Command::Sync { signal: SyncSignal::Event }]);
    assert_eq!((guest.interrupts(), guest.consumed()), (vec![], (5, None)));
}

#[test]
fn without_messages_there_are_wires() {
    let guest = Guest::new(&SmmuConfig { msi: false, ..Default::default() });
    guest.start();
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.submit_words(&[sync_message(DOORBELL).encode(), [0, 0]]);
    assert_eq!(
        guest.interrupts(),
        [SmmuInterrupt::EventQueue, SmmuInterrupt::CommandSync, SmmuInterrupt::GlobalError]
            .map(Interrupt::Wire)
    );
}

#[test]
fn a_message_without_address_is_a_wire() {
    let guest = Guest::running();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write64(regs::EVENTQ_IRQ_CFG0, 0);
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    assert_eq!(guest.interrupts(), [Interrupt::Wire(SmmuInterrupt::EventQueue)]);
}

#[test]
fn messages_that_nothing_takes_are_global_errors() {
    let guest = Guest::running();
    guest.submit(&[sync_message(0x9_0000_0000), SYNC]);
    // MSI_CMDQ_ABT_ERR; the queue continues.
    assert_eq!((guest.errors(), guest.consumed()), (1 << 4, (2, None)));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write64(regs::EVENTQ_IRQ_CFG0, 0x9_0000_0000);
    guest.write64(regs::GERROR_IRQ_CFG0, 0x9_0000_0000);
    guest.acknowledge_errors();
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.smmu.event(translation_fault(STREAM).to_words());
    // MSI_EVENTQ_ABT_ERR, whose own message goes nowhere: MSI_GERROR_ABT_ERR.
    assert_eq!((guest.errors(), guest.interrupts()), (1 << 5 | 1 << 7, vec![]));
}

#[test]
fn what_came_to_pass_while_interrupts_were_off_is_told_when_they_are_on() {
    let guest = Guest::running();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.smmu.event(translation_fault(STREAM).to_words());
    guest.submit_words(&[[0, 0]]);
    assert_eq!(guest.interrupts(), []);
    guest.write32(regs::IRQ_CTRL, 0b100);
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    // Nothing new.
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), []);
    guest.take_event();
    guest.acknowledge_errors();
    guest.interrupts();
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write(COMMANDS, &SYNC.encode());
    guest.acknowledge_errors();
    guest.write32(regs::IRQ_CTRL, 0b101);
    assert_eq!(guest.interrupts(), []);
}

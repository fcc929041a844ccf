// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stall model: a transaction that faults waits, the guest brings its page and resumes it
//! (§3.12.2, §4.7, §7.2.1).

use std::thread;

use super::guest::{cfgi_cd, Completion, Entry};
use super::machine::{while_reading, Kind, Machine, Served};
use crate::common::{A, B, PAGE};
use twostage::patience::{wait_for, wait_until};
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::event::{EventClass, EventId, EventRecord};
use twostage::spec::smmuv3::page_request::Resume;
use twostage::spec::smmuv3::regs::{self, Idr0};
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::SmmuConfig;
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DeviceConfig, SmmuV3UnitConfig};

const ASID: u16 = 3;
const IOVA: u64 = 0x12_3456_7000;

fn kind() -> Kind {
    let stalled = DeviceConfig::default().with_stalls(true);
    Kind {
        unit: SmmuV3UnitConfig::default().with_stalls(true),
        // The other one cannot be stalled.
        devices: [stalled, DeviceConfig::default()],
        offered: SmmuConfig::default().with_stalls(true),
    }
}

/// A machine whose guest lets both devices stall; returns the table that they are on, which maps
/// nothing.
fn machine() -> (Machine, u64) {
    stalling(kind().machine())
}

fn stalling(machine: Machine) -> (Machine, u64) {
    let guest = &machine.guest;
    let table = guest.page();
    let cd = guest.context(table, ASID);
    guest.set_stalls(cd, true);
    for rid in [A, B] {
        guest.set_entry(rid.into(), Entry::Stage1 { cd });
    }
    guest.enable();
    (machine, table)
}

/// The event of a transaction that stalls.
#[track_caller]
fn stalled(machine: &Machine) -> EventRecord {
    let event = machine.event();
    assert!(event.qw1.stall(), "{event:?}");
    event
}

fn tlbi() -> Command {
    Command::TlbiNhVa { vmid: 0, asid: ASID, range: AddressRange::at(IOVA) }
}

#[test]
fn stalls_are_offered_where_they_were_asked_for() {
    let model = |machine: Machine| {
        Idr0::from_bits(machine.guest.registers.read32(regs::IDR0)).stall_model()
    };
    assert_eq!(model(kind().machine()), 0);
    assert_eq!(model(Kind { offered: SmmuConfig::default(), ..kind() }.machine()), 1);
    let without = Kind { unit: SmmuV3UnitConfig::default(), ..kind() };
    let (host, unit) = without.host();
    let error = Machine::with(without, host, unit).err().unwrap();
    assert!(error.contains("stall=off"), "{error}");
}

#[test]
fn a_device_waits_for_a_page_and_reads_what_the_guest_brings() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    let page = guest.page();
    guest.store(page + 8, 0x1234);
    let read = while_reading(&machine, A, IOVA + 8, |dma| {
        let event = stalled(&machine);
        assert_eq!(event.id(), Some(EventId::Translation));
        assert_eq!((event.stream(), event.substream()), (A.into(), None));
        assert_eq!((event.input_address, event.second_address), (IOVA + 8, 0));
        let access = event.qw1;
        assert!(access.rnw() && !access.ind() && !access.pnu() && !access.s2());
        assert_eq!(EventClass::from_bits(access.class()), Some(EventClass::Input));
        // Of another stream, and with another tag: no effect (§4.7.1).
        let (stream, stag) = (event.stream(), access.stag());
        for (stream, stag) in [(B.into(), stag), (stream, stag + 1), (StreamId(60), stag)] {
            let none = Command::Resume { stream, stag, response: 1 };
            assert_eq!(guest.submit(&[none]), Completion::Done);
        }
        assert_eq!(guest.submit(&[Command::StallTerm { stream: B.into() }]), Completion::Done);
        guest.map(table, IOVA, page, 3, true);
        assert!(!dma.is_finished(), "it waits");
        assert_eq!(guest.resume_stalled(&event, Resume::Retry), Completion::Done);
    });
    assert_eq!(read, Ok(0x1234));
    assert_eq!(machine.read(A, IOVA), Ok(0));
    let counters = guest.registers.counters();
    assert_eq!((counters.stalls, counters.stalls_held, counters.stalls_refused), (1, 0, 0));
    assert_eq!(guest.take_event(), None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_transaction_ends_as_the_guest_says() {
    for resume in [Resume::Abort, Resume::Terminate] {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |_| {
            let event = stalled(&machine);
            assert_eq!(machine.guest.resume_stalled(&event, resume), Completion::Done);
        });
        assert!(read.is_err());
        assert_eq!(machine.guest.take_event(), None, "its event was recorded");
        assert_eq!(machine.end(), 0);
    }
}

/// As often as the guest resumes it, with an event for each time (§4.7.1).
#[test]
fn a_transaction_stalls_again() {
    let (machine, table) = machine();
    let page = machine.guest.page();
    let read = while_reading(&machine, A, IOVA, |_| {
        for _ in 0..100 {
            let event = stalled(&machine);
            assert_eq!(machine.guest.resume_stalled(&event, Resume::Retry), Completion::Done);
        }
        let event = stalled(&machine);
        machine.guest.map(table, IOVA, page, 3, true);
        machine.guest.resume_stalled(&event, Resume::Retry);
    });
    assert_eq!((read, machine.guest.registers.counters().stalls), (Ok(0), 101));
    assert_eq!(machine.end(), 0);
}

/// §3.12: of client devices that cannot be stalled, faults are terminated, with Stall of 0.
#[test]
fn a_device_that_cannot_be_stalled_is_terminated_beside_one_that_can() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    assert!(machine.read(B, IOVA).is_err());
    let event = machine.event();
    assert_eq!((event.stream(), event.qw1.stall(), event.qw1.stag()), (B.into(), false, 0));
    let page = guest.page();
    let read = while_reading(&machine, A, IOVA, |_| {
        let event = stalled(&machine);
        guest.map(table, IOVA, page, 3, true);
        guest.resume_stalled(&event, Resume::Retry);
    });
    assert_eq!((read, machine.read(B, IOVA)), (Ok(0), Ok(0)));
    assert_eq!(machine.end(), 0);
}

/// CD.S with S1STALLD is C_BAD_CD (§5.5), and so it is where stalls are not offered.
#[test]
fn a_stream_that_must_not_stall_has_no_context_that_does() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    let cd = guest.context(table, ASID);
    guest.set_raw_entry(A.into(), [1 | 5 << 1 | cd, 1 << 27]);
    assert_eq!(guest.flush_entries(&[A]), Completion::Done);
    assert!(machine.read(A, IOVA).is_err());
    assert_eq!(machine.event().id(), Some(EventId::BadCd));
    guest.set_stalls(cd, false);
    assert_eq!(guest.submit(&[cfgi_cd(A)]), Completion::Done);
    assert!(machine.read(A, IOVA).is_err());
    assert_eq!(machine.event().id(), Some(EventId::Translation));
    assert_eq!(machine.end(), 0);
    let (machine, _) = stalling(Kind { offered: SmmuConfig::default(), ..kind() }.machine());
    assert!(machine.read(A, IOVA).is_err());
    assert_eq!(machine.event().id(), Some(EventId::BadCd));
    let resume = Command::Resume { stream: A.into(), stag: 0, response: 1 };
    assert!(matches!(machine.guest.submit(&[resume]), Completion::Stopped(0, _)));
    assert_eq!(machine.end(), 0);
}

#[test]
fn whoever_waits_is_answered_when_its_tables_go() {
    type Change = fn(&Machine);
    let changes: [Change; 6] = [
        |machine| {
            machine.guest.set_entry(A.into(), Entry::Abort);
            machine.guest.flush_entries(&[A]);
        },
        |machine| {
            machine.guest.submit(&[Command::StallTerm { stream: A.into() }]);
        },
        |machine| machine.guest.registers.remove_device(A),
        |machine| machine.guest.disable(),
        |machine| machine.guest.registers.reset().unwrap(),
        |machine| machine.guest.registers.halt(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |dma| {
            let event = stalled(&machine);
            assert!(!dma.is_finished());
            change(&machine);
            wait_until("the end of the DMA", || dma.is_finished());
            if number < 4 {
                machine.guest.resume_stalled(&event, Resume::Retry);
            }
        });
        assert!(read.is_err(), "change {number}");
        assert_eq!(machine.end(), 0);
    }
}

/// An entry with other tables: Linux aborts what is outstanding of those before.
#[test]
fn whoever_waits_is_answered_when_it_gets_other_tables() {
    let (machine, _) = machine();
    let guest = &machine.guest;
    let read = while_reading(&machine, A, IOVA, |dma| {
        let event = stalled(&machine);
        let (table, page) = (guest.page(), guest.page());
        guest.map(table, IOVA, page, 3, true);
        guest.set_entry(A.into(), Entry::Stage1 { cd: guest.context(table, ASID + 1) });
        assert_eq!(guest.flush_entries(&[A]), Completion::Done);
        wait_until("the end of the DMA", || dma.is_finished());
        assert_eq!(guest.resume_stalled(&event, Resume::Retry), Completion::Done);
    });
    assert!(read.is_err());
    assert_eq!(machine.read(A, IOVA), Ok(0));
    assert_eq!(machine.end(), 0);
}

/// The record waits until the queue takes it, and is no overflow (§7.2.1, §7.4). What a CMD_SYNC
/// came before is tried again: its record could be of tables that have been invalidated (§4.7.3).
#[test]
fn a_record_is_not_lost_in_a_full_queue() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    let page = guest.page();
    // 128 events of a device that is terminated.
    for _ in 0..128 {
        assert!(machine.read(B, IOVA).is_err());
    }
    let counters = || guest.registers.counters();
    wait_until("a full queue", || counters().events_recorded == 128);
    let read = while_reading(&machine, A, IOVA, |dma| {
        wait_until("a held record", || counters().stalls_held == 1);
        assert_eq!(guest.submit(&[tlbi()]), Completion::Done);
        wait_until("a new fault", || counters().stalls_held == 2);
        assert_eq!(counters().stalls_retried, 1);
        assert!(!dma.is_finished());
        assert_eq!(guest.registers.read32(regs::EVENTQ_PROD) >> 31, 0, "no overflow");
        for _ in 0..128 {
            assert_eq!(guest.take_event().unwrap().stream(), B.into());
        }
        let event = guest.take_event().unwrap();
        assert!(event.qw1.stall() && event.stream() == A.into(), "{event:?}");
        guest.map(table, IOVA, page, 3, true);
        guest.resume_stalled(&event, Resume::Retry);
    });
    assert_eq!((read, counters().events_lost), (Ok(0), 0));
    assert_eq!(machine.end(), 0);
}

/// A device makes its request again on the host where the guest goes on.
#[test]
fn a_restored_guest_resumes_what_stalls_anew() {
    let (machine, table) = machine();
    let mut state = None;
    let mut next = None;
    let read = while_reading(&machine, A, IOVA, |_| {
        let event = stalled(&machine);
        let taken = machine.guest.registers.snapshot().unwrap();
        let ground = machine.next_ground();
        let nesting = ground.nest().unwrap();
        next = Some((machine.restored(&taken, &ground, nesting).unwrap(), event));
        state = Some(taken);
        machine.guest.registers.halt();
    });
    assert!(read.is_err());
    let (machine, former) = next.unwrap();
    let guest = &machine.guest;
    assert_eq!(guest.registers.snapshot().ok(), state);
    let page = guest.page();
    let read = while_reading(&machine, A, IOVA, |dma| {
        let event = stalled(&machine);
        if former.qw1.stag() != event.qw1.stag() {
            guest.resume_stalled(&former, Resume::Abort);
            assert!(!dma.is_finished());
        }
        guest.map(table, IOVA, page, 3, true);
        guest.resume_stalled(&event, Resume::Retry);
    });
    assert_eq!(read, Ok(0));
    assert_eq!(machine.end(), 0);
}

/// Pages at once, each of them resumed on its own and in any order (§4.7.1).
#[test]
fn many_transactions_of_a_device_stall_at_once() {
    const MANY: u64 = 20;
    let (machine, table) = machine();
    let guest = &machine.guest;
    thread::scope(|scope| {
        let iova = |number| IOVA + number * PAGE;
        let machine = &machine;
        let _served = Served(machine);
        let reads: Vec<_> =
            (0..MANY).map(|number| scope.spawn(move || machine.read(A, iova(number)))).collect();
        let mut events: Vec<_> =
            (0..MANY).map(|_| wait_for("a stall", || guest.take_event())).collect();
        let mut tags: Vec<_> = events.iter().map(|event| event.qw1.stag()).collect();
        tags.sort_unstable();
        tags.dedup();
        assert_eq!(tags.len() as u64, MANY);
        events.sort_by_key(|event| std::cmp::Reverse(event.input_address));
        for event in &events {
            let page = guest.page();
            guest.store(page, event.input_address);
            guest.map(table, event.input_address, page, 3, true);
            guest.resume_stalled(event, Resume::Retry);
        }
        for (number, read) in (0..).zip(reads) {
            assert_eq!(read.join().unwrap(), Ok(iova(number)));
        }
    });
    assert_eq!(machine.end(), 0);
}

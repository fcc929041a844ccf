// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stalled transactions: their records, and what the guest says about them (§3.12.2, §4.7, §7.2.1).

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::spec::pci::{PageResponse, Pasid};
use crate::spec::smmuv3::event::Event1;
use crate::spec::smmuv3::page_request::Resume;
use crate::viommu::PageTicket;

use PageResponse::{InvalidRequest, Success};

/// Events in a full queue.
const EVENTS_IN_QUEUE: u64 = 16;

fn config() -> SmmuConfig {
    SmmuConfig::default().with_stalls(true)
}

/// An SMMU whose guest lets [`STREAM`] stall.
fn stalling() -> Guest {
    let guest = Guest::new(&config());
    guest.start();
    guest
}

fn transaction(stag: u16) -> StalledTransaction {
    StalledTransaction {
        stream: STREAM,
        substream: Pasid::new(5),
        stag,
        address: 0x1234_5678,
        write: true,
        execute: false,
        privileged: true,
    }
}

/// The host stalls a transaction, now.
fn stall(guest: &Guest, stag: u16, ticket: u64) -> Option<PageResponse> {
    let epoch = guest.smmu.stall_epoch();
    guest.smmu.stalled(&transaction(stag), PageTicket(ticket), epoch)
}

fn resume(guest: &Guest, stag: u16, resume: Resume) {
    let response = resume.into_bits();
    guest.submit(&[Command::Resume { stream: STREAM, stag, response }, SYNC]);
}

/// What was answered since the last time.
pub(super) fn answers(guest: &Guest) -> Vec<(u64, PageResponse)> {
    let answers = std::mem::take(&mut *guest.host.answers.lock());
    answers.into_iter().map(|(ticket, code)| (ticket.0, code)).collect()
}

/// Fills the event queue with events of [`STREAM`] that are terminated.
fn fill(guest: &Guest) {
    (0..EVENTS_IN_QUEUE).for_each(|_| guest.smmu.event(translation_fault(STREAM).to_words()));
}

#[test]
fn the_registers_say_what_is_offered() {
    let idr0 = |config: &SmmuConfig| Guest::new(config).read32(regs::IDR0);
    let stall_model = |config| idr0(config) >> 24 & 3;
    assert_eq!((stall_model(&SmmuConfig::default()), stall_model(&config())), (1, 0));
    // Nothing but an abort can be had of a host.
    let relaxed = config().with_always_abort(false);
    assert_eq!(idr0(&relaxed) >> 26 & 1, 1, "TERM_MODEL");
}

/// §7.3.13.
#[test]
fn a_stalled_transaction_has_a_record_with_its_tag() {
    let guest = stalling();
    assert_eq!(stall(&guest, 0xabcd, 1), None);
    let record = EventRecord {
        qw1: Event1::new().with_stag(0xabcd).with_stall(true).with_pnu(true).with_class(2),
        input_address: 0x1234_5678,
        ..EventRecord::new(EventId::Translation, STREAM, Pasid::new(5))
    };
    assert_eq!(guest.take_event(), Some(record));
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    let fetch = StalledTransaction {
        write: false,
        execute: true,
        privileged: false,
        substream: None,
        ..transaction(1)
    };
    assert_eq!(guest.smmu.stalled(&fetch, PageTicket(2), 0), None);
    let told = guest.take_event().unwrap();
    assert!(told.qw1.rnw() && told.qw1.ind() && !told.qw1.pnu() && told.substream().is_none());
    assert_eq!(guest.smmu.counters().stalls, 2);
}

/// §4.7.1.
#[test]
fn a_transaction_goes_on_as_the_guest_says_and_no_other() {
    let guest = stalling();
    let all = [
        (1, Resume::Retry, Success),
        (2, Resume::Abort, InvalidRequest),
        (3, Resume::Terminate, InvalidRequest),
    ];
    for (stag, how, told) in all {
        assert_eq!(stall(&guest, stag, stag.into()), None);
        for (stream, stag) in [(OTHER, stag), (STREAM, stag + 1), (StreamId(9), stag)] {
            guest.submit(&[Command::Resume { stream, stag, response: 1 }, SYNC]);
        }
        assert_eq!(answers(&guest), []);
        resume(&guest, stag, how);
        resume(&guest, stag, how);
        assert_eq!(answers(&guest), [(stag.into(), told)]);
    }
    assert_eq!(guest.errors(), 0);
    // A tag is the SMMU's again, and Ab is ignored with Ac.
    assert_eq!(stall(&guest, 1, 9), None);
    guest.submit(&[Command::Resume { stream: STREAM, stag: 1, response: 3 }, SYNC]);
    assert_eq!(answers(&guest), [(9, Success)]);
}

#[test]
fn without_the_offer_nothing_stalls_and_the_commands_are_illegal() {
    for command in [
        Command::Resume { stream: STREAM, stag: 1, response: 1 },
        Command::StallTerm { stream: STREAM },
    ] {
        let guest = Guest::running();
        guest.submit(&[command, SYNC]);
        assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
        assert_eq!(stall(&guest, 1, 1), Some(InvalidRequest));
        assert_eq!(guest.take_event(), None);
    }
}

/// §4.7.2.
#[test]
fn a_stream_is_terminated_as_a_whole() {
    let guest = stalling();
    for stag in 0..EVENTS_IN_QUEUE as u16 + 3 {
        assert_eq!(stall(&guest, stag, stag.into()), None);
    }
    guest.submit(&[Command::StallTerm { stream: OTHER }]);
    assert_eq!(answers(&guest), []);
    guest.submit(&[Command::StallTerm { stream: STREAM }]);
    let all = answers(&guest);
    assert_eq!(all.len() as u64, EVENTS_IN_QUEUE + 3);
    assert!(all.iter().all(|(_, response)| *response == InvalidRequest));
    // Those without a record by then never have one.
    for _ in 0..EVENTS_IN_QUEUE {
        assert!(guest.take_event().is_some());
    }
    assert_eq!(guest.take_event(), None);
}

/// §7.2.1, §7.4: it is written when there is room, and no overflow.
#[test]
fn a_record_is_held_while_the_queue_is_full() {
    let guest = stalling();
    fill(&guest);
    guest.interrupts();
    for stag in 0..3 {
        assert_eq!(stall(&guest, stag, stag.into()), None);
    }
    assert_eq!(guest.read32(regs::EVENTQ_PROD) >> 31, 0, "no overflow");
    assert_eq!(guest.smmu.counters().stalls_held, 3);
    assert_eq!(guest.interrupts(), []);
    // It cannot be resumed before the guest has seen it.
    resume(&guest, 0, Resume::Abort);
    // That CMD_SYNC was the first since.
    assert_eq!(answers(&guest), [(0, Success), (1, Success), (2, Success)]);
    for stag in 0..3 {
        assert_eq!(stall(&guest, stag, 10 + u64::from(stag)), None);
    }
    for stag in 0..3 {
        assert!(!guest.take_event().unwrap().qw1.stall());
        let last = EVENTS + 32 * stag;
        let words = guest.memory.read_obj(GuestAddress(last)).unwrap();
        let record = EventRecord::from_words(words);
        assert_eq!((record.qw1.stall(), u64::from(record.qw1.stag())), (true, stag));
    }
    // One that is terminated is lost meanwhile, and that is an overflow.
    guest.smmu.event(translation_fault(STREAM).to_words());
    assert_eq!(guest.read32(regs::EVENTQ_PROD) >> 31, 1);
    resume(&guest, 1, Resume::Retry);
    assert_eq!(answers(&guest), [(11, Success)]);
}

/// §7.2.1: nor is it lost while the queue is off, or waits for an error to be acknowledged.
#[test]
fn a_record_is_held_until_the_queue_can_be_written() {
    let guest = stalling();
    guest.write32(regs::CR0, 0b1001);
    assert_eq!(stall(&guest, 1, 1), None);
    assert_eq!(guest.take_event(), None);
    guest.write64(regs::EVENTQ_BASE, MEMORY_SIZE | 4);
    guest.write32(regs::CR0, 0b1101);
    assert_eq!(guest.errors(), 1 << 2, "EVENTQ_ABT_ERR");
    guest.write32(regs::CR0, 0b1001);
    guest.write64(regs::EVENTQ_BASE, EVENTS | 4);
    guest.write32(regs::CR0, 0b1101);
    assert_eq!(guest.take_event(), None);
    guest.acknowledge_errors();
    assert_eq!(guest.take_event().unwrap().qw1.stag(), 1);
    resume(&guest, 1, Resume::Retry);
    assert_eq!(answers(&guest), [(1, Success)]);
}

/// §4.7.3: after a CMD_SYNC, no record of what was before it.
#[test]
fn what_has_no_record_by_a_sync_is_tried_again() {
    let guest = stalling();
    let epoch = guest.smmu.stall_epoch();
    guest.submit(&[tlbi(1)]);
    assert_eq!(guest.smmu.stall_epoch(), epoch);
    guest.submit(&[SYNC]);
    assert_eq!(*guest.host.looks.lock(), 1, "what the host has not given yet");
    // What it had, and gives now.
    assert_eq!(guest.smmu.stalled(&transaction(1), PageTicket(1), epoch), Some(Success));
    assert_eq!(guest.take_event(), None);
    assert_eq!((stall(&guest, 1, 2), guest.take_event().is_some()), (None, true));
    // What has one stays.
    guest.submit(&[SYNC]);
    assert_eq!(answers(&guest), []);
    assert_eq!(guest.smmu.counters().stalls_retried, 1);
    // A guest that was offered no stalls costs the host nothing.
    let guest = Guest::running();
    guest.submit(&[SYNC]);
    assert_eq!(*guest.host.looks.lock(), 0);
}

/// However many there are: a stream makes progress beside a guest that invalidates without end.
#[test]
fn a_sync_records_what_the_host_has_not_given_yet() {
    let guest = stalling();
    guest.host.unread.lock().push((transaction(1), PageTicket(1)));
    guest.submit(&[SYNC]);
    let event = guest.take_event().unwrap();
    assert_eq!((event.qw1.stall(), event.qw1.stag()), (true, 1));
    assert_eq!(answers(&guest), []);
    resume(&guest, 1, Resume::Retry);
    assert_eq!(answers(&guest), [(1, Success)]);
    // What cannot be recorded by then is tried again; what is blocked by now is refused.
    fill(&guest);
    let blocked = StalledTransaction { stream: OTHER, ..transaction(2) };
    guest.host.unread.lock().extend([(transaction(2), PageTicket(2)), (blocked, PageTicket(3))]);
    guest.submit(&[SYNC]);
    assert_eq!(answers(&guest), [(3, InvalidRequest), (2, Success)]);
}

/// §4.7.2: CMD_STALL_TERM ends what is stalled, whoever has it.
#[test]
fn what_the_host_has_not_given_yet_is_terminated_too() {
    let guest = stalling();
    guest.host.unread.lock().push((transaction(1), PageTicket(1)));
    guest.submit(&[Command::StallTerm { stream: STREAM }, SYNC]);
    assert_eq!(answers(&guest), [(1, InvalidRequest)]);
    assert_eq!(guest.take_event(), None);
}

/// A guest that takes no events and has the host end what is stalled, again and again.
#[test]
fn a_tag_has_one_held_record() {
    let guest = stalling();
    fill(&guest);
    for ticket in 0..3 {
        assert_eq!(stall(&guest, 7, ticket), None);
    }
    assert_eq!(answers(&guest), [(0, InvalidRequest), (1, InvalidRequest)]);
    guest.submit(&[SYNC]);
    assert_eq!(answers(&guest), [(2, Success)]);
}

/// §6.3.9.6, and what the architecture does not know.
#[test]
fn what_is_stalled_ends_with_its_stream_translation_a_reset_and_the_machine() {
    type End = fn(&Guest);
    let ends: [End; 4] = [
        |guest| guest.smmu.remove_device(STREAM),
        |guest| guest.write32(regs::CR0, 0b1100),
        |guest| guest.smmu.reset().unwrap(),
        |guest| guest.smmu.halt(),
    ];
    for end in ends {
        let guest = stalling();
        assert_eq!(stall(&guest, 1, 1), None);
        fill(&guest);
        assert_eq!(stall(&guest, 2, 2), None);
        end(&guest);
        assert_eq!(answers(&guest), [(1, InvalidRequest), (2, InvalidRequest)]);
        assert_eq!(stall(&guest, 3, 3), Some(InvalidRequest));
        assert_eq!(answers(&guest), []);
    }
}

/// One that is blocked by now, or of which nobody knows.
#[test]
fn what_no_guest_can_resume_ends() {
    let guest = stalling();
    for stream in [OTHER, StreamId(9)] {
        let transaction = StalledTransaction { stream, ..transaction(1) };
        let told = guest.smmu.stalled(&transaction, PageTicket(1), 0);
        assert_eq!(told, Some(InvalidRequest));
    }
    assert_eq!((guest.take_event(), guest.smmu.counters().stalls_refused), (None, 2));
}

/// The host has words of the entry that say whether it stalls (§5.2, §5.5).
#[test]
fn an_entry_may_keep_its_stream_from_stalling() {
    let guest = stalling();
    let entry = [stage1_entry(CONTEXTS)[0], 1 << 27];
    guest.write_entry(STREAM, entry);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    let policy = StreamPolicy::Stage1 { ste: entry };
    assert_eq!(guest.calls(), [Call::Configure(STREAM, policy)]);
}

/// What was open is not in a snapshot: its device makes its request again.
#[test]
fn a_restored_smmu_has_the_records_and_nothing_stalled() {
    let guest = stalling();
    assert_eq!(stall(&guest, 1, 1), None);
    let state = guest.smmu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.smmu.snapshot().unwrap(), state);
    assert_eq!(restored.take_event().unwrap().qw1.stag(), 1);
    resume(&restored, 1, Resume::Retry);
    assert_eq!(answers(&restored), []);
    assert_eq!(stall(&restored, 1, 7), None);
    resume(&restored, 1, Resume::Retry);
    assert_eq!(answers(&restored), [(7, Success)]);
}

/// One step of a life.
#[derive(Debug, Clone)]
enum Step {
    Stall { old: bool },
    Unread,
    Resume { stag: u16, response: u8 },
    Terminate,
    Sync,
    Fill,
    Take(usize),
    Enables(u32),
    Entry(bool),
    Remove,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => prop::bool::weighted(0.1).prop_map(|old| Step::Stall { old }),
        2 => Just(Step::Unread),
        6 => (0..40u16, 0..4u8).prop_map(|(stag, response)| Step::Resume { stag, response }),
        1 => Just(Step::Terminate),
        2 => Just(Step::Sync),
        1 => Just(Step::Fill),
        3 => (1..8usize).prop_map(Step::Take),
        1 => (0..4u32).prop_map(|on| Step::Enables(0b1000 | (on & 1) | (on & 2) << 1)),
        1 => any::<bool>().prop_map(Step::Entry),
        1 => Just(Step::Remove),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever the guest does, each stalled transaction has exactly one answer, and none has a
    /// record after a CMD_SYNC that came before it.
    #[test]
    fn each_transaction_has_exactly_one_answer(steps in prop::collection::vec(step(), 0..80)) {
        let guest = stalling();
        let mut given: BTreeMap<u64, u32> = BTreeMap::new();
        let mut epoch = 0;
        for (ticket, step) in (0..).zip(steps) {
            match step {
                Step::Stall { old } => {
                    let now = guest.smmu.stall_epoch();
                    let read = if old { epoch } else { now };
                    let transaction = transaction(ticket as u16);
                    let at_once = guest.smmu.stalled(&transaction, PageTicket(ticket), read);
                    prop_assert!(read == now || at_once.is_some());
                    given.insert(ticket, at_once.is_some().into());
                    epoch = read;
                }
                Step::Unread => {
                    let unread = (transaction(ticket as u16), PageTicket(ticket));
                    guest.host.unread.lock().push(unread);
                    given.insert(ticket, 0);
                }
                Step::Resume { stag, response } => {
                    guest.submit(&[Command::Resume { stream: STREAM, stag, response }]);
                }
                Step::Terminate => guest.submit(&[Command::StallTerm { stream: STREAM }]),
                Step::Sync => guest.submit(&[tlbi(1), SYNC]),
                Step::Fill => fill(&guest),
                Step::Take(count) => (0..count).for_each(|_| {
                    guest.take_event();
                }),
                Step::Enables(cr0) => guest.write32(regs::CR0, cr0),
                Step::Entry(translates) => {
                    let entry = if translates { stage1_entry(CONTEXTS) } else { [1, 0] };
                    guest.write_entry(STREAM, entry);
                    guest.submit(&[cfgi_ste(STREAM), SYNC]);
                }
                Step::Remove => {
                    guest.smmu.remove_device(STREAM);
                    guest.smmu.add_device(STREAM).unwrap();
                }
                Step::Reset => {
                    guest.smmu.reset().unwrap();
                    guest.start();
                }
            }
        }
        // What nobody has taken is the host's to answer.
        let unread = std::mem::take(&mut *guest.host.unread.lock());
        given.extend(unread.into_iter().map(|(_, ticket)| (ticket.0, 1)));
        guest.smmu.halt();
        for (ticket, _) in answers(&guest) {
            *given.entry(ticket).or_default() += 1;
        }
        prop_assert!(given.values().all(|count| *count == 1), "{given:?}");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The PRI queue, its overflow, and who is answered what (§8, §4.5.2).

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::stalls::answers;
use super::*;
use crate::spec::pci::{PageResponse, Pasid};
use crate::spec::smmuv3::page_request::PageRequest;
use crate::viommu::PageTicket;

use PageResponse::{Failure, InvalidRequest, Success};

/// 16 entries.
const PAGES: u64 = 0xe000;
const SLOTS: u64 = 16;
/// CR0: SMMUEN, PRIQEN, EVENTQEN, CMDQEN.
const ALL_ON: u32 = 0b1111;
/// Of GERROR.
const PRIQ_ABT_ERR: u32 = 1 << 3;

fn config() -> SmmuConfig {
    SmmuConfig::default().with_ats(true).with_page_requests(true)
}

/// An SMMU whose guest serves page requests of [`STREAM`], with message 3 for them.
pub(super) fn serving() -> Guest {
    let guest = Guest::new(&config());
    guest.start();
    guest.write64(regs::PRIQ_BASE, PAGES | 4);
    guest.write64(regs::PRIQ_IRQ_CFG0, DOORBELL);
    guest.write32(regs::PRIQ_IRQ_CFG1, 3);
    guest.write32(regs::IRQ_CTRL, 0b111);
    guest.write32(regs::CR0, ALL_ON);
    guest
}

fn request(group: u16) -> PageRequest {
    PageRequest {
        stream: STREAM,
        substream: Pasid::new(5),
        group,
        last: true,
        address: 0x7000,
        read: true,
        write: false,
        execute: false,
        privileged: false,
    }
}

fn ask_for(guest: &Guest, requests: &[PageRequest], ticket: u64) -> Option<PageResponse> {
    guest.smmu.page_requests(requests, PageTicket(ticket))
}

/// Asks for one page.
fn ask(guest: &Guest, group: u16, ticket: u64) -> Option<PageResponse> {
    ask_for(guest, &[request(group)], ticket)
}

fn response(group: u16, response: u8) -> Command {
    let PageRequest { stream, substream, .. } = request(group);
    Command::PriResp { stream, substream, group, response }
}

fn respond(guest: &Guest, group: u16, code: u8) {
    guest.submit(&[response(group, code), SYNC]);
}

fn queued(guest: &Guest, slot: u64) -> PageRequest {
    PageRequest::decode(guest.memory.read_obj(GuestAddress(PAGES + 16 * slot)).unwrap())
}

/// PRIQ_PROD: the index, and OVFLG.
fn produced(guest: &Guest) -> (u32, bool) {
    let prod = guest.read32(regs::PRIQ_PROD);
    (prod & 0xf_ffff, prod >> 31 != 0)
}

#[test]
fn registers_are_reserved_unless_page_requests_are_offered() {
    for (guest, offered) in [(Guest::running(), false), (Guest::new(&config()), true)] {
        assert_eq!(guest.read32(regs::IDR0) >> 16 & 1, u32::from(offered), "PRI");
        assert_eq!(guest.read32(regs::IDR1) >> 11 & 0x1f, if offered { 12 } else { 0 }, "PRIQS");
        assert_eq!(guest.read32(regs::IDR3) >> 5 & 1, u32::from(offered), "PPS");
        for (register, writable) in [
            (regs::PRIQ_BASE, 0x400f_ffff_ffff_ffff),
            (regs::PRIQ_IRQ_CFG0, 0x000f_ffff_ffff_fffc),
            (regs::PRIQ_IRQ_CFG1, 0x8000_003f_ffff_ffff),
            (regs::PRIQ_PROD, 0x800f_ffff_800f_ffff),
        ] {
            guest.write64(register, u64::MAX);
            assert_eq!(guest.read64(register), if offered { writable } else { 0 }, "{register:#x}");
        }
        guest.write32(regs::IRQ_CTRL, 0b111);
        assert_eq!(guest.read32(regs::IRQ_CTRLACK), if offered { 0b111 } else { 0b101 });
        guest.write32(regs::CR0, 0b1110);
        assert_eq!(guest.read32(regs::CR0ACK), if offered { 0b1110 } else { 0b1100 });
    }
    // §6.3.9.5: they are fixed by PRIQEN itself, whether translation is on or not.
    let guest = serving();
    for cr0 in [ALL_ON, ALL_ON & !1] {
        guest.write32(regs::CR0, cr0);
        guest.write64(regs::PRIQ_BASE, 0);
        guest.write32(regs::PRIQ_PROD, 3);
        guest.write64(regs::PRIQ_IRQ_CFG0, 0);
        assert_eq!(guest.read64(regs::PRIQ_BASE), PAGES | 4);
        assert_eq!(guest.read64(regs::PRIQ_IRQ_CFG0), DOORBELL);
        assert_eq!(produced(&guest).0, 0);
    }
}

#[test]
fn without_the_offer_a_response_is_illegal_and_so_is_a_reserved_one() {
    let guest = Guest::running();
    guest.submit(&[response(1, 2), SYNC]);
    assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    let guest = serving();
    assert_eq!(ask(&guest, 1, 1), None);
    respond(&guest, 1, 3);
    assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    assert_eq!(answers(&guest), []);
}

/// §6.3.36: without LO, when the queue is no longer empty; with it, for each last one of a group.
#[test]
fn an_interrupt_tells_of_a_queue_or_of_a_group() {
    let guest = serving();
    let of_pages = [Interrupt::Message(3)];
    assert_eq!((ask(&guest, 1, 1), guest.interrupts()), (None, of_pages.to_vec()));
    assert_eq!((ask(&guest, 2, 2), guest.interrupts()), (None, vec![]));
    assert_eq!((produced(&guest), queued(&guest, 1)), ((2, false), request(2)));
    guest.write32(regs::PRIQ_CONS, 2);
    assert_eq!((ask(&guest, 3, 3), guest.interrupts()), (None, of_pages.to_vec()));
    // What came while it was disabled.
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.write32(regs::PRIQ_IRQ_CFG2, 1 << 31);
    guest.write32(regs::IRQ_CTRL, 0b111);
    assert_eq!(guest.interrupts(), of_pages);
    let first = PageRequest { last: false, ..request(4) };
    assert_eq!((ask_for(&guest, &[first, request(4)], 4), guest.interrupts().len()), (None, 1));
    assert_eq!((ask(&guest, 5, 5), guest.interrupts().len()), (None, 1));
    // A message to nowhere, and a wire.
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.write64(regs::PRIQ_IRQ_CFG0, 0xfff_fff0_0000);
    guest.write32(regs::IRQ_CTRL, 0b111);
    assert_eq!(guest.errors(), 1 << 6, "MSI_PRIQ_ABT_ERR");
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.write64(regs::PRIQ_IRQ_CFG0, 0);
    guest.interrupts();
    guest.write32(regs::IRQ_CTRL, 0b111);
    assert_eq!(guest.interrupts(), [Interrupt::Wire(SmmuInterrupt::PageQueue)]);
}

/// §8.1.
#[test]
fn a_full_queue_overflows_until_the_guest_has_seen_it() {
    let guest = serving();
    for number in 0..SLOTS {
        assert_eq!(ask(&guest, number as u16, number), None);
    }
    guest.interrupts();
    // The first that finds no space; the device may try again.
    assert_eq!((ask(&guest, 200, 200), produced(&guest)), (Some(Success), (16, true)));
    assert_eq!((ask(&guest, 200, 201), produced(&guest)), (Some(Success), (16, true)));
    assert_eq!(guest.interrupts(), [], "the queue was not empty");
    // Free space alone is not enough, unlike for events.
    guest.write32(regs::PRIQ_CONS, 16);
    assert_eq!(ask(&guest, 200, 202), Some(Success));
    guest.write32(regs::PRIQ_CONS, 1 << 31 | 16);
    assert_eq!((ask(&guest, 200, 203), produced(&guest)), (None, (17, true)));
    assert_eq!(guest.interrupts().len(), 1, "the queue was empty");
    // The queue goes on at its start.
    assert_eq!(queued(&guest, 0), request(200));
    let counters = guest.smmu.counters();
    assert_eq!((counters.page_requests, counters.page_requests_lost), (SLOTS + 1, 3));
    assert_eq!(answers(&guest), [], "those in the queue are the guest's");
    // With LO, of each last one that is discarded, too.
    guest.write32(regs::IRQ_CTRL, 0b101);
    guest.write32(regs::PRIQ_IRQ_CFG2, 1 << 31);
    guest.write32(regs::PRIQ_CONS, 1 << 31 | 17);
    guest.write32(regs::IRQ_CTRL, 0b111);
    guest.write32(regs::PRIQ_CONS, 1);
    assert_eq!((ask(&guest, 201, 204), guest.interrupts().len()), (Some(Success), 1));
}

/// A group that goes over the end of the queue; and one of which only a part fits.
#[test]
fn a_group_is_in_the_queue_or_answered_as_a_whole() {
    let guest = Guest::new(&config());
    guest.start();
    guest.write64(regs::PRIQ_BASE, PAGES | 4);
    guest.write32(regs::PRIQ_PROD, 14);
    guest.write32(regs::PRIQ_CONS, 13);
    guest.write32(regs::CR0, ALL_ON);
    let group = |number: u16| {
        let page = |index: u64| PageRequest {
            last: index == 2,
            address: 0x1000 * index,
            ..request(number)
        };
        [page(0), page(1), page(2)]
    };
    assert_eq!(ask_for(&guest, &group(7), 1), None);
    assert_eq!(produced(&guest), (17, false));
    for (slot, expected) in [14, 15, 0].into_iter().zip(group(7)) {
        assert_eq!(queued(&guest, slot), expected);
    }
    // Two are left.
    guest.write32(regs::PRIQ_CONS, 3);
    assert_eq!(ask_for(&guest, &group(8), 2), Some(Success));
    assert_eq!(produced(&guest), (19, true));
    respond(&guest, 8, 2);
    assert_eq!(answers(&guest), [], "it has its answer");
    respond(&guest, 7, 2);
    assert_eq!(answers(&guest), [(1, Success)]);
}

/// §4.5.2, §8.3.
#[test]
fn responses_are_for_groups_that_are_open() {
    let guest = serving();
    for (group, code, told) in [(3, 2, Success), (4, 1, InvalidRequest), (5, 0, Failure)] {
        assert_eq!(ask(&guest, group, group.into()), None);
        let PageRequest { stream, substream, .. } = request(group);
        for (stream, substream, group) in [
            (OTHER, substream, group),
            (stream, None, group),
            (stream, Pasid::new(6), group),
            (stream, substream, group + 1),
            (StreamId(9), substream, group),
        ] {
            guest.submit(&[Command::PriResp { stream, substream, group, response: 2 }, SYNC]);
        }
        assert_eq!(answers(&guest), []);
        respond(&guest, group, code);
        respond(&guest, group, code);
        assert_eq!(answers(&guest), [(group.into(), told)]);
    }
    assert_eq!(guest.errors(), 0);
}

#[test]
fn an_index_that_is_used_again_ends_the_former_request() {
    let guest = serving();
    assert_eq!((ask(&guest, 3, 1), ask(&guest, 3, 2)), (None, None));
    assert_eq!(answers(&guest), [(1, InvalidRequest)]);
    respond(&guest, 3, 2);
    assert_eq!(answers(&guest), [(2, Success)]);
}

/// A response comes after the invalidations before it, and is not given twice (§4.5.2, §7.1).
#[test]
fn a_response_comes_after_what_the_guest_invalidated_before() {
    let guest = serving();
    assert_eq!(ask(&guest, 3, 1), None);
    guest.refuse(true);
    guest.submit(&[tlbi(1), response(3, 2), SYNC]);
    assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    assert_eq!(answers(&guest), []);
    guest.refuse(false);
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (3, None));
    assert_eq!(answers(&guest), [(1, Success)]);
}

/// Refused at once (§8.2), and nothing is written.
#[test]
fn what_nothing_serves_is_refused() {
    type Change = fn(&Guest);
    let cases: [Change; 6] = [
        |guest| guest.write32(regs::CR0, ALL_ON & !2),
        |guest| guest.write32(regs::CR0, ALL_ON & !1),
        |guest| {
            guest.write32(regs::CR0, ALL_ON & !2);
            guest.write64(regs::PRIQ_BASE, MEMORY_SIZE | 4);
            guest.write32(regs::CR0, ALL_ON);
        },
        |guest| {
            guest.write_entry(STREAM, [1, 0]);
            guest.submit(&[cfgi_ste(STREAM), SYNC]);
        },
        |guest| guest.smmu.remove_device(STREAM),
        |guest| guest.smmu.halt(),
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let guest = serving();
        change(&guest);
        assert_eq!(ask(&guest, 3, 1), Some(Failure), "case {number}");
        assert_eq!(produced(&guest), (0, false));
        assert_eq!(guest.smmu.counters().page_requests_refused, 1);
    }
    let guest = serving();
    assert_eq!(ask_for(&guest, &[], 1), Some(Failure));
    let other = PageRequest { stream: OTHER, ..request(1) };
    assert_eq!(ask_for(&guest, &[other], 1), Some(Failure), "it aborts");
}

/// §8.2: until the guest has seen that the queue is not in memory.
#[test]
fn after_an_aborted_write_the_queue_waits_for_the_guest() {
    let guest = Guest::new(&config());
    guest.start();
    guest.write64(regs::PRIQ_BASE, MEMORY_SIZE | 4);
    guest.write32(regs::CR0, ALL_ON);
    guest.interrupts();
    assert_eq!((ask(&guest, 3, 1), guest.errors()), (Some(Failure), PRIQ_ABT_ERR));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    guest.write32(regs::CR0, ALL_ON & !2);
    guest.write64(regs::PRIQ_BASE, PAGES | 4);
    guest.write32(regs::CR0, ALL_ON);
    assert_eq!((ask(&guest, 3, 2), guest.interrupts()), (Some(Failure), vec![]));
    guest.acknowledge_errors();
    assert_eq!((ask(&guest, 3, 3), produced(&guest)), (None, (1, false)));
}

#[test]
fn requests_end_with_their_stream_translation_a_reset_and_the_machine() {
    type End = fn(&Guest);
    let ends: [End; 4] = [
        |guest| guest.smmu.remove_device(STREAM),
        |guest| guest.write32(regs::CR0, ALL_ON & !1),
        |guest| guest.smmu.reset().unwrap(),
        |guest| guest.smmu.halt(),
    ];
    for end in ends {
        let guest = serving();
        assert_eq!((ask(&guest, 3, 1), ask(&guest, 4, 2)), (None, None));
        end(&guest);
        assert_eq!(answers(&guest), [(1, Failure), (2, Failure)]);
        assert_eq!(ask(&guest, 5, 3), Some(Failure));
        assert_eq!(answers(&guest), []);
    }
    // §6.3.9.6: while translation is off, a response is ignored.
    let guest = serving();
    guest.write32(regs::CR0, ALL_ON & !1);
    respond(&guest, 3, 2);
    assert_eq!((guest.errors(), answers(&guest)), (0, vec![]));
}

/// The queue of a snapshot is the guest's memory; responses to what was open have no effect.
#[test]
fn a_restored_smmu_has_the_queue_and_no_open_group() {
    let guest = serving();
    assert_eq!(ask(&guest, 3, 1), None);
    let state = guest.smmu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.smmu.snapshot().unwrap(), state);
    assert_eq!(restored.every_register(), guest.every_register());
    respond(&restored, 3, 2);
    assert_eq!(answers(&restored), []);
    assert_eq!((ask(&restored, 3, 7), produced(&restored)), (None, (2, false)));
    respond(&restored, 3, 2);
    assert_eq!(answers(&restored), [(7, Success)]);
    let mut state = state;
    state.config.page_requests = false;
    let told = state.check().unwrap_err().to_string();
    assert!(told.ends_with("but no page requests are offered"), "{told}");
}

/// One step of a life.
#[derive(Debug, Clone)]
enum Step {
    Ask { group: u16, pages: usize, pasid: Option<u32> },
    Respond { group: u16, pasid: Option<u32>, code: u8 },
    Cons(u32),
    Enables(u32),
    Acknowledge,
    Entry(bool),
    Remove,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let pasids = || prop::option::of(4..6u32);
    prop_oneof![
        8 => (0..6u16, 1..4usize, pasids())
            .prop_map(|(group, pages, pasid)| Step::Ask { group, pages, pasid }),
        6 => (0..6u16, pasids(), 0..3u8)
            .prop_map(|(group, pasid, code)| Step::Respond { group, pasid, code }),
        3 => (0..0x20u32, any::<bool>())
            .prop_map(|(rd, ack)| Step::Cons(rd | u32::from(ack) << 31)),
        1 => (0..4u32).prop_map(|on| Step::Enables(0b1100 | on)),
        1 => Just(Step::Acknowledge),
        1 => any::<bool>().prop_map(Step::Entry),
        1 => Just(Step::Remove),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever the guest does, each group has exactly one answer.
    #[test]
    fn each_group_has_exactly_one_answer(steps in prop::collection::vec(step(), 0..80)) {
        let guest = serving();
        let mut given: BTreeMap<u64, u32> = BTreeMap::new();
        for (ticket, step) in (0..).zip(steps) {
            match step {
                Step::Ask { group, pages, pasid } => {
                    let page = |index| PageRequest {
                        last: index + 1 == pages,
                        substream: pasid.and_then(Pasid::new),
                        ..request(group)
                    };
                    let requests: Vec<_> = (0..pages).map(page).collect();
                    let at_once = ask_for(&guest, &requests, ticket);
                    given.insert(ticket, at_once.is_some().into());
                }
                Step::Respond { group, pasid, code: response } => {
                    let (stream, substream) = (STREAM, pasid.and_then(Pasid::new));
                    guest.submit(&[Command::PriResp { stream, substream, group, response }, SYNC]);
                }
                Step::Cons(cons) => guest.write32(regs::PRIQ_CONS, cons),
                Step::Enables(cr0) => guest.write32(regs::CR0, cr0),
                Step::Acknowledge => guest.acknowledge_errors(),
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
                    guest.write64(regs::PRIQ_BASE, PAGES | 4);
                    guest.write32(regs::CR0, ALL_ON);
                }
            }
        }
        guest.smmu.halt();
        for (ticket, _) in answers(&guest) {
            *given.entry(ticket).or_default() += 1;
        }
        prop_assert!(given.values().all(|count| *count == 1), "{given:?}");
    }
}

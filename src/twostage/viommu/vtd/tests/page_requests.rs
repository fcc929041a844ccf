// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The page request queue, its overflow, and who is answered what.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::spec::vtd::page_request::{PageRequest, PageResponse};
use crate::spec::vtd::qi::{PasidCacheScope, StatusWrite};
use crate::viommu::vtd::queue::Slice;

const PAGES: u64 = 0x2_0000;
/// Descriptors of a queue of one page, of which one stays free.
const SLOTS: u64 = 0x1000 / 32;
const PPR: u32 = 1;
const PRO: u32 = 2;

use PageResponse::{InvalidRequest, Success};

fn config() -> VtdConfig {
    VtdConfig::default().with_device_iotlb(true).with_page_requests(true)
}

/// A unit whose guest serves page requests of [`RID`] for PASIDs 0 and 5.
pub(super) fn serving() -> Guest {
    let guest = Guest::new(config());
    guest.write_tables();
    // PRE, PASIDE, P.
    guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 4 | 1 << 3 | 1]);
    guest.write_pasid(5, 0x6000);
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.enable_translation();
    guest.write64(regs::PQA, PAGES);
    guest.calls();
    guest
}

fn request(group: u16) -> PageRequest {
    PageRequest {
        rid: RID,
        pasid: Some(pasid(5)),
        group,
        last: true,
        address: 0x7000,
        read: true,
        write: false,
        execute: false,
        privileged: false,
    }
}

/// Asks for one page.
pub(super) fn ask(guest: &Guest, group: u16, ticket: u64) -> Option<PageResponse> {
    guest.iommu.page_requests(&[request(group)], PageTicket(ticket))
}

fn respond(guest: &Guest, group: u16, code: u8) {
    let PageRequest { rid: requester, pasid, .. } = request(group);
    guest.submit(&[Descriptor::PageGroupResponse { requester, pasid, group, code }]);
}

/// What was answered since the last time.
fn answers(guest: &Guest) -> Vec<(u64, PageResponse)> {
    let answers = std::mem::take(&mut *guest.host.answers.lock());
    answers
        .into_iter()
        .map(|(rid, ticket, code)| (assert_eq!(rid, RID), (ticket.0, code)).1)
        .collect()
}

fn status(guest: &Guest) -> u32 {
    guest.read32(regs::PRS)
}

fn queued(guest: &Guest, slot: u64) -> Option<PageRequest> {
    let word = |at: u64| guest.memory.read_obj(GuestAddress(PAGES + 32 * slot + 8 * at)).unwrap();
    PageRequest::decode([0, 1, 2, 3].map(word))
}

#[test]
fn registers_are_as_after_reset_unless_page_requests_are_offered() {
    for (guest, offered) in [(Guest::running(), false), (Guest::new(config()), true)] {
        assert_eq!(guest.read64(regs::ECAP) >> 29 & 1, u64::from(offered), "ECAP.PRS");
        assert_eq!(guest.read32(regs::PECTL), 1 << 31, "IM");
        for (register, writable) in [
            (regs::PQH, 0x7_ffe0),
            (regs::PQT, 0x7_ffe0),
            (regs::PQA, !0xff8),
            (regs::PEADDR, !3),
            (regs::PECTL, 1 << 31 | 0xffff_ffff << 32),
        ] {
            guest.write64(register, u64::MAX);
            let reset = if register == regs::PECTL { 1 << 31 } else { 0 };
            let read = if offered { writable } else { reset };
            assert_eq!(guest.read64(register), read, "{register:#x}");
        }
        guest.write32(regs::PRS, 3);
        assert_eq!(status(&guest), 0);
    }
}

#[test]
fn an_event_is_sent_once_until_the_guest_has_seen_it() {
    let guest = serving();
    assert_eq!(ask(&guest, 1, 1), None);
    // Masked after reset: pending.
    assert_eq!((guest.messages(), guest.read32(regs::PECTL) >> 30), (vec![], 3));
    guest.write32(regs::PEDATA, 0x42);
    guest.write64(regs::PEADDR, 0x1_fee0_1000);
    guest.write32(regs::PECTL, 0);
    let event = [(0x1_fee0_1000, 0x42)];
    assert_eq!(guest.messages(), event);
    assert_eq!((ask(&guest, 2, 2), guest.messages()), (None, vec![]));
    assert_eq!((status(&guest), guest.read64(regs::PQT)), (PPR, 64));
    assert_eq!(queued(&guest, 1), Some(request(2)));
    guest.write32(regs::PRS, PPR);
    assert_eq!((ask(&guest, 3, 3), guest.messages()), (None, event.to_vec()));
    // What was pending and is cleared is not sent.
    guest.write32(regs::PECTL, 1 << 31);
    guest.write32(regs::PRS, PPR);
    assert_eq!(ask(&guest, 4, 4), None);
    guest.write32(regs::PRS, PPR);
    guest.write32(regs::PECTL, 0);
    assert_eq!(guest.messages(), []);
}

#[test]
fn a_full_queue_overflows_until_the_guest_has_seen_it() {
    let guest = serving();
    guest.write32(regs::PECTL, 0);
    for number in 0..SLOTS - 1 {
        assert_eq!(ask(&guest, number as u16, number), None);
    }
    guest.write32(regs::PRS, PPR);
    guest.messages();
    // The first that finds no space; the device may try again.
    assert_eq!((ask(&guest, 200, 200), status(&guest)), (Some(Success), PRO));
    assert_eq!(guest.messages().len(), 1);
    assert_eq!((ask(&guest, 200, 201), guest.messages().len()), (Some(Success), 0));
    // Free space alone is not enough.
    let tail = guest.read64(regs::PQT);
    guest.write64(regs::PQH, tail);
    assert_eq!(ask(&guest, 200, 202), Some(Success));
    guest.write32(regs::PRS, PRO);
    assert_eq!((ask(&guest, 200, 203), status(&guest)), (None, PPR));
    // The queue goes on at its start.
    assert_eq!(guest.read64(regs::PQT), 0);
    assert_eq!(queued(&guest, SLOTS - 1), Some(request(200)));
    let counters = guest.iommu.counters();
    assert_eq!((counters.page_requests, counters.page_requests_lost), (SLOTS, 3));
    assert_eq!(answers(&guest), [], "those in the queue are the guest's");
}

/// A group that goes over the end of the queue; and one of which only a part fits.
#[test]
fn a_group_is_in_the_queue_or_answered_as_a_whole() {
    let guest = serving();
    let group = |number: u16| {
        let page = |index: u64| PageRequest {
            last: index == 2,
            address: 0x1000 * index,
            ..request(number)
        };
        [page(0), page(1), page(2)]
    };
    let (head, tail) = (0x1000 - 3 * 32, 0x1000 - 2 * 32);
    guest.write64(regs::PQH, head);
    guest.write64(regs::PQT, tail);
    assert_eq!(guest.iommu.page_requests(&group(7), PageTicket(1)), None);
    assert_eq!(guest.read64(regs::PQT), 32);
    for (slot, expected) in [SLOTS - 2, SLOTS - 1, 0].into_iter().zip(group(7)) {
        assert_eq!(queued(&guest, slot), Some(expected));
    }
    guest.write64(regs::PQH, 32 + 2 * 32);
    guest.write32(regs::PRS, PPR);
    assert_eq!(guest.iommu.page_requests(&group(8), PageTicket(2)), Some(Success));
    assert_eq!((guest.read64(regs::PQT), status(&guest)), (64, PPR | PRO));
    respond(&guest, 8, 0);
    assert_eq!(answers(&guest), [], "it has its answer");
    respond(&guest, 7, 0);
    assert_eq!(answers(&guest), [(1, Success)]);
}

#[test]
fn responses_are_for_groups_that_are_open() {
    let guest = serving();
    for (group, code, response) in
        [(3, 0, Success), (4, 1, InvalidRequest), (5, 15, PageResponse::Failure)]
    {
        assert_eq!(ask(&guest, group, group.into()), None);
        let PageRequest { rid: requester, pasid: own, .. } = request(group);
        for (requester, pasid, group) in [
            (UPPER_RID, own, group),
            (requester, None, group),
            (requester, Some(pasid(6)), group),
            (requester, own, group + 1),
        ] {
            guest.submit(&[Descriptor::PageGroupResponse { requester, pasid, group, code }]);
        }
        assert_eq!(answers(&guest), []);
        respond(&guest, group, code);
        respond(&guest, group, code);
        assert_eq!(answers(&guest), [(group.into(), response)]);
    }
    assert!(!guest.fault_status().iqe());
    // LPIG of revision 3, which Linux sets up to 6.16.
    let mut words =
        Descriptor::PageGroupResponse { requester: RID, pasid: Some(pasid(5)), group: 9, code: 0 }
            .encode();
    words[1] |= 4;
    assert_eq!(ask(&guest, 9, 9), None);
    guest.submit_words(&[words]);
    assert_eq!(answers(&guest), [(9, Success)]);
}

#[test]
fn an_index_that_is_used_again_ends_the_former_request() {
    let guest = serving();
    assert_eq!((ask(&guest, 3, 1), ask(&guest, 3, 2)), (None, None));
    assert_eq!(answers(&guest), [(1, InvalidRequest)]);
    respond(&guest, 3, 0);
    assert_eq!(answers(&guest), [(2, Success)]);
}

/// Refused at once, with the reason that the guest finds in a record.
#[test]
fn what_nothing_serves_is_refused() {
    type Change = fn(&Guest);
    let cases: [(Change, Option<u8>); 8] = [
        // PRE is clear; and with FPD.
        (|guest| guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 3 | 1]), Some(0x47)),
        (|guest| guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 3 | 3]), None),
        (|guest| guest.write(CONTEXT + 0x100, &[0]), Some(0x41)),
        (|guest| guest.write64(regs::PQA, 0), None),
        (|guest| guest.write64(regs::PQA, MEMORY_SIZE), None),
        (|guest| guest.disable_translation(), None),
        (
            |guest| {
                guest.write(PASID_TABLE + 64 * 5, &[0]);
                guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
            },
            None,
        ),
        (|guest| guest.iommu.remove_device(RID), None),
    ];
    for (number, (change, reason)) in cases.into_iter().enumerate() {
        let guest = serving();
        change(&guest);
        assert_eq!(ask(&guest, 3, 1), Some(InvalidRequest), "case {number}");
        assert_eq!((guest.read64(regs::PQT), status(&guest)), (0, 0));
        let high = guest.fault_record(0).high;
        assert_eq!(high.f().then(|| high.fr()), reason, "case {number}");
        if reason.is_some() {
            assert_eq!((high.t1(), high.t2(), high.sid()), (false, true, RID.raw()));
            assert_eq!((high.pp(), high.pv()), (true, 5));
        }
        assert_eq!(guest.iommu.counters().page_requests_refused, 1);
    }
    let guest = serving();
    assert_eq!(guest.iommu.page_requests(&[], PageTicket(1)), Some(InvalidRequest));
    let other = PageRequest { rid: UPPER_RID, ..request(1) };
    assert_eq!(guest.iommu.page_requests(&[other], PageTicket(1)), Some(InvalidRequest));
}

#[test]
fn a_function_that_software_has_not_enabled_is_refused_without_a_fault() {
    let guest = serving();
    // PRE is clear, which would be one.
    guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 3 | 1]);
    guest.iommu.set_page_requests(RID, false);
    assert_eq!(ask(&guest, 0, 1), Some(InvalidRequest));
    assert_eq!((status(&guest), guest.read32(regs::FSTS)), (0, 0));
    guest.write(CONTEXT + 0x100, &[DIRECTORY | 1 << 4 | 1 << 3 | 1]);
    assert_eq!(ask(&guest, 0, 2), Some(InvalidRequest));
    guest.iommu.set_page_requests(RID, true);
    assert_eq!(ask(&guest, 0, 3), None);
}

#[test]
fn requests_end_with_their_function_a_reset_and_the_machine() {
    type End = fn(&Guest);
    let ends: [End; 3] = [
        |guest| guest.iommu.remove_device(RID),
        |guest| guest.iommu.reset().unwrap(),
        |guest| guest.iommu.halt(),
    ];
    for end in ends {
        let guest = serving();
        assert_eq!((ask(&guest, 3, 1), ask(&guest, 4, 2)), (None, None));
        end(&guest);
        assert_eq!(answers(&guest), [(1, InvalidRequest), (2, InvalidRequest)]);
        assert_eq!(ask(&guest, 5, 3), Some(InvalidRequest));
        assert_eq!(answers(&guest), []);
    }
    let guest = serving();
    assert_eq!(ask(&guest, 3, 1), None);
    guest.iommu.reset().unwrap();
    assert_eq!(guest.iommu.snapshot().unwrap().page_requests, PageQueue::default());
}

/// The queue of a snapshot is the guest's memory; responses to what was open have no effect.
#[test]
fn a_restored_unit_has_the_queue_and_no_open_group() {
    let guest = serving();
    guest.write64(regs::PEADDR, 0xfee0_1000);
    assert_eq!(ask(&guest, 3, 1), None);
    let state = guest.iommu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.iommu.snapshot().unwrap(), state);
    for register in [regs::PQH, regs::PQT, regs::PQA, regs::PEADDR] {
        assert_eq!(restored.read64(register), guest.read64(register), "{register:#x}");
    }
    assert_eq!(status(&restored), PPR);
    respond(&restored, 3, 0);
    assert_eq!(answers(&restored), []);
    assert_eq!(ask(&restored, 3, 7), None);
    respond(&restored, 3, 0);
    assert_eq!(answers(&restored), [(7, Success)]);
}

#[test]
fn a_queue_that_cannot_be_is_not_restored() {
    let refused = |state: VtdState| state.check().unwrap_err().to_string();
    let mut state = serving().iommu.snapshot().unwrap();
    state.check().unwrap();
    state.page_requests.tail = regs::QueuePointer::from_bits(0x30);
    let told = refused(state.clone());
    assert!(told.ends_with("PQT is 0x30, which is no place of a descriptor"), "{told}");
    state.page_requests = PageQueue::default();
    state.page_requests.address = regs::Pqa::from_bits(PAGES);
    state.config.page_requests = false;
    let told = refused(state);
    assert!(told.ends_with("but no page requests are offered"), "{told}");
}

#[test]
fn a_wait_drains_what_the_host_has() {
    let guest = serving();
    let wait = |drain_page_requests| Descriptor::Wait {
        status: None,
        interrupt: false,
        fence: true,
        drain_page_requests,
    };
    guest.submit(&[wait(false)]);
    assert_eq!(*guest.host.drains.lock(), 0);
    guest.submit(&[wait(true)]);
    assert_eq!(*guest.host.drains.lock(), 1);
    // Waits with the registers unlocked, and looks again.
    *guest.host.undrained.lock() = 4;
    let status = Some(StatusWrite { address: STATUS, data: 9 });
    guest.queue(&[Descriptor::Wait {
        status,
        interrupt: false,
        fence: true,
        drain_page_requests: true,
    }]);
    for _ in 0..2 {
        assert!(matches!(guest.slice(), Slice::Draining(progress) if !progress.is_done()));
        assert_eq!((guest.status(), *guest.host.drains.lock()), (0, 1));
    }
    guest.iommu.drain_queue();
    assert_eq!((guest.status(), *guest.host.drains.lock()), (9, 2));
}

/// One step of a life.
#[derive(Debug, Clone)]
enum Step {
    Ask { group: u16, pages: usize, pasid: u32 },
    Respond { group: u16, pasid: u32, code: u8 },
    Head(u64),
    Status(u32),
    Address(u64),
    Tables { pasid: u64, present: bool },
    Enable(bool),
    Page(bool),
    Remove,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let pasids = || 4..7u32;
    prop_oneof![
        8 => (0..6u16, 1..4usize, pasids())
            .prop_map(|(group, pages, pasid)| Step::Ask { group, pages, pasid }),
        6 => (0..6u16, pasids(), prop_oneof![Just(0u8), Just(1), Just(15), 0..16u8])
            .prop_map(|(group, pasid, code)| Step::Respond { group, pasid, code }),
        2 => (0..SLOTS).prop_map(|slot| Step::Head(32 * slot)),
        2 => (0..4u32).prop_map(Step::Status),
        1 => prop_oneof![Just(PAGES), Just(0), Just(MEMORY_SIZE - 32)].prop_map(Step::Address),
        1 => (4..7u64, any::<bool>()).prop_map(|(pasid, present)| Step::Tables { pasid, present }),
        1 => any::<bool>().prop_map(Step::Enable),
        1 => any::<bool>().prop_map(Step::Page),
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
                Step::Ask { group, pages, pasid: of } => {
                    let page = |index| PageRequest {
                        last: index + 1 == pages,
                        pasid: Some(pasid(of)),
                        ..request(group)
                    };
                    let requests: Vec<_> = (0..pages).map(page).collect();
                    let at_once = guest.iommu.page_requests(&requests, PageTicket(ticket));
                    given.insert(ticket, at_once.is_some().into());
                }
                Step::Respond { group, pasid: of, code } => {
                    let (requester, of) = (RID, Some(pasid(of)));
                    let response =
                        Descriptor::PageGroupResponse { requester, pasid: of, group, code };
                    guest.submit(&[response]);
                }
                Step::Head(head) => guest.write64(regs::PQH, head),
                Step::Status(clear) => guest.write32(regs::PRS, clear),
                Step::Address(address) => guest.write64(regs::PQA, address),
                Step::Tables { pasid, present } => {
                    let first = if present { 1 << 6 | 1 } else { 0 };
                    guest.write(PASID_TABLE + 64 * pasid, &[first, DOMAIN.into(), 0x6000]);
                    guest.submit(&[Descriptor::PasidCache(PasidCacheScope::Global)]);
                }
                Step::Enable(true) => guest.enable_translation(),
                Step::Enable(false) => guest.disable_translation(),
                Step::Page(pre) => {
                    let pre = u64::from(pre) << 4;
                    guest.write(CONTEXT + 0x100, &[DIRECTORY | pre | 1 << 3 | 1]);
                }
                Step::Remove => {
                    guest.iommu.remove_device(RID);
                    guest.iommu.add_device(RID).unwrap();
                }
                Step::Reset => {
                    guest.iommu.reset().unwrap();
                    guest.set_root(0x400);
                    guest.enable_queue(0x800);
                    guest.enable_translation();
                    guest.write64(regs::PQA, PAGES);
                }
            }
        }
        guest.iommu.halt();
        for (ticket, _) in answers(&guest) {
            *given.entry(ticket).or_default() += 1;
        }
        prop_assert!(given.values().all(|count| *count == 1), "{given:?}");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Commands that concern many requesters: under way in slices, and acknowledged after the last one.
//! Units that are halted on the way, and threads that share the queue.

use std::collections::BTreeMap;

use super::queue::pasid_iotlb;
use super::slices::{PASIDS, PASID_CACHE, RTPS, TES};
use super::*;
use crate::spec::vtd::qi::PasidCacheScope;

#[test]
fn a_unit_that_is_halted_on_the_way_acknowledges_nothing() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    assert_eq!(guest.begin_command(|enabled| enabled & !TES), Slice::More);
    guest.calls();
    guest.iommu.halt();
    guest.iommu.drain_queue();
    assert_eq!((guest.calls(), guest.head(), guest.status()), (vec![], 0, 0));
    guest.disable_translation();
    assert_eq!(guest.calls(), []);
    assert_eq!(guest.status_bits(TES), TES);
}

#[test]
fn a_halted_unit_leaves_the_rest_of_the_queue() {
    let guest = Guest::running();
    let queued = [pasid_iotlb(0, None), PASID_CACHE].repeat(50);
    *guest.host.halting.lock() = Some(guest.iommu.clone());
    let before = guest.iommu.counters().evaluations;
    guest.submit(&queued);
    *guest.host.halting.lock() = None;
    assert_eq!(guest.calls().len(), 1);
    assert_eq!(guest.iommu.counters().evaluations, before);
    assert_eq!(guest.head(), 32);
    assert!(!guest.fault_status().iqe());
    guest.submit(&[wait(3)]);
    assert_eq!(guest.status(), 0);
}

#[test]
fn a_unit_that_is_halted_before_a_wait_does_not_answer_it() {
    let guest = Guest::running();
    *guest.host.halting.lock() = Some(guest.iommu.clone());
    guest.submit(&[pasid_iotlb(0, None), wait(3)]);
    *guest.host.halting.lock() = None;
    assert_eq!(guest.calls().len(), 1);
    assert_eq!((guest.head(), guest.status()), (32, 0));
    assert!(!guest.fault_status().iqe());
}

#[test]
fn a_halted_unit_leaves_the_rest_of_the_pasids() {
    let guest = Guest::running();
    (1..40).for_each(|value| guest.write_pasid(value, 0x6000));
    *guest.host.halting.lock() = Some(guest.iommu.clone());
    guest.submit(&[PASID_CACHE, wait(3)]);
    *guest.host.halting.lock() = None;
    assert_eq!(guest.calls(), [Call::Configure(with_pasid(1), first_stage(0x6000))]);
    // Not acknowledged, and not an error of the guest.
    assert_eq!((guest.head(), guest.status()), (0, 0));
    assert!(!guest.fault_status().iqe());
}

#[test]
fn translation_is_enabled_when_the_last_requester_is_served() {
    let guest = Guest::with_directory();
    guest.disable_translation();
    guest.write_every_pasid(0x6000);
    guest.calls();
    let mut slice = guest.begin_command(|enabled| enabled | TES);
    let mut asked = 0;
    loop {
        let calls = guest.calls().len();
        assert!(calls <= 33, "{calls} requesters in one slice");
        asked += calls;
        assert_eq!(guest.status_bits(TES) != 0, slice == Slice::Done, "after {asked}");
        if slice == Slice::Done {
            break;
        }
        slice = guest.slice();
    }
    assert_eq!(asked, PASIDS as usize);
    // And disabled when the last one is withdrawn.
    let mut slice = guest.begin_command(|enabled| enabled & !TES);
    while slice == Slice::More {
        assert_eq!(guest.status_bits(TES), TES);
        slice = guest.slice();
    }
    assert_eq!(guest.status_bits(TES), 0);
    assert_eq!(guest.calls().len(), PASIDS as usize);
    assert_eq!(guest.iommu.requesters.pasid_from(RID, 0), None);
}

#[test]
fn a_root_table_is_set_when_the_last_requester_goes_by_it() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    let mut slice = guest.begin_command(|enabled| enabled | RTPS);
    while slice == Slice::More {
        assert_eq!(guest.status_bits(TES | RTPS), TES);
        slice = guest.slice();
    }
    assert_eq!(guest.status_bits(TES | RTPS), TES | RTPS);
    // The root table first, and then translation is disabled with the same command.
    let mut slice = guest.begin_command(|enabled| (enabled | RTPS) & !TES);
    while slice == Slice::More {
        assert_eq!(guest.status_bits(TES), TES);
        slice = guest.slice();
    }
    assert_eq!(guest.status_bits(TES | RTPS), RTPS);
}

#[test]
fn invalidations_wait_for_a_command_that_is_under_way() {
    let guest = Guest::with_directory();
    guest.disable_translation();
    guest.write_every_pasid(0x6000);
    guest.calls();
    assert_eq!(guest.begin_command(|enabled| enabled | TES), Slice::More);
    // While TES is clear, invalidations have nothing to do. But these PASIDs were served.
    guest.write_pasid(1, 0x7000);
    let scope = PasidCacheScope::Pasid { domain: DOMAIN, pasid: pasid(1) };
    guest.submit(&[Descriptor::PasidCache(scope), wait(1)]);
    assert_eq!((guest.status(), guest.status_bits(TES)), (1, TES));
    let mut has = BTreeMap::new();
    guest.host_has(&mut has);
    assert_eq!(has, guest.tables_say());
}

#[test]
fn a_second_command_comes_after_the_first() {
    let guest = Guest::with_directory();
    guest.disable_translation();
    guest.write_every_pasid(0x6000);
    guest.calls();
    assert_eq!(guest.begin_command(|enabled| enabled | TES), Slice::More);
    guest.disable_translation();
    assert_eq!(guest.status_bits(TES), 0);
    let mut has = BTreeMap::new();
    guest.host_has(&mut has);
    assert_eq!(has, BTreeMap::from([(Requester::rid(RID), Policy::Bypass)]));
}

#[test]
fn a_context_command_of_many_requesters_stays_set_until_it_is_done() {
    // PASIDs still attached in legacy mode, because the host failed to detach them.
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    guest.command(|enabled| enabled & !(1 << 26));
    guest.write(0x9000 + 0x10, &[0, 0]);
    guest.fail_to_block(true);
    guest.write64(regs::RTADDR, 0x9000);
    guest.command(|enabled| enabled | 1 << 30);
    assert_eq!(guest.status_bits(RTPS), 0);
    guest.fail_to_block(false);
    guest.calls();
    let mut registers = guest.iommu.lock_idle();
    registers.ccmd = regs::Ccmd::from_bits(1 << 63 | 1 << 61);
    guest.iommu.context_command(&mut registers);
    drop(registers);
    let mut slices = 0;
    while guest.slice() == Slice::More {
        assert_eq!(guest.read64(regs::CCMD) >> 63, 1);
        assert!(guest.calls().len() <= 33);
        slices += 1;
    }
    assert!(slices > PASIDS / 33 - 1, "{slices}");
    assert_eq!(guest.read64(regs::CCMD) >> 59, 0b00101);
    assert_eq!(guest.iommu.requesters.pasid_from(RID, 0), None);
}

#[test]
fn threads_that_drain_the_queue_at_once_share_it() {
    let guest = Guest::running();
    let descriptors: Vec<_> = (0..60).flat_map(|data| [pasid_iotlb(0, None), wait(data)]).collect();
    let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
    let tail = guest.queue_words(&words);
    guest.iommu.lock().iqt = regs::QueuePointer::from_offset(tail);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| guest.iommu.drain_queue());
        }
    });
    assert_eq!((guest.status(), guest.head()), (59, tail));
    assert_eq!(guest.calls().len(), 60);
}

#[test]
fn any_thread_may_drain_the_queue() {
    let guest = Guest::running();
    let tail = guest.queue_words(&[wait(6).encode()]);
    guest.iommu.lock().iqt = regs::QueuePointer::from_offset(tail);
    let iommu = guest.iommu.clone();
    std::thread::spawn(move || iommu.drain_queue()).join().unwrap();
    assert_eq!((guest.status(), guest.head()), (6, tail));
}

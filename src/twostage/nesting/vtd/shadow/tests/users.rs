// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mirrors that many requesters use are replaced for a part of them at a time.

use super::*;
use crate::spec::pci::Pasid;

const USERS: u32 = 100;

fn of(pasid: u32) -> Requester {
    Requester { rid: A, pasid: Pasid::new(pasid) }
}

fn configure(rig: &Rig, pasid: u32, policy: Policy) {
    let tag = DomainTag { pasid, ..TAG };
    let config = RequesterConfig { policy, tag, fault_disabled: false };
    rig.nesting.configure(of(pasid), &config).unwrap();
}

/// A page that PASIDs 1 to [`USERS`], `A` itself and `B` use, leads elsewhere.
fn changed() -> Rig {
    let rig = Rig::with(1 << 20, 8);
    rig.put(0x3000, 0, 0x9003);
    [A, B].into_iter().for_each(|rid| rig.configure_in(TAG.domain, rid, tables()).unwrap());
    (1..=USERS).for_each(|pasid| configure(&rig, pasid, tables()));
    rig.put(0x3000, 0, 0xa003);
    rig.host.take_log();
    rig
}

/// Does one slice. Returns the number of attaches.
#[track_caller]
fn slice(rig: &Rig, progress: &mut Progress) -> usize {
    rig.nesting.invalidate_some(&[Invalidation::ALL], progress).unwrap();
    let calls = rig.host.take_log();
    assert!(calls.len() <= 40, "{calls:?}");
    calls.iter().filter(|call| call.starts_with("DEVICE_ATTACH")).count()
}

/// The page that a PASID of `A`, or `A` itself, reaches.
fn page(rig: &Rig, pasid: Option<u32>) -> Option<u64> {
    rig.host.reached_by(DEV_A, pasid).first().map(|piece| piece.2)
}

#[test]
fn a_mirror_with_many_users_is_replaced_in_slices() {
    let rig = changed();
    let (mut progress, mut attached, mut slices) = (Progress::default(), 0, 0);
    while !progress.is_done() {
        attached += slice(&rig, &mut progress);
        slices += 1;
        let moved = (1..=USERS).filter(|pasid| page(&rig, Some(*pasid)) == Some(0xa000)).count();
        assert!(moved <= attached);
    }
    assert_eq!(attached, USERS as usize + 2);
    assert!(slices >= 4, "{slices}");
    (1..=USERS).for_each(|pasid| assert_eq!(page(&rig, Some(pasid)), Some(0xa000)));
    assert_eq!(page(&rig, None), Some(0xa000));
    assert_eq!(rig.host.reaches_copies(DEV_B)[0].2, 0xa000);
    assert_eq!(rig.nesting.counters().mirror_pieces, 1);
    rig.ends_clean();
}

/// Users come, and go, on both sides of where that is: all that stay have the new page in the end.
#[test]
fn who_comes_and_goes_while_a_mirror_is_replaced() {
    let rig = changed();
    let mut progress = Progress::default();
    while slice(&rig, &mut progress) == 0 {}
    assert!(!progress.is_done());
    for pasid in [1, 2, USERS - 1, USERS] {
        configure(&rig, pasid, Policy::Blocked(FaultReason::PasidEntryNotPresent));
    }
    for pasid in [1, USERS, USERS + 1] {
        configure(&rig, pasid, tables());
    }
    rig.host.take_log();
    while !progress.is_done() {
        slice(&rig, &mut progress);
    }
    for pasid in 1..=USERS + 1 {
        let goes = pasid == 2 || pasid == USERS - 1;
        assert_eq!(page(&rig, Some(pasid)), (!goes).then_some(0xa000), "{pasid}");
    }
    rig.ends_clean();
}

/// All of them, or those of one device, go in the middle: nothing is left of both mirrors.
#[test]
fn all_users_go_while_a_mirror_is_replaced() {
    for all in [true, false] {
        let rig = changed();
        let mut progress = Progress::default();
        while slice(&rig, &mut progress) == 0 {}
        rig.nesting.remove_device(A).unwrap();
        if all {
            rig.nesting.remove_device(B).unwrap();
            assert_eq!(rig.nesting.counters().mirror_pieces, 0);
        }
        rig.host.take_log();
        while !progress.is_done() {
            slice(&rig, &mut progress);
        }
        assert!(all || rig.host.reaches_copies(DEV_B)[0].2 == 0xa000);
        rig.ends_clean();
    }
}

/// From some call on the host fails, for a while or for good: the batch ends, nobody reaches what
/// was taken back, and nothing is left.
#[test]
fn a_replacement_for_many_users_ends_whichever_call_fails() {
    for count in [1, 2, 1000] {
        for nth in (0..).step_by(7) {
            let rig = changed();
            rig.host.fail_calls(nth, count, Errno::ENOMEM);
            let (mut progress, mut refused) = (Progress::default(), None);
            for slices in 0.. {
                assert!(slices < 30, "{count} calls from {nth} on");
                let batch = [Invalidation::ALL];
                let done = rig.nesting.invalidate_some(&batch, &mut progress);
                refused = refused.or(done.err());
                if progress.is_done() {
                    break;
                }
            }
            let done = rig.host.failure_pending() && refused.is_none();
            let reachable = refused.as_ref().is_some_and(|error| error.still_reachable);
            let stale = (1..=USERS).any(|pasid| page(&rig, Some(pasid)) == Some(0x9000));
            assert!(!stale || reachable, "{count} calls from {nth} on");
            rig.host.forget_failures();
            rig.ends_clean();
            if done {
                assert!(nth > USERS.into(), "{nth}");
                break;
            }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every host call fails in turn: no panic, no leak, the requester is blocked, and the error is
//! returned.

use super::*;
use crate::iommufd::{Errno, Protection};

/// One step of a guest's life, and the requester that is left blocked when it fails.
type Step = (Option<(ObjectId, Option<u32>)>, fn(&VtdNesting) -> Result<(), String>);

fn configure(
    nesting: &VtdNesting,
    who: Requester,
    policy: Policy,
    domain: u16,
) -> Result<(), String> {
    let tag = DomainTag { domain, pasid: who.pasid.map_or(0, Pasid::raw) };
    let config = RequesterConfig { policy, tag, fault_disabled: false };
    nesting.configure(who, &config).map_err(|error| error.to_string())
}

const STEPS: &[Step] = &[
    (None, |n| {
        n.ioas()
            .and_then(|ioas| ioas.map(0, &memory(), Protection::READ_WRITE))
            .map_err(|e| e.to_string())
    }),
    (Some((DEV_A, None)), |n| n.add_device(A, DEV_A).map_err(|e| e.to_string())),
    (Some((DEV_B, None)), |n| n.add_device(B, DEV_B).map_err(|e| e.to_string())),
    (Some((DEV_A, None)), |n| configure(n, Requester::rid(A), BLOCKED, 0)),
    (Some((DEV_A, None)), |n| configure(n, Requester::rid(A), first_stage(0x1000), 1)),
    (Some((DEV_B, None)), |n| configure(n, Requester::rid(B), first_stage(0x1000), 2)),
    (Some((DEV_A, Some(5))), |n| configure(n, pasid(A, 5), first_stage(0x1000), 1)),
    (Some((DEV_A, Some(6))), |n| configure(n, pasid(A, 6), Policy::Bypass, 3)),
    (Some((DEV_A, None)), |n| configure(n, Requester::rid(A), first_stage(0x2000), 1)),
    (Some((DEV_A, None)), |n| {
        let batch = [page(DomainTag { domain: 1, pasid: 0 }, 0x1000), Invalidation::ALL];
        n.invalidate(&batch).map_err(|e| e.to_string())
    }),
    (Some((DEV_B, None)), |n| configure(n, Requester::rid(B), Policy::Bypass, 2)),
    (Some((DEV_A, Some(5))), |n| n.state().forget_pasids(A).map_err(|e| e.to_string())),
    (Some((DEV_A, None)), |n| configure(n, Requester::rid(A), BLOCKED, 1)),
    (Some((DEV_B, None)), |n| n.remove_device(B).map_err(|e| e.to_string())),
];

/// Runs all steps with one failing call; returns whether the failure was reached.
fn run(nth: u64, errno: Errno) -> bool {
    let host = RecordingHost::new(Extensions { fault_reports: true, ..Extensions::default() });
    host.add_device(0, hw_info(0, 8));
    host.add_device(0, hw_info(0, 8));
    host.fail_nth(nth, errno);
    if let Ok(nesting) = GuestIoas::new(host.clone()).map(VtdNesting::new) {
        for (step, (victim, run)) in STEPS.iter().enumerate() {
            let pending = host.failure_pending();
            let result = run(&nesting);
            if let (true, false, Err(_), Some((dev, pasid))) =
                (pending, host.failure_pending(), &result, victim)
            {
                let reaches = host.reaches(*dev, *pasid);
                assert_eq!(reaches, None, "call {nth}, step {step}: {:?}", host.take_log());
            }
        }
    }
    assert_eq!(host.live_objects(), [], "call {nth}: {:?}", host.take_log());
    assert!([DEV_A, DEV_B].iter().all(|dev| host.reaches(*dev, None).is_none()));
    !host.failure_pending()
}

#[test]
fn every_call_fails_in_turn() {
    for errno in [Errno::ENOMEM, Errno::EINVAL, Errno::EBUSY] {
        let calls = (0..1000).find(|nth| !run(*nth, errno)).expect("the steps end");
        assert!(calls >= 30, "only {calls} calls were made to fail");
    }
}

/// A failing call is either made good (a detach, a destroy, an invalidation, the next parent) or
/// reported: never silently without effect.
#[test]
fn a_failed_configuration_is_told_or_made_good() {
    for nth in 0..8 {
        let rig = Rig::new();
        rig.host.fail_nth(nth, Errno::ENOMEM);
        let result = rig.configure(Requester::rid(A), first_stage(0x1000));
        let reached = rig.host.reaches(DEV_A, None);
        assert_eq!(result.is_ok(), reached.is_some(), "call {nth}: {:?}", rig.host.take_log());
        assert_ne!(reached, Some(PARENT));
        rig.ends_clean();
    }
}

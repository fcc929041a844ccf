// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every host call fails in turn: no panic, no leak, the stream is blocked, and the error is
//! returned.

use super::*;
use crate::iommufd::{Errno, Protection};

/// One step of a guest's life, and the device that is left blocked when it fails.
type Step = (Option<ObjectId>, fn(&SmmuNesting) -> Result<(), String>);

fn configure(n: &SmmuNesting, stream: StreamId, policy: StreamPolicy) -> Result<(), String> {
    n.configure(stream, &policy).map_err(|error| error.to_string())
}

fn invalidate(nesting: &SmmuNesting, commands: &[Command]) -> Result<(), String> {
    nesting.invalidate(commands).map_err(|error| error.to_string())
}

const STEPS: &[Step] = &[
    (None, |n| {
        n.ioas()
            .and_then(|ioas| ioas.map(0, &memory(), Protection::READ_WRITE))
            .map_err(|e| e.to_string())
    }),
    (Some(DEV_A), |n| n.add_device(A, DEV_A).map_err(|e| e.to_string())),
    (Some(DEV_B), |n| n.add_device(B, DEV_B).map_err(|e| e.to_string())),
    (Some(DEV_A), |n| configure(n, STREAM_A, StreamPolicy::GlobalBypass)),
    (Some(DEV_A), |n| configure(n, STREAM_A, StreamPolicy::Abort)),
    (Some(DEV_A), |n| configure(n, STREAM_A, stage1(0x1000, true))),
    (Some(DEV_B), |n| configure(n, STREAM_B, stage1(0x1000, true))),
    (None, |n| invalidate(n, &[va(1, 1), cd(STREAM_A), va(1, 2), atc(STREAM_A)])),
    (Some(DEV_A), |n| configure(n, STREAM_A, stage1(0x2000, false))),
    (Some(DEV_B), |n| configure(n, STREAM_B, StreamPolicy::Bypass)),
    (Some(DEV_A), |n| configure(n, STREAM_A, StreamPolicy::Abort)),
    (None, |n| invalidate(n, &[asid(1)])),
    (Some(DEV_A), |n| configure(n, STREAM_A, stage1(0x2000, false))),
    (Some(DEV_B), |n| n.remove_device(B).map_err(|e| e.to_string())),
];

/// Whether `dev` is blocked: detached, or attached to the aborting entry.
fn is_blocked(nesting: &SmmuNesting, host: &RecordingHost, dev: ObjectId) -> bool {
    let aborts = |hwpt| {
        let nested = nesting.objects().nested;
        nested.iter().any(|of| of.hwpt == hwpt && of.ste == super::super::nested::ABORT)
    };
    host.reaches(dev, None).is_none_or(aborts)
}

/// Runs all steps with one failing call; returns whether the failure was reached.
fn run(nth: u64, errno: Errno) -> bool {
    let host = RecordingHost::new(Extensions::default());
    host.add_device(0, hw_info());
    host.add_device(0, hw_info());
    host.fail_nth(nth, errno);
    if let Ok(nesting) = GuestIoas::new(host.clone()).map(|ioas| SmmuNesting::new(ioas, 8)) {
        for (step, (victim, run)) in STEPS.iter().enumerate() {
            let pending = host.failure_pending();
            let result = run(&nesting);
            let failed_here = pending && !host.failure_pending();
            if let (true, Err(_), Some(dev)) = (failed_here, &result, victim) {
                let blocked = is_blocked(&nesting, &host, *dev);
                assert!(blocked, "call {nth}, step {step}: {:?}", host.take_log());
            }
        }
    }
    assert_eq!(host.live_objects(), [], "call {nth}: {:?}", host.take_log());
    assert!([DEV_A, DEV_B].iter().all(|dev| host.reaches(*dev, None).is_none()));
    !host.failure_pending()
}

#[test]
fn every_call_fails_in_turn() {
    for errno in [Errno::ENOMEM, Errno::EINVAL, Errno::EBUSY, Errno::EIO] {
        let calls = (0..1000).find(|nth| !run(*nth, errno)).expect("the steps end");
        assert!(calls >= 30, "only {calls} calls were made to fail");
    }
}

/// A failing call is either made good (a destroy, an invalidation) or reported: never silently
/// without effect.
#[test]
fn a_failed_configuration_is_told_or_made_good() {
    for nth in 0..8 {
        let rig = Rig::new();
        rig.host.fail_nth(nth, Errno::ENOMEM);
        let result = rig.configure(STREAM_A, stage1(0x1000, false));
        let blocked = is_blocked(&rig.nesting, &rig.host, DEV_A);
        assert_eq!(result.is_ok(), !blocked, "call {nth}: {:?}", rig.host.take_log());
        rig.ends_clean();
    }
}

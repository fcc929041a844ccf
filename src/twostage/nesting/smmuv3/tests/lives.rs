// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices, host objects and events that come and go. Last, every host call fails in turn: no
//! panic, no leak, the stream is blocked, and the error is returned.

use std::sync::mpsc::{channel, Sender};
use std::sync::Weak;
use std::time::Duration;

use super::*;
use crate::iommufd::{iommu_hw_info_vtd, Errno, Protection, Verb, Vevent};
use crate::nesting::NestingError;
use crate::viommu::smmuv3::{EventRecordWords, EventTarget};

#[test]
fn devices_behind_two_smmus_are_told_apart() {
    let host = RecordingHost::new(Extensions::default());
    let (one, other) = (host.add_device(0, hw_info()), host.add_device(1, hw_info()));
    let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
    nesting.add_device(A, one).unwrap();
    host.take_log();
    let error = nesting.add_device(B, other).unwrap_err();
    assert_eq!(error, NestingError::OtherSmmu { rid: B, first: A });
    // The second call makes it certain.
    let calls = host.take_log();
    let refused = ["VDEVICE_ALLOC", "VIOMMU_ALLOC"];
    assert!(calls.len() == 3 && calls[0].starts_with("GET_HW_INFO"), "{calls:?}");
    for (call, verb) in calls[1..].iter().zip(refused) {
        assert!(call.starts_with(verb) && call.ends_with("! EINVAL"), "{calls:?}");
    }
    let text = error.to_string();
    assert!(text.contains("00:05.0") && text.contains("00:04.0"), "{text}");
    // A virtual SMMU of its own can serve it.
    let second = SmmuNesting::with_event_depth(nesting.ioas().unwrap(), 64);
    nesting.ioas().unwrap().map(0, &memory(), Protection::READ_WRITE).unwrap();
    second.add_device(B, other).unwrap();
    drop(nesting);
    drop(second);
    assert_eq!(host.live_objects(), []);
}

#[test]
fn a_refusal_is_not_taken_for_another_smmu() {
    for (vdevice, viommu) in
        [(Errno::EINVAL, None), (Errno::EINVAL, Some(Errno::ENOMEM)), (Errno::EEXIST, None)]
    {
        let host = RecordingHost::new(Extensions::default());
        let (one, other) = (host.add_device(0, hw_info()), host.add_device(0, hw_info()));
        let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
        nesting.add_device(A, one).unwrap();
        let live = host.live_objects();
        host.fail_next(Verb::VdeviceAlloc, vdevice);
        viommu.into_iter().for_each(|errno| host.fail_next(Verb::ViommuAlloc, errno));
        match nesting.add_device(B, other).unwrap_err() {
            NestingError::Host { source, .. } => assert_eq!(source.errno, vdevice),
            error => panic!("{error}"),
        }
        assert_eq!(host.live_objects(), live);
        nesting.add_device(B, other).unwrap();
    }
}

#[test]
fn only_an_smmu_serves() {
    let host = RecordingHost::new(Extensions::default());
    let vtd = iommu_hw_info_vtd { flags: 0, __reserved: 0, cap_reg: 0, ecap_reg: 0 };
    let dev = host.add_device(0, HwInfo { data: HwInfoData::Vtd(vtd), ..hw_info() });
    let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
    assert_eq!(nesting.add_device(A, dev), Err(NestingError::NoSmmu(A)));
    drop(nesting);
    assert_eq!(host.live_objects(), []);
}

#[test]
fn an_smmu_that_cannot_nest_leaves_nothing() {
    for verb in [Verb::HwptAlloc, Verb::ViommuAlloc, Verb::VeventqAlloc, Verb::VdeviceAlloc] {
        let host = RecordingHost::new(Extensions::default());
        let dev = host.add_device(0, hw_info());
        let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
        host.fail_next(verb, Errno::EOPNOTSUPP);
        let error = nesting.add_device(A, dev).unwrap_err().to_string();
        assert!(error.contains("00:04.0") && error.contains("EOPNOTSUPP"), "{error}");
        assert_eq!(host.live_objects(), [ObjectId(2)], "after {verb}");
        nesting.add_device(A, dev).unwrap();
    }
}

#[test]
fn a_removed_device_leaves_nothing() {
    let rig = Rig::nested();
    rig.nesting.remove_device(A).unwrap();
    rig.expect(&["DEVICE_DETACH #1", "DESTROY #9", "DESTROY #7"]);
    assert_eq!(rig.nesting.remove_device(A), Err(NestingError::NoDevice(A)));
    rig.nesting.remove_device(B).unwrap();
    rig.expect(&[
        "DEVICE_DETACH #2",
        "DESTROY #10",
        "DESTROY #8",
        "DESTROY #6",
        "DESTROY #5",
        "DESTROY #4",
    ]);
    assert_eq!(rig.host.live_objects(), [IOAS]);
    rig.nesting.add_device(B, DEV_B).unwrap();
    assert_eq!(rig.host.reaches(DEV_B, None), None);
    assert_eq!(rig.nesting.add_device(B, DEV_A), Err(NestingError::DeviceExists(B)));
    assert_eq!(rig.nesting.add_device(A, DEV_B), Err(NestingError::DeviceExists(A)));
    // A new VMID: nothing is stale.
    rig.host.take_log();
    rig.configure(STREAM_B, stage1(0x1000, false)).unwrap();
    assert_eq!(rig.host.take_log().len(), 2);
    rig.ends_clean();
}

#[test]
fn a_device_that_cannot_be_detached_stays_until_it_can() {
    let rig = Rig::nested();
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.nesting.remove_device(A).unwrap_err();
    assert_eq!(rig.nesting.hw_infos().len(), 2);
    rig.nesting.remove_device(A).unwrap();
    rig.ends_clean();
}

#[test]
fn shutdown_is_in_the_order_of_use_and_final() {
    let rig = Rig::nested();
    rig.nesting.shutdown().unwrap();
    rig.expect(&[
        "DESTROY #6",
        "DEVICE_DETACH #1",
        "DESTROY #9",
        "DEVICE_DETACH #2",
        "DESTROY #10",
        "DESTROY #7",
        "DESTROY #8",
        "DESTROY #5",
        "DESTROY #4",
        "DESTROY #3",
    ]);
    assert_eq!(rig.host.live_objects(), []);
    assert_eq!(rig.nesting.add_device(A, DEV_A), Err(NestingError::ShutDown));
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap_err();
    drop(rig.nesting);
    assert_eq!(rig.host.take_log(), Vec::<String>::new());
}

#[test]
fn the_objects_can_be_listed() {
    let rig = Rig::nested();
    let objects = rig.nesting.objects();
    let unit = objects.unit.unwrap();
    let ids = (objects.ioas, unit.parent, unit.viommu, unit.event_queue);
    assert_eq!(ids, (Some(IOAS), PARENT, VIOMMU, Some(EVENTS)));
    let devices: Vec<_> =
        objects.devices.iter().map(|d| (d.stream, d.device, d.vdevice, d.attached)).collect();
    let expected = [
        (STREAM_A, DEV_A, VDEVICE_A, Some(ObjectId(9))),
        (STREAM_B, DEV_B, VDEVICE_B, Some(ObjectId(10))),
    ];
    assert_eq!(devices, expected);
    let users: Vec<_> = objects.nested.iter().map(|n| (n.hwpt, n.streams.len())).collect();
    assert_eq!(users, [(ObjectId(9), 1), (ObjectId(10), 1)]);
    rig.nesting.shutdown().unwrap();
    let objects = rig.nesting.objects();
    assert_eq!((objects.ioas, objects.unit), (None, None));
}

struct Target(Sender<Option<EventRecordWords>>);

impl EventTarget for Target {
    fn event(&self, record: EventRecordWords) {
        self.0.send(Some(record)).unwrap();
    }

    fn events_lost(&self) {
        self.0.send(None).unwrap();
    }
}

#[test]
fn events_come_back_while_nesting_is_locked() {
    let rig = Rig::nested();
    let (sender, receiver) = channel();
    let target = Arc::new(Target(sender));
    let weak: Weak<Target> = Arc::downgrade(&target);
    rig.nesting.set_fault_target(weak);
    let record: EventRecordWords = [0x20_0000_0010, 0, 0x1234_5000, 0];
    let data: Vec<u8> = record.into_iter().flat_map(u64::to_le_bytes).collect();
    let next = || receiver.recv_timeout(Duration::from_secs(60)).expect("an event comes");
    let held = rig.nesting.state();
    rig.host.push_event(VIOMMU, Vevent::Event { sequence: 0, data: data.clone() });
    assert_eq!(next(), Some(record));
    drop(held);
    rig.host.push_event(VIOMMU, Vevent::Lost { sequence: 1 });
    rig.host.push_event(VIOMMU, Vevent::Event { sequence: 2, data });
    assert_eq!((next(), next()), (None, Some(record)));
    assert_eq!(rig.nesting.counters().events_lost, 1);
    // It is closed together with the device that it belongs to.
    rig.nesting.shutdown().unwrap();
    assert!(!rig.host.push_event(VIOMMU, Vevent::Lost { sequence: 3 }));
}

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
        nested.iter().any(|of| of.hwpt == hwpt && of.ste == super::super::state::ABORT)
    };
    host.reaches(dev, None).is_none_or(aborts)
}

/// Runs all steps with one failing call; returns whether the failure was reached.
fn run(nth: u64, errno: Errno) -> bool {
    let host = RecordingHost::new(Extensions::default());
    host.add_device(0, hw_info());
    host.add_device(0, hw_info());
    host.fail_nth(nth, errno);
    if let Ok(nesting) =
        GuestIoas::new(host.clone()).map(|ioas| SmmuNesting::with_event_depth(ioas, 8))
    {
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

#[test]
fn a_device_comes_back_though_its_vdevice_was_not_destroyed() {
    let rig = Rig::new();
    rig.host.fail_next(Verb::Destroy, Errno::EIO);
    rig.nesting.remove_device(A).unwrap();
    rig.nesting.add_device(A, DEV_A).unwrap();
    rig.ends_clean();
}

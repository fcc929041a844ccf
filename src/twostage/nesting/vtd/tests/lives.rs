// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices, memory and host objects that come and go. Last, every host call fails in turn: no
//! panic, no leak, the requester is blocked, and the error is returned.

use crate::sync::Mutex;

use super::*;
use crate::iommufd::{Errno, HostFault, Protection, Verb};
use crate::nesting::NestingError;
use crate::viommu::vtd::{DmaFault, FaultTarget};

#[test]
fn each_physical_iommu_has_a_nesting_parent() {
    let host = RecordingHost::new(Extensions::default());
    for iommu in [0, 1, 1] {
        host.add_device(iommu, hw_info(0, 0));
    }
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    for dev in 1..=3 {
        nesting.add_device(Bdf::from_raw(dev), ObjectId(dev.into())).unwrap();
    }
    let rig = Rig { host, nesting };
    rig.expect(&[
        "IOAS_ALLOC - = #4",
        "GET_HW_INFO #1",
        "HWPT_ALLOC paging NEST_PARENT on #4 for #1 = #5",
        "GET_HW_INFO #2",
        "GET_HW_INFO #3",
    ]);
    // The same tables on two parents are two objects. No device is ever attached to a parent: that
    // would let it pass.
    for dev in 1..=3 {
        rig.configure(Requester::rid(Bdf::from_raw(dev)), first_stage(0x1000)).unwrap();
    }
    rig.expect(&[
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) on #5 for #1 = #6",
        "DEVICE_ATTACH #1 to #6",
        "DEVICE_ATTACH #2 to #6 ! EINVAL",
        "DEVICE_DETACH #2",
        "HWPT_ALLOC paging NEST_PARENT on #4 for #2 = #7",
        "HWPT_ALLOC VTD_S1(0x1000, 48 bits, flags 0x0) on #7 for #2 = #8",
        "DEVICE_ATTACH #2 to #8",
        "DEVICE_ATTACH #3 to #6 ! EINVAL",
        "DEVICE_DETACH #3",
        "DEVICE_ATTACH #3 to #8",
    ]);
    assert_eq!(rig.nesting.counters().nested_allocs, 2);
    rig.ends_clean();
}

/// If the host refuses what the guest has for a device whose nesting parent is not known yet, as if
/// it were behind another IOMMU, the device gets a parent of its own, once.
#[test]
fn a_guest_that_tries_again_costs_no_parent() {
    let host = RecordingHost::new(Extensions::default());
    let (one, other) = (host.add_device(0, hw_info(0, 0)), host.add_device(0, hw_info(0, 0)));
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    nesting.add_device(A, one).unwrap();
    nesting.add_device(B, other).unwrap();
    let rig = Rig { host, nesting };
    for table in 1..4 {
        rig.host.fail_next(Verb::DeviceAttach, Errno::EINVAL);
        if table == 1 {
            rig.host.fail_next(Verb::DeviceAttach, Errno::EINVAL);
        }
        rig.configure(Requester::rid(B), first_stage(table << 12)).unwrap_err();
        assert_eq!(rig.host.reaches(other, None), None);
    }
    let calls = rig.host.take_log();
    let parents = calls.iter().filter(|call| call.contains("NEST_PARENT"));
    assert_eq!(parents.count(), 2, "{calls:?}");
    rig.nesting.remove_device(A).unwrap();
    rig.configure(Requester::rid(B), Policy::Bypass).unwrap();
    rig.ends_clean();
}

#[test]
fn a_device_behind_another_kind_of_iommu_is_refused_by_name() {
    let host = RecordingHost::new(Extensions::default());
    let dev = host.add_device(0, HwInfo { data: HwInfoData::None, ..hw_info(0, 0) });
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    assert_eq!(nesting.add_device(A, dev), Err(NestingError::NoVtd(A)));
    assert!(nesting.hw_infos().is_empty());
}

#[test]
fn virtual_iommus_of_one_guest_share_its_memory_and_nothing_else() {
    let host = RecordingHost::new(Extensions::default());
    let (sound, flawed) = (host.add_device(0, hw_info(0, 0)), host.add_device(1, hw_info(1, 0)));
    let first = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    let second = VtdNesting::new(first.ioas().unwrap());
    first.ioas().unwrap().map(0, &memory(), Protection::READ_WRITE).unwrap();
    first.add_device(A, sound).unwrap();
    second.add_device(B, flawed).unwrap();
    // The mapping would be in the memory of both.
    let refusal = NestingError::ReadOnlyErratum { gpa: 0xf0000, rid: B };
    assert_eq!(first.ioas().unwrap().map(0xf0000, &memory(), Protection::READ_ONLY), Err(refusal));
    host.take_log();
    for (nesting, rid) in [(&first, A), (&second, B)] {
        let policy = first_stage(0x1000);
        let config = RequesterConfig { policy, tag: TAG, fault_disabled: false };
        nesting.configure(Requester::rid(rid), &config).unwrap();
    }
    host.take_log();
    // The same domain id of another virtual IOMMU is another domain.
    second.invalidate(&[page(TAG, 0x7000)]).unwrap();
    assert_eq!(host.take_log(), ["HWPT_INVALIDATE #7 [0x7000/1 leaf]"]);
    second.shutdown().unwrap();
    assert!(matches!(second.ioas(), Err(NestingError::ShutDown)));
    assert!(host.take_log().iter().all(|call| call != "DESTROY #3"));
    first.shutdown().unwrap();
    assert_eq!(host.take_log().last().map(String::as_str), Some("DESTROY #3"));
    assert_eq!(host.live_objects(), []);
}

#[test]
fn a_device_with_pasids_needs_a_parent_made_for_them() {
    let host = RecordingHost::new(Extensions::default());
    let (plain, with) = (host.add_device(0, hw_info(0, 0)), host.add_device(0, hw_info(0, 8)));
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    nesting.add_device(A, plain).unwrap();
    nesting.add_device(B, with).unwrap();
    let rig = Rig { host, nesting };
    let calls = rig.host.take_log();
    assert_eq!(calls[4], "HWPT_ALLOC paging NEST_PARENT PASID on #3 for #2 = #5");
    rig.configure(pasid(B, 1), Policy::Bypass).unwrap();
    rig.configure(pasid(A, 1), Policy::Bypass).unwrap_err();
    rig.ends_clean();
}

#[test]
fn a_removed_device_leaves_nothing() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(pasid(A, 5), first_stage(0x2000)).unwrap();
    rig.host.take_log();
    rig.nesting.remove_device(A).unwrap();
    rig.expect(&["DEVICE_DETACH #1 PASID 0x5", "DESTROY #6", "DEVICE_DETACH #1", "DESTROY #5"]);
    rig.nesting.remove_device(B).unwrap();
    rig.expect(&["DEVICE_DETACH #2", "DESTROY #4"]);
    assert_eq!(rig.nesting.remove_device(B), Err(NestingError::NoDevice(B)));
    rig.nesting.add_device(B, DEV_B).unwrap();
    assert_eq!(rig.host.reaches(DEV_B, None), None);
    assert_eq!(rig.nesting.add_device(B, DEV_A), Err(NestingError::DeviceExists(B)));
    assert_eq!(rig.nesting.add_device(A, DEV_B), Err(NestingError::DeviceExists(A)));
    rig.ends_clean();
}

#[test]
fn a_device_that_cannot_be_detached_stays_until_it_can() {
    let rig = Rig::new();
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    rig.nesting.remove_device(A).unwrap_err();
    assert_eq!(rig.nesting.hw_infos().len(), 2);
    rig.nesting.remove_device(A).unwrap();
    rig.ends_clean();
}

#[test]
fn shutdown_is_in_the_order_of_use_and_final() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.take_log();
    rig.nesting.shutdown().unwrap();
    rig.expect(&["DEVICE_DETACH #1", "DESTROY #5", "DEVICE_DETACH #2", "DESTROY #4", "DESTROY #3"]);
    assert_eq!(rig.host.live_objects(), []);
    assert_eq!(rig.nesting.add_device(A, DEV_A), Err(NestingError::ShutDown));
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap_err();
    drop(rig.nesting);
    assert_eq!(rig.host.take_log(), Vec::<String>::new());
}

#[test]
fn what_could_not_be_destroyed_is_destroyed_later() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.fail_next(Verb::Destroy, Errno::EBUSY);
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    assert_eq!(rig.host.live_objects(), [IOAS, PARENT, ObjectId(5)]);
    rig.configure(Requester::rid(A), first_stage(0x2000)).unwrap();
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    assert_eq!(rig.host.live_objects(), [IOAS, PARENT]);
    rig.ends_clean();
}

#[test]
fn a_host_that_destroys_nothing_is_not_filled_up() {
    let rig = Rig::new();
    (0..10_000).for_each(|_| rig.host.fail_next(Verb::Destroy, Errno::EBUSY));
    let refused =
        (1..100u64).find(|n| rig.configure(Requester::rid(A), first_stage(n << 12)).is_err());
    assert!(refused.is_some(), "a guest could pile up host objects");
    assert_eq!(rig.host.reaches(DEV_A, None), None);
    assert!(rig.host.live_objects().len() < 30);
}

#[test]
fn erratum_772415_forbids_read_only_memory() {
    let host = RecordingHost::new(Extensions::default());
    let (sound, flawed) = (host.add_device(0, hw_info(0, 0)), host.add_device(0, hw_info(1, 0)));
    let nesting = VtdNesting::new(GuestIoas::new(host.clone()).unwrap());
    nesting.add_device(A, sound).unwrap();
    nesting.ioas().unwrap().map(0xf000, &memory(), Protection::READ_ONLY).unwrap();
    let refusal = NestingError::ReadOnlyErratum { gpa: 0xf000, rid: B };
    assert_eq!(nesting.add_device(B, flawed), Err(refusal));
    nesting.ioas().unwrap().unmap(0xf000, 0x10000).unwrap();
    nesting.add_device(B, flawed).unwrap();
    let refusal = NestingError::ReadOnlyErratum { gpa: 0, rid: B };
    assert!(refusal.to_string().contains("772415"), "{refusal}");
    assert_eq!(nesting.ioas().unwrap().map(0, &memory(), Protection::READ_ONLY), Err(refusal));
    nesting.ioas().unwrap().map(0, &memory(), Protection::READ_WRITE).unwrap();
}

#[derive(Default)]
struct Target(Mutex<Vec<DmaFault>>);

impl FaultTarget for Target {
    fn dma_fault(&self, fault: &DmaFault) {
        self.0.lock().push(*fault);
    }
}

#[test]
fn faults_come_back_to_their_requester() {
    let rig = Rig::with(Extensions { fault_reports: true, ..Extensions::default() });
    let target = Arc::new(Target::default());
    rig.nesting.set_fault_target(Arc::downgrade(&target) as _);
    let fault = HostFault {
        dev: DEV_B,
        pasid: None,
        address: 0x5000,
        write: false,
        execute: false,
        privileged: false,
        reason: 0x71,
        stage2: true,
    };
    // A fault arrives while the lock of nesting is held, as in an invalidation that waits for DMA.
    let held = rig.nesting.state();
    rig.host.report_fault(&fault);
    drop(held);
    assert_eq!(target.0.lock()[0].requester, Requester::rid(B));
    rig.nesting.remove_device(B).unwrap();
    rig.host.report_fault(&fault);
    assert_eq!(target.0.lock().len(), 1);
}

#[test]
fn the_host_tells_of_each_device() {
    let rig = Rig::new();
    let infos = rig.nesting.hw_infos();
    let told: Vec<_> = infos.iter().map(|d| (d.rid, d.dev, d.info.max_pasid_log2)).collect();
    assert_eq!(told, [(A, DEV_A, 8), (B, DEV_B, 8)]);
}

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
        assert!(calls >= 25, "only {calls} calls were made to fail");
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which host calls a configuration costs, and their order.

use super::*;
use crate::iommufd::{Errno, Protection, Verb};

#[test]
fn the_first_attach() {
    let host = RecordingHost::new(Extensions::default());
    let dev = host.add_device(0, hw_info());
    let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
    nesting.ioas().unwrap().map(0, &memory(), Protection::READ_WRITE).unwrap();
    nesting.add_device(A, dev).unwrap();
    assert_eq!(host.reaches(dev, None), None);
    let rig = Rig { host, nesting };
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #2",
        "IOAS_MAP #2 0x0+0x10000 rw",
        "GET_HW_INFO #1",
        "HWPT_ALLOC paging NEST_PARENT on #2 for #1 = #3",
        "VIOMMU_ALLOC #1 on #3 = #4",
        "VEVENTQ_ALLOC #4 type 0x1 depth 64 = #5",
        "VDEVICE_ALLOC #4 #1 0x20 = #6",
        // It was detached, so it was blocked.
        "DEVICE_ATTACH #1 to #3",
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #4 for #1 = #7",
        "DEVICE_ATTACH #1 to #7",
    ]);
    rig.ends_clean();
}

#[test]
fn an_unchanged_entry_costs_nothing() {
    let rig = Rig::new();
    for policy in [stage1(0x1000, false), StreamPolicy::GlobalBypass, StreamPolicy::Abort] {
        rig.configure(STREAM_A, policy).unwrap();
        rig.host.take_log();
        rig.configure(STREAM_A, policy).unwrap();
        rig.expect(&[]);
    }
    assert_eq!(rig.nesting.counters().unchanged, 3);
}

/// Linux reports no events of a stream that is attached to the nesting parent.
#[test]
fn an_entry_that_bypasses_is_no_global_bypass() {
    let rig = Rig::new();
    for stream in [STREAM_A, STREAM_B] {
        rig.configure(stream, StreamPolicy::Bypass).unwrap();
        rig.configure(stream, StreamPolicy::Bypass).unwrap();
    }
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.configure(STREAM_A, StreamPolicy::Bypass).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x9, 0x0) on #5 for #1 = #9",
        "DEVICE_ATTACH #1 to #9",
        "DEVICE_ATTACH #2 to #9",
        "DEVICE_ATTACH #1 to #4",
        "DEVICE_ATTACH #1 to #9",
    ]);
    rig.ends_clean();
}

#[test]
fn a_changed_entry_replaces() {
    let rig = Rig::new();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.configure(STREAM_A, stage1(0x2000, true)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 = #9",
        "DEVICE_ATTACH #1 to #9",
        "HWPT_ALLOC ARM_SMMUV3(0x200000000000200b, 0x10000000) on #5 for #1 = #10",
        "DEVICE_ATTACH #1 to #10",
        "DESTROY #9",
    ]);
    rig.ends_clean();
}

#[test]
fn the_same_entry_is_one_object_until_its_last_user_leaves() {
    let rig = Rig::new();
    for policy in [stage1(0x1000, false), StreamPolicy::Abort, StreamPolicy::GlobalBypass] {
        rig.configure(STREAM_A, policy).unwrap();
        rig.configure(STREAM_B, policy).unwrap();
    }
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 = #9",
        "DEVICE_ATTACH #1 to #9",
        "DEVICE_ATTACH #2 to #9",
        "HWPT_ALLOC ARM_SMMUV3(0x1, 0x0) on #5 for #1 = #10",
        "DEVICE_ATTACH #1 to #10",
        "DEVICE_ATTACH #2 to #10",
        "DESTROY #9",
        // The aborting entry stays; what passes while translation is off is stage 2 itself.
        "DEVICE_ATTACH #1 to #4",
        "DEVICE_ATTACH #2 to #4",
        "DEVICE_ATTACH #1 to #10",
    ]);
    let counters = rig.nesting.counters();
    assert_eq!((counters.nested_allocs, counters.nested_shares, counters.replaces), (2, 3, 7));
    rig.ends_clean();
}

#[test]
fn a_refused_attach_blocks_and_is_tried_again() {
    let rig = Rig::nested();
    rig.host.fail_next(Verb::DeviceAttach, Errno::EINVAL);
    let error = rig.configure(STREAM_A, stage1(0x3000, false)).unwrap_err();
    assert!(!error.still_reachable);
    assert!(error.to_string().contains("00:04.0"), "{error}");
    assert!(error.to_string().contains("EINVAL"), "{error}");
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x300b, 0x0) on #5 for #1 = #11",
        "DEVICE_ATTACH #1 to #11 ! EINVAL",
        "HWPT_ALLOC ARM_SMMUV3(0x1, 0x0) on #5 for #1 = #12",
        "DEVICE_ATTACH #1 to #12",
        "DESTROY #9",
        "DESTROY #11",
    ]);
    assert_eq!(rig.nesting.counters().refused_attaches, 1);
    // The same again is not a repetition: it had failed.
    rig.configure(STREAM_A, stage1(0x3000, false)).unwrap();
    rig.expect(&["HWPT_ALLOC ARM_SMMUV3(0x300b, 0x0) on #5 for #1 = #9", "DEVICE_ATTACH #1 to #9"]);
    rig.ends_clean();
}

#[test]
fn what_cannot_be_aborted_is_detached() {
    let rig = Rig::nested();
    for _ in 0..2 {
        rig.host.fail_next(Verb::DeviceAttach, Errno::EBUSY);
    }
    let error = rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap_err();
    assert!(!error.still_reachable);
    rig.expect(&[
        "DEVICE_ATTACH #1 to #4 ! EBUSY",
        "HWPT_ALLOC ARM_SMMUV3(0x1, 0x0) on #5 for #1 = #11",
        "DEVICE_ATTACH #1 to #11 ! EBUSY",
        "DEVICE_DETACH #1",
        "DESTROY #9",
    ]);
    // Already blocked.
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.expect(&[]);
    rig.ends_clean();
}

#[test]
fn an_entry_that_aborts_is_not_trusted_after_a_refused_attach() {
    let rig = Rig::new();
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.host.take_log();
    rig.host.fail_next(Verb::DeviceAttach, Errno::EIO);
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap_err();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 = #10",
        "DEVICE_ATTACH #1 to #10 ! EIO",
        "DEVICE_DETACH #1",
        "DESTROY #10",
    ]);
    rig.ends_clean();
}

#[test]
fn what_cannot_be_blocked_is_told_and_blocked_first_of_all() {
    let rig = Rig::nested();
    for _ in 0..8 {
        rig.host.fail_next(Verb::DeviceAttach, Errno::EIO);
        rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    assert!(rig.configure(STREAM_A, StreamPolicy::Abort).unwrap_err().still_reachable);
    rig.host.forget_failures();
    rig.host.take_log();
    rig.configure(STREAM_A, stage1(0x1000, true)).unwrap();
    let calls = rig.host.take_log();
    assert_eq!(calls[0], "DEVICE_DETACH #1", "{calls:?}");
    rig.ends_clean();
}

#[test]
fn a_refused_allocation_blocks() {
    let rig = Rig::new();
    rig.host.fail_next(Verb::HwptAlloc, Errno::EIO);
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap_err();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 ! EIO",
        "HWPT_ALLOC ARM_SMMUV3(0x1, 0x0) on #5 for #1 = #9",
        "DEVICE_ATTACH #1 to #9",
    ]);
    rig.ends_clean();
}

#[test]
fn a_stream_without_a_device_is_blocked_already() {
    let rig = Rig::new();
    let nobody = StreamId(0x99);
    rig.configure(nobody, StreamPolicy::Abort).unwrap();
    let error = rig.configure(nobody, StreamPolicy::GlobalBypass).unwrap_err();
    assert!(error.to_string().contains("0x99") && !error.still_reachable, "{error}");
    rig.expect(&[]);
}

/// What a Linux guest asks for from power-on to a shell, with one device: QEMU needs 4 HWPTs and 6
/// attaches for it.
#[test]
fn the_calls_of_a_boot() {
    let host = RecordingHost::new(Extensions::default());
    let dev = host.add_device(0, hw_info());
    let nesting = SmmuNesting::with_event_depth(GuestIoas::new(host.clone()).unwrap(), 64);
    nesting.add_device(A, dev).unwrap();
    let rig = Rig { host, nesting };
    // GBPA at power-on; then the driver's reset, and its stream table.
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.invalidate(&[Command::TlbiNsnhAll]).unwrap();
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.invalidate(&[cd(STREAM_A)]).unwrap();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.invalidate(&[va(1, 1), va(1, 2)]).unwrap();
    let calls = rig.host.take_log();
    let of = |verb: &str| calls.iter().filter(|call| call.starts_with(verb)).count();
    let counts = (of("HWPT_ALLOC"), of("DEVICE_ATTACH"), of("HWPT_INVALIDATE"));
    assert_eq!(counts, (3, 4, 1), "{calls:#?}");
    rig.ends_clean();
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which host calls a batch of invalidations costs.

use super::*;
use crate::iommufd::{Errno, Verb, HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI};
use crate::spec::smmuv3::command::SyncSignal;

/// A flush of everything for [`Rig::nested`]: context descriptors, translations, A's device-TLB.
const EVERYTHING: &str = "HWPT_INVALIDATE #5 [0x2000000006:0x0, 0x2800000006:0x0, 0x10:0x0, \
                          0x2000000040:0x34, 0x2000000a40:0x34]";

#[test]
fn a_batch_is_one_call_of_the_guest_s_commands() {
    let rig = Rig::nested();
    rig.invalidate(&[cd(STREAM_A), va(1, 5), asid(2), atc(STREAM_A)]).unwrap();
    rig.expect(&["HWPT_INVALIDATE #5 [0x2000000005:0x1, 0x1000000000012:0x5000, \
         0x2000000000011:0x0, 0x2000000040:0x7000]"]);
    rig.invalidate(&[]).unwrap();
    rig.expect(&[]);
    let counters = rig.nesting.counters();
    assert_eq!((counters.commands_in, counters.commands_out), (4, 4));
}

#[test]
fn what_another_command_covers_is_not_sent() {
    let rig = Rig::nested();
    rig.invalidate(&[va(1, 5), va(1, 5), asid(1), Command::TlbiNsnhAll]).unwrap();
    rig.expect(&["HWPT_INVALIDATE #5 [0x30:0x0]"]);
    assert_eq!(rig.nesting.counters().merged, 3);
}

#[test]
fn what_cannot_be_cached_costs_no_call() {
    let rig = Rig::new();
    // No stream has ever used stage 1.
    rig.invalidate(&[Command::TlbiNsnhAll, va(1, 1), cd(STREAM_A), atc(STREAM_A)]).unwrap();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.host.take_log();
    // B bypasses, A's device caches nothing, and 0x99 does not exist.
    rig.invalidate(&[cd(STREAM_B), atc(STREAM_B), atc(STREAM_A), cd(StreamId(0x99))]).unwrap();
    rig.expect(&[]);
    assert_eq!(rig.nesting.counters().not_cached, 8);
}

#[test]
fn what_was_kept_back_is_flushed_before_a_stream_uses_stage_1_again() {
    let rig = Rig::new();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.host.take_log();
    rig.invalidate(&[va(1, 1)]).unwrap();
    rig.invalidate(&[va(1, 2)]).unwrap();
    rig.expect(&[]);
    rig.configure(STREAM_B, stage1(0x1000, false)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #2 = #9",
        "HWPT_INVALIDATE #5 [0x10:0x0]",
        "DEVICE_ATTACH #2 to #9",
    ]);
    // Once is enough: nothing was withheld since.
    rig.configure(STREAM_B, StreamPolicy::GlobalBypass).unwrap();
    rig.configure(STREAM_B, stage1(0x2000, false)).unwrap();
    assert!(rig.host.take_log().iter().all(|call| !call.starts_with("HWPT_INVALIDATE")));
    rig.ends_clean();
}

#[test]
fn what_is_stale_keeps_a_stream_from_stage_1() {
    let rig = Rig::new();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.configure(STREAM_A, StreamPolicy::Abort).unwrap();
    rig.invalidate(&[va(1, 1)]).unwrap();
    rig.host.take_log();
    rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    assert!(!rig.configure(STREAM_A, stage1(0x1000, false)).unwrap_err().still_reachable);
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 = #9",
        "HWPT_INVALIDATE #5 [0x10:0x0] ! EIO",
        "DESTROY #9",
    ]);
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x100b, 0x0) on #5 for #1 = #9",
        "HWPT_INVALIDATE #5 [0x10:0x0]",
        "DEVICE_ATTACH #1 to #9",
    ]);
    rig.ends_clean();
}

#[test]
fn a_refused_command_is_found_and_nothing_is_stale() {
    let rig = Rig::nested();
    rig.host.refuse_command(va(1, 7).encode());
    let batch: Vec<_> = (5..10).map(|page| va(1, page)).collect();
    let refused = rig.invalidate(&batch).unwrap_err();
    assert_eq!((refused.refused, refused.flushed, refused.error.still_reachable), (2, true, false));
    assert!(refused.to_string().contains("EIO"), "{refused}");
    let log = rig.host.take_log();
    assert_eq!(log[1], EVERYTHING, "{log:#?}");
    assert_eq!(
        log[2..],
        [
            "HWPT_INVALIDATE #5 [0x1000000000012:0x5000, 0x1000000000012:0x6000, \
             0x1000000000012:0x7000] ! EIO",
            "HWPT_INVALIDATE #5 [0x1000000000012:0x5000, 0x1000000000012:0x6000]",
            "HWPT_INVALIDATE #5 [0x1000000000012:0x7000] ! EIO",
        ]
    );
    assert_eq!(rig.nesting.counters().full_flushes, 1);
    // Streams continue: none of their translations is stale.
    assert_eq!(rig.host.reaches(DEV_A, None), Some(ObjectId(9)));
    rig.ends_clean();
}

#[test]
fn the_number_of_a_refused_command_is_the_guest_s() {
    let rig = Rig::nested();
    rig.configure(STREAM_B, StreamPolicy::GlobalBypass).unwrap();
    rig.host.refuse_command(va(1, 7).encode());
    let batch = [cd(STREAM_B), va(1, 5), va(1, 5), atc(STREAM_A), va(1, 7)];
    assert_eq!(rig.invalidate(&batch).unwrap_err().refused, 4);
}

#[test]
fn a_failure_that_passes_is_made_good_and_told() {
    let rig = Rig::nested();
    rig.configure(STREAM_B, StreamPolicy::GlobalBypass).unwrap();
    rig.host.take_log();
    rig.host.fail_next(Verb::HwptInvalidate, Errno::ENOMEM);
    // Which of the forwarded commands failed is unknown: the first will do.
    let refused = rig.invalidate(&[cd(STREAM_B), va(1, 5), va(1, 6), va(1, 7)]).unwrap_err();
    assert_eq!((refused.refused, refused.flushed, refused.error.still_reachable), (1, true, false));
    assert!(refused.to_string().contains("ENOMEM"), "{refused}");
    let log = rig.host.take_log();
    assert_eq!((log.len(), log[1].contains("0x10:0x0")), (4, true), "{log:#?}");
    rig.invalidate(&[va(1, 5)]).unwrap();
    rig.ends_clean();
}

#[test]
fn a_device_that_does_not_answer_is_no_refusal() {
    let rig = Rig::nested();
    // Whether all before it was done is unknown.
    (0..2).for_each(|_| rig.host.fail_next(Verb::HwptInvalidate, Errno::ETIMEDOUT));
    let refused = rig.invalidate(&[va(1, 5), atc(STREAM_A)]).unwrap_err();
    assert!(!refused.unanswered, "it is not the device");
    rig.host.take_log();
    let rig = Rig::nested();
    rig.host.fail_next(Verb::HwptInvalidate, Errno::ETIMEDOUT);
    let refused = rig.invalidate(&[va(1, 5), atc(STREAM_A)]).unwrap_err();
    assert_eq!((refused.unanswered, refused.flushed), (true, false));
    let log = rig.host.take_log();
    assert_eq!(log.len(), 3, "all, translations, the device: {log:#?}");
    rig.invalidate(&[va(1, 5), atc(STREAM_A)]).unwrap();
    rig.ends_clean();
}

#[test]
fn a_flush_that_was_due_is_no_refusal() {
    let rig = Rig::nested();
    for _ in 0..2 {
        rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    }
    // Neither the batch nor the flush succeeds, nor can the streams be blocked.
    for _ in 0..4 {
        rig.host.fail_next(Verb::DeviceAttach, Errno::EIO);
        rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    let refused = rig.invalidate(&[va(1, 5)]).unwrap_err();
    assert!(!refused.flushed && refused.error.still_reachable);
    rig.invalidate(&[va(1, 6)]).unwrap();
}

#[test]
fn what_cannot_be_flushed_is_blocked() {
    let rig = Rig::nested();
    for _ in 0..2 {
        rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    }
    let refused = rig.invalidate(&[va(1, 5)]).unwrap_err();
    assert_eq!(
        (refused.refused, refused.flushed, refused.error.still_reachable),
        (0, false, false)
    );
    rig.expect(&[
        "HWPT_INVALIDATE #5 [0x1000000000012:0x5000] ! EIO",
        &format!("{EVERYTHING} ! EIO"),
        "HWPT_ALLOC ARM_SMMUV3(0x1, 0x0) on #5 for #1 = #11",
        "DEVICE_ATTACH #1 to #11",
        "DESTROY #9",
        "DEVICE_ATTACH #2 to #11",
        "DESTROY #10",
    ]);
    // They are nested again at the next configuration, with nothing stale.
    rig.configure(STREAM_B, stage1(0x2000, false)).unwrap();
    rig.expect(&[
        "HWPT_ALLOC ARM_SMMUV3(0x200b, 0x0) on #5 for #2 = #9",
        "HWPT_INVALIDATE #5 [0x10:0x0]",
        "DEVICE_ATTACH #2 to #9",
    ]);
    rig.ends_clean();
}

#[test]
fn what_can_neither_be_flushed_nor_blocked_is_told_and_flushed_first_of_all() {
    let rig = Rig::nested();
    rig.configure(STREAM_B, StreamPolicy::GlobalBypass).unwrap();
    rig.host.take_log();
    for _ in 0..2 {
        rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
        rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    rig.host.fail_next(Verb::DeviceAttach, Errno::EIO);
    assert!(rig.invalidate(&[va(1, 5)]).unwrap_err().error.still_reachable);
    rig.host.take_log();
    rig.invalidate(&[]).unwrap();
    rig.expect(&[
        "HWPT_INVALIDATE #5 [0x2000000006:0x0, 0x10:0x0, 0x2000000040:0x34, 0x2000000a40:0x34]",
    ]);
    rig.invalidate(&[]).unwrap();
    rig.expect(&[]);
    rig.ends_clean();
}

#[test]
fn what_is_no_invalidation_of_stage_1_never_reaches_the_host() {
    let rig = Rig::nested();
    for foreign in [
        Command::CfgiSte { stream: STREAM_A, leaf: true },
        Command::TlbiS12Vmall { vmid: 0 },
        Command::TlbiEl2All,
    ] {
        let refused = rig.invalidate(&[va(1, 5), foreign, va(1, 6)]).unwrap_err();
        assert_eq!(refused.refused, 1);
        assert!(refused.to_string().contains(foreign.name()), "{refused}");
        rig.expect(&["HWPT_INVALIDATE #5 [0x1000000000012:0x5000]"]);
    }
    assert_eq!(rig.invalidate(&[Command::TlbiEl2All]).unwrap_err().refused, 0);
    rig.expect(&[]);
}

#[test]
fn a_long_batch_goes_in_pieces() {
    let rig = Rig::nested();
    rig.host.mute();
    let before = rig.host.calls();
    let batch: Vec<_> = (0..10_000).map(|page| va(1, page)).collect();
    rig.invalidate(&batch).unwrap();
    assert_eq!(rig.host.calls() - before, 3);
    assert_eq!(rig.nesting.counters().commands_out, 10_000);
}

#[test]
fn an_smmu_that_may_miss_invalidations_is_given_each_twice() {
    let rig = Rig::nested_on(hw_info_with(HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI));
    rig.invalidate(&[cd(STREAM_A), va(1, 5), atc(STREAM_A), va(1, 6)]).unwrap();
    let (first, last) = (
        "HWPT_INVALIDATE #5 [0x2000000005:0x1, 0x1000000000012:0x5000]",
        "HWPT_INVALIDATE #5 [0x1000000000012:0x6000]",
    );
    // Device-TLB entries are made from translations, and invalidated after them.
    rig.expect(&[first, first, "HWPT_INVALIDATE #5 [0x2000000040:0x7000]", last, last]);
    // The flush after a refusal is also issued twice.
    rig.host.refuse_command(va(1, 7).encode());
    let refused = rig.invalidate(&[va(1, 7)]).unwrap_err();
    assert!(refused.flushed);
    let log = rig.host.take_log();
    let flush = "HWPT_INVALIDATE #5 [0x2000000006:0x0, 0x2800000006:0x0, 0x10:0x0]";
    assert_eq!(log[1..3], [flush; 2], "{log:#?}");
    // So is the flush before a stream returns to stage 1.
    rig.configure(STREAM_A, StreamPolicy::GlobalBypass).unwrap();
    rig.configure(STREAM_B, StreamPolicy::GlobalBypass).unwrap();
    rig.invalidate(&[asid(1)]).unwrap();
    rig.host.take_log();
    rig.configure(STREAM_A, stage1(0x1000, false)).unwrap();
    let all = "HWPT_INVALIDATE #5 [0x10:0x0]";
    assert_eq!(rig.host.take_log()[1..3], [all; 2]);
    rig.ends_clean();
}

#[test]
fn a_silent_device_is_told_with_a_command_that_is_not_passed_on() {
    let rig = Rig::nested();
    rig.host.fail_next(Verb::HwptInvalidate, Errno::ETIMEDOUT);
    let foreign = Command::Sync { signal: SyncSignal::None };
    let refused = rig.invalidate(&[va(1, 5), atc(STREAM_A), foreign]).unwrap_err();
    assert_eq!((refused.refused, refused.unanswered, refused.done), (2, true, false));
    rig.ends_clean();
}

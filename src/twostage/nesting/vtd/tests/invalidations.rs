// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which host calls a batch of invalidations costs.

use super::*;
use crate::iommufd::{Errno, Verb};
use crate::nesting::sides::Sides;

#[test]
fn a_batch_is_one_call_per_hwpt_and_ordering_point() {
    let rig = Rig::new();
    let other = DomainTag { domain: 8, pasid: 0 };
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure_tagged(Requester::rid(B), first_stage(0x2000), other).unwrap();
    rig.host.take_log();
    let first = [page(TAG, 0x1000), page(other, 0x9000), page(TAG, 0x2000), page(TAG, 0x8000)];
    rig.nesting.invalidate(&first).unwrap();
    rig.nesting.invalidate(&[page(TAG, 0x3000)]).unwrap();
    rig.expect(&[
        "HWPT_INVALIDATE #5 [0x1000/2 leaf, 0x8000/1 leaf]",
        "HWPT_INVALIDATE #6 [0x9000/1 leaf]",
        "HWPT_INVALIDATE #5 [0x3000/1 leaf]",
    ]);
    let counters = rig.nesting.counters();
    assert_eq!((counters.invalidations_in, counters.entries_out, counters.merged), (5, 4, 1));
    rig.ends_clean();
}

#[test]
fn only_nested_requesters_that_are_named_cost_a_call() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), Policy::Bypass).unwrap();
    rig.configure(Requester::rid(B), BLOCKED).unwrap();
    rig.configure_tagged(pasid(B, 3), first_stage(0x1000), DomainTag { domain: 7, pasid: 3 })
        .unwrap();
    rig.host.take_log();
    rig.nesting.invalidate(&[page(TAG, 0x1000)]).unwrap();
    rig.nesting.invalidate(&[]).unwrap();
    rig.expect(&[]);
    let domain = Invalidation { domain: Some(7), pasid: None, range: None };
    rig.nesting.invalidate(&[domain, page(TAG, 0x1000)]).unwrap();
    rig.expect(&["HWPT_INVALIDATE #5 [all]"]);
}

/// §6.5.2.3: alone and in a batch.
#[test]
fn pages_of_a_domain_are_all_of_its_first_stage_tables_and_those_pages_of_its_second_stage_ones() {
    let rig = Rig::walking();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(Requester::rid(B), second_stage(0x2000)).unwrap();
    rig.host.take_log();
    let of_domain = |address| Invalidation { pasid: None, ..page(TAG, address) };
    rig.nesting.invalidate(&[of_domain(0x5000)]).unwrap();
    rig.nesting.invalidate(&[of_domain(0x5000), page(TAG, 0x7000), of_domain(0x6000)]).unwrap();
    rig.nesting.invalidate(&[page(TAG, 0x7000)]).unwrap();
    rig.expect(&[
        "HWPT_INVALIDATE #5 [all]",
        "HWPT_INVALIDATE #6 second-stage [0x5000/1 leaf]",
        "HWPT_INVALIDATE #5 [all]",
        "HWPT_INVALIDATE #6 second-stage [0x5000/3 leaf]",
        "HWPT_INVALIDATE #5 [0x7000/1 leaf]",
        "HWPT_INVALIDATE #6 second-stage [0x7000/1 leaf]",
    ]);
    let counters = rig.nesting.counters();
    assert_eq!((counters.invalidations_in, counters.entries_out, counters.merged), (5, 6, 4));
    rig.ends_clean();
}

/// §6.5.2.3, §6.5.2.4: addresses without a PASID are of the second stage, those with one of the
/// first, and what the second stage drops needs no call for the first.
#[test]
fn nested_tables_are_invalidated_by_addresses_of_either_stage() {
    let rig = Rig::walking();
    rig.configure(Requester::rid(A), nested(0x1000, 0x2000)).unwrap();
    rig.host.take_log();
    let of_domain = |address| Invalidation { pasid: None, ..page(TAG, address) };
    let all_of = |pasid| Invalidation { domain: Some(TAG.domain), pasid, range: None };
    let first = page(TAG, 0x7000);
    let batches: [(&[_], &str); 9] = [
        (&[first], "[0x7000/1 leaf]"),
        (&[first, page(TAG, 0x8000)], "[0x7000/2 leaf]"),
        (&[of_domain(0x5000)], "second-stage [0x5000/1 leaf]"),
        (&[of_domain(0x5000), of_domain(0x6000)], "second-stage [0x5000/2 leaf]"),
        (&[first, of_domain(0x5000)], "second-stage [0x5000/1 leaf]"),
        (&[of_domain(0x5000), all_of(Some(0)), first], "second-stage [0x5000/1 leaf]"),
        (&[all_of(Some(0))], "[all]"),
        (&[all_of(None)], "second-stage [all]"),
        (&[first, Invalidation::ALL], "second-stage [all]"),
    ];
    for (batch, call) in batches {
        rig.nesting.invalidate(batch).unwrap();
        rig.expect(&[&format!("HWPT_INVALIDATE #5 {call}")]);
    }
    let counters = rig.nesting.counters();
    assert_eq!((counters.invalidations_in, counters.entries_out, counters.merged), (15, 9, 6));
    // What stops halfway goes on with everything of the same stage.
    for (invalidation, kind) in [(first, ""), (of_domain(0x5000), "second-stage ")] {
        rig.host.fail_invalidation(0, Errno::EINVAL);
        rig.nesting.invalidate(&[invalidation]).unwrap();
        let calls = rig.host.take_log();
        assert_eq!(calls[1], format!("HWPT_INVALIDATE #5 {kind}[all]"), "{calls:?}");
    }
    rig.ends_clean();
}

#[test]
fn a_partial_invalidation_goes_on_with_everything_where_it_stopped() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.host.take_log();
    rig.host.fail_invalidation(1, Errno::EINVAL);
    let batch = [page(TAG, 0x1000), page(TAG, 0x3000), page(TAG, 0x5000)];
    rig.nesting.invalidate(&batch).unwrap();
    rig.expect(&[
        "HWPT_INVALIDATE #5 [0x1000/1 leaf, 0x3000/1 leaf, 0x5000/1 leaf] ! EINVAL",
        "HWPT_INVALIDATE #5 [all]",
    ]);
    assert_eq!(rig.nesting.counters().entries_out, 2);
    assert_eq!(rig.host.reaches(DEV_A, None), Some(ObjectId(5)));
}

#[test]
fn what_cannot_be_invalidated_is_blocked_and_the_rest_is_done() {
    let rig = Rig::new();
    let other = DomainTag { domain: 8, pasid: 0 };
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    rig.configure(pasid(A, 1), first_stage(0x1000)).unwrap();
    rig.configure_tagged(Requester::rid(B), first_stage(0x2000), other).unwrap();
    rig.host.take_log();
    rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    let error = rig.nesting.invalidate(&[page(TAG, 0x1000), page(other, 0x1000)]).unwrap_err();
    assert!(error.to_string().contains("EIO") && !error.still_reachable, "{error}");
    rig.expect(&[
        "HWPT_INVALIDATE #5 [0x1000/1 leaf] ! EIO",
        "HWPT_INVALIDATE #5 [all] ! EIO",
        "DEVICE_DETACH #1",
        "DEVICE_DETACH #1 PASID 0x1",
        "DESTROY #5",
        "HWPT_INVALIDATE #6 [0x1000/1 leaf]",
    ]);
    assert_eq!(rig.host.reaches(DEV_A, None), None);
    // Blocked requesters are nested again at the next configuration.
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    assert_eq!(rig.host.reaches(DEV_A, None), Some(ObjectId(5)));
    rig.ends_clean();
}

#[test]
fn what_can_neither_be_invalidated_nor_blocked_is_told() {
    let rig = Rig::new();
    rig.configure(Requester::rid(A), first_stage(0x1000)).unwrap();
    for _ in 0..2 {
        rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
        rig.host.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    assert!(rig.nesting.invalidate(&[page(TAG, 0x1000)]).unwrap_err().still_reachable);
    rig.ends_clean();
}

#[test]
fn a_batch_that_names_many_tables_is_done_in_pieces() {
    let rig = Rig::new();
    let tag = |value| DomainTag { domain: (value % 3) as u16, pasid: value };
    for value in 1..=100 {
        let tables = first_stage(u64::from(value) << 12);
        rig.configure_tagged(pasid(A, value), tables, tag(value)).unwrap();
        rig.configure_tagged(pasid(B, value), tables, tag(value)).unwrap();
    }
    let of_domain = |domain| Invalidation { domain: Some(domain), ..Invalidation::ALL };
    let batches = [
        vec![Invalidation::ALL],
        vec![of_domain(0), of_domain(2), of_domain(1)],
        // More names than tables at once.
        (1..=100).map(|value| page(tag(value), 0x1000)).collect(),
    ];
    for batch in batches {
        rig.host.take_log();
        let (mut progress, mut all) = (Progress::default(), Vec::new());
        while !progress.is_done() {
            rig.nesting.invalidate_some(&batch, &mut progress).unwrap();
            let calls = rig.host.take_log();
            assert!((1..=32).contains(&calls.len()), "{calls:?}");
            all.extend(calls);
        }
        rig.nesting.invalidate(&batch).unwrap();
        // Each once, and as with one call.
        assert_eq!((all.len(), &all), (100, &rig.host.take_log()));
    }
    // A failure on the way is reported, and the rest can be done.
    rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    rig.host.fail_next(Verb::HwptInvalidate, Errno::EIO);
    let mut progress = Progress::default();
    rig.nesting.invalidate_some(&[Invalidation::ALL], &mut progress).unwrap_err();
    assert!(!progress.is_done());
    while !progress.is_done() {
        rig.nesting.invalidate_some(&[Invalidation::ALL], &mut progress).unwrap();
    }
    rig.ends_clean();
}

#[test]
fn a_batch_of_many_ranges_is_done_in_pieces() {
    let rig = Rig::new();
    let tag = |value| DomainTag { domain: 3, pasid: value };
    for value in 1..=8 {
        rig.configure_tagged(pasid(A, value), first_stage(u64::from(value) << 12), tag(value))
            .unwrap();
    }
    // Few of some, very many of others; all disjoint.
    let ranges = [200, 1, 1, 100, 20, 20, 256, 3];
    let batch: Vec<_> = (1..)
        .zip(ranges)
        .flat_map(|(value, ranges)| (0..ranges).map(move |at| page(tag(value), at << 13)))
        .collect();
    rig.host.take_log();
    let (mut progress, mut pieces, mut done) = (Progress::default(), 0, 0);
    let mut all = Vec::new();
    while !progress.is_done() {
        rig.nesting.invalidate_some(&batch, &mut progress).unwrap();
        let entries = rig.nesting.counters().entries_out;
        // One HWPT may have 256; another one is started below 32.
        assert!(entries - done <= 31 + 256, "{} ranges in a piece", entries - done);
        (pieces, done) = (pieces + 1, entries);
        all.extend(rig.host.take_log());
    }
    assert_eq!((pieces, done), (5, ranges.iter().sum()));
    rig.nesting.invalidate(&batch).unwrap();
    assert_eq!((all.len(), &all), (8, &rig.host.take_log()), "each once, and as with one call");
    rig.ends_clean();
}

#[test]
fn pasids_that_are_alike_cost_nothing() {
    let rig = Rig::new();
    for value in 1..=255 {
        let tag = DomainTag { domain: 7, pasid: value };
        rig.configure_tagged(pasid(A, value), first_stage(0x1000), tag).unwrap();
        rig.configure_tagged(pasid(B, value), BLOCKED, tag).unwrap();
    }
    assert_eq!(rig.nesting.state().nested.slots().kept(), 1);
    rig.configure(pasid(A, 9), BLOCKED).unwrap();
    assert_eq!(rig.nesting.state().nested.slots().kept(), 2);
    rig.ends_clean();
}

#[test]
fn on_several_hosts_a_batch_is_done_in_pieces_of_each() {
    let [one, other] = [0, 1].map(|_| {
        let host = RecordingHost::new(Extensions::default());
        (host.add_device(0, hw_info(0, 8)), GuestIoas::new(host.clone()).unwrap(), host)
    });
    let sides = Sides::new(VtdNesting::new(one.1.clone()));
    for (rid, (dev, ioas, _), tables) in [(A, &one, 40), (B, &other, 70)] {
        sides.add_device(Some(ioas), rid, *dev).unwrap();
        for value in 1..=tables {
            let policy = first_stage(u64::from(value) << 12);
            let tag = DomainTag { domain: 3, pasid: value };
            let config = RequesterConfig { policy, tag, fault_disabled: false };
            sides.configure(pasid(rid, value), &config).unwrap();
        }
    }
    let done = || [&one, &other].map(|(_, _, host)| host.take_log().len());
    done();
    let (mut progress, mut pieces) = (Progress::default(), Vec::new());
    while !progress.is_done() {
        sides.invalidate_some(&[Invalidation::ALL], &mut progress).unwrap();
        pieces.push(done());
    }
    assert_eq!(pieces, [[32, 0], [8, 32], [0, 32], [0, 6]]);
    // A failure of the first is reported once it is known; the others go on with their own.
    for _ in 0..2 {
        one.2.fail_next(Verb::HwptInvalidate, Errno::EIO);
    }
    let refused = sides.invalidate(&[Invalidation::ALL]).unwrap_err();
    assert!(!refused.still_reachable && refused.to_string().contains("EIO"), "{refused}");
    assert_eq!(other.2.take_log().len(), 70);
    one.2.fail_next(Verb::HwptInvalidate, Errno::EIO);
    one.2.fail_next(Verb::HwptInvalidate, Errno::EIO);
    for _ in 0..2 {
        other.2.fail_next(Verb::HwptInvalidate, Errno::EIO);
        other.2.fail_next(Verb::DeviceDetach, Errno::EIO);
        other.2.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    let refused = sides.invalidate(&[Invalidation::ALL]).unwrap_err();
    assert!(refused.still_reachable, "what the second could not block counts: {refused}");
    other.2.forget_failures();
    sides.shutdown().unwrap();
    for (_, ioas, host) in [one, other] {
        drop(ioas);
        assert!(host.live_objects().len() <= 1, "{:?}", host.live_objects());
    }
}

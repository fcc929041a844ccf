// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What takes long is done in slices: each has few host calls, and between two of them others get
//! their turn.

use super::*;
use crate::nesting::vtd::shadow::MAX_STARVED;

/// Calls of one slice: changes of mappings, and those to make, attach and destroy a mirror.
const CALLS: usize = 32 + 6;

/// Every other page of both tables leads to the page at `to`.
fn scatter(rig: &Rig, to: u64) {
    for table in [0x3000, 0x4000] {
        (0..512).step_by(2).for_each(|page| rig.put(table, page, to | 3));
    }
}

fn config(policy: Policy) -> RequesterConfig {
    RequesterConfig { policy, tag: TAG, fault_disabled: false }
}

/// Does a slice, whose calls are few.
#[track_caller]
fn slice(rig: &Rig, progress: &mut Progress) -> Result<(), HostSideError> {
    let done = rig.nesting.invalidate_some(&[Invalidation::ALL], progress);
    let calls = rig.host.take_log();
    assert!(calls.len() <= CALLS, "{calls:?}");
    done
}

/// Prepares the tables for `A`, in slices of which each has few calls. Returns their number.
#[track_caller]
fn prepare(rig: &Rig) -> usize {
    for slices in 1.. {
        let done = rig.nesting.prepare(Requester::rid(A), &config(tables()));
        let calls = rig.host.take_log();
        assert!(calls.len() <= CALLS, "{calls:?}");
        if done {
            return slices;
        }
    }
    unreachable!()
}

#[test]
fn a_large_comparison_is_done_in_slices() {
    let rig = Rig::new();
    rig.configure(A, tables()).unwrap();
    (0..512).step_by(2).for_each(|page| rig.put(0x3000, page, 0x9003));
    (0..512).step_by(2).for_each(|page| rig.put(0x4000, page, 0xa003));
    rig.host.take_log();
    let batch = [Invalidation::ALL];
    let (mut progress, mut slices) = (Progress::default(), 0);
    while !progress.is_done() {
        rig.nesting.invalidate_some(&batch, &mut progress).unwrap();
        assert!(rig.host.take_log().len() <= 32);
        slices += 1;
        // Two batches, each of which gets on with the other between.
        if slices == 3 {
            rig.invalidate(Some((0, 1024))).unwrap();
            assert_eq!(rig.host.take_log().len(), 512 - 3 * 32);
        }
    }
    assert!(slices >= 4, "{slices}");
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 512);
    rig.ends_clean();
}

#[test]
fn a_mirror_is_replaced_in_slices() {
    let rig = Rig::new();
    scatter(&rig, 0x9000);
    [A, B].into_iter().for_each(|rid| rig.configure(rid, tables()).unwrap());
    let before = rig.host.reaches_copies(DEV_A);
    for others in [0, 1, 2] {
        // What leads elsewhere is the last page.
        let to = 0xa000 + ((others as u64) << 12);
        rig.put(0x4000, 510, to | 3);
        rig.host.take_log();
        let (mut progress, mut slices) = (Progress::default(), 0);
        while !progress.is_done() {
            slice(&rig, &mut progress).unwrap();
            slices += 1;
            if slices == 8 && others > 0 {
                assert_eq!(rig.host.reaches_copies(DEV_B).len(), before.len());
                // Another batch goes on with the new one, whatever it names.
                rig.put(0x3000, 0, to | 3);
                rig.invalidate(Some((if others == 1 { 0 } else { 0x9000 }, 1))).unwrap();
                assert!(rig.host.take_log().len() > 10);
            }
        }
        assert!(slices >= if others == 0 { 16 } else { 9 }, "{slices}");
        for dev in [DEV_A, DEV_B] {
            let reached = rig.host.reaches_copies(dev);
            assert_eq!((reached.len(), reached[511]), (512, (0x3f_e000, 0x1000, to, RW)));
            // What was not named, and had been read, is as before.
            assert_eq!(reached[0].2, [0x9000, 0xb000, 0xb000][others]);
        }
        assert_eq!(rig.nesting.counters().mirror_pieces, 512);
    }
    rig.ends_clean();
}

#[test]
fn the_first_mirror_of_a_table_is_made_in_slices() {
    let rig = Rig::new();
    scatter(&rig, 0x9000);
    let slices = prepare(&rig);
    assert!(slices >= 16, "{slices}");
    rig.configure(A, tables()).unwrap();
    rig.expect(&["DEVICE_ATTACH #1 to #4"]);
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 512);
    // Somebody else is served.
    assert_eq!(prepare(&rig), 1);
    rig.ends_clean();
}

#[test]
fn who_joins_a_mirror_under_another_name_has_it_compared_in_slices() {
    let rig = Rig::new();
    let policy = tables();
    rig.configure(A, policy).unwrap();
    let tag = DomainTag { domain: TAG.domain + 1, ..TAG };
    let prepare =
        || rig.nesting.prepare(Requester::rid(B), &RequesterConfig { tag, ..config(policy) });
    scatter(&rig, 0x9000);
    rig.host.take_log();
    let mut slices = 1;
    while !prepare() {
        let calls = rig.host.take_log();
        assert!(calls.len() <= CALLS, "{calls:?}");
        slices += 1;
    }
    assert!(slices >= 16, "{slices}");
    rig.host.take_log();
    rig.configure(B, policy).unwrap();
    rig.expect(&["DEVICE_ATTACH #2 to #4"]);
    assert_eq!(rig.host.reaches_copies(DEV_B).len(), 512);
    // By then something else was said: it is compared again.
    rig.configure(B, Policy::Bypass).unwrap();
    while !prepare() {}
    rig.put(0x3000, 1, 0xa003);
    rig.invalidate(Some((0x9000, 1))).unwrap();
    rig.configure(B, policy).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_B).len(), 513);
    rig.ends_clean();
}

/// What is prepared is not used if the guest has changed it, nor kept if nobody needs it.
#[test]
fn what_is_prepared_goes_when_it_is_not_right_any_more() {
    let rig = Rig::new();
    scatter(&rig, 0x9000);
    let part = || assert!(!rig.nesting.prepare(Requester::rid(A), &config(tables())));
    let live = || rig.host.live_objects().len();
    let before = live();
    for way in 0..4 {
        part();
        assert_eq!(live(), before + 1);
        match way {
            0 => rig.invalidate(None).unwrap(),
            1 => rig.configure(B, Policy::Bypass).unwrap(),
            2 => rig.nesting.ioas().unwrap().unmap(ROM, SIZE - ROM).unwrap(),
            _ => rig.nesting.remove_device(B).unwrap(),
        }
        assert_eq!((live(), rig.nesting.counters().mirror_pieces), (before, 0));
    }
    // Disturbed so often, it is made in one piece.
    assert!(rig.nesting.prepare(Requester::rid(A), &config(tables())));
    rig.put(0x3000, 0, 0xa003);
    rig.configure(A, tables()).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A)[0], (0, 0x1000, 0xa000, RW));
    rig.ends_clean();
}

/// A requester whose tables change between two slices: what was prepared of the others goes, and
/// however often they change, something is ready in the end.
#[test]
fn what_is_prepared_goes_when_another_table_is_prepared() {
    let rig = Rig::new();
    scatter(&rig, 0x9000);
    rig.put(0x5000, 0, 0x2007);
    let of = |table| config(Policy::Stage1(second_stage(table, AddressWidth::Bits39)));
    let before = rig.host.live_objects().len();
    for turn in 0.. {
        assert!(turn < 10, "it never ends");
        if rig.nesting.prepare(Requester::rid(A), &of([0x1000, 0x5000][turn % 2])) {
            break;
        }
        assert_eq!(rig.host.live_objects().len(), before + 1);
        assert!(rig.nesting.counters().mirror_pieces <= 512);
    }
    rig.configure(A, tables()).unwrap();
    rig.configure(A, Policy::Bypass).unwrap();
    assert_eq!(rig.nesting.counters().mirror_pieces, 0);
    // Two mirrors that somebody joins under other names, in turns; and one that is prepared.
    rig.configure(A, tables()).unwrap();
    rig.configure(B, of(0x5000).policy).unwrap();
    let other = |table| RequesterConfig { tag: DomainTag { domain: 30, ..TAG }, ..of(table) };
    rig.put(0x6000, 0, 0x2007);
    (1..512).step_by(2).for_each(|page| rig.put(0x3000, page, 0xa003));
    for turn in 0.. {
        assert!(turn < 10, "it never ends");
        let table = [0x1000, 0x6000, 0x5000][turn % 3];
        if rig.nesting.prepare(Requester::rid(A), &other(table)) {
            break;
        }
    }
    rig.configure(A, Policy::Bypass).unwrap();
    rig.ends_clean();
}

#[test]
fn a_table_that_cannot_be_prepared_is_not_tried_again_when_it_is_given() {
    let rig = Rig::with(100, 0);
    scatter(&rig, 0x9000);
    prepare(&rig);
    rig.configure(A, tables()).unwrap();
    rig.expect(&["DEVICE_DETACH #1"]);
    assert_eq!((rig.faults().len(), rig.host.reaches(DEV_A, None)), (1, None));
    rig.ends_clean();
}

/// A gigabyte of single pages is one mapping, though each slice reads a part of it only.
#[test]
fn slices_do_not_cut_what_is_adjacent() {
    let rig = Rig::of(1 << 20, 0, 1 << 40);
    let tables_at = |number: u64| 0x10_0000 + (number << 12);
    for number in 0..512u64 {
        rig.put(0x2000, number, tables_at(number) | 7);
        let pages: Vec<u8> = (0..512u64)
            .flat_map(|page| ((1 << 32 | number << 21 | page << 12) | 3).to_le_bytes())
            .collect();
        rig.memory.write_slice(&pages, GuestAddress(tables_at(number))).unwrap();
    }
    let slices = prepare(&rig);
    assert!(slices >= 16, "{slices}");
    rig.configure(A, tables()).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A), [(0, 1 << 30, 1 << 32, RW)]);
    rig.ends_clean();
}

/// More ranges than hardware would like to have one by one: nothing else is read.
#[test]
fn many_ranges_do_not_become_everything() {
    let rig = Rig::new();
    rig.configure(A, tables()).unwrap();
    scatter(&rig, 0x9000);
    let of = |page: u64| Invalidation {
        domain: Some(TAG.domain),
        pasid: None,
        range: Some(PageRange::new(page << 12, 1, true)),
    };
    let batch: Vec<_> = (0..400).map(|number| of(2 * number)).collect();
    rig.nesting.invalidate(&batch).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 400);
    rig.ends_clean();
}

/// From some call on the host fails, for a while or for good, while a mirror is replaced in slices:
/// the batch ends, nothing that was taken back is reached, and nothing is left.
#[test]
fn a_replacement_in_slices_ends_whichever_call_fails() {
    for count in [1, 2, 1000] {
        for nth in (0..).step_by(5) {
            let rig = Rig::new();
            (0..80).for_each(|page| rig.put(0x3000, 2 * page, 0x9003));
            rig.configure(A, tables()).unwrap();
            rig.put(0x3000, 0, 0xa003);
            rig.host.fail_calls(nth, count, Errno::ENOMEM);
            let (mut progress, mut refused) = (Progress::default(), None);
            for slices in 0.. {
                assert!(slices < 30, "{count} calls from {nth} on");
                refused = refused
                    .or(rig.nesting.invalidate_some(&[Invalidation::ALL], &mut progress).err());
                if progress.is_done() {
                    break;
                }
            }
            let done = rig.host.failure_pending() && refused.is_none();
            let reached = rig.host.reaches_copies(DEV_A);
            let stale = reached.iter().any(|piece| piece.2 == 0x9000 && piece.0 == 0);
            let reachable = refused.as_ref().is_some_and(|error| error.still_reachable);
            assert!(!stale || reachable, "{count} calls from {nth} on");
            assert!(reached.len() == 80 || refused.is_some(), "{count} calls from {nth} on");
            rig.host.forget_failures();
            rig.configure(A, Policy::Bypass).unwrap();
            rig.ends_clean();
            if done {
                assert!(nth > 80, "{nth}");
                break;
            }
        }
    }
}

/// A batch that replaces a mirror is given up, as the guest disables its queue: the mirror is still
/// in use, and counts; and one that has all the pieces that there may be can be replaced.
#[test]
fn a_mirror_that_is_being_replaced_counts() {
    let rig = Rig::with(512, 0);
    scatter(&rig, 0x9000);
    rig.configure(A, tables()).unwrap();
    rig.put(0x4000, 510, 0xa003);
    rig.host.take_log();
    let mut progress = Progress::default();
    (0..3).for_each(|_| slice(&rig, &mut progress).unwrap());
    assert!((513..=1024).contains(&rig.nesting.counters().mirror_pieces));
    // Others have no room.
    rig.put(0x5000, 0, 0x6007);
    rig.put(0x6000, 0, 0x7007);
    rig.put(0x7000, 0, 0x9003);
    let policy = Policy::Stage1(second_stage(0x5000, AddressWidth::Bits39));
    rig.configure(B, policy).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_B, None)), (vec![(B, 0)], None));
    rig.invalidate(None).unwrap();
    let reached = rig.host.reaches_copies(DEV_A);
    assert_eq!((reached.len(), reached[511].2), (512, 0xa000));
    assert_eq!(rig.nesting.counters().mirror_pieces, 512);
    // It goes in the middle.
    rig.put(0x4000, 510, 0xb003);
    rig.host.take_log();
    let mut progress = Progress::default();
    (0..3).for_each(|_| slice(&rig, &mut progress).unwrap());
    rig.configure(A, Policy::Bypass).unwrap();
    assert_eq!(rig.nesting.counters().mirror_pieces, 0);
    rig.configure(B, policy).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_B).len(), 1);
    rig.ends_clean();
}

/// What was read before it went is not in a mirror that another one finishes.
#[test]
fn memory_that_goes_while_a_mirror_is_replaced_is_not_in_the_new_one() {
    let rig = Rig::new();
    scatter(&rig, 0x9000);
    rig.put(0x3000, 0, ROM | 1);
    rig.configure(A, tables()).unwrap();
    rig.put(0x4000, 510, 0xa003);
    rig.host.take_log();
    let mut progress = Progress::default();
    (0..3).for_each(|_| slice(&rig, &mut progress).unwrap());
    rig.nesting.ioas().unwrap().unmap(ROM, SIZE - ROM).unwrap();
    let reached = rig.host.reaches_copies(DEV_A);
    assert_eq!((reached.len(), reached[0].2, reached[510].2), (511, 0x9000, 0xa000));
    rig.ends_clean();
}

/// A gigabyte of which many pages lead elsewhere: its tables are read once.
#[test]
fn a_torn_gigabyte_is_replaced_without_reading_it_for_each_slice() {
    let rig = Rig::of(4096, 0, 1 << 40);
    let tables_at = |number: u64| 0x10_0000 + (number << 12);
    for number in 0..512u64 {
        rig.put(0x2000, number, tables_at(number) | 7);
        let pages: Vec<u8> = (0..512u64)
            .flat_map(|page| ((1 << 32 | number << 21 | page << 12) | 3).to_le_bytes())
            .collect();
        rig.memory.write_slice(&pages, GuestAddress(tables_at(number))).unwrap();
    }
    rig.configure(A, tables()).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 1);
    for number in 0..7 {
        (0..512).step_by(2).for_each(|page| rig.put(tables_at(number), page, 0x9003));
    }
    rig.host.take_log();
    let mut progress = Progress::default();
    while !progress.is_done() {
        slice(&rig, &mut progress).unwrap();
    }
    assert_eq!((rig.faults(), rig.host.reaches_copies(DEV_A).len() > 3500), (vec![], true));
    rig.ends_clean();
}

/// Those whose tables are not touched take their time, too.
#[test]
fn many_mirrors_are_visited_in_slices() {
    let rig = Rig::with(1 << 20, 8);
    let configure = |pasid: u32| {
        let requester = Requester { rid: A, pasid: crate::spec::pci::Pasid::new(pasid) };
        let table = 0x10_0000 + (u64::from(pasid) << 12);
        let policy = Policy::Stage1(second_stage(table, AddressWidth::Bits39));
        let config = RequesterConfig { tag: DomainTag { pasid, ..TAG }, ..config(policy) };
        rig.nesting.configure(requester, &config).unwrap();
    };
    (1..=200).for_each(configure);
    let range = Some(PageRange::new(1 << 40, 1, true));
    let batch = [Invalidation { domain: Some(TAG.domain), pasid: None, range }];
    let (mut progress, mut slices) = (Progress::default(), 0);
    while !progress.is_done() {
        rig.nesting.invalidate_some(&batch, &mut progress).unwrap();
        slices += 1;
    }
    assert!(slices > 5, "{slices}");
    rig.ends_clean();
}

/// A guest that may have few pieces may name many ranges.
#[test]
fn many_ranges_do_not_use_up_what_one_may_read() {
    let rig = Rig::with(1, 0);
    rig.put(0x3000, 0, 0x9003);
    (1..16).for_each(|number| rig.put(0x2000, number, 0x4007));
    rig.configure(A, tables()).unwrap();
    let range = |number: u64| Some(PageRange::new(number << 13, 1, true));
    let of = |number| Invalidation { domain: Some(TAG.domain), pasid: None, range: range(number) };
    let batch: Vec<_> = (0..4096).map(of).collect();
    rig.nesting.invalidate(&batch).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches_copies(DEV_A).len()), (vec![], 1));
    rig.ends_clean();
}

/// From some call on the host fails, for a while or for good, while a mirror is prepared.
#[test]
fn a_preparation_leaves_nothing_whichever_call_fails() {
    for (count, nth) in [1, 2, 1000].into_iter().flat_map(|it| (0..90).map(move |nth| (it, nth))) {
        let rig = Rig::new();
        (0..80).for_each(|page| rig.put(0x3000, 2 * page, 0x9003));
        rig.host.fail_calls(nth, count, Errno::ENOMEM);
        prepare(&rig);
        let given = rig.configure(A, tables()).is_ok();
        assert_eq!(rig.host.reaches_copies(DEV_A).len(), if given { 80 } else { 0 });
        rig.host.forget_failures();
        rig.configure(A, Policy::Bypass).unwrap();
        assert_eq!(rig.nesting.counters().mirror_pieces, 0);
        rig.ends_clean();
    }
}

/// Many whose table fits at last join its mirror one by one.
#[test]
fn the_starved_are_served_in_slices() {
    let rig = Rig::with(1, 8);
    (0..2).for_each(|page| rig.put(0x3000, 2 * page, 0x9003));
    for pasid in 1..=100 {
        let requester = Requester { rid: A, pasid: crate::spec::pci::Pasid::new(pasid) };
        let config = RequesterConfig { tag: DomainTag { pasid, ..TAG }, ..config(tables()) };
        rig.nesting.configure(requester, &config).unwrap();
    }
    rig.put(0x3000, 0, 0);
    rig.host.take_log();
    let mut progress = Progress::default();
    while !progress.is_done() {
        slice(&rig, &mut progress).unwrap();
    }
    (1..=100).for_each(|pasid| assert!(rig.host.reaches(DEV_A, Some(pasid)).is_some()));
    rig.ends_clean();
}

/// Those beyond the limit are blocked and told like others, and served with another table.
#[test]
fn more_starved_requesters_than_are_remembered() {
    let rig = Rig::with(1, 20);
    (0..2).for_each(|page| rig.put(0x3000, 2 * page, 0x9003));
    let configure = |pasid, table: u64| {
        let requester = Requester { rid: A, pasid: crate::spec::pci::Pasid::new(pasid) };
        let policy = Policy::Stage1(second_stage(table, AddressWidth::Bits39));
        let config = RequesterConfig { tag: DomainTag { pasid, ..TAG }, ..config(policy) };
        rig.nesting.configure(requester, &config).unwrap();
        rig.nesting.configured();
    };
    let last = MAX_STARVED as u32 + 10;
    (1..=last).for_each(|pasid| configure(pasid, 0x1000));
    assert_eq!(rig.faults().len(), last as usize);
    let remembered =
        |rig: &Rig| rig.nesting.state().shadow.as_ref().map(|shadow| shadow.starved.len());
    assert_eq!(remembered(&rig), Some(MAX_STARVED));
    // It does not fit yet: those that are remembered are told, and stay so.
    rig.invalidate(None).unwrap();
    assert_eq!((rig.faults().len(), remembered(&rig)), (MAX_STARVED, Some(MAX_STARVED)));
    rig.put(0x3000, 0, 0);
    rig.invalidate(None).unwrap();
    assert_eq!((rig.faults().len(), remembered(&rig)), (0, Some(0)));
    assert!(rig.host.reaches(DEV_A, Some(1)).is_some());
    assert_eq!(rig.host.reaches(DEV_A, Some(last)), None);
    configure(last, 0x1000);
    assert!(rig.host.reaches(DEV_A, Some(last)).is_some());
    rig.ends_clean();
}

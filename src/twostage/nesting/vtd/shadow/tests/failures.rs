// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices reach when host calls fail, and whether the guest is told.

use std::collections::BTreeSet;

use super::*;
use crate::iommufd::UserMemory;
use vm_memory::GuestRegionMmap;

/// What the tables translate, as single pages: IOVA, GPA, and whether it may be written.
fn translated(rig: &Rig) -> Vec<(u64, u64, bool)> {
    let word = |table: u64, number| -> u64 {
        rig.memory.read_obj(GuestAddress(table + number * 8)).unwrap()
    };
    let pages = (0..1024).map(|page| (page << 12, word(0x3000 + page / 512 * 0x1000, page % 512)));
    let present = pages.filter(|(_, word)| word & 1 != 0);
    present.map(|(iova, word)| (iova, word & 0xf_f000, word & 2 != 0)).collect()
}

fn reached(rig: &Rig, dev: ObjectId) -> Vec<(u64, u64, bool)> {
    let pages = |(iova, length, gpa, access): (u64, u64, u64, Protection)| {
        (0..length).step_by(4096).map(move |at| (iova + at, gpa + at, access.write))
    };
    rig.host.reaches_copies(dev).into_iter().flat_map(pages).collect()
}

/// Invalidates the domains of both devices.
fn invalidate_all(rig: &Rig) -> Result<(), HostSideError> {
    let of = |domain| Invalidation { domain: Some(domain), pasid: None, range: None };
    rig.nesting.invalidate(&[of(TAG.domain), of(TAG.domain + 1)])
}

/// A guest with its virtual IOMMU, which gives everything again when an invalidation fails.
struct Life<'a> {
    rig: &'a Rig,
    /// Who uses the tables.
    users: BTreeSet<Bdf>,
    /// The virtual IOMMU knows that the host refused these.
    refused: BTreeSet<Bdf>,
    /// Blocked, and the guest knows.
    blocked: BTreeSet<Bdf>,
    name: String,
}

impl Life<'_> {
    fn configure(&mut self, rid: Bdf) {
        self.users.insert(rid);
        self.give(rid);
        self.check("configured", &BTreeSet::new());
    }

    fn give(&mut self, rid: Bdf) {
        match self.rig.configure(rid, tables()) {
            Ok(()) => self.refused.remove(&rid),
            Err(_) => self.refused.insert(rid),
        };
    }

    fn invalidate(&mut self, what: &str) {
        let mut told = BTreeSet::new();
        if invalidate_all(self.rig).is_err() {
            told = self.users.clone();
            told.iter().for_each(|rid| self.give(*rid));
        }
        self.check(what, &told);
        let now = translated(self.rig);
        for dev in [DEV_A, DEV_B] {
            let reached = reached(self.rig, dev);
            let stale = reached.iter().find(|page| !now.contains(page));
            assert_eq!(stale, None, "{}: {what}", self.name);
        }
    }

    /// Who is blocked was told: the error of this step, or a fault.
    fn check(&mut self, what: &str, told: &BTreeSet<Bdf>) {
        let faults: BTreeSet<_> = self.rig.faults().into_iter().map(|(rid, _)| rid).collect();
        for (rid, dev) in [(A, DEV_A), (B, DEV_B)] {
            if !self.users.contains(&rid) || self.rig.host.reaches(dev, None).is_some() {
                self.blocked.remove(&rid);
            } else if self.blocked.insert(rid) {
                let known = [told, &faults, &self.refused].iter().any(|set| set.contains(&rid));
                assert!(known, "{}: {what}: {rid} is blocked without a word", self.name);
            }
        }
    }
}

/// Host calls of a life of mirrors fail, each in turn, alone and with the next one: nothing that
/// the guest has taken back can be reached, nothing is left behind, who is blocked is told, and one
/// more invalidation makes everything good.
#[test]
fn whichever_call_fails_nothing_stale_is_reached_and_nobody_is_blocked_without_a_word() {
    let errnos = [Errno::ENOMEM, Errno::EINVAL, Errno::EADDRINUSE];
    for (pasids, errno, count) in [0, 8]
        .into_iter()
        .flat_map(|pasids| errnos.map(|errno| (pasids, errno)))
        .flat_map(|(pasids, errno)| [1, 2, 3].map(|count| (pasids, errno, count)))
    {
        for nth in 0.. {
            let rig = Rig::with(1 << 20, pasids);
            rig.host.fail_calls(nth, count, errno);
            let name = format!("{pasids} bits of PASIDs, {count} from {nth} on: {errno}");
            let (users, refused, blocked) = Default::default();
            let mut life = Life { rig: &rig, users, refused, blocked, name };
            (0..8).for_each(|page| rig.put(0x3000, page, 0x9003 + (page << 12)));
            life.configure(A);
            // Parts go, before another one joins.
            [1, 5].into_iter().for_each(|page| rig.put(0x3000, page, 0));
            life.configure(B);
            life.invalidate("joined");
            (0..4).for_each(|page| rig.put(0x4000, page * 3, 0x2_0001 + (page << 12)));
            life.invalidate("more");
            // Elsewhere.
            rig.put(0x3000, 0, 0x3_0003);
            life.invalidate("torn");
            if rig.host.failure_pending() {
                assert!(nth > 25, "{nth} calls");
                break;
            }
            let refused = std::mem::take(&mut life.refused);
            refused.into_iter().for_each(|rid| rig.configure(rid, tables()).unwrap());
            // A table that failed again is left out once.
            (0..2).for_each(|_| invalidate_all(&rig).unwrap());
            for dev in [DEV_A, DEV_B] {
                assert_eq!(reached(&rig, dev), translated(&rig), "{}", life.name);
            }
            for rid in [A, B] {
                rig.configure(rid, Policy::Bypass).unwrap();
            }
            rig.ends_clean();
        }
    }
}

/// A rig whose `users` have one page, which leads elsewhere by now.
fn torn(users: &[Bdf]) -> Rig {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    users.iter().for_each(|rid| rig.configure(*rid, tables()).unwrap());
    rig.put(0x3000, 0, 0xa003);
    rig.host.take_log();
    rig
}

#[test]
fn who_is_not_attached_to_a_new_mirror_is_served_again_or_told() {
    let fail = |rig: &Rig, times, errno| {
        (0..times).for_each(|_| rig.host.fail_next(Verb::DeviceAttach, errno));
    };
    // One, both, the only one.
    for (users, times) in [(&[A, B][..], 1), (&[A, B], 2), (&[A], 1)] {
        for errno in [Errno::ENOMEM, Errno::EADDRINUSE] {
            let rig = torn(users);
            fail(&rig, times, errno);
            rig.invalidate(None).unwrap();
            assert_eq!((rig.faults(), reached(&rig, DEV_A)), (vec![], translated(&rig)));
            assert_eq!(reached(&rig, DEV_B).len(), users.len() - 1);
            rig.ends_clean();
        }
    }
    let rig = torn(&[A]);
    fail(&rig, 2, Errno::ENOMEM);
    assert!(!rig.invalidate(None).unwrap_err().still_reachable);
    assert_eq!(rig.host.reaches(DEV_A, None), None);
    rig.ends_clean();
    // IOVAs are reserved.
    let rig = torn(&[A]);
    fail(&rig, 2, Errno::EADDRINUSE);
    rig.invalidate(None).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_A, None)), (vec![(A, 0)], None));
    rig.invalidate(None).unwrap();
    assert_eq!(reached(&rig, DEV_A), translated(&rig));
    rig.ends_clean();
}

/// `B` joins the mirror of `A`, and cannot be compared.
#[test]
fn who_is_lost_because_another_one_joins_is_served_again_or_told() {
    for (times, faults) in [(2, vec![]), (3, vec![(A, 0)])] {
        let rig = torn(&[A]);
        (0..times).for_each(|_| rig.host.fail_next(Verb::IoasAlloc, Errno::ENOMEM));
        rig.configure(B, tables()).unwrap_err();
        assert_eq!(rig.faults(), faults);
        rig.invalidate(None).unwrap();
        assert_eq!(reached(&rig, DEV_A), translated(&rig));
        assert_eq!(rig.host.reaches(DEV_B, None), None);
        rig.ends_clean();
    }
    // The only user of the mirror is lost, and the mirror with it.
    let rig = torn(&[A]);
    rig.host.fail_next(Verb::DeviceAttach, Errno::ENOMEM);
    rig.configure(B, tables()).unwrap();
    assert_eq!((rig.faults(), reached(&rig, DEV_A)), (vec![], translated(&rig)));
    assert_eq!(reached(&rig, DEV_B), translated(&rig));
    rig.ends_clean();
}

#[test]
fn who_is_lost_because_memory_comes_is_told() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    rig.put(0x3000, 1, SIZE | 3);
    rig.configure(A, tables()).unwrap();
    (0..3).for_each(|_| rig.host.fail_next(Verb::IoasCopy, Errno::ENOMEM));
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(SIZE), 0x1000, None).unwrap();
    let ioas = rig.nesting.ioas().unwrap();
    ioas.map(SIZE, &UserMemory::whole(Arc::new(region)), RW).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_A, None)), (vec![(A, 0)], None));
    rig.invalidate(None).unwrap();
    let all = [(0, 0x1000, 0x9000, RW), (0x1000, 0x1000, SIZE, RW)];
    assert_eq!(rig.host.reaches_copies(DEV_A), all);
}

#[test]
fn a_mirror_of_which_nothing_is_certain_is_compared_before_another_one_joins() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    rig.configure(A, tables()).unwrap();
    rig.put(0x3000, 1, 0xa001);
    (0..2).for_each(|_| rig.host.fail_next(Verb::IoasCopy, Errno::ENOMEM));
    (0..2).for_each(|_| rig.host.fail_next(Verb::DeviceDetach, Errno::EIO));
    assert!(rig.invalidate(None).unwrap_err().still_reachable);
    rig.configure_in(TAG.domain, B, tables()).unwrap();
    assert_eq!(reached(&rig, DEV_B), translated(&rig));
    rig.ends_clean();
}

/// A table that takes more than there is costs no host call, however often it is named, and no more
/// than a slice at a time; it is tried once it fits.
#[test]
fn a_table_is_counted_in_slices_before_it_is_tried_again() {
    let rig = Rig::with(600, 0);
    // 512 tables with 2 pages each.
    (0..512).for_each(|number| rig.put(0x2000, number, 0x3003));
    (0..2).for_each(|page| rig.put(0x3000, page * 2, 0x9003));
    rig.configure(A, tables()).unwrap();
    rig.configure(B, tables()).unwrap();
    assert_eq!(
        (rig.faults(), rig.host.reaches(DEV_A, None)),
        (vec![(A, 300 << 21), (B, 300 << 21)], None)
    );
    rig.host.take_log();
    let slices = |rig: &Rig| {
        let (mut progress, mut slices) = (Progress::default(), 0);
        while !progress.is_done() {
            rig.nesting.invalidate_some(&[Invalidation::ALL], &mut progress).unwrap();
            slices += 1;
        }
        slices
    };
    let count = slices(&rig);
    assert!(count >= 8, "{count}");
    rig.expect(&[]);
    assert_eq!(rig.faults(), [(A, 300 << 21), (B, 300 << 21)]);
    (300..512).for_each(|number| rig.put(0x2000, number, 0));
    slices(&rig);
    for dev in [DEV_A, DEV_B] {
        assert_eq!(rig.host.reaches_copies(dev).len(), 600);
    }
    rig.ends_clean();
}

/// Once per table and batch; and if that fails though it fits, not by every batch.
#[test]
fn a_table_that_fits_and_fails_is_tried_by_fewer_and_fewer_batches() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    (0..2).for_each(|_| rig.host.fail_next(Verb::IoasCopy, Errno::EINVAL));
    [A, B].into_iter().for_each(|rid| rig.configure(rid, tables()).unwrap());
    rig.host.take_log();
    let mut tries = Vec::new();
    for batch in 0..20 {
        rig.host.fail_next(Verb::IoasCopy, Errno::EINVAL);
        rig.invalidate(None).unwrap();
        match rig.host.take_log()[..] {
            [] => {}
            [_, _, _] => tries.push(batch),
            ref log => panic!("{log:?}"),
        }
        rig.host.forget_failures();
    }
    assert_eq!(tries, [0, 2, 5, 10, 19]);
    rig.ends_clean();
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    (0..3).for_each(|_| rig.host.fail_next(Verb::IoasCopy, Errno::EINVAL));
    [A, B].into_iter().for_each(|rid| rig.configure(rid, tables()).unwrap());
    rig.host.take_log();
    invalidate_all(&rig).unwrap();
    assert_eq!(rig.host.take_log().len(), 3, "a mirror is made, fails, and goes");
    (0..2).for_each(|_| invalidate_all(&rig).unwrap());
    assert_eq!(reached(&rig, DEV_B), translated(&rig));
    rig.ends_clean();
}

/// Between two slices of a batch, the mirror is replaced, or goes with its user and comes back.
#[test]
fn a_batch_goes_on_with_whatever_has_become_of_its_mirror() {
    for (gone, back) in [(false, false), (true, false), (true, true)] {
        let rig = Rig::new();
        rig.configure(A, tables()).unwrap();
        (0..512).step_by(2).for_each(|page| rig.put(0x3000, page, 0x9003));
        (0..512).step_by(2).for_each(|page| rig.put(0x4000, page, 0xa003));
        let mut progress = Progress::default();
        let slice = |progress: &mut Progress| {
            rig.nesting.invalidate_some(&[Invalidation::ALL], progress).unwrap();
        };
        (0..2).for_each(|_| slice(&mut progress));
        if gone {
            rig.configure(A, Policy::Bypass).unwrap();
            if back {
                rig.configure(A, tables()).unwrap();
            }
        } else {
            rig.put(0x3000, 0, 0xb003);
            rig.invalidate(Some((0, 1))).unwrap();
            assert_eq!(rig.nesting.counters().mirror_rebuilds, 1);
        }
        assert!(!progress.is_done());
        while !progress.is_done() {
            slice(&mut progress);
        }
        let expected = if gone && !back { vec![] } else { translated(&rig) };
        assert_eq!(reached(&rig, DEV_A), expected);
        rig.ends_clean();
    }
}

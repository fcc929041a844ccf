// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading the tables of many PASIDs again in slices: what others see in between, and the result.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::queue::device_tlb;
use super::*;
use crate::spec::vtd::qi::PasidCacheScope;
use crate::spec::vtd::regs::{Fsts, Gcmd};

pub(super) const PASID_CACHE: Descriptor = Descriptor::PasidCache(PasidCacheScope::Global);
/// PASIDs of a directory of 128 tables.
pub(super) const PASIDS: u32 = 1 << 13;
pub(super) const TES: u32 = 1 << 31;
pub(super) const RTPS: u32 = 1 << 30;

fn config() -> VtdConfig {
    VtdConfig { pasid_bits: Some(13), ..Default::default() }
}

impl Guest {
    /// Translation is enabled, and one table page serves every directory entry. No PASID but 0 is
    /// present yet.
    pub(super) fn with_directory() -> Self {
        Self::with_directory_of(config())
    }

    pub(super) fn with_directory_of(config: VtdConfig) -> Self {
        let guest = Self::new(config);
        guest.write_tables();
        (0..128).for_each(|index| guest.write(DIRECTORY + 8 * index, &[PASID_TABLE | 1]));
        guest.write_pasid(0, 0);
        guest.write(PASID_TABLE, &[0]);
        guest.set_root(0x400);
        guest.enable_queue(0x800);
        guest.enable_translation();
        guest.calls();
        guest
    }

    pub(super) fn write_every_pasid(&self, table: u64) {
        (0..64).for_each(|pasid| self.write_pasid(pasid, table));
    }

    /// Descriptors are queued, and not processed yet.
    pub(super) fn queue(&self, descriptors: &[Descriptor]) {
        let words: Vec<_> = descriptors.iter().map(Descriptor::encode).collect();
        let tail = self.queue_words(&words);
        self.iommu.lock().iqt = regs::QueuePointer::from_offset(tail);
    }

    pub(super) fn slice(&self) -> Slice {
        self.iommu.run_slice(&mut self.iommu.lock())
    }

    /// A global command, of which only the first slice is executed.
    pub(super) fn begin_command(&self, change: impl FnOnce(u32) -> u32) -> Slice {
        let enabled = self.read32(regs::GSTS) & 0x96ff_ffff;
        let mut registers = self.iommu.lock_idle();
        self.iommu.global_command(&mut registers, Gcmd::from_bits(change(enabled)));
        self.iommu.run_command(&mut registers)
    }

    pub(super) fn status_bits(&self, bits: u32) -> u32 {
        self.read32(regs::GSTS) & bits
    }

    /// Updates what the host has from its calls since the last time.
    pub(super) fn host_has(&self, has: &mut BTreeMap<Requester, Policy>) {
        for call in self.calls() {
            match call {
                Call::Configure(requester, Policy::Blocked(_)) => {
                    has.remove(&requester);
                }
                Call::Configure(requester, policy) => {
                    has.insert(requester, policy);
                }
                Call::Invalidate(_) | Call::DeviceTlb(..) => {}
            }
        }
    }

    /// What the tables say, for everything that is not blocked.
    pub(super) fn tables_say(&self) -> BTreeMap<Requester, Policy> {
        let pasids = (1..PASIDS).map(with_pasid);
        let requesters = [Requester::rid(RID)].into_iter().chain(pasids);
        requesters
            .filter_map(|requester| {
                let policy = self.iommu.policy_by_tables(requester)?;
                (!matches!(policy, Policy::Blocked(_))).then_some((requester, policy))
            })
            .collect()
    }
}

#[test]
fn what_the_host_prepares_takes_slices_of_its_own() {
    let of_one = PasidCacheScope::Pasid { domain: DOMAIN, pasid: Pasid::new(1).unwrap() };
    for (rid, scope) in [(true, PasidCacheScope::Global), (false, PasidCacheScope::Global)]
        .into_iter()
        .chain([(false, of_one)])
    {
        let guest = Guest::with_directory();
        match rid {
            true => guest.write_pasid(0, 0x6000),
            false => guest.write_pasid(1, 0x6000),
        }
        *guest.host.unprepared.lock() = 3;
        guest.queue(&[Descriptor::PasidCache(scope), wait(1)]);
        let (mut slices, mut has) = (0, BTreeMap::new());
        while guest.slice() == Slice::More {
            slices += 1;
            if slices <= 3 {
                assert_eq!((guest.calls().len(), guest.status()), (0, 0), "{scope:?} {slices}");
            }
            guest.host_has(&mut has);
        }
        guest.host_has(&mut has);
        let who = if rid { Requester::rid(RID) } else { with_pasid(1) };
        assert_eq!((guest.status(), *guest.host.unprepared.lock()), (1, 0));
        assert_eq!(has.get(&who), guest.tables_say().get(&who), "{scope:?}");
        assert!(slices >= 3 && has.contains_key(&who), "{scope:?} {slices} {has:?}");
    }
}

/// The same for PASIDs whose entry goes, or that the host has lost; and for a function
/// that comes.
#[test]
fn what_the_host_prepares_takes_slices_wherever_it_is_given() {
    for lost in [false, true] {
        let guest = Guest::with_directory();
        guest.write_pasid(1, 0x6000);
        guest.queue(&[PASID_CACHE, wait(1)]);
        while guest.slice() == Slice::More {}
        guest.calls();
        match lost {
            true => guest.iommu.requesters.unapply_all(),
            false => guest.write(PASID_TABLE + 64, &[0]),
        }
        *guest.host.unprepared.lock() = 3;
        guest.queue(&[PASID_CACHE, wait(2)][usize::from(lost)..]);
        let (mut more, mut idle) = (true, 0);
        while more {
            more = guest.slice() == Slice::More;
            let given = guest.calls().iter().any(|call| matches!(call, Call::Configure(..)));
            idle += u32::from(!given);
            assert!(!given || *guest.host.unprepared.lock() == 0, "{lost}");
        }
        assert!(idle >= 3, "{lost} {idle}");
        assert_eq!((guest.status(), *guest.host.unprepared.lock()), (2, 0));
    }
    let guest = Guest::with_directory();
    guest.iommu.remove_device(RID);
    *guest.host.unprepared.lock() = 3;
    guest.iommu.add_device(RID).unwrap();
    assert_eq!(*guest.host.unprepared.lock(), 0);
}

#[test]
fn a_slice_is_of_few_requesters_and_nothing_is_acknowledged_before_the_last() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    let (mut slices, mut asked) = (0, 0);
    while guest.slice() == Slice::More {
        let calls = guest.calls().len();
        assert!(calls <= 33, "{calls} requesters in one slice");
        (slices, asked) = (slices + 1, asked + calls);
        if asked < PASIDS as usize {
            assert_eq!((guest.head(), guest.status()), (0, 0), "after {asked}");
        }
    }
    assert_eq!(asked, PASIDS as usize);
    assert!(slices >= PASIDS / 33, "{slices}");
    assert_eq!((guest.head(), guest.status()), (64, 1));
    assert_eq!(guest.iommu.counters().evaluations, 2);

    // Without changes, a slice covers more of them, but not all.
    guest.queue(&[PASID_CACHE, wait(2)]);
    let mut slices = 0;
    while guest.slice() == Slice::More {
        slices += 1;
    }
    assert!((PASIDS / 1024..PASIDS / 256).contains(&slices), "{slices}");
    assert_eq!((guest.calls(), guest.status()), (vec![], 2));
}

#[test]
fn what_is_not_present_is_passed_over() {
    let guest = Guest::with_directory();
    guest.write(DIRECTORY, &[0; 128]);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::Done);
    assert_eq!(guest.status(), 1);
    assert_eq!(guest.iommu.requesters.pasid_from(RID, 0), None);
}

#[test]
fn only_what_is_present_and_differs_from_its_neighbour_is_kept() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    assert_eq!(guest.iommu.requesters.kept(RID), 2, "a block of 4096 PASIDs each");
    // Every other one on other tables, and then every other one gone.
    (0..64).step_by(2).for_each(|pasid| guest.write_pasid(pasid, 0x7000));
    guest.submit(&[PASID_CACHE]);
    assert_eq!(guest.iommu.requesters.kept(RID), PASIDS as usize - 1);
    (0..64).step_by(2).for_each(|pasid| guest.write(PASID_TABLE + 64 * pasid, &[0]));
    guest.submit(&[PASID_CACHE]);
    assert_eq!(guest.iommu.requesters.kept(RID), PASIDS as usize / 2);
    guest.write(CONTEXT + 0x100, &[0]);
    guest.submit(&[PASID_CACHE]);
    assert_eq!(guest.iommu.requesters.kept(RID), 0);
}

#[test]
fn a_batch_that_the_host_does_in_pieces_is_done_with_the_last() {
    let guest = Guest::with_directory();
    *guest.host.pieces.lock() = 3;
    let global = Descriptor::Iotlb {
        scope: crate::spec::vtd::qi::IotlbScope::Global,
        drain_writes: false,
        drain_reads: false,
    };
    guest.queue(&[global, wait(1)]);
    for _ in 0..2 {
        assert_eq!(guest.slice(), Slice::More);
        assert_eq!((guest.calls(), guest.head(), guest.status()), (vec![], 0, 0));
    }
    assert_eq!((guest.slice(), guest.status()), (Slice::Done, 1));
    let all = Call::Invalidate(vec![Invalidation::ALL]);
    assert_eq!((guest.calls(), guest.iommu.counters().batches), (vec![all.clone()], 2));

    // SRTP, and the register-based interface.
    let mut slice = guest.begin_command(|enabled| enabled | RTPS);
    let mut slices = 0;
    while slice == Slice::More {
        assert_eq!(guest.status_bits(RTPS), 0);
        (slice, slices) = (guest.slice(), slices + 1);
    }
    assert!(slices >= 3, "{slices}");
    assert_eq!(guest.status_bits(RTPS), RTPS);
    guest.calls();
    guest.disable_translation();
    guest.command(|enabled| enabled & !(1 << 26));
    guest.write64(regs::RTADDR, ROOT);
    guest.command(|enabled| enabled | RTPS);
    guest.calls();
    let mut registers = guest.iommu.lock_idle();
    registers.iotlb = regs::IotlbReg::from_bits(1 << 63 | 1 << 60);
    guest.iommu.iotlb_command(&mut registers);
    drop(registers);
    let ivt = |guest: &Guest| guest.iommu.lock().iotlb.ivt();
    assert_eq!((guest.slice(), guest.slice(), ivt(&guest)), (Slice::More, Slice::More, true));
    assert_eq!((guest.slice(), ivt(&guest)), (Slice::Done, false));
    assert_eq!(guest.calls(), [all]);
}

#[test]
fn any_thread_goes_on_with_what_another_has_begun() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| guest.iommu.drain_queue());
        }
    });
    assert_eq!((guest.head(), guest.status()), (64, 1));
    // Each was configured once.
    assert_eq!(guest.calls().len(), PASIDS as usize);
}

#[test]
fn a_withdrawn_table_is_as_many_slices() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    guest.calls();
    // One context entry removes all of them.
    guest.write(CONTEXT + 0x100, &[0]);
    guest.queue(&[PASID_CACHE, wait(1)]);
    let mut asked = 0;
    while guest.slice() == Slice::More {
        let calls = guest.calls();
        assert!(calls.len() <= 33);
        asked += calls.len();
        if asked < PASIDS as usize {
            assert_eq!((guest.head(), guest.status()), (32, 0));
        }
    }
    assert_eq!((asked, guest.status()), (PASIDS as usize, 1));
    assert_eq!(guest.iommu.requesters.pasid_from(RID, 0), None);
}

#[test]
fn tables_that_change_in_between_are_taken_as_they_are_then() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    // The rest is gone before its turn, and what was configured stays.
    guest.write(DIRECTORY, &[0; 128]);
    while guest.slice() == Slice::More {}
    assert_eq!(guest.status(), 1);
    let given = guest.calls();
    assert!((30..66).contains(&given.len()), "{}", given.len());
    // So does a directory outside memory.
    guest.submit(&[PASID_CACHE]);
    guest.write_every_pasid(0x6000);
    (0..128).for_each(|index| guest.write(DIRECTORY + 8 * index, &[PASID_TABLE | 1]));
    guest.queue(&[PASID_CACHE, wait(2)]);
    assert_eq!(guest.slice(), Slice::More);
    guest.write(CONTEXT + 0x100, &[(1 << 40) | 1 << 3 | 1]);
    while guest.slice() == Slice::More {}
    assert_eq!((guest.status(), guest.iommu.requesters.pasid_from(RID, 40)), (2, None));
    guest.submit(&[PASID_CACHE, wait(3)]);
    assert_eq!((guest.status(), guest.iommu.requesters.pasid_from(RID, 0)), (3, None));
}

#[test]
fn a_wrong_descriptor_behind_many_pasids_is_told_when_they_are_done() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    let tail = guest.queue_words(&[PASID_CACHE.encode(), [0xf, 0, 0, 0]]);
    guest.write64(regs::IQT, tail);
    assert_eq!(guest.calls().len(), PASIDS as usize);
    assert_eq!(guest.head(), 32);
    assert!(Fsts::from_bits(guest.read32(regs::FSTS)).iqe());
}

#[test]
fn a_host_that_fails_on_the_way_stops_the_queue_and_all_is_done_again() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    guest.fail_to_block(true);
    while guest.slice() == Slice::More {}
    assert_eq!((guest.head(), guest.status()), (0, 0));
    assert!(Fsts::from_bits(guest.read32(regs::FSTS)).iqe());
    guest.fail_to_block(false);
    let mut has = BTreeMap::new();
    guest.write32(regs::FSTS, 1 << 4);
    assert_eq!((guest.head(), guest.status()), (64, 1));
    guest.host_has(&mut has);
    let served = has.get(&with_pasid(PASIDS - 1));
    assert_eq!(served, Some(&first_stage(0x6000)));
}

#[test]
fn a_queue_that_is_disabled_on_the_way_forgets_what_it_was_at() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    guest.command(|enabled| enabled & !(1 << 26));
    assert_eq!((guest.slice(), guest.head(), guest.status()), (Slice::Done, 0, 0));
    assert!(guest.calls().len() < 100);
    guest.enable_queue(0x800);
    assert_eq!((guest.slice(), guest.head()), (Slice::Done, 0));
    guest.submit(&[PASID_CACHE, wait(2)]);
    assert_eq!(guest.status(), 2);
}

#[test]
fn translation_that_is_disabled_on_the_way_ends_the_reading_of_tables() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    guest.disable_translation();
    assert_eq!((guest.head(), guest.status()), (64, 1));
    let mut has = BTreeMap::new();
    guest.host_has(&mut has);
    let own = BTreeMap::from([(Requester::rid(RID), Policy::Bypass)]);
    assert!(has == own, "{} are served", has.len());
}

#[test]
fn what_the_host_lost_is_given_again_in_slices() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    guest.refuse(true);
    let global = Descriptor::Iotlb {
        scope: crate::spec::vtd::qi::IotlbScope::Global,
        drain_writes: false,
        drain_reads: false,
    };
    guest.submit(&[global]);
    guest.refuse(false);
    guest.calls();
    guest.queue(&[wait(3)]);
    guest.iommu.fault_log().write_status(1 << 4);
    let mut asked = 0;
    while guest.slice() == Slice::More {
        let calls = guest.calls();
        assert!(calls.len() <= 34, "{}", calls.len());
        asked += calls.len();
    }
    asked += guest.calls().len();
    assert_eq!((asked, guest.status()), (PASIDS as usize + 1, 3));
}

#[test]
fn what_the_host_loses_while_it_gets_decisions_again_is_given_once_more() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    guest.iommu.requesters.unapply_all();
    guest.calls();
    guest.queue(&[wait(3)]);
    assert_eq!(guest.slice(), Slice::More);
    assert!(!guest.calls().is_empty());
    guest.iommu.requesters.unapply_all();
    while guest.slice() == Slice::More {}
    assert_eq!((guest.calls().len(), guest.status()), (PASIDS as usize, 3));
    assert!(!guest.iommu.requesters.has_unapplied());
}

#[test]
fn a_function_comes_and_goes_with_all_its_pasids() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    let mut has = BTreeMap::new();
    guest.iommu.remove_device(RID);
    guest.calls();
    guest.iommu.add_device(RID).unwrap();
    guest.host_has(&mut has);
    assert_eq!(has.len(), PASIDS as usize);
    assert_eq!(has, guest.tables_say());
    guest.iommu.remove_device(RID);
    guest.host_has(&mut has);
    assert_eq!(has, BTreeMap::new());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]
    /// Whatever changes while tables are read, by whichever thread: after the last invalidation the
    /// host has what they say.
    #[test]
    fn the_host_ends_with_what_the_tables_say(
        steps in prop::collection::vec((0u8..9, 0u64..128, 0u64..64, 0usize..60), 1..12),
    ) {
        let guest = Guest::with_directory();
        // Two table pages, to tell them apart.
        let other = 0xa000;
        let mut has = BTreeMap::new();
        guest.host_has(&mut has);
        for (what, index, entry, slices) in steps {
            match what {
                0 => guest.write(DIRECTORY + 8 * index, &[0]),
                1 => guest.write(DIRECTORY + 8 * index, &[other | 1]),
                2 => guest.write(DIRECTORY + 8 * index, &[PASID_TABLE | 1]),
                3 => guest.write_pasid(entry, 0x6000),
                4 => guest.write_every_pasid(0x7000),
                5 => guest.write(other + 64 * entry, &[1 << 6 | 1, index, 0x5000]),
                6 => guest.write(other + 64 * entry, &[0]),
                7 => guest.command(|enabled| enabled ^ TES),
                _ => guest.command(|enabled| enabled | RTPS),
            }
            guest.queue(&[PASID_CACHE, wait(1)]);
            for _ in 0..slices {
                guest.slice();
            }
        }
        guest.command(|enabled| enabled | TES);
        guest.submit(&[PASID_CACHE, wait(9)]);
        prop_assert_eq!(guest.status(), 9);
        guest.host_has(&mut has);
        prop_assert_eq!(has, guest.tables_say());
    }
}

#[test]
fn a_slice_invalidates_a_few_device_tlbs() {
    let guest = Guest::new(VtdConfig { device_iotlb: true, ..Default::default() });
    guest.enable_queue(0x800);
    let mut queued = vec![device_tlb(RID); 100];
    queued.push(wait(1));
    guest.queue(&queued);
    let mut most = 0;
    while guest.slice() == Slice::More {
        most = most.max(guest.calls().len());
        assert_eq!(guest.status(), 0);
    }
    assert!((1..=32).contains(&most), "{most} in one slice");
    assert_eq!((guest.status(), guest.calls().len()), (1, 4));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walk through first-stage tables nested on stage 2.

use super::*;
use crate::units::engine::{Caches, LocalCounters, OverHost, PathRights, RequestKind, Walk};
use crate::units::vtd::context::Context;
use crate::units::vtd::fault::Fault;
use crate::units::vtd::tables::{FirstStage, Tables};
use twostage::iommufd::{VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE};

fn machine() -> Machine {
    Machine::new(VtdUnitConfig {
        address_width: AddressWidth::Bits57,
        supervisor_requests: true,
        extended_accessed: true,
        ..VtdUnitConfig::default()
    })
}

const IOVA: u64 = 0x0000_1234_5678_9000;

fn user_fault(reason: FaultReason) -> Outcome {
    Err((reason, false))
}

fn stage2_fault(reason: FaultReason) -> Outcome {
    Err((reason, true))
}

#[test]
fn pages_of_every_size_through_four_and_five_levels() {
    let machine = machine();
    let mut port = machine.port();
    for levels in [4, 5] {
        for (level, iova) in [(1, IOVA), (2, 0x20_0000_0000), (3, 0xffff_ff80_4000_0000)] {
            let root = machine.table();
            machine.map(root, levels, iova, level, HIGH, RW);
            machine.attach(None, 1, root, levels, 0);
            let offset = 0xff8.min(page_size(level) - 8);
            machine.poke(HIGH + offset, u64::from(level));
            for _ in 0..2 {
                assert_eq!(machine.read_u64(&mut port, PLAIN, iova + offset), Ok(level.into()));
            }
        }
    }
}

#[test]
fn a_large_page_is_served_as_far_as_stage_2_goes() {
    let machine = machine();
    let mut port = machine.port();
    let root = machine.table();
    // 1 GiB at HIGH, of which stage 2 has 8 MiB and, at READ_ONLY, one more page.
    machine.map(root, 4, 0x80_0000_0000, 3, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    let (first, last) = (0x80_0000_0000, 0x80_0000_0000 + HALF - 8);
    machine.poke(HIGH, 1);
    machine.poke(HIGH + HALF - 8, 2);
    let denied = stage2_fault(FaultReason::SecondStageDenied);
    for _ in 0..2 {
        assert_eq!(machine.read_u64(&mut port, PLAIN, first), Ok(1));
        assert_eq!(machine.read_u64(&mut port, PLAIN, last), Ok(2));
        assert_eq!(machine.read_u64(&mut port, PLAIN, last + 8), denied);
        let read_only = first + READ_ONLY - HIGH;
        assert_eq!(machine.read_u64(&mut port, PLAIN, read_only), Ok(0));
        assert_eq!(machine.write_u64(&mut port, PLAIN, read_only, 1), denied);
    }
}

#[test]
fn every_level_must_be_present_and_well_formed() {
    let machine = machine();
    let mut port = machine.port();
    for levels in [4, 5] {
        let root = machine.table();
        machine.map(root, levels, IOVA, 1, HIGH, RW);
        machine.attach(None, 1, root, levels, 0);
        for level in 1..=levels {
            let entry = machine.entry(root, levels, IOVA, level, TABLE);
            let good = machine.peek(entry);
            let mut expect = |word: u64, outcome: Outcome| {
                machine.poke(entry, word);
                machine.invalidate(1, ALL);
                assert_eq!(
                    machine.read_u64(&mut port, PLAIN, IOVA),
                    outcome,
                    "level {level} of {levels}, {word:#x}"
                );
            };
            expect(good & !1, user_fault(FaultReason::FirstStageNotPresent));
            match level {
                1 => {}
                2 => expect(good | 0x80 | 0x2000, user_fault(FaultReason::FirstStageReserved)),
                3 => expect(good | 0x80 | 0x2000_0000, user_fault(FaultReason::FirstStageReserved)),
                _ => expect(good | 0x80, user_fault(FaultReason::FirstStageReserved)),
            }
            // A unit without execute requests ignores XD and software's bits.
            expect(good | 1 << 63 | 0x7ff << 52 | 0xa00, Ok(0));
            expect(good, Ok(0));
        }
    }
}

#[test]
fn huge_pages_are_reserved_where_there_are_none() {
    let machine = Machine::new(VtdUnitConfig { huge_pages: false, ..VtdUnitConfig::default() });
    let root = machine.table();
    machine.map(root, 4, 0, 3, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    let outcome = machine.read_u64(&mut machine.port(), PLAIN, 0);
    assert_eq!(outcome, user_fault(FaultReason::FirstStageReserved));
}

#[test]
fn addresses_must_be_canonical() {
    let machine = machine();
    let mut port = machine.port();
    for levels in [4, 5] {
        machine.attach(None, 1, machine.table(), levels, 0);
        let sign = if levels == 4 { 47 } else { 56 };
        for (iova, reason) in [
            ((1 << sign) - 8, FaultReason::FirstStageNotPresent),
            (1 << sign, FaultReason::NotCanonical),
            (!0 << sign, FaultReason::FirstStageNotPresent),
            ((!0 << sign) - 8, FaultReason::NotCanonical),
            (1 << 63, FaultReason::NotCanonical),
        ] {
            let outcome = machine.read_u64(&mut port, PLAIN, iova);
            assert_eq!(outcome, user_fault(reason), "{iova:#x} of {levels}");
        }
    }
}

#[test]
fn rights_are_those_of_all_levels_together() {
    let machine = machine();
    let mut port = machine.port();
    let (none, sre, wpe) = (1, 2, 3);
    let root = machine.table();
    machine.map(root, 4, IOVA, 1, HIGH, RW);
    machine.attach(Some(none), 1, root, 4, 0);
    machine.attach(Some(sre), 2, root, 4, VTD_S1_SRE);
    machine.attach(Some(wpe), 3, root, 4, VTD_S1_SRE | VTD_S1_WPE);
    let user_denied = user_fault(FaultReason::UserDenied);
    let write_denied = user_fault(FaultReason::WriteDenied);
    let supervisor_disabled = user_fault(FaultReason::SupervisorDisabled);
    for level in 1..=4 {
        let entry = machine.entry(root, 4, IOVA, level, TABLE);
        let good = machine.peek(entry);
        // Each twice, to check the cached result, too.
        let mut check = |drop: u64, attributes, read: Outcome, write: Outcome| {
            machine.poke(entry, good & !drop);
            for tag in 1..=3 {
                machine.invalidate(tag, ALL);
            }
            for _ in 0..2 {
                let context = format!("level {level}, without {drop:#x}, {attributes:?}");
                assert_eq!(machine.read_u64(&mut port, attributes, IOVA), read, "{context}");
                let written = machine.write_u64(&mut port, attributes, IOVA, 0);
                assert_eq!(written, write, "{context}");
            }
        };
        check(0, pasid(none), Ok(0), Ok(0));
        check(0, supervisor(none), supervisor_disabled, supervisor_disabled);
        check(0, supervisor(sre), Ok(0), Ok(0));
        check(4, pasid(sre), user_denied, user_denied);
        check(4, supervisor(sre), Ok(0), Ok(0));
        check(2, pasid(sre), Ok(0), write_denied);
        check(2, supervisor(sre), Ok(0), Ok(0));
        check(2, supervisor(wpe), Ok(0), write_denied);
        check(6, pasid(wpe), user_denied, user_denied);
        machine.poke(entry, good);
    }
    let execute = DmaAttributes { execute: true, ..pasid(sre) };
    let disabled = user_fault(FaultReason::ExecuteDisabled);
    assert_eq!(machine.read_u64(&mut port, execute, IOVA), disabled);
}

#[test]
fn without_pasid_there_is_no_privilege() {
    let machine = machine();
    let root = machine.table();
    machine.map(root, 4, IOVA, 1, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    let attributes = DmaAttributes { pasid: None, privileged: true, execute: true };
    assert_eq!(machine.read_u64(&mut machine.port(), attributes, IOVA), Ok(0));
}

#[test]
fn execution_goes_by_ere_and_by_xd_under_nxe() {
    // The uAPI cannot request these, so the walker gets them directly.
    let machine = machine();
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, 1, HIGH, RW);
    let config = VtdUnitConfig::default();
    let caches = Caches::new(config.cache_sizes(), 48, None);
    let stage2 = Arc::clone(&machine.stage2);
    let translation = Translation { tag: CacheTag(1), tables: None, stage2, dirty: None };
    let context = Context::new(translation, 0, &config);
    assert_eq!(context.tables, Tables::None);
    let counters = LocalCounters::default();
    let (source, caches, counters) = (context.source(None), &caches, &counters);
    let lower = OverHost::new(caches, &context.host, counters);
    let walk = Walk { caches, source, global: source, counters, lower };
    let tables = FirstStage {
        table: root,
        levels: 4,
        huge_pages: true,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
        execute_requests: true,
        no_execute: true,
        rights: PathRights::NONE,
    };
    let tables = tables.with_rights();
    let execute = RequestKind::new(false, false, true);
    let lookup = context.lookup(None);
    let cached = |kind| caches.translation(&lookup, IOVA, kind).is_some();
    assert!(walk.walk(&tables, IOVA, execute).is_ok() && cached(execute));
    machine.poke(leaf, machine.peek(leaf) | 1 << 63);
    let denied = Err(Fault::stage1(FaultReason::ExecuteDenied));
    assert_eq!(walk.walk(&tables, IOVA, execute), denied);
    let read = RequestKind::new(false, false, false);
    assert!(walk.walk(&tables, IOVA, read).is_ok() && cached(read) && !cached(execute));
    let ignoring = FirstStage { no_execute: false, ..tables }.with_rights();
    assert!(walk.walk(&ignoring, IOVA, execute).is_ok());
}

#[test]
fn accessed_and_dirty_flags_are_set_when_a_request_succeeds() {
    let machine = machine();
    let mut port = machine.port();
    for (flags, accessed) in [(0, 0x20), (VTD_S1_EAFE, 0x420)] {
        let root = machine.table();
        let leaf = machine.map(root, 4, IOVA, 1, HIGH, 0x5);
        let directory = machine.entry(root, 4, IOVA, 2, TABLE);
        machine.poke(directory, machine.peek(directory) & !0x20);
        machine.attach(None, 1, root, 4, flags);
        let (leaf_word, table_word) = (machine.peek(leaf), machine.peek(directory));

        let denied = user_fault(FaultReason::WriteDenied);
        assert_eq!(machine.write_u64(&mut port, PLAIN, IOVA, 1), denied);
        assert_eq!((machine.peek(leaf), machine.peek(directory)), (leaf_word, table_word));

        machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
        assert_eq!(machine.peek(leaf), leaf_word | accessed);
        assert_eq!(machine.peek(directory), table_word | accessed);

        // A write to a page that is cached clean sets D, even without an invalidation.
        machine.poke(leaf, leaf_word | 2 | accessed);
        machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
        machine.write_u64(&mut port, PLAIN, IOVA, 1).unwrap();
        assert_eq!(machine.peek(leaf), leaf_word | 2 | accessed | 0x40);
        assert_eq!(machine.peek(directory), table_word | accessed);
    }
}

#[test]
fn flags_need_tables_that_stage_2_lets_be_written() {
    let machine = machine();
    let mut port = machine.port();
    let root = machine.table();
    let directory = machine.entry(root, 4, IOVA, 2, TABLE);
    machine.poke(directory, READ_ONLY | TABLE);
    machine.attach(None, 1, root, 4, 0);
    let entry = READ_ONLY + index(IOVA, 1) * 8;
    machine.poke(entry, HIGH | 0x7);
    let denied = stage2_fault(FaultReason::FirstStageFlagsSecondStageDenied);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), denied);
    machine.poke(entry, HIGH | 0x27);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(0));
    // Once more, from the cached paging structure.
    assert_eq!(machine.write_u64(&mut port, PLAIN, IOVA, 0), denied);
    machine.poke(entry, HIGH | 0x67);
    assert_eq!(machine.write_u64(&mut port, PLAIN, IOVA, 0), Ok(0));
}

#[test]
fn no_dirty_flag_where_stage_2_refuses_the_write() {
    let machine = machine();
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, 1, READ_ONLY, 0x27);
    machine.attach(None, 1, root, 4, 0);
    let denied = stage2_fault(FaultReason::SecondStageDenied);
    assert_eq!(machine.write_u64(&mut machine.port(), PLAIN, IOVA, 0), denied);
    assert_eq!(machine.peek(leaf) & 0x40, 0);
}

#[test]
fn every_pointer_goes_through_stage_2() {
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    let beyond = 1 << 48;
    machine.attach(None, 1, NOWHERE, 4, 0);
    let denied = stage2_fault(FaultReason::FirstStageTopSecondStageDenied);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), denied);
    machine.attach(None, 1, beyond, 4, 0);
    let too_far = stage2_fault(FaultReason::FirstStagePointerBeyond);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), too_far);

    let root = machine.table();
    machine.map(root, 4, IOVA, 1, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    for level in 1..=4 {
        let entry = machine.entry(root, 4, IOVA, level, TABLE);
        let good = machine.peek(entry);
        let (nowhere, far) = match level {
            1 => (FaultReason::SecondStageDenied, FaultReason::AddressBeyondGuest),
            _ => (FaultReason::FirstStageSecondStageDenied, FaultReason::FirstStagePointerBeyond),
        };
        for (gpa, reason) in [(NOWHERE, nowhere), (beyond, far)] {
            machine.poke(entry, gpa | good & 0xfff);
            machine.invalidate(1, ALL);
            let outcome = machine.read_u64(&mut port, PLAIN, IOVA);
            assert_eq!(outcome, stage2_fault(reason), "level {level}");
        }
        machine.poke(entry, good);
    }
}

#[test]
fn a_table_that_is_not_whole_is_read_as_far_as_it_goes() {
    let machine = machine();
    let mut port = machine.port();
    let root = machine.table();
    // Half a page of stage 2, at an unaligned place of its memory; and one whose words are
    // misaligned.
    machine.map_stage2(NOWHERE, 0x10_0800, 0x800, Protection::READ_WRITE);
    machine.map_stage2(NOWHERE + 0x1000, 0x20_0004, 0x1000, Protection::READ_WRITE);
    let directory = machine.entry(root, 4, IOVA, 2, TABLE);
    machine.poke(directory, NOWHERE | TABLE);
    machine.attach(None, 1, root, 4, 0);
    let (inside, outside) = (IOVA & !0x1f_ffff | 0x5000, IOVA & !0x1f_ffff | 0x1f_f000);
    machine.poke(NOWHERE + 5 * 8, HIGH | RW);
    for _ in 0..2 {
        assert_eq!(machine.read_u64(&mut port, PLAIN, inside), Ok(0));
        let denied = stage2_fault(FaultReason::FirstStageSecondStageDenied);
        assert_eq!(machine.read_u64(&mut port, PLAIN, outside), denied);
    }
    machine.attach(None, 1, NOWHERE + 0x1000, 4, 0);
    let access = user_fault(FaultReason::FirstStageTopAccess);
    assert_eq!(machine.read_u64(&mut port, PLAIN, inside), access);
}

#[test]
fn tables_that_the_unit_cannot_walk_are_invalid_programming() {
    let machine = Machine::new(VtdUnitConfig::default());
    machine.attach(None, 1, machine.table(), 5, 0);
    let outcome = machine.read_u64(&mut machine.port(), PLAIN, IOVA);
    assert_eq!(outcome, user_fault(FaultReason::PasidEntryInvalid));
}

#[test]
fn a_guest_that_keeps_changing_an_entry_does_not_keep_a_walk_going() {
    use std::sync::atomic::{AtomicBool, Ordering};

    let machine = Machine::new(VtdUnitConfig { iotlb_entries: 0, ..VtdUnitConfig::default() });
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, 1, HIGH, 0x7);
    machine.attach(None, 1, root, 4, 0);
    let mut port = machine.port();
    let done = AtomicBool::new(false);
    let (region, offset) = (Arc::clone(&machine.region), machine.offset(leaf));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let slot: &std::sync::atomic::AtomicU64 =
                vm_memory::VolatileMemory::get_atomic_ref(&**region, offset).unwrap();
            let mut software = 0;
            while !done.load(Ordering::Relaxed) {
                software ^= 0x200;
                slot.store((HIGH | 0x7 | software).to_le(), Ordering::Relaxed);
            }
        });
        for _ in 0..20_000 {
            let mut bytes = [0];
            match port.write(PLAIN, IOVA, &bytes).and_then(|()| port.read(PLAIN, IOVA, &mut bytes))
            {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(fault(error), (FaultReason::FirstStageFlagsUpdate, false));
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

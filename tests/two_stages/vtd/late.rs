// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Without caching mode: a driver does not invalidate entries that become present or valid.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use twostage::spec::vtd::fault::FaultReason;
use twostage_emulated::{DmaAttributes, VtdUnitConfig};
use vm_memory::{Bytes, GuestAddress, IommuMemory};

use super::guest::{Completion, Entry};
use super::machine::{vtd_config, Machine};
use super::{expect_fault, DOMAIN, IOVA};
use crate::common::{A, B, PAGE};

/// A machine without caching mode, whose guest has an empty root table.
fn untold() -> Machine {
    let config = vtd_config().with_caching_mode(false).with_second_stage(true);
    let machine = Machine::with(VtdUnitConfig::default(), config);
    machine.guest.enable();
    machine
}

/// A first-stage table that maps `IOVA` to a page that starts with `value`.
fn table(machine: &Machine, value: u64) -> u64 {
    let guest = &machine.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.map(table, IOVA, page, 1, true);
    guest.store(page, value);
    table
}

#[test]
fn an_entry_that_becomes_present_is_found_by_the_next_request() {
    for pasid in [None, Some(6)] {
        let machine = untold();
        let guest = &machine.guest;
        assert!(machine.read(A, pasid, IOVA).is_err());
        expect_fault(&machine, FaultReason::RootNotPresent, IOVA, pasid);
        // Root, context and directory, and then only the entry.
        guest.set_entry(A, pasid.unwrap_or(0), Entry::NotPresent);
        assert!(machine.read(A, pasid, IOVA).is_err());
        expect_fault(&machine, FaultReason::PasidEntryNotPresent, IOVA, pasid);
        let table = table(&machine, 1);
        guest.set_entry(A, pasid.unwrap_or(0), Entry::FirstStage { table, domain: DOMAIN });
        assert_eq!(machine.read(A, pasid, IOVA), Ok(1));
        assert_eq!(machine.iommu.counters().found_served, 1);
        assert_eq!(guest.take_fault(), None);
        // This changes an entry that may be cached.
        guest.set_entry(A, pasid.unwrap_or(0), Entry::NotPresent);
        assert_eq!(machine.read(A, pasid, IOVA), Ok(1));
        assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        assert!(machine.read(A, pasid, IOVA).is_err());
        expect_fault(&machine, FaultReason::PasidEntryNotPresent, IOVA, pasid);
        assert_eq!(machine.end(), 0);
    }
}

#[test]
fn an_entry_that_becomes_right_is_found_too() {
    let machine = untold();
    let guest = &machine.guest;
    // Nested: valid, but not supported here. Then second-stage, first-stage and pass-through.
    let first = table(&machine, 1);
    let (second, page) = (guest.page(), guest.page());
    guest.map_second_stage(second, IOVA, page, true);
    guest.store(page, 2);
    for (entry, iova, value) in [
        (Entry::FirstStage { table: first, domain: DOMAIN }, IOVA, 1),
        (Entry::SecondStage { table: second, domain: DOMAIN }, IOVA, 2),
        (Entry::PassThrough { domain: DOMAIN }, page, 2),
    ] {
        let nested = Entry::Nested { first, second, domain: DOMAIN, accessed_dirty: false };
        guest.set_entry(A, 0, nested);
        assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        assert!(machine.read(A, None, iova).is_err());
        expect_fault(&machine, FaultReason::PasidEntryInvalid, iova, None);
        guest.set_entry(A, 0, entry);
        assert_eq!(machine.read(A, None, iova), Ok(value), "{entry:?}");
    }
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_legacy_entry_and_the_pages_below_it_are_found() {
    let config = vtd_config().with_caching_mode(false).with_second_stage(true);
    let machine = Machine::with(VtdUnitConfig::default(), config);
    let guest = &machine.guest;
    guest.enable_legacy(true);
    assert!(machine.read(A, None, IOVA).is_err());
    expect_fault(&machine, FaultReason::LegacyRootNotPresent, IOVA, None);
    let (table, page) = (guest.page(), guest.page());
    guest.store(page, 1);
    guest.set_legacy_entry(A, Entry::SecondStage { table, domain: DOMAIN });
    assert!(machine.read(A, None, IOVA).is_err());
    expect_fault(&machine, FaultReason::LegacyReadDenied, IOVA, None);
    guest.map_second_stage(table, IOVA, page, true);
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    assert_eq!(machine.end(), 0);
}

#[test]
fn a_section_finds_it_as_well() {
    let machine = untold();
    let table = table(&machine, 1);
    machine.guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    let mut port = machine.port(A);
    let section = port.section(DmaAttributes::default());
    let memory = IommuMemory::new((*machine.memory.map).clone(), section, true, ());
    assert_eq!(memory.read_obj::<u64>(GuestAddress(IOVA)).unwrap(), 1);
    assert!(memory.read_obj::<u64>(GuestAddress(IOVA + PAGE)).is_err());
    drop(memory);
    expect_fault(&machine, FaultReason::FirstStageNotPresent, IOVA + PAGE, None);
    assert_eq!(machine.guest.take_fault(), None);
}

#[test]
fn who_is_refused_late_is_told_and_tries_again() {
    let machine = untold();
    let table = table(&machine, 1);
    machine.guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    // HWPT_ALLOC.
    machine.fail_nth(1);
    assert!(machine.read(A, None, IOVA).is_err());
    expect_fault(&machine, FaultReason::PasidEntryInvalid, IOVA, None);
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    assert_eq!(machine.end(), 0);
}

/// Threads of two devices make requests while the guest removes entries, with an invalidation, and
/// replaces them, without. Nobody waits forever, and nothing is used after its invalidation.
#[test]
fn threads_find_it_while_the_guest_goes_on() {
    const ROUNDS: u64 = 300;
    const LIMIT: Duration = Duration::from_secs(60);
    let machine = untold();
    let guest = &machine.guest;
    let tables = [table(&machine, 0), table(&machine, 1)];
    let over = AtomicBool::new(false);
    // Invalidated: rounds before this one.
    let valid = AtomicU64::new(0);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        for (rid, pasid) in [(A, None), (A, None), (A, Some(6)), (B, None)] {
            let (machine, over, valid, reads) = (&machine, &over, &valid, &reads);
            scope.spawn(move || {
                let mut port = machine.port(rid);
                let attributes = DmaAttributes { pasid, ..Default::default() };
                while !over.load(Ordering::SeqCst) {
                    let before = valid.load(Ordering::SeqCst);
                    let mut bytes = [0; 8];
                    if port.read(attributes, IOVA, &mut bytes).is_ok() {
                        let after = valid.load(Ordering::SeqCst);
                        let value = u64::from_le_bytes(bytes);
                        if before == after && before < ROUNDS {
                            assert_eq!(value, before % 2, "round {before}");
                        }
                        reads.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        for round in 0..ROUNDS {
            for (rid, pasid) in [(A, 0), (A, 6), (B, 0)] {
                let table = tables[(round % 2) as usize];
                guest.set_entry(rid, pasid, Entry::FirstStage { table, domain: DOMAIN });
            }
            valid.store(round, Ordering::SeqCst);
            // More than those that may have been in progress since before.
            let seen = reads.load(Ordering::SeqCst);
            let begun = Instant::now();
            while reads.load(Ordering::SeqCst) < seen + 8 {
                if begun.elapsed() > LIMIT {
                    over.store(true, Ordering::SeqCst);
                    panic!("nobody finds the entries of round {round}");
                }
                thread::yield_now();
            }
            for (rid, pasid) in [(A, 0), (A, 6), (B, 0)] {
                guest.set_entry(rid, pasid, Entry::NotPresent);
            }
            // No round: requests still use the old entries until they are invalidated.
            valid.store(round + ROUNDS, Ordering::SeqCst);
            assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        }
        over.store(true, Ordering::SeqCst);
    });
    assert!(machine.iommu.counters().found_served >= ROUNDS);
    assert_eq!(machine.end(), 0);
}

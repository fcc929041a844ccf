// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done for every request and every invalidation takes no allocation once its memory is
//! there: an allocator counts.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::StreamId;
use twostage::spec::vtd::qi::{AddressMask, Descriptor};
use twostage_emulated::kit::smmuv3;
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::{DmaAccess, DmaAttributes, VtdUnitConfig};

#[allow(dead_code)] // The tests of both stages use all of these.
#[path = "common.rs"]
mod common;
#[allow(dead_code)]
#[path = "vtd/machine.rs"]
mod machine;
#[allow(dead_code)]
#[path = "smmuv3/machine.rs"]
mod smmu_machine;

use common::{A, PAGE};
use machine::{vtd_config, Machine};

const DOMAIN: u16 = 1;
const ASID: u16 = 1;
const IOVA: u64 = 0x4000_0000;

/// The system's allocator.
struct Counting;

thread_local! {
    /// Allocations of this thread.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: everything is passed on to the system's allocator. Counting allocates nothing: the
// counter is initialised at compile time and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: by the caller.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: by the caller.
        unsafe { System.realloc(start, layout, size) }
    }
}

/// The number of allocations in `work`.
fn allocations<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let before = ALLOCATIONS.get();
    let result = work();
    (ALLOCATIONS.get() - before, result)
}

/// A machine whose device [`A`] is on first-stage tables that map `pages` pages from [`IOVA`] on.
fn machine(unit: VtdUnitConfig, pages: u64) -> Machine {
    let machine = Machine::with(unit, vtd_config());
    let table = machine.guest.page();
    for page in 0..pages {
        machine.guest.map(table, IOVA + page * PAGE, machine.guest.page(), 1, true);
    }
    machine.guest.enable();
    machine.guest.set_entry(A, 0, Entry::FirstStage { table, domain: DOMAIN });
    assert_eq!(machine.guest.flush_pasid_cache(), Completion::Done);
    machine
}

#[test]
fn allocations_are_counted() {
    assert_eq!(allocations(|| Vec::<u8>::with_capacity(1)).0, 1);
    assert_eq!(allocations(|| ()).0, 0);
}

#[test]
fn a_batch_of_invalidations_takes_no_allocation() {
    let machine = machine(VtdUnitConfig::default(), 1);
    let page = |number: u64, leaf| {
        let range = Some(AddressMask { address: IOVA + number * PAGE, mask: 0, leaf });
        let pasid = Pasid::new(0).expect("0 fits in 20 bits");
        Descriptor::PasidIotlb { domain: DOMAIN, pasid, range }.encode()
    };
    for (stride, leaf) in [(1, true), (2, true), (2, false)] {
        // One fewer than the queue of 128 holds, including the wait.
        for count in [1, 16, 120] {
            let descriptors: Vec<_> = (0..count).map(|it| page(it * stride, leaf)).collect();
            for round in 0..4 {
                let (made, done) = allocations(|| machine.guest.submit_words(&descriptors));
                assert_eq!(done, Completion::Done);
                assert!(round == 0 || made == 0, "{made} for {count} pages, {stride} apart");
            }
        }
    }
}

#[test]
fn a_batch_of_commands_takes_no_allocation() {
    let (host, unit) = smmu_machine::host();
    let machine = smmu_machine::Machine::on(host, unit).expect("the default machine");
    let table = machine.guest.page();
    machine.guest.map(table, IOVA, machine.guest.page(), 3, true);
    let cd = machine.guest.context(table, ASID);
    machine.guest.enable();
    machine.guest.set_entry(StreamId::from(A), smmuv3::Entry::Stage1 { cd });
    assert_eq!(machine.guest.flush_entries(&[A]), smmuv3::Completion::Done);
    let page = |number: u64, leaf| {
        let range = AddressRange { leaf, ..AddressRange::at(IOVA + number * PAGE) };
        Command::TlbiNhVa { vmid: 0, asid: ASID, range }.encode()
    };
    for (stride, leaf) in [(1, true), (2, true), (2, false)] {
        for count in [1, 16, 120] {
            let commands: Vec<_> = (0..count).map(|it| page(it * stride, leaf)).collect();
            for round in 0..4 {
                let (made, done) = allocations(|| machine.guest.submit_words(&commands));
                assert_eq!(done, smmuv3::Completion::Done);
                assert!(round == 0 || made == 0, "{made} for {count} pages, {stride} apart");
            }
        }
    }
}

#[test]
fn a_translation_takes_no_allocation_whether_it_hits_or_misses() {
    const PAGES: u64 = 64;
    for entries in [0, 4, 4096] {
        let unit = VtdUnitConfig::default()
            .with_iotlb_entries(entries)
            .with_paging_structure_entries(entries);
        let machine = machine(unit, PAGES);
        let mut port = machine.port(A);
        let mut translate_all = || {
            for page in 0..PAGES {
                let iova = IOVA + page * PAGE;
                let found = port.translate(DmaAttributes::default(), iova, 8, DmaAccess::Read);
                found.expect("the page is mapped");
            }
        };
        // The first sets flags, and fills what is cached.
        translate_all();
        assert_eq!(allocations(translate_all).0, 0, "{entries} entries");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Several accesses in one critical section, as `vm_memory` does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::{Bytes, GuestMemoryMmap, IommuMemory, Permissions};

use super::*;
use crate::PortIommu;

const IOVA: u64 = 0x0000_1234_4020_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);

/// A machine whose device has IOVA mapped to OLD; the leaf's GPA.
fn machine() -> (Machine, u64) {
    let machine = Machine::new(VtdUnitConfig::default());
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, 1, OLD, RW);
    machine.attach(None, 1, root, 4, 0);
    (machine, leaf)
}

/// Guest memory through `port`, for the duration of one section.
fn section<'a>(
    memory: &GuestMemoryMmap,
    port: &'a mut DmaPort,
) -> IommuMemory<GuestMemoryMmap, PortIommu<'a>> {
    IommuMemory::new(memory.clone(), port.section(PLAIN), true, ())
}

impl Machine {
    fn memory(&self) -> GuestMemoryMmap {
        GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&self.region)]).unwrap()
    }

    /// Remaps IOVA to `gpa`, as a guest does: table, then invalidation.
    fn remap(&self, leaf: u64, gpa: u64) {
        self.poke(leaf, gpa | RW);
        self.invalidate(1, page(IOVA, true));
    }
}

#[test]
fn an_invalidation_waits_for_the_section() {
    let (machine, leaf) = machine();
    let (memory, mut port) = (machine.memory(), machine.port());
    let unit = Arc::clone(&machine.unit);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let section = section(&memory, &mut port);
        // Looked up, not accessed yet: it is the slice that must not outlive the invalidation.
        let slice =
            vm_memory::GuestMemory::get_slices(&section, GuestAddress(IOVA), 8, Permissions::Write)
                .unwrap()
                .next()
                .unwrap()
                .unwrap();
        machine.poke(leaf, NEW | RW);
        scope.spawn(|| {
            unit.invalidate(CacheTag(1), &[page(IOVA, true)]);
            done.store(true, Ordering::SeqCst);
        });
        for _ in 0..2000 {
            thread::yield_now();
            assert!(!done.load(Ordering::SeqCst), "the invalidation did not wait");
        }
        slice.copy_from(&[1u8; 8]);
        assert!(!done.load(Ordering::SeqCst), "the invalidation did not wait");
    });
    assert_eq!(machine.peek(OLD), u64::from_le_bytes([1; 8]));
    section(&memory, &mut port).write_obj(2u64, GuestAddress(IOVA)).unwrap();
    assert_eq!((machine.peek(OLD), machine.peek(NEW)), (u64::from_le_bytes([1; 8]), 2));
}

#[test]
fn nothing_reaches_a_page_that_was_taken_away() {
    let (machine, leaf) = machine();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            let (memory, mut port) = (machine.memory(), machine.port());
            let stop = &stop;
            scope.spawn(move || {
                let mut value = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let section = section(&memory, &mut port);
                    // The later ones use what the section keeps of the first.
                    for word in 0..8 {
                        value += 1;
                        section.write_obj(value, GuestAddress(IOVA + word * 8)).unwrap();
                    }
                }
            });
        }
        const MARK: u64 = u64::MAX;
        let mut pages = [OLD, NEW];
        for _ in 0..2000 {
            let [taken, given] = pages;
            machine.remap(leaf, given);
            (0..8).for_each(|word| machine.poke(taken + word * 8, MARK));
            for _ in 0..50 {
                for word in 0..8 {
                    if machine.peek(taken + word * 8) != MARK {
                        stop.store(true, Ordering::Relaxed);
                        panic!("a write by the old translation after its invalidation");
                    }
                }
            }
            pages = [given, taken];
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_fault_is_reported_at_the_end_of_the_section() {
    let (machine, _) = machine();
    let sink = machine.sink();
    let (memory, mut port) = (machine.memory(), machine.port());
    let section = section(&memory, &mut port);
    section.write_obj(1u64, GuestAddress(IOVA)).unwrap();
    section.write_obj(1u64, GuestAddress(IOVA + 0x1000)).unwrap_err();
    section.read_obj::<u64>(GuestAddress(0xfee0_0000)).unwrap_err();
    assert_eq!(sink.take(), []);
    drop(section);
    let faults = sink.take();
    assert_eq!(faults.len(), 1);
    assert_eq!((faults[0].address, faults[0].write), (IOVA + 0x1000, true));
    assert_eq!(machine.unit.counters().faults, 1);
}

#[test]
fn rights_are_looked_up_for_each_direction() {
    let (machine, leaf) = machine();
    machine.poke(leaf, machine.peek(leaf) & !2);
    let (memory, mut port) = (machine.memory(), machine.port());
    let section = section(&memory, &mut port);
    section.read_obj::<u64>(GuestAddress(IOVA)).unwrap();
    section.write_obj(1u64, GuestAddress(IOVA)).unwrap_err();
    section.read_obj::<u64>(GuestAddress(IOVA)).unwrap();
}

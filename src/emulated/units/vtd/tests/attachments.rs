// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Attaching, detaching, stage 2 only, fault delivery, interrupt addresses, transfers; several
//! accesses in one critical section, as `vm_memory` does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestMemoryMmap, IommuMemory, Permissions};

use super::*;
use crate::{DmaAccess, PortIommu};

const NOT_PRESENT: (FaultReason, bool) = (FaultReason::PasidEntryNotPresent, false);
const STAGE2: (FaultReason, bool) = (FaultReason::SecondStageDenied, true);

const IOVA: u64 = 0x0000_1234_4020_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);

#[test]
fn who_is_not_attached_is_blocked_and_reported() {
    let machine = Machine::new(VtdUnitConfig { pasid_bits: 10, ..VtdUnitConfig::default() });
    let sink = machine.sink();
    let mut port = machine.port();
    assert_eq!(machine.read_u64(&mut port, PLAIN, HIGH), Err(NOT_PRESENT));
    assert_eq!(machine.write_u64(&mut port, supervisor(1), HIGH + 5, 0), Err(NOT_PRESENT));
    let beyond = (FaultReason::PasidBeyondDirectory, false);
    assert_eq!(machine.read_u64(&mut port, pasid(1 << 10), HIGH), Err(beyond));
    let fault = HostFault {
        dev: DEVICE,
        pasid: None,
        address: HIGH,
        write: false,
        execute: false,
        privileged: false,
        reason: 0x59,
        stage2: false,
    };
    let second =
        HostFault { pasid: Some(1), address: HIGH + 5, write: true, privileged: true, ..fault };
    let third = HostFault { pasid: Some(1 << 10), reason: 0x46, ..fault };
    assert_eq!(sink.take(), [fault, second, third]);
    machine.unit.set_fault_sink(RID, None);
    assert_eq!(machine.read_u64(&mut port, PLAIN, HIGH), Err(NOT_PRESENT));
    assert_eq!(sink.take(), []);
    assert_eq!(machine.unit.counters().faults, 4);
}

#[test]
fn a_unit_without_pasids_says_so() {
    let machine = Machine::new(VtdUnitConfig { pasid_bits: 0, ..VtdUnitConfig::default() });
    let outcome = machine.read_u64(&mut machine.port(), pasid(0), HIGH);
    assert_eq!(outcome, Err((FaultReason::PasidDisabled, false)));
}

#[test]
fn without_user_tables_the_iova_is_the_gpa() {
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    machine.install(None, 1, None);
    machine.poke(LOW + 0x3ff8, 11);
    machine.poke(HIGH, 22);
    for _ in 0..2 {
        assert_eq!(machine.read_u64(&mut port, PLAIN, LOW + 0x3ff8), Ok(11));
        assert_eq!(machine.read_u64(&mut port, PLAIN, HIGH), Ok(22));
        assert_eq!(machine.read_u64(&mut port, PLAIN, NOWHERE), Err(STAGE2));
        assert_eq!(machine.read_u64(&mut port, PLAIN, READ_ONLY), Ok(0));
        assert_eq!(machine.write_u64(&mut port, PLAIN, READ_ONLY, 1), Err(STAGE2));
        // Stage 2 ignores privilege and never allows execution.
        machine.install(Some(1), 2, None);
        assert_eq!(machine.read_u64(&mut port, supervisor(1), HIGH), Ok(22));
        let execute = DmaAttributes { execute: true, ..pasid(1) };
        let refused = Err((FaultReason::ExecuteDisabled, false));
        assert_eq!(machine.read_u64(&mut port, execute, HIGH), refused);
        let beyond = Err((FaultReason::AddressBeyondGuest, true));
        assert_eq!(machine.read_u64(&mut port, PLAIN, 1 << 48), beyond);
    }
    machine.unit.remove(RID, None);
    assert_eq!(machine.read_u64(&mut port, PLAIN, HIGH), Err(NOT_PRESENT));
    assert_eq!(machine.read_u64(&mut port, pasid(1), HIGH), Ok(22));
}

#[test]
fn a_transfer_goes_page_by_page_up_to_the_fault() {
    let machine = Machine::new(VtdUnitConfig::default());
    let sink = machine.sink();
    let mut port = machine.port();
    machine.install(None, 1, None);
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    port.write(PLAIN, LOW + 0x123, &data).unwrap();
    let mut back = vec![0; data.len()];
    port.read(PLAIN, LOW + 0x123, &mut back).unwrap();
    assert_eq!(back, data);

    let end = LOW + HALF;
    let error = port.write(PLAIN, end - 0x800, &data[..0x1000]).unwrap_err();
    let (reason, stage2) = (DmaFaultReason::Vtd(STAGE2.0), STAGE2.1);
    assert_eq!(error, DmaError::Fault { address: end, reason, stage2 });
    assert_eq!(sink.take().iter().map(|fault| fault.address).collect::<Vec<_>>(), [end]);
    port.read(PLAIN, end - 0x800, &mut back[..0x800]).unwrap();
    assert_eq!(back[..0x800], data[..0x800]);
    port.read(PLAIN, NOWHERE, &mut []).unwrap();
}

#[test]
fn a_transfer_may_reach_the_end_of_the_address_space_but_not_pass_it() {
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    let root = machine.table();
    machine.map(root, 4, !0xfff, 1, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    port.write(PLAIN, u64::MAX - 0xfff, &[7; 0x1000]).unwrap();
    let error = port.write(PLAIN, u64::MAX, &[7; 2]).unwrap_err();
    assert_eq!(error, DmaError::PastEnd { address: u64::MAX, length: 2 });
    port.write(PLAIN, u64::MAX, &[9]).unwrap();
    assert_eq!(machine.peek(HIGH + 0xff8), 0x0907_0707_0707_0707);
}

#[test]
fn interrupt_addresses_are_no_memory_without_pasid() {
    let machine = Machine::new(VtdUnitConfig::default());
    let sink = machine.sink();
    let mut port = machine.port();
    let root = machine.table();
    machine.map(root, 4, 0xfee0_0000, 1, HIGH, RW);
    machine.attach(None, 1, root, 4, 0);
    machine.attach(Some(3), 1, root, 4, 0);
    let error = port.write(PLAIN, 0xfee0_0000, &[0; 4]).unwrap_err();
    assert_eq!(error, DmaError::Interrupt { address: 0xfee0_0000 });
    let error = port.read(PLAIN, 0xfeef_ffff, &mut [0]).unwrap_err();
    assert_eq!(error, DmaError::Interrupt { address: 0xfeef_ffff });
    assert_eq!(sink.take(), []);
    // With PASID these are ordinary addresses.
    machine.poke(HIGH, 5);
    assert_eq!(machine.read_u64(&mut port, pasid(3), 0xfee0_0000), Ok(5));
    let absent = Err((FaultReason::FirstStageNotPresent, false));
    assert_eq!(machine.read_u64(&mut port, pasid(3), 0xfee0_1000), absent);
}

#[test]
fn a_1_gib_page_ends_where_interrupt_messages_start() {
    const GPA: u64 = 0x80_0000_0000;
    const GIB: u64 = 1 << 30;
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    // Only two pages of it are ever touched.
    let region = GuestRegionMmap::<()>::from_range(GuestAddress(GPA), GIB as usize, None).unwrap();
    let memory = UserMemory::whole(Arc::new(region));
    let (last, protection) = (GPA + GIB - 1, Protection::READ_WRITE);
    machine.stage2.insert(Mapping { start: GPA, last, memory: memory.clone(), protection });
    let root = machine.table();
    machine.map(root, 4, 0xc000_0000, 3, GPA, RW);
    machine.attach(None, 1, root, 4, 0);
    machine.attach(Some(3), 1, root, 4, 0);
    let at_interrupts = || {
        let mut byte = [0];
        memory.slice().read_slice(&mut byte, 0x3ee0_0000).unwrap();
        byte[0]
    };
    let error = port.write(PLAIN, 0xfedf_f000, &[7; 0x2000]).unwrap_err();
    assert_eq!(error, DmaError::Interrupt { address: 0xfee0_0000 });
    assert_eq!(at_interrupts(), 0);
    port.write(pasid(3), 0xfedf_f000, &[8; 0x2000]).unwrap();
    assert_eq!(at_interrupts(), 8);
}

#[test]
fn translate_gives_what_is_contiguous() {
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    machine.install(None, 1, None);
    for _ in 0..2 {
        let large = port.translate(PLAIN, HIGH + 0x10, 1 << 20, DmaAccess::Read).unwrap();
        assert_eq!(large.slice().len(), 64 << 10);
        drop(large);
        let small = port.translate(PLAIN, READ_ONLY + 0x10, 1 << 20, DmaAccess::Read).unwrap();
        assert_eq!(small.slice().len(), 0xff0);
    }
}

#[test]
fn memory_is_let_go_with_its_last_user() {
    let machine = Machine::new(VtdUnitConfig::default());
    let mut port = machine.port();
    let mapping = machine.region.get_mmap();
    let before = Arc::strong_count(&mapping);
    machine.install(None, 1, None);
    machine.install(Some(1), 2, None);
    machine.read_u64(&mut port, PLAIN, HIGH).unwrap();
    machine.read_u64(&mut port, pasid(1), HIGH).unwrap();
    assert_eq!(Arc::strong_count(&mapping), before + 1);
    machine.unit.remove(RID, None);
    machine.read_u64(&mut port, pasid(1), HIGH).unwrap();
    assert_eq!(Arc::strong_count(&mapping), before + 1);
    machine.unit.stage2_changed(&machine.stage2);
    assert_eq!(Arc::strong_count(&mapping), before);
    machine.read_u64(&mut port, pasid(1), HIGH).unwrap();
    machine.unit.remove(RID, Some(1));
    assert_eq!(Arc::strong_count(&mapping), before);
}

#[test]
fn changes_of_one_attachment_leave_the_caches_alone() {
    const PASIDS: u32 = 1024;
    let machine = Machine::new(VtdUnitConfig::default());
    let scans = || machine.unit.counters().invalidations;
    // One HWPT for each PASID, and then all of them on one.
    for tag in [|pasid: u32| pasid, |_| 5000] {
        let before = scans();
        for requester in 1..=PASIDS {
            machine.install(Some(requester), tag(requester), None);
        }
        assert_eq!(scans(), before);
        for requester in 1..=PASIDS {
            machine.install(Some(requester), PASIDS + tag(requester), None);
        }
        for requester in 1..=PASIDS {
            machine.unit.remove(RID, Some(requester));
        }
        let count = scans() - before;
        assert!((1..PASIDS as u64 / 16).contains(&count), "{count} scans");
    }
}

/// A sink that reacts to a fault as a host may: by invalidating at once.
struct Invalidating(Arc<VtdUnit>);

impl FaultSink for Invalidating {
    fn dma_fault(&self, _fault: &HostFault) {
        self.0.invalidate(CacheTag(1), &[ALL]);
        self.0.remove(RID, Some(1));
    }
}

#[test]
fn a_sink_is_called_outside_of_the_critical_section() {
    let machine = Machine::new(VtdUnitConfig::default());
    let sink: Arc<dyn FaultSink> = Arc::new(Invalidating(Arc::clone(&machine.unit)));
    machine.unit.set_fault_sink(RID, Some((DEVICE, Arc::downgrade(&sink))));
    machine.install(Some(1), 1, None);
    let mut port = machine.port();
    assert_eq!(machine.read_u64(&mut port, PLAIN, HIGH), Err(NOT_PRESENT));
    assert_eq!(machine.read_u64(&mut port, pasid(1), HIGH), Err(NOT_PRESENT));
}

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
    memory: &GuestMemoryMmap<AtomicBitmap>,
    port: &'a mut DmaPort,
) -> IommuMemory<GuestMemoryMmap<AtomicBitmap>, PortIommu<'a>> {
    IommuMemory::new(memory.clone(), port.section(PLAIN), true, AtomicBitmap::default())
}

impl Machine {
    fn memory(&self) -> GuestMemoryMmap<AtomicBitmap> {
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

#[test]
fn dma_marks_the_pages_it_writes_and_the_tables_whose_flags_it_sets() {
    let (machine, _) = machine();
    machine.attach(Some(2), 2, machine.table(), 4, 0);
    let root = machine.table();
    let pages = [OLD, OLD + 0x1000, OLD + 0x2000];
    for (iova, page) in (IOVA..).step_by(0x1000).zip(pages) {
        machine.map(root, 4, iova, 1, page, RW & !(FirstStageEntry::A | FirstStageEntry::D));
    }
    machine.attach(None, 1, root, 4, 0);
    let tables = [4, 3, 2, 1].map(|level| machine.entry(root, 4, IOVA, level, TABLE));
    tables
        .iter()
        .for_each(|table| machine.poke(*table, machine.peek(*table) & !FirstStageEntry::A));
    let all = [&pages[..], &tables].concat();
    let mut port = machine.port();

    // Accessed flags of all levels, and then nothing to set.
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(0));
    assert_eq!(machine.marked(&all), tables);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(0));
    assert_eq!(machine.marked(&all), [0; 0]);
    // The dirty flag of the page.
    machine.write_u64(&mut port, PLAIN, IOVA, 1).unwrap();
    assert_eq!(machine.marked(&all), [pages[0], tables[3]]);
    machine.write_u64(&mut port, PLAIN, IOVA, 1).unwrap();
    assert_eq!(machine.marked(&all), [pages[0]]);
    // Across two pages, and refused without a byte written.
    port.write(PLAIN, IOVA + 0x1ff8, &[1; 16]).unwrap();
    assert_eq!(machine.marked(&all), [pages[1], pages[2], tables[3]]);
    port.write(pasid(2), IOVA, &[1]).unwrap_err();
    assert_eq!(machine.marked(&all), [0; 0]);

    port.write_message(PLAIN, IOVA + 0x1000, 7, |_| panic!("memory")).unwrap();
    assert_eq!(machine.marked(&all), [pages[1]]);
    let piece = port.translate(PLAIN, IOVA, 0x1000, DmaAccess::Write).unwrap();
    assert_eq!(machine.marked(&all), [0; 0]);
    piece.slice().write_obj(5u32, 0xffc).unwrap();
    drop(piece);
    assert_eq!(machine.marked(&all), [pages[0]]);
    let piece = port.translate(PLAIN, IOVA, 0x1000, DmaAccess::Read).unwrap();
    assert_eq!(piece.slice().read_obj::<u32>(0xffc).unwrap(), 5);
    drop(piece);
    assert_eq!(machine.marked(&all), [0; 0]);

    // As vm_memory's device: when the section ends.
    let memory = machine.memory();
    let section = section(&memory, &mut port);
    section.read_slice(&mut [0; 0x3000], GuestAddress(IOVA)).unwrap();
    section.write_obj(9u32, GuestAddress(IOVA + 0x1000)).unwrap();
    section.store(9u32, GuestAddress(IOVA + 0x2000), Ordering::Relaxed).unwrap();
    section.write_obj(9u64, GuestAddress(IOVA + 0xffc)).unwrap();
    assert_eq!(machine.marked(&all), [0; 0]);
    drop(section);
    assert_eq!(machine.marked(&all), pages);
}

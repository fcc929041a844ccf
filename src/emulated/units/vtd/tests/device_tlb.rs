// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A device uses the translations that it has asked for until it is told to forget them.

use super::*;
use crate::host::refusal::Outcome as HostOutcome;
use crate::units::page_requests::{PageRequestSink, Waits};
use crate::DmaServices;
use proptest::prelude::*;
use std::collections::BTreeSet;
use twostage::iommufd::PageRequest;

const IOVA: u64 = 0x0000_1234_4020_0000;
const OLD: u64 = HIGH;
const NEW: u64 = HIGH + (4 << 20);
/// Another device, without ATS, that is attached to the same tables.
const OTHER: u16 = RID + 1;

/// A machine with two devices, of which the first has a TLB, and a small IOTLB. IOVA leads to OLD
/// by a page of `level`; the leaf's GPA.
fn machine(level: u8, sanitize: bool) -> (Machine, u64) {
    let config = VtdUnitConfig::default().with_device_tlb(true).with_sanitize(sanitize);
    let machine = Machine::new(config.with_iotlb_entries(8));
    machine.poke(OLD, 1);
    machine.poke(NEW, 2);
    let root = machine.table();
    let leaf = machine.map(root, 4, IOVA, level, OLD, RW);
    // Pages that fill the IOTLB.
    (1..64).for_each(|page| _ = machine.map(root, 4, IOVA + (page << 30), 1, OLD, RW));
    for pasid in [None, Some(1), Some(2)] {
        machine.attach(pasid, 1, root, 4, 0);
    }
    let stage2 = Arc::clone(&machine.stage2);
    let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: root, addr_width: 48, ..Default::default() };
    let tables = Some(UserTables::FirstStage(tables));
    machine.unit.install(
        OTHER,
        None,
        Translation { tag: CacheTag(1), tables, stage2, dirty: None },
    );
    machine.port().control().set_device_tlb(true);
    (machine, leaf)
}

/// Leads IOVA elsewhere, without an invalidation; what was cached in the IOTLB is evicted.
fn change(machine: &Machine, leaf: u64) {
    machine.poke(leaf, machine.peek(leaf) - OLD + NEW);
    let mut other = machine.unit.port(OTHER);
    for page in 1..64 {
        machine.read_u64(&mut other, PLAIN, IOVA + (page << 30)).unwrap();
    }
    assert_eq!(machine.read_u64(&mut other, PLAIN, IOVA), Ok(2), "not in the IOTLB");
}

#[test]
fn a_translation_is_used_until_the_device_is_told() {
    type Tell = fn(&Machine);
    let ways: [Tell; 6] = [
        |machine| machine.invalidate(1, page(IOVA, true)),
        |machine| machine.invalidate(1, ALL),
        |machine| machine.invalidate_second_stage(1, page(0x5000, true)),
        |machine| assert!(machine.unit.invalidate_device_tlb(RID, None, page(IOVA, true))),
        |machine| assert!(machine.unit.invalidate_device_tlb(RID, None, ALL)),
        |machine| {
            let device = machine.port().control();
            device.set_device_tlb(false);
            device.set_device_tlb(true);
        },
    ];
    for (number, tell) in ways.into_iter().enumerate() {
        let (machine, leaf) = machine(1, false);
        let mut port = machine.port();
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        change(&machine, leaf);
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1), "it has it");
        machine.invalidate(1, page(IOVA + 0x1000, true));
        machine.invalidate(2, ALL);
        machine.unit.invalidate_device_tlb(OTHER, None, ALL);
        machine.unit.invalidate_device_tlb(RID, Some(1), ALL);
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1), "that was not it");
        assert_eq!(machine.unit.counters().device_tlb_hits, 2);
        tell(&machine);
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2), "way {number}");
    }
}

#[test]
fn pasids_are_separate_and_a_large_page_is_one_entry() {
    let (machine, leaf) = machine(2, false);
    let mut port = machine.port();
    let mut read = |of: Option<u32>, offset: u64| {
        let attributes = of.map_or(PLAIN, pasid);
        machine.read_u64(&mut port, attributes, IOVA + offset).unwrap()
    };
    let all = [None, Some(1), Some(2)];
    all.iter().for_each(|of| assert_eq!(read(*of, 0), 1));
    let misses = machine.unit.counters().device_tlb_misses;
    all.iter().for_each(|of| _ = read(*of, 0x1f_f000));
    assert_eq!(machine.unit.counters().device_tlb_misses, misses);
    machine.poke(leaf, machine.peek(leaf) - OLD + NEW);
    let tell = |pasid| machine.unit.invalidate_device_tlb(RID, pasid, page(IOVA + 0x3000, true));
    // The IOTLB has the old ones, too, until others take their places.
    let mut other = machine.unit.port(OTHER);
    for page in 1..64 {
        machine.read_u64(&mut other, PLAIN, IOVA + (page << 30)).unwrap();
    }
    tell(Some(1));
    assert_eq!(all.map(|of| read(of, 0)), [1, 2, 1]);
    // Without a PASID it concerns those with one, too.
    tell(None);
    assert_eq!(all.map(|of| read(of, 0)), [2, 2, 2]);
}

#[test]
fn a_page_that_is_not_present_is_no_fault_for_a_device_that_asks() {
    let (machine, leaf) = machine(1, false);
    let (sink, mut port) = (machine.sink(), machine.port());
    machine.poke(leaf, 0);
    let absent = Err((FaultReason::FirstStageNotPresent, false));
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), absent);
    assert_eq!(sink.take().len(), 0);
    // What software cannot mend is one; and so is everything without ATS.
    machine.poke(leaf, OLD | RW | 1 << 51);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap_err();
    assert_eq!(sink.take().len(), 1);
    machine.poke(leaf, 0);
    port.control().set_device_tlb(false);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), absent);
    assert_eq!(sink.take().len(), 1);
}

#[test]
fn the_sanitizer_sets_no_flags_for_what_a_device_has() {
    let (machine, leaf) = machine(1, true);
    let mut port = machine.port();
    assert_eq!(machine.write_u64(&mut port, PLAIN, IOVA, 5), Ok(5));
    let flags = FirstStageEntry::A | FirstStageEntry::D;
    assert_eq!(machine.peek(leaf) & flags, flags);
    // Software clears them, without an invalidation yet; the IOTLB forgets the page.
    machine.poke(leaf, machine.peek(leaf) & !flags);
    let mut other = machine.unit.port(OTHER);
    for page in 1..64 {
        machine.read_u64(&mut other, PLAIN, IOVA + (page << 30)).unwrap();
    }
    let hits = machine.unit.counters().device_tlb_hits;
    assert_eq!(machine.write_u64(&mut port, PLAIN, IOVA, 6), Ok(6));
    assert_eq!(machine.unit.counters().device_tlb_hits, hits + 1);
    assert_eq!(machine.peek(leaf) & flags, 0, "the device asked for nothing");
    assert_eq!(machine.unit.sanitizer_report().unwrap().stale, []);
}

#[test]
fn the_host_takes_memory_back_from_devices_too() {
    let (machine, _) = machine(1, false);
    let mut port = machine.port();
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    machine.stage2.remove(HIGH).unwrap();
    machine.unit.stage2_changed(&machine.stage2);
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap_err();
}

#[test]
fn a_silent_device_forgets_and_does_not_say_so() {
    let (machine, leaf) = machine(1, false);
    let mut port = machine.port();
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    change(&machine, leaf);
    port.control().set_silent(true);
    assert!(!machine.unit.invalidate_device_tlb(RID, None, ALL));
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(2));
    port.control().set_silent(false);
    assert!(machine.unit.invalidate_device_tlb(RID, None, ALL));
}

#[test]
fn the_sanitizer_names_the_invalidation_that_a_device_missed() {
    let (machine, leaf) = machine(1, true);
    let mut port = machine.port();
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    machine.read_u64(&mut port, PLAIN, IOVA).unwrap();
    assert_eq!(machine.unit.sanitizer_report().unwrap().stale, []);
    change(&machine, leaf);
    assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
    let report = machine.unit.sanitizer_report().unwrap();
    let [stale] = report.stale[..] else { panic!("{report}") };
    assert_eq!((stale.invalidation, stale.invalidated_since), (TlbInvalidation::DeviceTlb, false));
    assert!(report.to_string().contains("needed: device-TLB invalidation"), "{report}");
    machine.unit.invalidate_device_tlb(RID, None, page(IOVA, true));
    assert!(machine.unit.sanitizer_report().unwrap().stale[0].invalidated_since);
}

/// What happens to pages of the guest's tables, by number.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// One leads nowhere, or to one of two places.
    Lead(u64, Option<bool>),
    /// So many from one on are invalidated in the unit.
    Invalidate(u64, u64),
    /// The device alone is told.
    Tell(u64, u64, Option<u32>),
    /// The device reads with a PASID, or without.
    Read(u64, Option<u32>),
}

fn step() -> impl Strategy<Value = Step> {
    let (page, pages, of) = (0u64..4, 1u64..4, prop_oneof![Just(None), Just(Some(1))]);
    prop_oneof![
        2 => (page.clone(), any::<Option<bool>>()).prop_map(|(at, to)| Step::Lead(at, to)),
        1 => (page.clone(), pages.clone()).prop_map(|(at, pages)| Step::Invalidate(at, pages)),
        1 => (page.clone(), pages, of.clone()).prop_map(|(at, n, of)| Step::Tell(at, n, of)),
        4 => (page, of).prop_map(|(at, of)| Step::Read(at, of)),
    ]
}

proptest! {
    /// A device never uses what was replaced before the last invalidation, and of what was since,
    /// nothing that never was.
    #[test]
    fn nothing_is_used_after_its_invalidation(steps in prop::collection::vec(step(), 1..80)) {
        let (machine, first) = machine(1, false);
        let mut port = machine.port();
        let mut now = [Some(1); 4];
        (1..4).for_each(|page| machine.poke(first + page * 8, OLD | RW));
        let mut since = [1; 4].map(|word| BTreeSet::from([Some(word)]));
        let range = |at: u64, pages| {
            CacheRange::Pages(PageRange::new(IOVA + at * 0x1000, pages, true))
        };
        for step in steps {
            match step {
                Step::Lead(at, to) => {
                    let place = to.map(|new| if new { (NEW, 2) } else { (OLD, 1) });
                    machine.poke(first + at * 8, place.map_or(0, |(page, _)| page | RW));
                    now[at as usize] = place.map(|(_, word)| word);
                    since[at as usize].insert(now[at as usize]);
                }
                Step::Invalidate(at, pages) => {
                    machine.invalidate(1, range(at, pages));
                    for page in at..(at + pages).min(4) {
                        since[page as usize] = BTreeSet::from([now[page as usize]]);
                    }
                }
                Step::Tell(at, pages, of) => {
                    machine.unit.invalidate_device_tlb(RID, of, range(at, pages));
                }
                Step::Read(at, of) => {
                    let attributes = of.map_or(PLAIN, pasid);
                    let read = machine.read_u64(&mut port, attributes, IOVA + at * 0x1000).ok();
                    prop_assert!(since[at as usize].contains(&read), "{read:?} of {since:?}");
                }
            }
        }
    }
}

/// Software that takes page requests.
#[derive(Debug)]
struct Software;

impl PageRequestSink for Software {
    fn page_request(&self, _: PageRequest) -> HostOutcome<()> {
        Ok(())
    }
}

#[test]
fn a_page_request_forgets_the_way_to_the_page() {
    for device_tlb in [false, true] {
        let config = VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true);
        let machine = Machine::new(config);
        let root = machine.table();
        machine.map(root, 4, IOVA, 1, OLD, RW);
        let entry = machine.entry(root, 4, IOVA, 2, TABLE);
        let value = machine.peek(entry);
        // The table is read-only, and cached as such; its leaf is not.
        machine.poke(entry, value & !2);
        machine.attach(None, 1, root, 4, 0);
        machine.unit.page_requests().unwrap().set_sink(
            RID,
            Waits::ForPages,
            Some(Arc::new(Software)),
        );
        let mut port = machine.port();
        port.set_services(DmaServices { wait_for_pages: false, ..DmaServices::default() });
        port.control().set_device_tlb(device_tlb);
        machine.poke(OLD, 1);
        assert_eq!(machine.read_u64(&mut port, PLAIN, IOVA), Ok(1));
        let asks = Err(DmaError::PageRequested { address: IOVA, group: 0 });
        assert_eq!(port.write(PLAIN, IOVA, &5u64.to_le_bytes()), asks);
        machine.poke(entry, value);
        assert_eq!(port.write(PLAIN, IOVA, &5u64.to_le_bytes()), Ok(()));
        assert_eq!(machine.peek(OLD), 5);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A first stage over a second stage, both of them the user's, over stage 2.

use std::cell::Cell;
use std::collections::BTreeSet;

use super::*;
use crate::units::stage2::DirtyLog;
use twostage::iommufd::VTD_S1_SRE;

pub const IOVA: u64 = 0x0000_1234_4020_0000;
/// What the first stage translates [`IOVA`] to, by default.
pub const PAGE: u64 = 0x30_4000_0000;
/// GPAs of first-stage tables, which are the lower bits of their second-stage addresses.
pub const LOWER: u64 = 0x3fff_ffff;
/// Bits of present second-stage entries.
pub const RW_SECOND: u64 = 3;
/// Accessed and dirty.
const A: u64 = 0x100;
const D: u64 = 0x200;

/// A machine with tables of both stages.
#[derive(Debug)]
pub struct Guest {
    pub machine: Machine,
    /// Number of first-stage tables.
    tables: Cell<u64>,
    pub first: FirstStage,
    pub second: SecondStage,
}

impl Deref for Guest {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Guest {
    /// With empty tables of so many levels, attached as HWPT 1 without PASID.
    pub fn new(config: VtdUnitConfig, levels: (u8, u8), accessed_dirty: bool) -> Self {
        let machine = Machine::new(VtdUnitConfig {
            address_width: AddressWidth::Bits57,
            supervisor_requests: true,
            extended_accessed: true,
            ..config
        });
        let second = SecondStage { root: machine.table(), levels: levels.1, accessed_dirty };
        let first = FirstStage { root: 0, levels: levels.0, flags: 0 };
        let mut guest = Self { machine, tables: Cell::new(0), first, second };
        guest.first.root = guest.first_table();
        guest.attach(None, 1);
        guest
    }

    /// With [`IOVA`] mapped to [`PAGE`], and that to [`HIGH`], by pages of 4 KiB.
    pub fn small() -> Self {
        Self::with(VtdUnitConfig::default(), false)
    }

    pub fn with(config: VtdUnitConfig, accessed_dirty: bool) -> Self {
        let guest = Self::new(config, (4, 4), accessed_dirty);
        guest.map_second(PAGE, 1, HIGH);
        guest.map_first(IOVA, 1, PAGE, RW);
        guest
    }

    pub fn attach(&self, pasid: Option<u32>, tag: u32) {
        self.attach_nested(pasid, tag, self.first, self.second);
    }

    /// GPA of the second-stage entry of `level` for `address`.
    pub fn second_entry(&self, address: u64, level: u8) -> u64 {
        self.entry(self.second.root, self.second.levels, address, level, RW_SECOND)
    }

    /// Maps the second stage's page of `level` at `address` to `gpa`; returns the leaf's GPA.
    pub fn map_second(&self, address: u64, level: u8, gpa: u64) -> u64 {
        let entry = self.second_entry(address, level);
        let large = if level > 1 { 0x80 } else { 0 };
        self.poke(entry, gpa & !(page_size(level) - 1) | RW_SECOND | large);
        entry
    }

    /// Second-stage address of a new, empty first-stage table, mapped by tables of its own.
    pub fn first_table(&self) -> u64 {
        let (gpa, number) = (self.table(), self.tables.get() + 1);
        self.tables.set(number);
        let address = number << if self.second.levels == 3 { 30 } else { 39 } | gpa;
        self.map_second(address, 1, gpa);
        address
    }

    /// Second-stage address of the first-stage entry of `level` for `iova`.
    pub fn first_entry_address(&self, iova: u64, level: u8) -> u64 {
        let mut table = self.first.root;
        for above in (level + 1..=self.first.levels).rev() {
            let entry = (table & LOWER) + index(iova, above) * 8;
            if self.peek(entry) == 0 {
                self.poke(entry, self.first_table() | TABLE);
            }
            table = FirstStageEntry::from_bits(self.peek(entry)).frame() << 12;
        }
        table + index(iova, level) * 8
    }

    /// GPA of that entry.
    pub fn first_entry(&self, iova: u64, level: u8) -> u64 {
        self.first_entry_address(iova, level) & LOWER
    }

    /// Maps the first stage's page of `level` at `iova`; returns the leaf's GPA.
    pub fn map_first(&self, iova: u64, level: u8, address: u64, bits: u64) -> u64 {
        let entry = self.first_entry(iova, level);
        let large = if level > 1 { 0x80 } else { 0 };
        self.poke(entry, address & !(page_size(level) - 1) | bits | large);
        entry
    }

    pub fn read(&self, port: &mut DmaPort, iova: u64) -> Outcome {
        self.read_u64(port, PLAIN, iova)
    }

    pub fn write(&self, port: &mut DmaPort, iova: u64) -> Outcome {
        self.write_u64(port, PLAIN, iova, 0)
    }
}

pub fn own(reason: FaultReason) -> Outcome {
    Err((reason, false))
}

pub fn host(reason: FaultReason) -> Outcome {
    Err((reason, true))
}

#[test]
fn pages_of_every_size_in_both_stages_through_tables_of_every_depth() {
    for levels in [(4, 3), (4, 5), (5, 3), (5, 4), (5, 5)] {
        for sizes in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)] {
            let guest = Guest::new(VtdUnitConfig::default(), levels, false);
            let mut port = guest.port();
            // One page of each that is common to all sizes.
            let (iova, offset) = (0xffff_ff80_4000_0000, 0x20_5000);
            guest.map_first(iova + offset, sizes.0, PAGE + offset, RW);
            guest.map_second(PAGE + offset, sizes.1, HIGH + offset);
            for (number, at) in [offset, offset + 0xff8].into_iter().enumerate() {
                guest.poke(HIGH + at, number as u64 + 1);
            }
            let context = format!("levels {levels:?}, pages {sizes:?}");
            for hits in 0..2 {
                assert_eq!(guest.read(&mut port, iova + offset), Ok(1), "{context}");
                assert_eq!(guest.read(&mut port, iova + offset + 0xff8), Ok(2), "{context}");
                assert_eq!(guest.unit.counters().iotlb_hits, 1 + 2 * hits, "{context}");
            }
            // As far as the smallest of the three goes, of which the host's is 2 MiB.
            let size = page_size(sizes.0.min(sizes.1)).min(2 << 20);
            let start = (iova + offset) & !(size - 1);
            let last = start + size - 8;
            guest.read(&mut port, start).unwrap();
            let misses = guest.unit.counters().iotlb_misses;
            guest.read(&mut port, last).unwrap();
            assert_eq!(guest.unit.counters().iotlb_misses, misses, "{context}");
            // What follows is another page, or none.
            let _ = guest.read(&mut port, last + 8);
            assert_eq!(guest.unit.counters().iotlb_misses, misses + 1, "{context}");
        }
    }
}

#[test]
fn a_fault_of_the_first_stage_is_its_own() {
    let guest = Guest::small();
    let mut port = guest.port();
    let entry = guest.first_entry(IOVA, 2);
    let good = guest.peek(entry);
    for (word, reason) in [
        (good & !1, FaultReason::FirstStageNotPresent),
        (good | 0x80 | 0x2000, FaultReason::FirstStageReserved),
        (good & !4, FaultReason::UserDenied),
    ] {
        guest.poke(entry, word);
        guest.invalidate(1, ALL);
        assert_eq!(guest.read(&mut port, IOVA), own(reason));
    }
    guest.poke(entry, good & !2);
    guest.invalidate(1, ALL);
    assert_eq!(guest.write(&mut port, IOVA), own(FaultReason::WriteDenied));
    assert_eq!(guest.read(&mut port, 1 << 50), own(FaultReason::NotCanonical));
    let supervisor = DmaAttributes { privileged: true, ..pasid(3) };
    guest.attach(Some(3), 1);
    let disabled = own(FaultReason::SupervisorDisabled);
    assert_eq!(guest.read_u64(&mut port, supervisor, IOVA), disabled);
    let first = FirstStage { flags: VTD_S1_SRE, ..guest.first };
    guest.attach_nested(Some(4), 2, first, guest.second);
    // The second stage ignores privilege.
    let supervisor = DmaAttributes { privileged: true, ..pasid(4) };
    assert_eq!(guest.read_u64(&mut port, supervisor, IOVA), Ok(0));
}

#[test]
fn first_stage_tables_go_through_the_second_stage() {
    for level in 1..=4 {
        let guest = Guest::small();
        let mut port = guest.port();
        let table = guest.first_entry_address(IOVA, level);
        let (denied, access) = match level {
            4 => (FaultReason::FirstStageTopSecondStageDenied, FaultReason::SecondStageAccess),
            _ => (FaultReason::FirstStageSecondStageDenied, FaultReason::SecondStageAccess),
        };
        // Each level of the second stage on the way to that table.
        for below in 1..=4 {
            let entry = guest.second_entry(table, below);
            let good = guest.peek(entry);
            let mut check = |word: u64, outcome: Outcome| {
                guest.poke(entry, word);
                guest.invalidate_second_stage(1, ALL);
                let context = format!("level {level}, second-stage level {below}, {word:#x}");
                for _ in 0..2 {
                    assert_eq!(guest.read(&mut port, IOVA), outcome, "{context}");
                }
            };
            check(0, own(denied));
            // Writes alone are not enough for a table.
            check(good & !1, own(denied));
            // Nor is reading for its flags, which are all set here.
            check(good & !2, Ok(0));
            check(good | 1 << 62, own(FaultReason::SecondStageReserved));
            // No memory, or beyond all that the host has.
            for gpa in [NOWHERE, 1 << 48] {
                check(gpa | good & 0xfff, host(if below == 1 { denied } else { access }));
            }
            guest.poke(entry, good);
        }
    }
}

#[test]
fn the_final_page_goes_through_the_second_stage() {
    let guest = Guest::small();
    let mut port = guest.port();
    let denied = own(FaultReason::SecondStageDenied);
    let reserved = own(FaultReason::SecondStageReserved);
    for below in 1..=4 {
        let entry = guest.second_entry(PAGE, below);
        let good = guest.peek(entry);
        let mut check = |word: u64, read: Outcome, write: Outcome| {
            guest.poke(entry, word);
            guest.invalidate_second_stage(1, ALL);
            let context = format!("level {below}, {word:#x}");
            for _ in 0..2 {
                assert_eq!(guest.read(&mut port, IOVA), read, "{context}");
                assert_eq!(guest.write(&mut port, IOVA), write, "{context}");
            }
        };
        check(0, denied, denied);
        check(good | 1 << 62, reserved, reserved);
        if below == 1 {
            check(good & !1, denied, Ok(0));
            check(good & !2, Ok(0), denied);
            let nowhere = host(FaultReason::SecondStageDenied);
            check(NOWHERE | 3, nowhere, nowhere);
            check(READ_ONLY | 3, Ok(0), nowhere);
        } else {
            let access = host(FaultReason::SecondStageAccess);
            check(NOWHERE | 3, access, access);
        }
        // Flags are not this guest's: they are ignored, and not set.
        check(good | A | D, Ok(0), Ok(0));
        check(good, Ok(0), Ok(0));
        assert_eq!(guest.peek(entry), good);
    }
}

#[test]
fn top_tables_must_be_within_reach() {
    let guest = Guest::small();
    let mut port = guest.port();
    let mut outcome = |first, second| {
        guest.attach_nested(None, 2, first, second);
        guest.read(&mut port, IOVA)
    };
    let (first, second) = (guest.first, guest.second);
    // Beyond the second stage's four levels, and its page at 0 is absent.
    let beyond = FirstStage { root: 1 << 48, ..first };
    assert_eq!(outcome(beyond, second), own(FaultReason::FirstStagePointerBeyond));
    let absent = FirstStage { root: 0, ..first };
    assert_eq!(outcome(absent, second), own(FaultReason::FirstStageTopSecondStageDenied));
    let nowhere = SecondStage { root: NOWHERE, ..second };
    assert_eq!(outcome(first, nowhere), host(FaultReason::SecondStageTopAccess));
    assert_eq!(outcome(first, second), Ok(0));
    let five = VtdUnitConfig { address_width: AddressWidth::Bits48, ..VtdUnitConfig::default() };
    let machine = Machine::new(five);
    let (root, levels) = (machine.table(), 5);
    machine.attach_nested(None, 1, first, SecondStage { root, levels, accessed_dirty: false });
    let invalid = own(FaultReason::PasidEntryInvalid);
    assert_eq!(machine.read_u64(&mut machine.port(), PLAIN, IOVA), invalid);
}

#[test]
fn flags_of_the_first_stage_need_the_second_to_allow_writes() {
    let guest = Guest::small();
    let mut port = guest.port();
    let leaf = guest.first_entry(IOVA, 1);
    let below = guest.second_entry(guest.first_entry_address(IOVA, 1), 1);
    let clear = guest.peek(leaf) & !0x60;
    let (good, denied) = (guest.peek(below), FaultReason::FirstStageFlagsSecondStageDenied);
    guest.poke(leaf, clear);
    guest.poke(below, good & !2);
    assert_eq!(guest.read(&mut port, IOVA), own(denied));
    guest.poke(leaf, clear | 0x20);
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    // Once more, from the cached paging structure.
    assert_eq!(guest.write(&mut port, IOVA), own(denied));
    assert_eq!(guest.peek(leaf), clear | 0x20);
    // Allowing more takes no invalidation.
    guest.poke(below, good);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(guest.peek(leaf), clear | 0x60);
    // The second stage allows it, the host does not.
    guest.poke(below, READ_ONLY | RW_SECOND);
    guest.poke(READ_ONLY + (leaf & 0xfff), clear);
    guest.invalidate_second_stage(1, ALL);
    assert_eq!(guest.read(&mut port, IOVA), host(denied));
}

/// Second-stage entries on the way to `address`, from the top table on.
fn way(guest: &Guest, address: u64) -> [u64; 4] {
    [4, 3, 2, 1].map(|level| guest.second_entry(address, level))
}

/// Accessed and dirty flags of `entries`.
fn flags(guest: &Guest, entries: [u64; 4]) -> [u64; 4] {
    entries.map(|entry| guest.peek(entry) & (A | D))
}

#[test]
fn second_stage_flags_are_set_by_every_access_and_every_write() {
    let guest = Guest::with(VtdUnitConfig::default(), true);
    let mut port = guest.port();
    let tables = [1, 2, 3, 4].map(|level| way(&guest, guest.first_entry_address(IOVA, level)));
    let page = way(&guest, PAGE);
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    for entries in [page].iter().chain(&tables) {
        assert_eq!(flags(&guest, *entries), [A; 4], "flags of the first stage were set already");
    }
    // Cached for reading: the first write sets the flag, without an invalidation.
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(flags(&guest, page), [A, A, A, A | D]);
    tables.iter().for_each(|entries| assert_eq!(flags(&guest, *entries), [A; 4]));
    // It stays cached as dirty until it is invalidated: what dirty tracking clears, it flushes.
    guest.poke(page[3], guest.peek(page[3]) & !D);
    guest.invalidate(1, ALL);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(flags(&guest, page), [A; 4]);
    guest.invalidate_second_stage(1, super::page(PAGE, true));
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    assert_eq!(flags(&guest, page), [A; 4]);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(flags(&guest, page), [A, A, A, A | D]);
    // No write that is refused sets it.
    guest.poke(page[3], guest.peek(page[3]) & !(D | 2));
    guest.invalidate_second_stage(1, ALL);
    assert_eq!(guest.write(&mut port, IOVA), own(FaultReason::SecondStageDenied));
    assert_eq!(flags(&guest, page), [A; 4]);
}

#[test]
fn setting_a_flag_of_the_first_stage_is_a_write() {
    let guest = Guest::with(VtdUnitConfig::default(), true);
    let mut port = guest.port();
    let leaf = guest.first_entry(IOVA, 1);
    let table = way(&guest, guest.first_entry_address(IOVA, 1));
    let directory = way(&guest, guest.first_entry_address(IOVA, 2));
    guest.poke(leaf, guest.peek(leaf) & !0x60);
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    assert_eq!(guest.peek(leaf) & 0x60, 0x20);
    assert_eq!(flags(&guest, table), [A, A, A, A | D]);
    assert_eq!(flags(&guest, directory), [A; 4]);
    // The table of another page is cached when no flag was to be set in it, and then one is.
    let iova = IOVA + (1 << 21);
    guest.map_first(iova, 1, PAGE, RW);
    let leaf = guest.map_first(iova + 0x1000, 1, PAGE, RW & !0x60);
    let table = way(&guest, guest.first_entry_address(iova, 1));
    assert_eq!(guest.read(&mut port, iova), Ok(0));
    assert_eq!(flags(&guest, table), [A; 4]);
    assert_eq!(guest.write(&mut port, iova + 0x1000), Ok(0));
    assert_eq!((guest.peek(leaf) & 0x60, flags(&guest, table)), (0x60, [A, A, A, A | D]));
}

#[test]
fn flags_of_the_second_stage_need_memory_that_can_be_written() {
    let guest = Guest::with(VtdUnitConfig::default(), true);
    let mut port = guest.port();
    let (directory, leaf) = (guest.second_entry(PAGE, 2), guest.second_entry(PAGE, 1));
    let in_read_only = READ_ONLY + (leaf & 0xfff);
    guest.poke(directory, READ_ONLY | RW_SECOND);
    guest.poke(in_read_only, HIGH | RW_SECOND);
    let refused = host(FaultReason::SecondStageFlagsUpdate);
    assert_eq!(guest.read(&mut port, IOVA), refused);
    guest.poke(in_read_only, HIGH | RW_SECOND | A);
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    assert_eq!(guest.write(&mut port, IOVA), refused);
    guest.poke(in_read_only, HIGH | RW_SECOND | A | D);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
}

#[test]
fn what_the_hosts_parent_tracks_is_the_pages_that_were_written_in_guest_memory() {
    let guest = Guest::with(VtdUnitConfig::default(), true);
    let log = Arc::new(DirtyLog::new(0x1000));
    let both = HwptVtdNested {
        first: iommu_hwpt_vtd_s1 {
            pgtbl_addr: guest.first.root,
            addr_width: 48,
            ..Default::default()
        },
        second: HwptVtdSecondStage {
            pgtbl_addr: guest.second.root,
            addr_width: 48,
            accessed_dirty: true,
        },
    };
    guest.unit.install(
        RID,
        None,
        Translation {
            tag: CacheTag(1),
            tables: Some(UserTables::Nested(both)),
            stage2: Arc::clone(&guest.stage2),
            dirty: Some(Arc::clone(&log)),
        },
    );
    // What was written since the last time, and is clean now.
    let written = || {
        let runs = log.read(&(0..=u64::MAX), true);
        guest.unit.stage2_changed(&guest.stage2);
        let pages = runs.iter().flat_map(|run| (*run.start()..=*run.end()).step_by(0x1000));
        pages.collect::<BTreeSet<_>>()
    };
    let page = |entry: u64| entry & !0xfff;
    let mut port = guest.port();
    log.enable(true);
    // Every second-stage table, as none of their accessed flags was set.
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    let addresses = [1, 2, 3, 4].map(|level| guest.first_entry_address(IOVA, level));
    let tables = addresses.iter().chain(&[PAGE]).flat_map(|address| way(&guest, *address));
    assert_eq!(written(), tables.map(page).collect());
    assert_eq!(guest.read(&mut port, IOVA), Ok(0));
    assert_eq!(written(), BTreeSet::new());
    // The page, and its second-stage entry.
    let leaf = guest.second_entry(PAGE, 1);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(written(), [HIGH, page(leaf)].into());
    for _ in 0..2 {
        assert_eq!(guest.write(&mut port, IOVA), Ok(0));
        assert_eq!(written(), [HIGH].into());
    }
    // The entry of the first stage, and that of the second stage for its table.
    let leaf = guest.first_entry(IOVA, 1);
    guest.poke(leaf, guest.peek(leaf) & !0x40);
    guest.read(&mut port, IOVA).unwrap();
    assert_eq!(written(), BTreeSet::new());
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    let below = guest.second_entry(guest.first_entry_address(IOVA, 1), 1);
    assert_eq!(written(), [HIGH, page(leaf), page(below)].into());
    // While it is off, nothing is marked.
    log.enable(false);
    guest.poke(leaf, guest.peek(leaf) & !0x40);
    assert_eq!(guest.write(&mut port, IOVA), Ok(0));
    assert_eq!(written(), BTreeSet::new());
}

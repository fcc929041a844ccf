// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walk against single walks of each page.

use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::spec::vtd::pasid::PagingMode;
use crate::spec::vtd::root::AddressWidth;
use crate::viommu::vtd::{VtdFirstStage, VtdSecondStage};

/// Guest memory of 64 pages.
const PAGES: u64 = 64;

pub(crate) fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES << 12) as usize)]).unwrap()
}

pub(crate) fn first_stage(table: u64) -> Stage1 {
    Stage1::VtdFirstStage(VtdFirstStage {
        table,
        paging_mode: PagingMode::Level4,
        supervisor_requests: false,
        write_protect: false,
        extended_accessed: false,
    })
}

pub(crate) fn second_stage(table: u64, address_width: AddressWidth) -> Stage1 {
    Stage1::VtdSecondStage(VtdSecondStage { table, address_width, accessed_dirty: false })
}

fn put(memory: &GuestMemoryMmap, table: u64, number: u64, word: u64) {
    memory.write_obj(word, GuestAddress(table + number * 8)).unwrap();
}

fn word(memory: &GuestMemoryMmap, table: u64, number: u64) -> u64 {
    memory.read_obj(GuestAddress(table + number * 8)).unwrap()
}

/// All pages of 4 KiB that `range` has, by single walks.
type Naive = BTreeMap<u64, (u64, Allowed)>;

fn naive(memory: &GuestMemoryMmap, tables: &Tables, range: Range<u64>) -> Naive {
    let one = |iova: u64| {
        let (mut table, mut on_the_way) = (tables.top, Allowed::ALL);
        for level in (1..=tables.levels).rev() {
            let word = memory.load_u64(table + index(iova, level) * 8).ok()?;
            let Entry::Present { leaf, address, allowed } = tables.decode(word, level) else {
                return None;
            };
            on_the_way = on_the_way.and(allowed);
            if leaf {
                let gpa = address | iova & (page_size(level) - 1);
                return (!on_the_way.nothing()).then_some((gpa, on_the_way));
            }
            table = address;
        }
        unreachable!("level 1 has pages only")
    };
    range.step_by(4096).filter_map(|iova| Some((iova, one(iova)?))).collect()
}

fn walked(memory: &GuestMemoryMmap, tables: Tables, range: Range<u64>, pause: u64) -> Naive {
    let (mut pages, mut at) = (Naive::new(), range.start);
    let mut walk = Walk::new(memory, tables, 1 << 20);
    while at < range.end.min(tables.end()) {
        let next = walk.leaves(at..range.end, pause, &mut |leaf| {
            assert!(leaf.iova < range.end && leaf.iova + leaf.length > at);
            for offset in (0..leaf.length).step_by(4096) {
                if range.contains(&(leaf.iova + offset)) {
                    pages.insert(leaf.iova + offset, (leaf.gpa + offset, leaf.allowed));
                }
            }
        });
        assert!(next.unwrap() > at, "a walk gets on");
        at = next.unwrap();
    }
    pages
}

/// Words that are entries more often than not, with addresses of memory, and near it.
pub(crate) fn entries() -> impl Strategy<Value = u64> {
    let bits = prop::sample::select(vec![
        0x7, 0x7, 0x7, 0x3, 0x5, 0x1, 0x2, 0x6, 0x0, 0x87, 0x83, 0x85, 0x67,
    ]);
    let spoilt = prop::sample::select(vec![0, 0, 0, 0, 0, 1 << 52, 1 << 51, 0x1000, 1 << 62]);
    (0..PAGES + 2, bits, spoilt).prop_map(|(page, bits, spoilt)| page << 12 | bits | spoilt)
}

proptest! {
    /// Over tables of random words, which point to each other in circles: as page by page, with
    /// pauses or without.
    #[test]
    fn a_walk_finds_what_single_walks_find(
        words in prop::collection::vec((0..8u64, 0..4u64, entries()), 1..60),
        (start, pages) in (0..1024u64, 1..600u64),
        format in 0..4,
        pause in prop::sample::select(vec![5, 9, 1000]),
    ) {
        let memory = memory();
        for (table, number, word) in words {
            put(&memory, table << 12, number, word);
        }
        let stage1 = match format {
            0 => first_stage(0),
            1 => second_stage(0, AddressWidth::Bits39),
            2 => second_stage(0, AddressWidth::Bits48),
            _ => second_stage(0, AddressWidth::Bits57),
        };
        let tables = Tables::new(&stage1, true, 48).unwrap();
        let range = start << 12..(start + pages) << 12;
        let found = walked(&memory, tables, range.clone(), pause);
        prop_assert_eq!(&found, &naive(&memory, &tables, range.clone()));
        for iova in range.step_by(4096) {
            let allowed = found.get(&iova).map(|(_, allowed)| *allowed);
            let serves = |write| tables.refusal(&memory, iova + 7, write).is_none();
            prop_assert_eq!(serves(false), allowed.is_some_and(|allowed| allowed.read));
            prop_assert_eq!(serves(true), allowed.is_some_and(|allowed| allowed.write));
        }
    }
}

#[test]
fn two_tables_that_name_everything_are_given_up() {
    let memory = memory();
    (0..512).for_each(|number| put(&memory, 0x1000, number, 0x1007));
    let tables = Tables::new(&second_stage(0x1000, AddressWidth::Bits48), true, 48).unwrap();
    let mut walk = Walk::new(&memory, tables, 100);
    let mut pages = 0;
    let everything = 0..tables.end();
    let result = walk.leaves(everything, u64::MAX, &mut |_| pages += 1);
    assert_eq!((result, pages, walk.budget()), (Err(TooManyTables), 97 * 512, 0));
}

#[test]
fn flags_are_set_on_the_way_to_a_page_and_in_it() {
    let memory = memory();
    let clear = |page: u64| page << 12 | 7;
    for (table, page) in [(1, 2), (2, 3), (3, 4)] {
        put(&memory, table << 12, 0, clear(page));
    }
    put(&memory, 0x4000, 0, clear(9));
    put(&memory, 0x4000, 1, 9 << 12 | 5);
    put(&memory, 0x4000, 2, 9 << 12 | 3);
    // A table without pages was not used.
    put(&memory, 0x3000, 1, clear(8));
    let tables = Tables::new(&first_stage(0x1000), true, 48).unwrap();
    assert_eq!(walked(&memory, tables, 0..1 << 22, 1000).len(), 2);
    let a = FirstStageEntry::A;
    let seen = [1, 2, 3].map(|table| word(&memory, table << 12, 0));
    assert_eq!(seen, [2, 3, 4].map(|page| clear(page) | a));
    let pages = [0, 1, 2].map(|number| word(&memory, 0x4000, number));
    assert_eq!(pages, [clear(9) | a | FirstStageEntry::D, 9 << 12 | 5 | a, 9 << 12 | 3]);
    assert_eq!(word(&memory, 0x3000, 1), clear(8));
}

#[test]
fn a_refusal_has_the_reason_of_its_stage() {
    use FaultReason as R;
    let memory = memory();
    let (outside, top) = (PAGES << 12, 0x1000);
    let first = Tables::new(&first_stage(top), true, 48).unwrap();
    let second = Tables::new(&second_stage(top, AddressWidth::Bits39), true, 48).unwrap();
    let why = |tables: Tables, iova, write| tables.refusal(&memory, iova, write);
    assert_eq!(why(first, 1 << 47, false), Some(R::NotCanonical));
    assert_eq!(why(first, u64::MAX << 47, false), Some(R::FirstStageNotPresent));
    assert_eq!(why(second, 1 << 39, false), Some(R::AddressBeyondGuest));
    assert_eq!(why(second, 0, false), Some(R::SecondStageDenied));
    put(&memory, top, 0, outside | 7);
    assert_eq!(why(first, 0, false), Some(R::FirstStageAccess));
    assert_eq!(why(second, 0, false), Some(R::SecondStageAccess));
    put(&memory, top, 0, 0x87);
    assert_eq!(why(first, 0, false), Some(R::FirstStageReserved));
    put(&memory, top, 0, 0x40_0000_1087);
    assert_eq!(why(second, 0, false), Some(R::SecondStageReserved));
    let beyond = Tables::new(&first_stage(outside), true, 48).unwrap();
    assert_eq!(why(beyond, 0, false), Some(R::FirstStageTopAccess));
    for table in [1, 2, 3] {
        put(&memory, table << 12, 0, (table + 1) << 12 | 7);
    }
    put(&memory, 0x4000, 0, 0x5001);
    assert_eq!(why(first, 0, false), Some(R::UserDenied));
    put(&memory, 0x4000, 0, 0x5005);
    assert_eq!((why(first, 0, false), why(first, 0, true)), (None, Some(R::WriteDenied)));
}

/// TM of a second stage is reserved since revision 3.2; a first stage ignores the bit.
#[test]
fn no_second_stage_entry_may_be_transient() {
    const TRANSIENT: u64 = 1 << 62;
    let memory = memory();
    for table in [1, 2, 3, 4] {
        put(&memory, table << 12, 0, (table + 1) << 12 | 7);
    }
    let first = Tables::new(&first_stage(0x1000), true, 48).unwrap();
    let second = Tables::new(&second_stage(0x1000, AddressWidth::Bits48), true, 48).unwrap();
    let seen = |tables: Tables| {
        let pages = walked(&memory, tables, 0..1 << 12, 1000).len();
        (pages, tables.refusal(&memory, 0, false))
    };
    for table in [1, 2, 3, 4] {
        put(&memory, table << 12, 0, (table + 1) << 12 | 7 | TRANSIENT);
        assert_eq!(seen(second), (0, Some(FaultReason::SecondStageReserved)));
        assert_eq!(seen(first), (1, None));
        put(&memory, table << 12, 0, (table + 1) << 12 | 7);
    }
    assert_eq!(seen(second), (1, None));
}

/// Tables may have more addresses than the unit translates; a request for one does not get to them.
#[test]
fn what_no_request_may_name_is_not_walked() {
    let memory = memory();
    for (top, table, flags) in [(0x1000, 0x2000, 3), (0x5000, 0x6000, 7)] {
        // The first page, and those from 2^39 and 2^40 on.
        for number in [0, 1, 2] {
            put(&memory, top, number, table | flags);
        }
        put(&memory, table, 0, (table + 0x1000) | flags);
        put(&memory, table + 0x1000, 0, (table + 0x2000) | flags);
        put(&memory, table + 0x2000, 0, 0x9000 | flags);
        let stage1 = match flags {
            3 => second_stage(top, AddressWidth::Bits48),
            _ => first_stage(top),
        };
        for (iova_bits, pages) in [(39, 1), (40, 2), (41, 3), (48, 3)] {
            let tables = Tables::new(&stage1, true, iova_bits).unwrap();
            let mut found = 0;
            let mut walk = Walk::new(&memory, tables, 1000);
            let end = walk.leaves(0..u64::MAX, 1000, &mut |_| found += 1);
            assert_eq!((end, found), (Ok(tables.end()), pages), "{iova_bits}");
            let reason = tables.refusal(&memory, 1 << 40, false);
            let beyond = flags == 3 && iova_bits < 41;
            assert_eq!(reason, beyond.then_some(FaultReason::AddressBeyondGuest), "{iova_bits}");
        }
    }
}

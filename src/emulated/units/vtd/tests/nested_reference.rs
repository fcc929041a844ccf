// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Nested walks against a naive reference: random tables of both stages, random requests, with and
//! without caches; then with tables that change, and every invalidation that the change needs.
//!
//! The formats are so alike that each page is a table of both: entries with some indices lead to
//! GPAs, and those with others to addresses of the second stage.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::nested::Guest;
use super::*;
use twostage::iommufd::{VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE};

/// GPAs of tables; the first is the second stage's top table. Stage 2 does not allow writing the
/// last.
const TABLES: [u64; 6] = [LOW, LOW + 0x1000, LOW + 0x5000, HIGH, HIGH + 0x1000, READ_ONLY];
/// GPAs that are not tables: the last is beyond 48 bits.
const PAGES: [u64; 3] = [HIGH + 0x20_3000, NOWHERE, 1 << 48];
/// Indices of the entries that lead to GPAs: those of most addresses of the second stage.
const SECOND: [u64; 2] = [0, 1];
/// Indices of those that lead to addresses of the second stage: those of most IOVAs.
const FIRST: [u64; 2] = [2, 511];

#[derive(Debug, Clone)]
struct Case {
    first: FirstStage,
    second: SecondStage,
    wide: bool,
    huge_pages: bool,
    /// Words by GPA.
    words: BTreeMap<u64, u64>,
    requests: Vec<TestRequest>,
    /// Entries that change after the requests, which then come again.
    changes: Vec<(u64, u64)>,
}

/// An address of `levels` indices, of which `often` are frequent.
fn address(often: [u64; 2], seldom: u64, levels: u8) -> impl Strategy<Value = u64> {
    let index = prop_oneof![
        12 => Just(often[0]),
        12 => Just(often[1]),
        1 => Just(seldom)
    ];
    prop::collection::vec(index, usize::from(levels))
        .prop_map(|indices| indices.iter().fold(0, |address, index| address << 9 | index) << 12)
}

/// Permissions and flags of an entry of either stage.
fn bits() -> impl Strategy<Value = u64> {
    let seldom = |bits: u64| prop_oneof![80 => Just(0), 1 => Just(bits)];
    let clear = (seldom(1), seldom(2), seldom(4)).prop_map(|(p, rw, us)| p | rw | us);
    let set = (seldom(0x80), seldom(1 << 13), seldom(1 << 51), seldom(1 << 62));
    let set = set.prop_map(|(ps, low, high, tm)| ps | low | high | tm);
    (clear, set, any::<u64>()).prop_map(|(clear, set, flags)| 7 & !clear | set | flags & 0x760)
}

fn word(index: u64, second_levels: u8) -> BoxedStrategy<u64> {
    let target = match SECOND.contains(&index) {
        true => prop_oneof![
            40 => prop::sample::select(TABLES.to_vec()),
            1 => prop::sample::select(PAGES.to_vec()),
            3 => Just(HIGH | 0x80),
        ]
        .boxed(),
        false => prop_oneof![
            24 => address(SECOND, 2, second_levels),
            1 => address(SECOND, 2, second_levels).prop_map(|address| address | 0x80),
            1 => Just(1 << 50),
        ]
        .boxed(),
    };
    (target, bits()).prop_map(|(target, bits)| target | bits).boxed()
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (4u8..=5, 3u8..=5, any::<bool>(), any::<bool>(), any::<bool>(), any::<[bool; 3]>());
    shape.prop_flat_map(|(levels, below, wide, huge_pages, accessed_dirty, [sre, wpe, eafe])| {
        let flag = |set, flag| if set { flag } else { 0 };
        let flags = flag(sre, VTD_S1_SRE) | flag(sre && wpe, VTD_S1_WPE) | flag(eafe, VTD_S1_EAFE);
        let indices = || [SECOND, FIRST].concat();
        let places: Vec<_> = TABLES
            .iter()
            .flat_map(|table| indices().into_iter().map(move |index| (table + index * 8, index)))
            .collect();
        let words: Vec<_> = places.iter().map(|(_, index)| word(*index, below)).collect();
        let changed = prop::sample::select(places.clone()).prop_flat_map(move |(at, index)| {
            prop_oneof![4 => word(index, below), 1 => Just(0).boxed()]
                .prop_map(move |word| (at, word))
        });
        let who = prop_oneof![4 => Just(0), 4 => 0u8..4, 1 => 0u8..8];
        let spare = 52 - 9 * u32::from(levels);
        let iova = address(FIRST, 0, levels)
            .prop_map(move |address| (address << spare).cast_signed() >> spare)
            .prop_map(i64::cast_unsigned);
        let offset = prop::sample::select(vec![0u64, 0x10, 0xff8]);
        let request = (iova, offset, any::<bool>(), who);
        (
            address(SECOND, 2, below),
            words,
            prop::collection::vec(request, 1..24),
            prop::collection::vec(changed, 0..4),
        )
            .prop_map(move |(root, words, requests, changes)| Case {
                first: FirstStage { root, levels, flags },
                second: SecondStage { root: TABLES[0], levels: below, accessed_dirty },
                wide: wide || levels == 5 || below == 5,
                huge_pages,
                words: places.iter().map(|(at, _)| *at).zip(words).collect(),
                requests: requests
                    .into_iter()
                    .map(|(iova, offset, write, who)| TestRequest {
                        iova: iova | offset,
                        write,
                        attributes: DmaAttributes {
                            pasid: (who & 1 != 0).then_some(3),
                            privileged: who & 2 != 0,
                            execute: who & 4 != 0,
                        },
                    })
                    .collect(),
                changes,
            })
    })
}

/// What stage 2 of the machine allows at `gpa`: nothing, reads, or reads and writes.
fn stage2_rights(gpa: u64) -> (bool, bool) {
    let in_half = |start| (start..start + HALF).contains(&gpa);
    if in_half(LOW) || in_half(HIGH) {
        (true, true)
    } else {
        ((READ_ONLY..READ_ONLY + 0x1000).contains(&gpa), false)
    }
}

/// Sets `flags` in the word at `gpa`, which is memory; whether that can be written, if need be.
fn set(case: &mut Case, gpa: u64, flags: u64) -> bool {
    let word = case.words.get(&gpa).copied().unwrap_or(0);
    let wanted = word | flags;
    if wanted != word && !stage2_rights(gpa).1 {
        return false;
    }
    case.words.insert(gpa, wanted);
    true
}

/// Whether a present `word` of `level` is a page, and whether its reserved bits are clear.
fn shape(case: &Case, word: u64, level: u8, lowest: u32) -> (bool, bool) {
    let large = word & 0x80 != 0 && level > 1;
    let below = |bits: u32| (1u64 << bits) - (1 << lowest);
    let bad = match level {
        1 => false,
        2 => large && word & below(21) != 0,
        3 => large && (!case.huge_pages || word & below(30) != 0),
        _ => large,
    };
    (level == 1 || large, !bad)
}

/// The GPA of `address`, for a read or a write, by the second stage and the host; or why not.
fn second(case: &mut Case, address: u64, write: bool) -> Result<u64, Blocked> {
    let limit = if case.wide { 1u64 << 57 } else { 1 << 48 };
    let SecondStage { root, levels, accessed_dirty } = case.second;
    if address >> (12 + 9 * u32::from(levels)) != 0 {
        return Err((FaultReason::AddressBeyondGuest, false));
    }
    let (mut table, mut level, mut way, mut allowed) = (root, levels, vec![], 3);
    let gpa = loop {
        if table >= limit || !stage2_rights(table).0 {
            return Err(match level == levels {
                true => (FaultReason::SecondStageTopAccess, true),
                false => (FaultReason::SecondStageAccess, true),
            });
        }
        let shift = 12 + 9 * (u32::from(level) - 1);
        let entry = table + (address >> shift & 511) * 8;
        let word = case.words.get(&entry).copied().unwrap_or(0);
        if word & 3 == 0 {
            return Err((FaultReason::SecondStageDenied, false));
        }
        let (leaf, good) = shape(case, word, level, 12);
        if !good || word & 1 << 62 != 0 {
            return Err((FaultReason::SecondStageReserved, false));
        }
        allowed &= word;
        way.push(entry);
        table = word & 0x000f_ffff_ffff_f000;
        if leaf {
            let mask = (1u64 << shift) - 1;
            break table & !mask | address & mask;
        }
        level -= 1;
    };
    if allowed & if write { 2 } else { 1 } == 0 {
        return Err((FaultReason::SecondStageDenied, false));
    }
    if gpa >= limit {
        return Err((FaultReason::AddressBeyondGuest, true));
    }
    let (readable, writable) = stage2_rights(gpa);
    if if write { !writable } else { !readable } {
        return Err((FaultReason::SecondStageDenied, true));
    }
    if accessed_dirty {
        let leaf = way.len() - 1;
        for (step, entry) in way.into_iter().enumerate() {
            if !set(case, entry, if write && step == leaf { 0x300 } else { 0x100 }) {
                return Err((FaultReason::SecondStageFlagsUpdate, true));
            }
        }
    }
    Ok(gpa)
}

/// The expected result of `request`: the GPA, or the fault. Sets flags in `case.words`.
fn reference(case: &mut Case, request: &TestRequest) -> Result<u64, Blocked> {
    let TestRequest { iova, write, attributes } = *request;
    let FirstStage { root, levels, flags } = case.first;
    let with_pasid = attributes.pasid.is_some();
    let own = |reason| Err((reason, false));
    if with_pasid && attributes.execute {
        return own(FaultReason::ExecuteDisabled);
    }
    let privileged = with_pasid && attributes.privileged;
    if privileged && flags & VTD_S1_SRE == 0 {
        return own(FaultReason::SupervisorDisabled);
    }
    let sign = 12 + 9 * u32::from(levels) - 1;
    if iova >> sign != 0 && iova >> sign != u64::MAX >> sign {
        return own(FaultReason::NotCanonical);
    }
    let (mut table, mut level, mut way, mut allowed) = (root, levels, vec![], 7);
    let page = loop {
        let shift = 12 + 9 * (u32::from(level) - 1);
        let at = table + (iova >> shift & 511) * 8;
        let entry = second(case, at, false).map_err(|(reason, host)| match reason {
            FaultReason::AddressBeyondGuest if !host => {
                (FaultReason::FirstStagePointerBeyond, host)
            }
            FaultReason::SecondStageDenied | FaultReason::AddressBeyondGuest if level == levels => {
                (FaultReason::FirstStageTopSecondStageDenied, host)
            }
            FaultReason::SecondStageDenied | FaultReason::AddressBeyondGuest => {
                (FaultReason::FirstStageSecondStageDenied, host)
            }
            other => (other, host),
        })?;
        let word = case.words.get(&entry).copied().unwrap_or(0);
        if word & 1 == 0 {
            return own(FaultReason::FirstStageNotPresent);
        }
        // Bit 12 is PAT in a large page.
        let (leaf, good) = shape(case, word, level, 13);
        if !good {
            return own(FaultReason::FirstStageReserved);
        }
        allowed &= word;
        way.push((at, entry));
        table = word & 0x000f_ffff_ffff_f000;
        if leaf {
            let mask = (1u64 << shift) - 1;
            break table & !mask | iova & mask;
        }
        level -= 1;
    };
    if !privileged && allowed & 4 == 0 {
        return own(FaultReason::UserDenied);
    }
    if write && allowed & 2 == 0 && (!privileged || flags & VTD_S1_WPE != 0) {
        return own(FaultReason::WriteDenied);
    }
    let gpa = second(case, page, write)?;
    let leaf = way.len() - 1;
    for (step, (at, entry)) in way.into_iter().enumerate() {
        let extended = if flags & VTD_S1_EAFE != 0 { 0x400 } else { 0 };
        let wanted = 0x20 | extended | if write && step == leaf { 0x40 } else { 0 };
        if case.words.get(&entry).copied().unwrap_or(0) & wanted != wanted {
            second(case, at, true).map_err(|(reason, host)| match reason {
                FaultReason::SecondStageDenied => {
                    (FaultReason::FirstStageFlagsSecondStageDenied, host)
                }
                other => (other, host),
            })?;
            assert!(set(case, entry, wanted));
        }
    }
    Ok(gpa)
}

/// A machine with the tables of `case`, the device attached without and with PASID.
fn machine(case: &Case, entries: usize) -> Machine {
    let machine = Machine::new(VtdUnitConfig {
        address_width: if case.wide { AddressWidth::Bits57 } else { AddressWidth::Bits48 },
        huge_pages: case.huge_pages,
        supervisor_requests: true,
        extended_accessed: true,
        iotlb_entries: entries,
        paging_structure_entries: entries,
        stage2_entries: entries,
        ..VtdUnitConfig::default()
    });
    for (&gpa, &word) in &case.words {
        machine.poke(gpa, word);
    }
    for pasid in [None, Some(3)] {
        machine.attach_nested(pasid, 1, case.first, case.second);
    }
    machine
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_walker_does_what_the_reference_does(case in case()) {
        let machines = [0, 4096, 1].map(|entries| machine(&case, entries));
        let mut ports = machines.each_ref().map(Machine::port);
        let mut model = case.clone();
        let changes = case.changes.iter().map(Some).chain([None]);
        for change in changes {
            for request in case.requests.iter().chain(&case.requests) {
                let expected = reference(&mut model, request);
                for (machine, port) in machines.iter().zip(&mut ports) {
                    let expected = expected.map(|gpa| machine.offset(gpa));
                    prop_assert_eq!(request.outcome(machine, port), expected, "{:x?}", request);
                }
            }
            for (&gpa, &word) in &model.words {
                for machine in &machines {
                    prop_assert_eq!(machine.peek(gpa), word, "entry at {:#x}", gpa);
                }
            }
            // What each entry is an entry of is anybody's guess.
            if let Some(&(at, word)) = change {
                model.words.insert(at, word);
                for machine in &machines {
                    machine.poke(at, word);
                    machine.invalidate_second_stage(1, ALL);
                }
            }
        }
    }
}

/// Number of pages of each kind.
const COUNT: u64 = 4;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Leaves change one by one, some with their narrowest invalidation. Each stage may use what
    /// its entry was since the last invalidation that names it, and the first none older than the
    /// last of the second.
    #[test]
    fn the_narrowest_invalidation_is_enough(
        steps in prop::collection::vec((0..COUNT, 0..COUNT, any::<[bool; 3]>()), 1..40),
        accessed_dirty in any::<bool>(),
    ) {
        let guest = Guest::new(VtdUnitConfig::default(), (4, 4), accessed_dirty);
        let [iova, address, gpa] = [0x12_3456_7000, 0x7_0000_0000, HIGH]
            .map(|start| move |number: u64| start + (number << 12));
        let mut first: Vec<_> = (0..COUNT).map(|number| vec![number]).collect();
        let mut second = first.clone();
        for number in 0..COUNT {
            guest.poke(gpa(number), number);
            guest.map_second(address(number), 1, gpa(number));
            guest.map_first(iova(number), 1, address(number), 0x7);
        }
        let mut port = guest.port();
        let forget = |old: &mut Vec<u64>| *old = old.split_off(old.len() - 1);
        for (which, to, [of_second, invalidates, leaf]) in steps {
            match of_second {
                true => {
                    guest.map_second(address(which), 1, gpa(to));
                    second[which as usize].push(to);
                }
                false => {
                    guest.map_first(iova(which), 1, address(to), 0x7);
                    first[which as usize].push(to);
                }
            }
            match (invalidates, of_second) {
                (false, _) => {}
                (true, true) => {
                    guest.invalidate_second_stage(1, page(address(which), leaf));
                    forget(&mut second[which as usize]);
                    first.iter_mut().for_each(forget);
                }
                (true, false) => {
                    guest.invalidate(1, page(iova(which), leaf));
                    forget(&mut first[which as usize]);
                }
            }
            for number in 0..COUNT {
                let found = guest.read(&mut port, iova(number)).unwrap();
                let ways = first[number as usize].iter().map(|to| &second[*to as usize]);
                let known = ways.clone().any(|gpas| gpas.contains(&found));
                prop_assert!(known, "{number}: {found}, not of {:?}", ways.collect::<Vec<_>>());
            }
        }
    }
}

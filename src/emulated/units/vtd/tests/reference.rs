// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walker against a naive reference: random tables, random requests, with and without caches.
//!
//! The reference keeps guest memory as a map of words and uses plain shifts and masks, step by
//! step. It has no caches.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use twostage::iommufd::{VTD_S1_EAFE, VTD_S1_SRE, VTD_S1_WPE};

/// GPAs of tables; the first is the top table. Stage 2 does not allow writing the last.
const TABLES: [u64; 8] = [
    LOW,
    LOW + 0x1000,
    LOW + 0x5000,
    LOW + 0x7f_f000,
    HIGH + 0x1000,
    HIGH + 0x20_3000,
    HIGH + 0x60_0000,
    READ_ONLY,
];
/// GPAs that are not tables: pages of every alignment, unmapped ones, and beyond 48 bits.
const PAGES: [u64; 7] =
    [HIGH, HIGH + 0x40_0000, HIGH + 0x5f_f000, LOW + 0x10_0000, READ_ONLY, NOWHERE, 1 << 48];
/// Indices that entries have and addresses use.
const INDICES: [u64; 3] = [0, 1, 511];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    First { supervisor: bool, write_protect: bool, extended: bool },
    Second,
}

#[derive(Debug, Clone)]
struct Case {
    format: Format,
    levels: u8,
    wide: bool,
    huge_pages: bool,
    /// Words by GPA.
    words: BTreeMap<u64, u64>,
    requests: Vec<TestRequest>,
}

fn word() -> impl Strategy<Value = u64> {
    let table = prop::sample::select(TABLES.to_vec());
    let page = prop::sample::select(PAGES.to_vec());
    let large = prop::sample::select(vec![HIGH, HIGH + 0x40_0000, LOW + 0x10_0000]);
    let target = prop_oneof![12 => table, 2 => page, 2 => large.prop_map(|gpa| gpa | 0x80)];
    // Bits that are rarely clear, or set.
    let seldom = |bits: u64| prop_oneof![30 => Just(0), 1 => Just(bits)];
    let clear = (seldom(1), seldom(2), seldom(4)).prop_map(|(p, rw, us)| p | rw | us);
    let set = (seldom(0x80), seldom(1 << 13), seldom(1 << 51), seldom(1 << 62), seldom(1 << 63))
        .prop_map(|(ps, low, high, tm, xd)| ps | low | high | tm | xd);
    let flags = any::<u64>().prop_map(|bits| bits & 0x460);
    (target, clear, set, flags)
        .prop_map(|(target, clear, set, flags)| target | (7 & !clear) | set | flags)
}

fn iova(format: Format, levels: u8) -> impl Strategy<Value = u64> {
    let index = prop::sample::select(INDICES.to_vec());
    let offset = prop::sample::select(vec![0u64, 0x10, 0xff8]);
    let odd = prop_oneof![20 => Just(0), 1 => Just(1u64 << 60), 1 => Just(u64::MAX << 48)];
    (prop::collection::vec(index, usize::from(levels)), offset, odd).prop_map(
        move |(indices, offset, odd)| {
            let address = indices.iter().fold(0, |address, index| address << 9 | index) << 12;
            // First-stage addresses are canonical, second-stage addresses end at their width.
            let spare = if format == Format::Second { 0 } else { 52 - 9 * u32::from(levels) };
            (((address | offset) << spare) as i64 >> spare) as u64 ^ odd
        },
    )
}

fn case() -> impl Strategy<Value = Case> {
    let first = any::<[bool; 3]>().prop_map(|[supervisor, write_protect, extended]| {
        Format::First { supervisor, write_protect, extended }
    });
    let shape = prop_oneof![
        2 => (first, 4u8..=5).boxed(),
        1 => (Just(Format::Second), 3u8..=5).boxed(),
    ];
    (shape, any::<bool>(), any::<bool>()).prop_flat_map(|((format, levels), wide, huge_pages)| {
        let count = TABLES.len() * INDICES.len();
        let who = prop_oneof![4 => Just(0), 4 => 0u8..4, 1 => 0u8..8];
        let requests = (iova(format, levels), any::<bool>(), who);
        let requests = prop::collection::vec(requests, 1..24);
        (prop::collection::vec(word(), count), requests).prop_map(move |(words, requests)| {
            let entries = TABLES.iter().flat_map(|table| INDICES.map(|index| table + index * 8));
            Case {
                format,
                levels,
                wide: wide || levels == 5,
                huge_pages,
                words: entries.zip(words).collect(),
                requests: requests
                    .into_iter()
                    .map(|(iova, write, who)| TestRequest {
                        iova,
                        write,
                        attributes: DmaAttributes {
                            pasid: (who & 1 != 0).then_some(3),
                            privileged: who & 2 != 0,
                            execute: who & 4 != 0,
                        },
                    })
                    .collect(),
            }
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

/// The expected result of `request`: the GPA, or the fault. Sets flags in `case.words`.
fn reference(case: &mut Case, request: &TestRequest) -> Result<u64, Blocked> {
    let TestRequest { iova, write, attributes } = *request;
    let with_pasid = attributes.pasid.is_some();
    let (privileged, execute) =
        (with_pasid && attributes.privileged, with_pasid && attributes.execute);
    let user = |reason| Err((reason, false));
    let host = |reason| Err((reason, true));
    let limit = if case.wide { 1u64 << 57 } else { 1 << 48 };

    if execute {
        return user(FaultReason::ExecuteDisabled);
    }
    let width = 12 + 9 * u32::from(case.levels);
    match case.format {
        Format::First { supervisor, .. } => {
            if privileged && !supervisor {
                return user(FaultReason::SupervisorDisabled);
            }
            let high = iova >> (width - 1);
            if high != 0 && high != u64::MAX >> (width - 1) {
                return user(FaultReason::NotCanonical);
            }
        }
        Format::Second if iova >> width != 0 => return user(FaultReason::AddressBeyondGuest),
        Format::Second => {}
    }
    let first = case.format != Format::Second;
    let mut table = TABLES[0];
    let mut level = case.levels;
    let (mut may_write, mut may_read, mut user_page) = (true, true, true);
    let mut way = vec![];
    let gpa = loop {
        let top = level == case.levels;
        if table >= limit {
            return host(match (first, top) {
                (true, _) => FaultReason::FirstStagePointerBeyond,
                (false, true) => FaultReason::SecondStageTopAccess,
                (false, false) => FaultReason::SecondStageAccess,
            });
        }
        if !stage2_rights(table).0 {
            return host(match (first, top) {
                (true, true) => FaultReason::FirstStageTopSecondStageDenied,
                (true, false) => FaultReason::FirstStageSecondStageDenied,
                (false, true) => FaultReason::SecondStageTopAccess,
                (false, false) => FaultReason::SecondStageAccess,
            });
        }
        let shift = 12 + 9 * (u32::from(level) - 1);
        let entry = table + (iova >> shift & 511) * 8;
        let word = case.words.get(&entry).copied().unwrap_or(0);
        let present = if first { word & 1 != 0 } else { word & 3 != 0 };
        if !present {
            return user(if first {
                FaultReason::FirstStageNotPresent
            } else {
                FaultReason::SecondStageDenied
            });
        }
        let large = word & 0x80 != 0 && level > 1;
        // Bit 12 is PAT in a large first-stage page.
        let from = if first { 13 } else { 12 };
        let below = |bits: u32| (1u64 << bits) - (1 << from);
        let bad = match level {
            1 => false,
            2 => large && word & below(21) != 0,
            3 => large && (!case.huge_pages || word & below(30) != 0),
            _ => large,
        };
        let leaf = level == 1 || large;
        if bad || !first && word & 1 << 62 != 0 {
            return user(if first {
                FaultReason::FirstStageReserved
            } else {
                FaultReason::SecondStageReserved
            });
        }
        if first {
            may_write &= word & 2 != 0;
            user_page &= word & 4 != 0;
        } else {
            may_read &= word & 1 != 0;
            may_write &= word & 2 != 0;
        }
        way.push((entry, table));
        let address = word & 0x000f_ffff_ffff_f000;
        if leaf {
            let mask = (1u64 << shift) - 1;
            break address & !mask | iova & mask;
        }
        table = address;
        level -= 1;
    };
    match case.format {
        Format::First { write_protect, .. } => {
            if !privileged && !user_page {
                return user(FaultReason::UserDenied);
            }
            if write && !may_write && (!privileged || write_protect) {
                return user(FaultReason::WriteDenied);
            }
        }
        Format::Second => {
            if if write { !may_write } else { !may_read } {
                return user(FaultReason::SecondStageDenied);
            }
        }
    }
    if gpa >= limit {
        return host(FaultReason::AddressBeyondGuest);
    }
    let (readable, writable) = stage2_rights(gpa);
    if if write { !writable } else { !readable } {
        return host(FaultReason::SecondStageDenied);
    }
    if let Format::First { extended, .. } = case.format {
        let leaf = way.len() - 1;
        for (step, (entry, table)) in way.into_iter().enumerate() {
            let word = case.words.entry(entry).or_default();
            let mut wanted = *word | 0x20;
            if extended {
                wanted |= 0x400;
            }
            if write && step == leaf {
                wanted |= 0x40;
            }
            if wanted != *word && !stage2_rights(table).1 {
                return host(FaultReason::FirstStageFlagsSecondStageDenied);
            }
            *word = wanted;
        }
    }
    Ok(gpa)
}

/// A machine with the tables of `case`, the device attached without and with PASID.
fn machine(case: &Case, config: VtdUnitConfig) -> Machine {
    let machine = Machine::new(VtdUnitConfig {
        address_width: if case.wide { AddressWidth::Bits57 } else { AddressWidth::Bits48 },
        huge_pages: case.huge_pages,
        supervisor_requests: true,
        extended_accessed: true,
        ..config
    });
    for (&gpa, &word) in &case.words {
        machine.poke(gpa, word);
    }
    for pasid in [None, Some(3)] {
        match case.format {
            Format::First { supervisor, write_protect, extended } => {
                let flag = |set, flag| if set { flag } else { 0 };
                let flags = flag(supervisor, VTD_S1_SRE)
                    | flag(write_protect && supervisor, VTD_S1_WPE)
                    | flag(extended, VTD_S1_EAFE);
                machine.attach(pasid, 1, TABLES[0], case.levels, flags);
            }
            Format::Second => machine.attach_second_stage(pasid, 1, TABLES[0], case.levels),
        }
    }
    machine
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_walker_does_what_the_reference_does(case in case()) {
        let uncached = machine(&case, VtdUnitConfig {
            iotlb_entries: 0,
            paging_structure_entries: 0,
            stage2_entries: 0,
            ..VtdUnitConfig::default()
        });
        let cached = machine(&case, VtdUnitConfig::default());
        let tiny = machine(&case, VtdUnitConfig {
            iotlb_entries: 1,
            paging_structure_entries: 1,
            stage2_entries: 1,
            ..VtdUnitConfig::default()
        });
        let machines = [uncached, cached, tiny];
        let mut ports = machines.each_ref().map(Machine::port);
        let mut model = case.clone();
        for request in case.requests.iter().chain(&case.requests) {
            let interrupt = (0xfee0_0000..=0xfeef_ffff).contains(&request.iova);
            if request.attributes.pasid.is_none() && interrupt {
                continue;
            }
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
    }
}

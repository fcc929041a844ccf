// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walk through a user's second-stage tables over stage 2.

use super::*;

const READ: u64 = 1;
const WRITE: u64 = 2;

fn machine() -> Machine {
    Machine::new(VtdUnitConfig { address_width: AddressWidth::Bits57, ..VtdUnitConfig::default() })
}

/// Maps `iova` with entries that all have `bits`.
fn map(machine: &Machine, root: u64, levels: u8, iova: u64, level: u8, gpa: u64) -> u64 {
    let entry = machine.entry(root, levels, iova, level, READ | WRITE);
    let large = if level > 1 { 0x80 } else { 0 };
    machine.poke(entry, gpa | READ | WRITE | large);
    entry
}

#[test]
fn pages_of_every_size_through_three_to_five_levels() {
    let machine = machine();
    let mut port = machine.port();
    for levels in 3..=5 {
        for level in 1..=3 {
            let iova = 0x12_4000_0000;
            let root = machine.table();
            map(&machine, root, levels, iova, level, HIGH);
            machine.attach_second_stage(None, 1, root, levels);
            machine.poke(HIGH + 0x10, u64::from(levels));
            for _ in 0..2 {
                assert_eq!(machine.read_u64(&mut port, PLAIN, iova + 0x10), Ok(levels.into()));
            }
            let width = 12 + 9 * u32::from(levels);
            let beyond = Err((FaultReason::AddressBeyondGuest, false));
            assert_eq!(machine.read_u64(&mut port, PLAIN, 1 << width), beyond);
            let absent = Err((FaultReason::SecondStageDenied, false));
            assert_eq!(machine.read_u64(&mut port, PLAIN, (1 << width) - 8), absent);
        }
    }
}

#[test]
fn every_level_limits_and_must_be_well_formed() {
    let machine = machine();
    let mut port = machine.port();
    let iova = 0x12_3456_7000;
    let root = machine.table();
    map(&machine, root, 4, iova, 1, HIGH);
    machine.attach_second_stage(None, 1, root, 4);
    let denied = Err((FaultReason::SecondStageDenied, false));
    let reserved = Err((FaultReason::SecondStageReserved, false));
    for level in 1..=4 {
        let entry = machine.entry(root, 4, iova, level, 0);
        let good = machine.peek(entry);
        let mut check = |word: u64, read: Outcome, write: Outcome| {
            machine.poke(entry, word);
            machine.invalidate(1, ALL);
            for _ in 0..2 {
                let context = format!("level {level}, {word:#x}");
                assert_eq!(machine.read_u64(&mut port, PLAIN, iova), read, "{context}");
                assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), write, "{context}");
            }
        };
        check(good & !WRITE, Ok(0), denied);
        check(good & !READ, denied, Ok(0));
        check(good & !READ & !WRITE, denied, denied);
        // Accessed and dirty are ignored and not set.
        check(good | 0x300, Ok(0), Ok(0));
        check(good, Ok(0), Ok(0));
        assert_eq!(machine.peek(entry), good);
        match level {
            1 => check(good | 1 << 62, reserved, reserved),
            2 => check(good | 0x80 | 0x1000, reserved, reserved),
            3 => check(good | 0x80 | 0x1000_0000, reserved, reserved),
            _ => check(good | 0x80, reserved, reserved),
        }
        machine.poke(entry, good);
    }
}

#[test]
fn every_pointer_goes_through_stage_2() {
    let machine = machine();
    let mut port = machine.port();
    let iova = 0x12_3456_7000;
    machine.attach_second_stage(None, 1, NOWHERE, 4);
    let top = Err((FaultReason::SecondStageTopAccess, true));
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), top);
    let root = machine.table();
    map(&machine, root, 4, iova, 1, HIGH);
    machine.attach_second_stage(None, 1, root, 4);
    for level in 1..=4 {
        let entry = machine.entry(root, 4, iova, level, 0);
        let good = machine.peek(entry);
        machine.poke(entry, NOWHERE | READ | WRITE);
        machine.invalidate(1, ALL);
        let reason = match level {
            1 => FaultReason::SecondStageDenied,
            _ => FaultReason::SecondStageAccess,
        };
        assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Err((reason, true)));
        machine.poke(entry, good);
    }
    let leaf = machine.entry(root, 4, iova, 1, 0);
    machine.poke(leaf, READ_ONLY | READ | WRITE);
    machine.invalidate(1, ALL);
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(0));
    let denied = Err((FaultReason::SecondStageDenied, true));
    assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), denied);
}

#[test]
fn accessed_and_dirty_flags_are_set_if_enabled() {
    let machine = machine();
    let mut port = machine.port();
    let iova = 0x12_3456_7000;
    let root = machine.table();
    map(&machine, root, 4, iova, 1, HIGH);
    machine.attach_second_stage_with(
        None,
        1,
        SecondStage { root, levels: 4, accessed_dirty: true },
    );
    let entries = [4, 3, 2, 1].map(|level| machine.entry(root, 4, iova, level, 0));
    let flags = || entries.map(|entry| machine.peek(entry) & 0x300);
    assert_eq!(machine.read_u64(&mut port, PLAIN, iova), Ok(0));
    assert_eq!(flags(), [0x100; 4]);
    assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), Ok(0));
    assert_eq!(flags(), [0x100, 0x100, 0x100, 0x300]);
    // What dirty tracking clears, it invalidates.
    machine.poke(entries[3], machine.peek(entries[3]) & !0x200);
    assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), Ok(0));
    assert_eq!(flags(), [0x100; 4]);
    machine.invalidate(1, page(iova, true));
    assert_eq!(machine.write_u64(&mut port, PLAIN, iova, 0), Ok(0));
    assert_eq!(flags(), [0x100, 0x100, 0x100, 0x300]);
}

/// TM of a page is reserved since revision 3.2, as it always was in a pointer, whether device-TLBs
/// are served or not.
#[test]
fn no_entry_may_be_transient() {
    const TRANSIENT: u64 = 1 << 62;
    for device_tlb in [false, true] {
        let machine = Machine::new(VtdUnitConfig { device_tlb, ..VtdUnitConfig::default() });
        let (root, iova) = (machine.table(), 0x12_3456_7000);
        map(&machine, root, 4, iova, 1, HIGH);
        machine.attach_second_stage(None, 1, root, 4);
        let read = || machine.read_u64(&mut machine.port(), PLAIN, iova);
        for level in 1..=4 {
            let entry = machine.entry(root, 4, iova, level, 0);
            let word = machine.peek(entry);
            machine.poke(entry, word | TRANSIENT);
            assert_eq!(read(), Err((FaultReason::SecondStageReserved, false)));
            machine.poke(entry, word);
        }
        assert_eq!(read(), Ok(0));
    }
}

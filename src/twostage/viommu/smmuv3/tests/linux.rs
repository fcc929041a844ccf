// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The behaviour of Linux's driver: in order, and when a stream table entry changes while
//! transactions use it (§3.21.3). Words are then written one by one, with a CMD_CFGI_STE and a
//! CMD_SYNC between those that an SMMU must not see together.

use proptest::prelude::*;

use super::*;

/// The driver waits for CR0ACK.
fn write_cr0(guest: &Guest, value: u32) {
    guest.write32(regs::CR0, value);
    assert_eq!(guest.read32(regs::CR0ACK), value);
}

/// The driver waits for a CMD_SYNC through CMDQ_CONS.
fn command_with_sync(guest: &Guest, command: Command) {
    guest.submit(&[command, SYNC]);
    assert_eq!(guest.consumed(), (guest.read32(regs::CMDQ_PROD), None));
}

#[test]
fn reset_and_the_life_of_a_device() {
    let guest = Guest::new(&SmmuConfig::default());
    // The firmware left nothing enabled.
    assert_eq!(guest.read32(regs::CR0) & 1, 0);
    write_cr0(&guest, 0);
    guest.write32(regs::IRQ_CTRL, 0);
    guest.write32(regs::CR1, 0xd75);
    guest.write32(regs::CR2, 0b110);
    // Every entry aborts until its device has a driver.
    for stream in [STREAM, OTHER] {
        guest.write_entry(stream, [1, 0]);
    }
    guest.write64(regs::STRTAB_BASE, 1 << 62 | STREAM_TABLE);
    guest.write32(regs::STRTAB_BASE_CFG, 4);
    guest.write64(regs::CMDQ_BASE, 1 << 62 | COMMANDS | 8);
    guest.write32(regs::CMDQ_PROD, 0);
    guest.write32(regs::CMDQ_CONS, 0);
    write_cr0(&guest, 0b1000);
    command_with_sync(&guest, CFGI_ALL);
    assert_eq!(guest.calls(), []);
    command_with_sync(&guest, Command::TlbiNsnhAll);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![Command::TlbiNsnhAll])]);
    guest.write64(regs::EVENTQ_BASE, 1 << 62 | EVENTS | 4);
    guest.write32(regs::EVENTQ_PROD, 0);
    guest.write32(regs::EVENTQ_CONS, 0);
    write_cr0(&guest, 0b1100);
    guest.set_interrupts();
    assert_eq!(guest.calls(), []);
    write_cr0(&guest, 0b1101);
    let abort = StreamPolicy::Abort;
    assert_eq!(guest.calls(), [Call::Configure(STREAM, abort), Call::Configure(OTHER, abort)]);

    // A device is attached: word 1 first, which changes nothing, then word 0.
    let [word0, word1] = stage1_entry(CONTEXTS);
    guest.write_entry(STREAM, [1, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), []);
    guest.write_entry(STREAM, [word0, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), [Call::Configure(STREAM, stage1(CONTEXTS))]);
    // Its context descriptor changes.
    let substream = crate::spec::pci::Pasid::new(0).unwrap();
    let cd = Command::CfgiCd { stream: STREAM, substream, leaf: true };
    command_with_sync(&guest, cd);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![cd])]);
    // Pages are unmapped.
    let pages: Vec<_> = (0..40).map(tlbi).collect();
    guest.submit(&[pages.as_slice(), &[SYNC]].concat());
    assert_eq!(guest.calls(), [Call::Invalidate(pages)]);
    // A fault is reported.
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
    assert_eq!(guest.interrupts(), [Interrupt::Message(1)]);
    // The device is detached.
    guest.write_entry(STREAM, [1, word1]);
    command_with_sync(&guest, cfgi_ste(STREAM));
    assert_eq!(guest.calls(), [Call::Configure(STREAM, abort)]);

    // The next kernel finds the SMMU enabled, and aborts through GBPA before it disables it.
    guest.write32(regs::GBPA, guest.read32(regs::GBPA) | 1 << 31 | 1 << 20);
    assert_eq!(guest.read32(regs::GBPA), 0x10_1000);
    write_cr0(&guest, 0);
    assert_eq!(guest.calls(), []);
    assert_eq!(guest.smmu.counters().guest_errors, 0);
    assert_eq!(guest.smmu.counters().host_errors, 0);
}

#[test]
fn a_wrong_command_is_replaced_by_a_sync() {
    let guest = Guest::running();
    guest.submit_words(&[tlbi(1).encode(), [0xfe, 7], tlbi(2).encode(), SYNC.encode()]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1)])]);
    // A new tail has no effect.
    guest.submit(&[SYNC]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    guest.write(COMMANDS + 16, &SYNC.encode());
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (5, None));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(2)])]);
}

#[test]
fn a_sync_can_write_its_own_place_in_the_queue() {
    let guest = Guest::running();
    let signal = SyncSignal::Interrupt { address: COMMANDS + 16, data: 0 };
    guest.submit(&[tlbi(1), Command::Sync { signal }]);
    // The low half of the first word, with the opcode.
    let word: u32 = guest.memory.read_obj(GuestAddress(COMMANDS + 16)).unwrap();
    assert_eq!((word, guest.consumed()), (0, (2, None)));
    assert_eq!(guest.interrupts(), []);
}

/// Bits of an entry that its configuration uses, by word.
fn used([word0, word1]: [u64; 2]) -> [u64; 2] {
    const V: u64 = 1;
    const CONFIG: u64 = 7 << 1;
    const STAGE1: [u64; 2] = [3 << 4 | 0xf_ffff_ffff_ffc0 | 31 << 59, 0xff | 1 << 27 | 3 << 28];
    const SHCFG: u64 = 3 << 44;
    match (word0 & V, (word0 & CONFIG) >> 1) {
        (0, _) => [V, 0],
        (_, 4) => [V | CONFIG, SHCFG],
        // With S1DSS bypass, the shareability is taken from here.
        (_, 5) if word1 & 3 == 1 => [V | CONFIG | STAGE1[0], STAGE1[1] | SHCFG],
        (_, 5) => [V | CONFIG | STAGE1[0], STAGE1[1]],
        _ => [V | CONFIG, 0],
    }
}

/// The entries that memory holds in sequence to turn `from` into `to`.
fn steps(from: [u64; 2], to: [u64; 2]) -> Vec<[u64; 2]> {
    let (in_use, wanted) = (used(from), used(to));
    let mut early = from;
    let mut critical = Vec::new();
    for word in 0..2 {
        early[word] = from[word] & in_use[word] | to[word] & !in_use[word];
        if early[word] & wanted[word] != to[word] & wanted[word] {
            critical.push(word);
        }
    }
    match critical[..] {
        [] => vec![to],
        // One word makes the difference: unused bits are set before it, and cleared after it.
        [word] => {
            early[word] = from[word];
            let mut switched = early;
            switched[word] = to[word];
            vec![early, switched, to]
        }
        _ => vec![[0, from[1]], [0, to[1]], to],
    }
}

/// An entry as the driver writes it for a device: off, bypass, or with one or many context
/// descriptors.
fn entry() -> impl Strategy<Value = [u64; 2]> {
    let contexts = (1u64..64, prop::sample::select(vec![0u64, 6, 16]), 0u64..3, 0u64..3);
    let stage1 = contexts.prop_map(|(table, bits, format, default)| {
        let (format, default) = if bits == 0 { (0, 0) } else { (format, default) };
        let shareability = if default == 1 { 1 << 44 } else { 0 };
        let word0 = bits << 59 | table << 12 | format << 4 | 5 << 1 | 1;
        [word0, shareability | 3 << 6 | 1 << 4 | 1 << 2 | default]
    });
    prop_oneof![1 => Just([1, 0]), 1 => Just([4 << 1 | 1, 1 << 44]), 4 => stage1]
}

/// The policy of the entry.
fn policy([word0, word1]: [u64; 2]) -> StreamPolicy {
    match word0 >> 1 & 7 {
        4 => StreamPolicy::Bypass,
        5 => StreamPolicy::Stage1 { ste: [word0, word1 & 0xff] },
        _ => StreamPolicy::Abort,
    }
}

fn guest() -> Guest {
    let guest = Guest::new(&SmmuConfig { substream_bits: Some(16), ..Default::default() });
    guest.start();
    guest.write_entry(STREAM, [1, 0]);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    guest.calls();
    guest
}

/// Changes the entry of [`STREAM`] step by step; returns the resulting host calls.
fn update(guest: &Guest, from: [u64; 2], to: [u64; 2]) -> Vec<StreamPolicy> {
    let mut before = from;
    for step in steps(from, to) {
        if step != before {
            guest.write_entry(STREAM, step);
            guest.submit(&[cfgi_ste(STREAM), SYNC]);
            before = step;
        }
    }
    let policies = guest.calls().into_iter().filter_map(|call| match call {
        Call::Configure(STREAM, policy) => Some(policy),
        Call::Configure(..) => panic!("no entry but one has changed"),
        // Context descriptors of an equivalent entry.
        Call::Invalidate(_) => None,
    });
    policies.collect()
}

#[test]
fn a_device_is_given_tables_without_a_gap() {
    let guest = guest();
    let one = stage1_entry(CONTEXTS);
    assert_eq!(update(&guest, [1, 0], BYPASS_ENTRY), [StreamPolicy::Bypass]);
    assert_eq!(update(&guest, BYPASS_ENTRY, one), [stage1(CONTEXTS)]);
    let other = stage1_entry(CONTEXTS + 0x1000);
    assert_eq!(update(&guest, one, other), [stage1(CONTEXTS + 0x1000)]);
    assert_eq!(update(&guest, other, BYPASS_ENTRY), [StreamPolicy::Bypass]);
}

proptest! {
    #[test]
    fn the_host_sees_the_old_entry_and_the_new_one_alone(
        entries in prop::collection::vec(entry(), 1..8),
    ) {
        let guest = guest();
        let mut from = [1, 0];
        for to in entries {
            let gap = steps(from, to).iter().any(|step| step[0] & 1 == 0);
            let mut expected = Vec::new();
            if gap && policy(from) != StreamPolicy::Abort {
                expected.push(StreamPolicy::Abort);
            }
            let last = expected.last().copied().unwrap_or(policy(from));
            if policy(to) != last {
                expected.push(policy(to));
            }
            prop_assert_eq!(update(&guest, from, to), expected);
            from = to;
        }
        // No intermediate step is a mistake of the guest.
        prop_assert_eq!(guest.take_event(), None);
        let counters = guest.smmu.counters();
        prop_assert_eq!((counters.guest_errors, counters.command_errors), (0, 0));
    }
}

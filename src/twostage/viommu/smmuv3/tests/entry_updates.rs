// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A stream table entry changes while transactions use it, as Linux's driver does it (§3.21.3):
//! words are written one by one, with a CMD_CFGI_STE and a CMD_SYNC between those that an SMMU must
//! not see together.

use proptest::prelude::*;

use super::*;

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

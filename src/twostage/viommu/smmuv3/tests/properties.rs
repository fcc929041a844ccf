// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whatever a guest does, and whichever host call fails, the SMMU responds.

use proptest::prelude::*;

use super::*;
use crate::viommu::testing::{any_access, AnyAccess};

fn words() -> impl Strategy<Value = Words> {
    let opcodes = prop::sample::select(vec![
        0x01u64, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10, 0x11, 0x12, 0x13, 0x28, 0x30, 0x40, 0x44, 0x46,
    ]);
    // Random words nearly always have a reserved opcode; these are often valid.
    let near = (opcodes, 0..16u64, any::<u32>(), any::<u64>()).prop_map(
        |(opcode, stream, fields, high)| {
            [opcode | u64::from(fields) << 8 & !(1 << 10) & 0xffff_ffff | stream << 32, high]
        },
    );
    prop_oneof![1 => any::<Words>(), 8 => near]
}

fn access() -> impl Strategy<Value = AnyAccess> {
    any_access(prop_oneof![0..0xe0u64, 0x1_00a0..0x1_00d0u64, 0..2 * regs::SIZE, any::<u64>()])
}

proptest! {
    #[test]
    fn a_queue_of_garbage_ends(
        commands in prop::collection::vec(words(), 1..128),
        acknowledgements in 0..40usize,
    ) {
        let guest = Guest::running();
        guest.submit_words(&commands);
        for _ in 0..acknowledgements {
            guest.acknowledge_errors();
            guest.smmu.drain_queue();
        }
        let (cons, error) = guest.consumed();
        prop_assert_eq!(error.is_none(), cons == guest.read32(regs::CMDQ_PROD));
    }

    #[test]
    fn any_accesses_are_answered(
        accesses in prop::collection::vec(access(), 0..64),
        memory in prop::collection::vec((0x800..0x1800u64, any::<u64>()), 0..64),
    ) {
        let guest = Guest::running();
        for (word, value) in memory {
            guest.write(8 * word, &[value]);
        }
        for access in accesses {
            guest.access(&access);
            let AnyAccess { offset, value, .. } = access;
            guest.smmu.event([value, offset, value, offset]);
            guest.smmu.event(translation_fault(STREAM).to_words());
        }
        // The host does everything: the guest's requests are acknowledged.
        let SmmuState { registers, faults: log, .. } = guest.smmu.snapshot().unwrap();
        prop_assert_eq!(registers.cr0, registers.cr0ack);
        prop_assert!(!registers.gbpa.update());
        prop_assert_eq!(log.events.enabled, registers.cr0.eventqen());
        prop_assert_eq!(guest.smmu.streams.all(), vec![STREAM, OTHER]);
        // The queue stops only if it is off or has an error.
        let queue = registers.cmdq_base.layout(16, 12);
        let empty = queue.is_empty(registers.cmdq_prod.wr(), registers.cmdq_cons.rd());
        prop_assert!(empty || !registers.cr0.cmdqen() || log.errors.active().cmdq_err());
    }

    #[test]
    fn any_entry_decides(
        entry in any::<[u64; 8]>(),
        valid in any::<bool>(),
        cfg in any::<u32>(),
        base in prop_oneof![Just(STREAM_TABLE), any::<u64>()],
    ) {
        let guest = Guest::new(&SmmuConfig::default());
        guest.write(STREAM_TABLE + 64 * 3, &entry);
        if valid {
            guest.write_entry(STREAM, [entry[0] | 1, entry[1]]);
        }
        guest.write_queue_registers();
        guest.write64(regs::STRTAB_BASE, base);
        guest.write32(regs::STRTAB_BASE_CFG, if valid { 4 } else { cfg });
        guest.write32(regs::CR0, 0b1101);
        prop_assert_eq!(guest.read32(regs::CR0ACK), 0b1101);
        // The applied policy is that of the table.
        let policy = guest.smmu.policy_by_tables(STREAM).unwrap();
        let given = guest.calls().into_iter().find_map(|call| match call {
            Call::Configure(STREAM, policy) => Some(policy),
            _ => None,
        });
        prop_assert_eq!(given, Some(policy));
    }
}

/// As Linux does: a wrong command is replaced with a CMD_SYNC. Whatever the host did, all is
/// consumed.
fn submit(guest: &Guest, commands: &[Command]) {
    guest.submit(commands);
    while let (index, Some(CommandError::Illegal)) = guest.consumed() {
        guest.write(COMMANDS + 16 * u64::from(index & 0xff), &SYNC.encode());
        guest.acknowledge_errors();
    }
    assert_eq!(guest.consumed(), (guest.read32(regs::CMDQ_PROD), None));
}

/// Enables, serves, changes, invalidates and disables.
fn life(guest: &Guest) {
    guest.start_recording();
    submit(guest, &[CFGI_ALL, Command::TlbiNsnhAll, SYNC]);
    guest.write_entry(STREAM, stage1_entry(0x7000));
    submit(guest, &[cfgi_ste(STREAM), tlbi(1), tlbi(2), SYNC]);
    submit(guest, &[cfgi_ste(STREAM), SYNC]);
    guest.smmu.add_stream(StreamId(5));
    guest.smmu.remove_stream(StreamId(5));
    submit(guest, &[cfgi_cd_all(STREAM), SYNC]);
    // What failed is served again, once the guest announces a change of the entry.
    submit(guest, &[CFGI_ALL, SYNC]);
    while guest.take_event().is_some() {}
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
    guest.write_entry(STREAM, [0, 0]);
    submit(guest, &[cfgi_ste(STREAM), SYNC]);
    while guest.take_event().is_some() {}
    assert_eq!(guest.told(STREAM), Some(EventId::BadSte));
    guest.write32(regs::CR0, 0b1100);
    assert_eq!(guest.read32(regs::CR0ACK), 0b1100);
}

impl Guest {
    /// [`Guest::start`], keeping the recorded calls.
    fn start_recording(&self) {
        self.write_entry(STREAM, stage1_entry(CONTEXTS));
        self.write_entry(OTHER, BYPASS_ENTRY);
        self.write_table_registers();
        self.write_queue_registers();
        self.write32(regs::CR0, 0b1101);
        assert_eq!(self.read32(regs::CR0ACK), 0b1101);
    }
}

#[test]
fn each_failure_is_counted_told_and_survived() {
    for failing in 0.. {
        let guest = Guest::new(&SmmuConfig::default());
        guest.host.refusals.after(failing);
        life(&guest);
        let calls = guest.calls();
        let counters = guest.smmu.counters();
        let Some(call) = calls.get(failing as usize) else {
            assert_eq!((counters.host_errors, counters.command_errors), (0, 0));
            assert!(failing > 10, "{calls:?}");
            return;
        };
        assert_eq!(counters.host_errors, 1, "{call:?}");
        let command_errors = u64::from(matches!(call, Call::Invalidate(_)));
        assert_eq!(counters.command_errors, command_errors, "{call:?}");
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A life of the SMMU in which each host call fails in turn.

use super::*;

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

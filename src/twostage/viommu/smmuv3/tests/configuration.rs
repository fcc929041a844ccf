// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Streams: their policies, and when the guest is told that they are applied.

use super::*;

const ABORT: StreamPolicy = StreamPolicy::Abort;
const BYPASS: StreamPolicy = StreamPolicy::Bypass;
const GLOBAL_BYPASS: StreamPolicy = StreamPolicy::GlobalBypass;

#[test]
fn streams_pass_until_translation_is_enabled() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.smmu.add_device(StreamId(5)).unwrap();
    assert_eq!(guest.calls(), [Call::Configure(StreamId(5), GLOBAL_BYPASS)]);
    // It exists already.
    guest.smmu.add_device(StreamId(5)).unwrap();
    assert_eq!(guest.calls(), []);
    guest.smmu.remove_device(StreamId(5));
    guest.smmu.remove_device(StreamId(5));
    assert_eq!(guest.calls(), [Call::Configure(StreamId(5), ABORT)]);
    assert_eq!(guest.smmu.streams.all(), [STREAM, OTHER]);
}

#[test]
fn without_a_table_every_stream_is_blocked() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write64(regs::STRTAB_BASE, MEMORY_SIZE);
    guest.write32(regs::STRTAB_BASE_CFG, 16);
    guest.write32(regs::CR0, 1);
    assert_eq!(guest.read32(regs::CR0ACK), 1);
    assert_eq!(guest.calls(), [Call::Configure(STREAM, ABORT), Call::Configure(OTHER, ABORT)]);
    assert_eq!(guest.smmu.policy_by_tables(STREAM), Some(ABORT));
}

#[test]
fn enabling_is_acknowledged_when_the_host_has_it() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write_entry(STREAM, stage1_entry(CONTEXTS));
    guest.write_entry(OTHER, [1, 0]);
    guest.write_table_registers();
    // The host supports neither, and keeps letting them pass.
    guest.fail_to_block(true);
    guest.write32(regs::CR0, 1);
    assert_eq!((guest.read32(regs::CR0), guest.read32(regs::CR0ACK)), (1, 0));
    // The table is fixed all the same.
    guest.write64(regs::STRTAB_BASE, 0);
    assert_eq!(guest.read64(regs::STRTAB_BASE), STREAM_TABLE);
    guest.fail_to_block(false);
    guest.calls();
    guest.write32(regs::CR0, 1);
    assert_eq!(guest.read32(regs::CR0ACK), 1);
    assert_eq!(
        guest.calls(),
        [Call::Configure(STREAM, stage1(CONTEXTS)), Call::Configure(OTHER, ABORT)]
    );
    // Nor is disabling.
    guest.fail_to_block(true);
    guest.write32(regs::CR0, 0);
    assert_eq!((guest.read32(regs::CR0), guest.read32(regs::CR0ACK)), (0, 1));
    guest.fail_to_block(false);
    guest.write32(regs::CR0, 0);
    assert_eq!(guest.read32(regs::CR0ACK), 0);
}

#[test]
fn an_enable_that_is_given_up_is_undone() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write_entry(STREAM, stage1_entry(CONTEXTS));
    guest.write_entry(OTHER, BYPASS_ENTRY);
    guest.write_table_registers();
    guest.fail_to_block(true);
    guest.write32(regs::CR0, 1);
    guest.fail_to_block(false);
    guest.calls();
    guest.write32(regs::CR0, 0);
    assert_eq!((guest.read32(regs::CR0ACK), guest.smmu.policy_by_tables(STREAM)), (0, None));
    let global = [STREAM, OTHER].map(|stream| Call::Configure(stream, GLOBAL_BYPASS));
    assert_eq!(guest.calls(), global);
}

#[test]
fn a_stream_that_the_host_refuses_is_blocked_and_told() {
    let guest = Guest::running();
    guest.write_entry(STREAM, stage1_entry(0x7000));
    guest.refuse(true);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    // It took effect: the stream is blocked.
    assert_eq!(guest.consumed(), (2, None));
    assert_eq!(guest.take_event().unwrap(), EventRecord::new(EventId::BadSte, STREAM, None));
    assert_eq!(guest.told(STREAM), Some(EventId::BadSte));
    // It is retried, and reported only once.
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    assert_eq!(guest.take_event(), None);
    guest.refuse(false);
    guest.calls();
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    assert_eq!(guest.calls(), [Call::Configure(STREAM, stage1(0x7000))]);
    assert_eq!(guest.told(STREAM), Some(EventId::Translation));
}

#[test]
fn a_command_names_its_streams() {
    let guest = Guest::running();
    let configured = |command| {
        // Both change.
        let ids = guest.smmu.counters().evaluations;
        for stream in [STREAM, OTHER] {
            guest.write_entry(stream, stage1_entry(0x1_0000 + ids * 64));
        }
        guest.submit(&[command, SYNC]);
        let calls = guest.calls().into_iter().map(|call| match call {
            Call::Configure(stream, _) => stream,
            Call::Invalidate(_) => panic!("{call:?}"),
        });
        calls.collect::<Vec<_>>()
    };
    let range = |stream, range| Command::CfgiSteRange { stream: StreamId(stream), range };
    assert_eq!(configured(cfgi_ste(STREAM)), [STREAM]);
    assert_eq!(configured(cfgi_ste(StreamId(9))), []);
    assert_eq!(configured(CFGI_ALL), [STREAM, OTHER]);
    // 2 and 3; 0 to 7; 8 to 15.
    assert_eq!(configured(range(2, 0)), [STREAM]);
    assert_eq!(configured(range(7, 2)), [STREAM, OTHER]);
    assert_eq!(configured(range(8, 2)), []);
    assert_eq!(configured(range(0, 30)), [STREAM, OTHER]);
}

#[test]
fn an_unchanged_entry_costs_no_configuration_but_its_context_descriptors_are_read_anew() {
    let guest = Guest::running();
    guest.submit(&[cfgi_ste(STREAM), cfgi_ste(OTHER), SYNC]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![cfgi_cd_all(STREAM)])]);
    // Meaningless bits are not a change.
    guest.write_entry(STREAM, [stage1_entry(CONTEXTS)[0], 0xf << 20]);
    guest.submit(&[CFGI_ALL, SYNC]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![cfgi_cd_all(STREAM)])]);
    // The host cannot do it: not acknowledged.
    guest.refuse(true);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    let (cons, error) = guest.consumed();
    assert_eq!((cons, error), (5, Some(CommandError::Illegal)));
}

#[test]
fn entries_are_not_read_while_translation_is_disabled() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write_entry(STREAM, stage1_entry(CONTEXTS));
    guest.write_table_registers();
    guest.write_queue_registers();
    guest.write32(regs::CR0, 0b1000);
    guest.submit(&[cfgi_ste(STREAM), CFGI_ALL, SYNC]);
    assert_eq!((guest.calls(), guest.consumed()), (vec![], (3, None)));
    assert_eq!(guest.smmu.counters().evaluations, 0);
}

#[test]
fn a_stream_that_comes_later_goes_by_its_entry() {
    let guest = Guest::running();
    let late = StreamId(5);
    guest.write_entry(late, stage1_entry(0x7000));
    guest.smmu.add_device(late).unwrap();
    assert_eq!(guest.calls(), [Call::Configure(late, stage1(0x7000))]);
    assert_eq!(guest.smmu.policy_by_tables(late), Some(stage1(0x7000)));
    guest.smmu.remove_device(late);
    assert_eq!(guest.calls(), [Call::Configure(late, ABORT)]);
    assert_eq!(guest.smmu.policy_by_tables(late), None);
}

#[test]
fn tables_may_be_ahead_of_what_was_given() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BYPASS_ENTRY);
    assert_eq!(guest.smmu.policy_by_tables(STREAM), Some(BYPASS));
    assert_eq!(guest.calls(), []);
    guest.submit(&[SYNC]);
    assert_eq!(guest.calls(), []);
}

#[test]
fn a_two_level_table_is_followed() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write(0x1_0000, &[STREAM_TABLE | 5, 0]);
    guest.write_entry(STREAM, stage1_entry(CONTEXTS));
    guest.write_entry(OTHER, BYPASS_ENTRY);
    guest.write64(regs::STRTAB_BASE, 0x1_0000);
    guest.write32(regs::STRTAB_BASE_CFG, 1 << 16 | 8 << 6 | 9);
    guest.write32(regs::CR0, 1);
    assert_eq!(
        guest.calls(),
        [Call::Configure(STREAM, stage1(CONTEXTS)), Call::Configure(OTHER, BYPASS)]
    );
}

#[test]
fn a_wrong_entry_is_told_once_when_its_command_comes() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BAD_ENTRY);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    assert_eq!(guest.calls(), [Call::Configure(STREAM, ABORT)]);
    assert_eq!(guest.take_event().unwrap(), EventRecord::new(EventId::BadSte, STREAM, None));
    guest.submit(&[cfgi_ste(STREAM), CFGI_ALL, SYNC]);
    assert_eq!(guest.take_event(), None);
}

#[test]
fn streams_that_are_kept_off_are_not_told_of() {
    let guest = Guest::running();
    // No valid entry, and a command that names all streams.
    guest.write_entry(STREAM, [0, 0]);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    guest.write_entry(OTHER, BAD_ENTRY);
    guest.submit(&[CFGI_ALL, SYNC]);
    assert_eq!(guest.take_event(), None);
    // If the host reports their transactions, the guest is told all the same.
    assert_eq!(guest.told(STREAM), Some(EventId::BadSte));
    assert_eq!(guest.told(OTHER), Some(EventId::BadSte));
}

#[test]
fn what_the_host_refuses_for_one_stream_leaves_no_context_of_another_stale() {
    let guest = Guest::running();
    guest.write_entry(OTHER, stage1_entry(0x7000));
    guest.submit(&[cfgi_ste(OTHER), SYNC]);
    guest.calls();
    // STREAM keeps a revoked mapping; OTHER's entry is unchanged.
    guest.write_entry(STREAM, [1, 0]);
    guest.host.refusals.block_nothing(true);
    guest.host.refusals.after(0);
    guest.submit(&[CFGI_ALL]);
    let contexts = cfgi_cd_all(OTHER);
    assert_eq!(guest.calls(), [Call::Configure(STREAM, ABORT), Call::Invalidate(vec![contexts])]);
    assert_eq!(guest.consumed().1, Some(CommandError::Illegal));
}

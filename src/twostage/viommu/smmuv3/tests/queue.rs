// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command queue.

use super::*;
use crate::spec::pci::Pasid;
use crate::spec::smmuv3::queue::CmdqProd;

#[test]
fn invalidations_are_one_call_up_to_a_sync() {
    let guest = Guest::running();
    let asid = Command::TlbiNhAsid { vmid: 0, asid: 7 };
    guest.submit(&[tlbi(1), asid, cfgi_cd_all(STREAM), SYNC, tlbi(2), tlbi(3), SYNC, tlbi(4)]);
    assert_eq!(
        guest.calls(),
        [
            Call::Invalidate(vec![tlbi(1), asid, cfgi_cd_all(STREAM)]),
            Call::Invalidate(vec![tlbi(2), tlbi(3)]),
            Call::Invalidate(vec![tlbi(4)]),
        ]
    );
    assert_eq!(guest.consumed(), (8, None));
    let counters = guest.smmu.counters();
    assert_eq!((counters.batches, counters.invalidations), (3, 6));
    assert_eq!((counters.tlbi_nh_va, counters.tlbi_nh_asid), (4, 1));
    assert_eq!((counters.cfgi_cd_all, counters.sync), (1, 2));
}

#[test]
fn every_invalidation_is_done_before_a_change_of_configuration() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BYPASS_ENTRY);
    guest.submit(&[tlbi(1), cfgi_ste(STREAM), tlbi(2), SYNC]);
    assert_eq!(
        guest.calls(),
        [
            Call::Invalidate(vec![tlbi(1)]),
            Call::Configure(STREAM, StreamPolicy::Bypass),
            Call::Invalidate(vec![tlbi(2)]),
        ]
    );
}

#[test]
fn the_queue_wraps() {
    let guest = Guest::running();
    // 256 entries: full, then twice as much in pieces.
    let all: Vec<_> = (0..256).map(tlbi).collect();
    guest.submit(&all);
    assert_eq!(guest.calls(), [Call::Invalidate(all.clone())]);
    assert_eq!(guest.consumed(), (256, None));
    for start in [0, 100, 200] {
        let some = &all[start..][..40];
        guest.submit(some);
        assert_eq!(guest.calls(), [Call::Invalidate(some.to_vec())]);
    }
    guest.submit(&all[..200]);
    assert_eq!(guest.consumed(), ((256 + 120 + 200) & 0x1ff, None));
}

/// The lengths of the host calls for 4096 times `command`.
fn calls_of(command: Command) -> Vec<usize> {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write64(regs::CMDQ_BASE, 0x2_0000 | 12);
    for index in 0..4096 {
        guest.write(0x2_0000 + 16 * index, &command.encode());
    }
    guest.write32(regs::CR0, 0b1000);
    guest.write32(regs::CMDQ_PROD, 4096);
    let calls = guest.calls();
    assert_eq!(guest.consumed(), (4096, None));
    calls
        .iter()
        .map(|call| match call {
            Call::Invalidate(batch) => batch.len(),
            Call::Configure(..) => panic!("{call:?}"),
        })
        .collect()
}

#[test]
fn a_long_queue_is_cut_into_calls() {
    assert_eq!(calls_of(tlbi(1)), [256; 16]);
    // Commands that may make a host search its whole cache.
    assert_eq!(calls_of(Command::TlbiNhAsid { vmid: 0, asid: 1 }), [64; 64]);
    assert_eq!(calls_of(Command::TlbiNhAll { vmid: 0 }), [64; 64]);
    let pages = |num, scale| {
        let range = AddressRange { tg: 1, num, scale, ..AddressRange::at(0) };
        Command::TlbiNhVaa { vmid: 0, range }
    };
    assert_eq!(calls_of(pages(31, 2)), [64; 64]);
    assert_eq!(calls_of(pages(31, 1)), [256; 16]);
}

#[test]
fn indices_that_no_queue_can_have_end_all_the_same() {
    let guest = Guest::running();
    for index in 0..256 {
        guest.write(COMMANDS + 16 * index, &SYNC.encode());
    }
    // One before CMDQ_CONS: 511 commands in a queue of 256.
    guest.write32(regs::CMDQ_PROD, 0x1ff);
    assert_eq!((guest.consumed(), guest.smmu.counters().sync), ((0x1ff, None), 511));
    // Index bits above the size of the queue are ignored.
    guest.write32(regs::CMDQ_PROD, 0xf_fe01);
    assert_eq!((guest.consumed(), guest.smmu.counters().sync), ((1, None), 513));
}

#[test]
fn each_wrong_command_stops_the_queue_at_itself() {
    let range = |tg, num| AddressRange { tg, num, ..AddressRange::at(0) };
    let wrong = [
        [0, 0],
        [u64::MAX, u64::MAX],
        [0x07, 0],
        // For a Secure stream.
        [0x03 | 1 << 10, 0],
        [0x46 | 3 << 12, 0],
        // Not offered.
        Command::TlbiEl2All.encode(),
        Command::TlbiEl2Asid { asid: 1 }.encode(),
        Command::TlbiEl2Va { asid: 1, range: range(0, 0) }.encode(),
        Command::TlbiEl2Vaa { range: range(0, 0) }.encode(),
        Command::TlbiS12Vmall { vmid: 1 }.encode(),
        Command::TlbiS2Ipa { vmid: 1, range: range(0, 0) }.encode(),
        Command::AtcInv { stream: STREAM, substream: None, global: false, address: 0, size: 52 }
            .encode(),
        Command::PriResp { stream: STREAM, substream: None, group: 0, response: 2 }.encode(),
        Command::Resume { stream: STREAM, stag: 0, response: 1 }.encode(),
        Command::StallTerm { stream: STREAM }.encode(),
        // A range of one granule and no level.
        Command::TlbiNhVa { vmid: 0, asid: 1, range: range(1, 0) }.encode(),
    ];
    for words in wrong {
        let guest = Guest::running();
        guest.submit_words(&[tlbi(1).encode(), words, SYNC.encode()]);
        assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)), "{words:x?}");
        // Commands before it were done, those after it not looked at.
        assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1)])]);
        assert_eq!(guest.smmu.counters().sync, 0);
        assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
        // A valid command in its place, and the error acknowledged.
        guest.write(COMMANDS + 16, &tlbi(2).encode());
        guest.acknowledge_errors();
        assert_eq!(guest.consumed(), (3, None));
        assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(2)])]);
        assert_eq!(guest.smmu.counters().command_errors, 1);
    }
}

#[test]
fn an_error_that_is_not_removed_comes_again() {
    let guest = Guest::running();
    guest.submit_words(&[[0xff, 0]]);
    for times in 1..4 {
        assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
        assert_eq!(guest.interrupts(), [Interrupt::Message(2)]);
        assert_eq!(guest.smmu.counters().command_errors, times);
        guest.acknowledge_errors();
    }
}

#[test]
fn ranges_need_their_feature() {
    let range = AddressRange { tg: 1, num: 7, scale: 3, ..AddressRange::at(0x7000) };
    let ranged = [
        Command::TlbiNhVa { vmid: 0, asid: 1, range },
        Command::TlbiNhVaa { vmid: 0, range: AddressRange { ttl: 3, ..range } },
    ];
    let guest = Guest::running();
    guest.submit(&ranged);
    assert_eq!(guest.calls(), [Call::Invalidate(ranged.to_vec())]);
    let config = SmmuConfig { range_invalidation: false, ..Default::default() };
    for command in ranged {
        let guest = Guest::new(&config);
        guest.start();
        guest.submit(&[command]);
        assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
        assert_eq!(guest.calls(), []);
    }
}

#[test]
fn device_caches_are_invalidated_where_ats_is_offered() {
    let guest = Guest::new(&SmmuConfig { ats: true, ..Default::default() });
    guest.start();
    let of = |stream| Command::AtcInv {
        stream,
        substream: Pasid::new(3),
        global: true,
        address: 0x7000,
        size: 52,
    };
    // The host does not know a removed stream.
    guest.submit(&[of(STREAM), of(StreamId(9)), SYNC]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![of(STREAM)])]);
    assert_eq!(guest.consumed(), (3, None));
}

#[test]
fn the_sync_behind_a_device_that_does_not_answer_stops_the_queue_once() {
    let guest = Guest::new(&SmmuConfig { ats: true, ..Default::default() });
    guest.start();
    let (substream, global, address, size) = (None, false, 0, 52);
    let atc = Command::AtcInv { stream: STREAM, substream, global, address, size };
    let stopped = Some(CommandError::AtcInvSync);
    guest.host.silent.store(true, Ordering::Relaxed);
    guest.submit(&[atc, SYNC, SYNC]);
    assert_eq!(guest.consumed(), (1, stopped));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![atc])]);
    guest.acknowledge_errors();
    assert_eq!((guest.consumed(), guest.calls()), ((3, None), vec![]));
    // A sync that comes later says so, too.
    guest.submit(&[atc]);
    assert_eq!(guest.consumed(), (4, None));
    guest.host.silent.store(false, Ordering::Relaxed);
    guest.submit(&[atc, SYNC]);
    assert_eq!(guest.consumed(), (5, stopped));
}

#[test]
fn hints_and_streams_that_are_not_here_cost_nothing() {
    let guest = Guest::running();
    guest.submit(&[
        Command::PrefetchConfig { stream: STREAM, substream: None },
        Command::PrefetchAddr { stream: STREAM, substream: None, address: 0, size: 0, stride: 0 },
        cfgi_ste(StreamId(7)),
        cfgi_cd_all(StreamId(u32::MAX)),
        SYNC,
    ]);
    assert_eq!((guest.calls(), guest.consumed()), (vec![], (5, None)));
    assert_eq!(guest.smmu.counters().prefetch, 2);
}

#[test]
fn a_queue_outside_memory_is_an_abort() {
    for base in [MEMORY_SIZE, 0x000f_ffff_ffff_f000] {
        let guest = Guest::new(&SmmuConfig::default());
        guest.write64(regs::CMDQ_BASE, base | 8);
        guest.write32(regs::CR0, 0b1000);
        guest.write32(regs::CMDQ_PROD, 2);
        assert_eq!(guest.consumed(), (0, Some(CommandError::Abort)));
        // It is retried.
        guest.acknowledge_errors();
        assert_eq!(guest.consumed(), (0, Some(CommandError::Abort)));
        assert_eq!(guest.smmu.counters().command_errors, 2);
    }
}

#[test]
fn what_stands_in_memory_is_done_before_an_abort() {
    let guest = Guest::new(&SmmuConfig::default());
    let base = MEMORY_SIZE - 16;
    // The second entry of a queue of 2 at `base` would be outside memory, but a base is aligned to
    // the queue's size: with that, both entries are inside.
    guest.write64(regs::CMDQ_BASE, base & !31 | 1);
    guest.write(base & !31, &tlbi(1).encode());
    guest.write(base, &tlbi(2).encode());
    guest.write32(regs::CR0, 0b1000);
    guest.write32(regs::CMDQ_PROD, 2);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1), tlbi(2)])]);
}

#[test]
fn a_refused_command_is_where_the_queue_stops() {
    let guest = Guest::running();
    guest.refuse(true);
    *guest.host.refused.lock() = 2;
    guest.submit(&[tlbi(1), Command::CfgiCdAll { stream: StreamId(9) }, tlbi(2), tlbi(3), SYNC]);
    // The second command is not the host's: its third is the fourth here.
    assert_eq!(guest.consumed(), (3, Some(CommandError::Illegal)));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1), tlbi(2), tlbi(3)])]);
    let counters = guest.smmu.counters();
    assert_eq!((counters.host_errors, counters.command_errors), (1, 1));
    // Linux puts a CMD_SYNC there. What the host blocked because of the failure is given again.
    guest.refuse(false);
    guest.write(COMMANDS + 48, &SYNC.encode());
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (5, None));
    assert_eq!(
        guest.calls(),
        [Call::Configure(STREAM, stage1(CONTEXTS)), Call::Configure(OTHER, StreamPolicy::Abort)]
    );
    guest.submit(&[SYNC]);
    assert_eq!(guest.calls(), []);
}

#[test]
fn a_refusal_that_is_made_good_is_shown_and_costs_nobody_the_stream() {
    let guest = Guest::running();
    guest.host.flushes.store(true, Ordering::Relaxed);
    guest.host.refusals.after(0);
    guest.submit(&[cfgi_cd_all(StreamId(9)), tlbi(1), tlbi(2), SYNC]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1), tlbi(2)])]);
    let counters = guest.smmu.counters();
    assert_eq!((counters.host_errors, counters.command_errors), (1, 1));
    // The queue waits for the acknowledgement; then none of the commands is skipped.
    guest.submit(&[SYNC]);
    assert_eq!(guest.calls(), []);
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (5, None));
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1), tlbi(2)])]);
}

#[test]
fn a_refusal_that_is_made_good_is_none_of_a_command_that_asked_for_something_else() {
    let guest = Guest::running();
    guest.host.flushes.store(true, Ordering::Relaxed);
    guest.refuse(true);
    // The entry is unchanged: its cached context descriptors are invalidated.
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![cfgi_cd_all(STREAM)])]);
    assert_eq!(guest.consumed(), (2, None));
    assert_eq!(guest.smmu.counters().host_errors, 1);
}

#[test]
fn a_refusal_of_what_is_not_in_the_batch_is_one_of_its_first() {
    let guest = Guest::running();
    guest.refuse(true);
    *guest.host.refused.lock() = 99;
    guest.submit(&[cfgi_cd_all(StreamId(9)), tlbi(1), tlbi(2), SYNC]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
}

#[test]
fn what_the_host_cannot_block_stops_the_queue_and_is_tried_again() {
    let guest = Guest::running();
    guest.write_entry(STREAM, [1, 0]);
    guest.fail_to_block(true);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    for _ in 0..3 {
        assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
        assert_eq!(guest.calls(), [Call::Configure(STREAM, StreamPolicy::Abort)]);
        guest.acknowledge_errors();
    }
    guest.fail_to_block(false);
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (2, None));
}

#[test]
fn no_sync_completes_while_a_stream_has_what_the_guest_took_back() {
    let guest = Guest::running();
    guest.write_entry(STREAM, [1, 0]);
    guest.fail_to_block(true);
    guest.submit(&[cfgi_ste(STREAM), SYNC]);
    // As Linux does: it drops the command, but not its purpose.
    guest.write(COMMANDS, &SYNC.encode());
    for _ in 0..3 {
        guest.acknowledge_errors();
        assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    }
    guest.fail_to_block(false);
    guest.calls();
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (2, None));
    assert_eq!(guest.calls(), [Call::Configure(STREAM, StreamPolicy::Abort)]);
}

#[test]
fn an_error_is_never_behind_the_last_command() {
    let guest = Guest::running();
    guest.refuse(true);
    guest.submit(&[tlbi(1)]);
    guest.write(COMMANDS, &Command::PrefetchConfig { stream: STREAM, substream: None }.encode());
    guest.fail_to_block(true);
    guest.acknowledge_errors();
    // A hint does not wait for anything.
    assert_eq!(guest.consumed(), (1, None));
    // The next command does, and the queue stops there.
    guest.submit(&[tlbi(2)]);
    assert_eq!(guest.consumed(), (1, Some(CommandError::Illegal)));
    guest.fail_to_block(false);
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (2, None));
}

#[test]
fn what_the_host_cannot_give_back_stops_the_queue_at_the_next_command() {
    let guest = Guest::running();
    guest.refuse(true);
    guest.submit(&[tlbi(1)]);
    assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    guest.fail_to_block(true);
    guest.write(COMMANDS, &SYNC.encode());
    guest.calls();
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (0, Some(CommandError::Illegal)));
    guest.fail_to_block(false);
    guest.acknowledge_errors();
    assert_eq!(guest.consumed(), (1, None));
}

#[test]
fn a_disabled_queue_takes_indices_and_nothing_else() {
    let guest = Guest::running();
    guest.write32(regs::CR0, 0b0101);
    guest.submit(&[tlbi(1), SYNC]);
    assert_eq!((guest.calls(), guest.consumed()), (vec![], (0, None)));
    guest.write32(regs::CR0, 0b1101);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1)])]);
    guest.write32(regs::CR0, 0b0101);
    // From elsewhere.
    guest.write32(regs::CMDQ_CONS, 0x10);
    guest.write32(regs::CMDQ_PROD, 0x10);
    guest.submit(&[tlbi(2)]);
    guest.write32(regs::CR0, 0b1101);
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(2)])]);
    assert_eq!(guest.consumed(), (0x11, None));
}

#[test]
fn the_registers_are_let_go_at_each_sync_and_change_of_configuration() {
    let guest = Guest::running();
    let queued = [tlbi(1), SYNC, cfgi_ste(STREAM), tlbi(2), CFGI_ALL, SYNC, tlbi(3)];
    let prod = guest.queue_words(&queued.map(|command| command.encode()));
    guest.smmu.lock().cmdq_prod = CmdqProd::new().with_wr(prod);
    for cons in [2, 3, 5, 6] {
        assert_eq!(guest.smmu.run_slice(&mut guest.smmu.lock()), Slice::More);
        assert_eq!(guest.consumed(), (cons, None));
    }
    assert_eq!(guest.smmu.run_slice(&mut guest.smmu.lock()), Slice::Done);
    assert_eq!(guest.consumed(), (7, None));
}

#[test]
fn a_halted_smmu_leaves_the_rest_of_the_queue() {
    let guest = Guest::running();
    *guest.host.halting.lock() = Some(guest.smmu.clone());
    let word = SyncSignal::Interrupt { address: WORD, data: 1 };
    guest.submit(&[tlbi(1), Command::Sync { signal: word }, tlbi(2), SYNC]);
    *guest.host.halting.lock() = None;
    // The invalidation is complete, the CMD_SYNC is not.
    assert_eq!(guest.calls(), [Call::Invalidate(vec![tlbi(1)])]);
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(WORD)).unwrap(), 0);
    assert_eq!(guest.consumed(), (1, None));
    guest.submit(&[SYNC]);
    assert_eq!(guest.consumed(), (1, None));
}

#[test]
fn a_halted_smmu_leaves_the_rest_of_the_streams() {
    let guest = Guest::running();
    guest.write_entry(STREAM, BYPASS_ENTRY);
    guest.write_entry(OTHER, BYPASS_ENTRY);
    *guest.host.halting.lock() = Some(guest.smmu.clone());
    guest.submit(&[CFGI_ALL, SYNC]);
    *guest.host.halting.lock() = None;
    assert_eq!(guest.calls(), [Call::Configure(STREAM, StreamPolicy::Bypass)]);
    // Not acknowledged, and not an error of the guest.
    assert_eq!((guest.consumed(), guest.errors()), ((0, None), 0));
}

#[test]
fn threads_that_drain_the_queue_at_once_share_it() {
    let guest = Guest::running();
    let words: Vec<_> = (0..100).flat_map(|asid| [tlbi(asid).encode(), SYNC.encode()]).collect();
    let prod = guest.queue_words(&words);
    guest.smmu.lock().cmdq_prod = CmdqProd::new().with_wr(prod);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| guest.smmu.drain_queue());
        }
    });
    assert_eq!((guest.consumed(), guest.calls().len()), ((200, None), 100));
}

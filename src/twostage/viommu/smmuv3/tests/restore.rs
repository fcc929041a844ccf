// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot, restore on a new host, and reset.

use super::*;
use crate::spec::smmuv3::regs::Cr0;
use crate::viommu::{RestoreError, SnapshotError};

/// Behind the SMMU besides [`STREAM`] and [`OTHER`], with a wrong entry.
const WRONG: StreamId = StreamId(5);
const ABORT: StreamPolicy = StreamPolicy::Abort;

/// Damage to a state.
type Change<'a> = &'a dyn Fn(&mut SmmuState);

impl Guest {
    /// The guest on a new SMMU and host, in the same memory. The state goes through JSON, where
    /// that is possible.
    pub(super) fn restored(&self, state: &SmmuState) -> Result<Self, RestoreError> {
        #[cfg(feature = "serde")]
        let state = &serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap();
        self.restored_on(Arc::default(), state)
    }

    /// The same with a host, and with another copy of memory.
    pub(super) fn restored_with(
        &self,
        host: Arc<FakeHost>,
        memory: GuestMemoryMmap,
        state: &SmmuState,
    ) -> Result<Self, RestoreError> {
        let interrupts = Arc::new(FakeInterrupts::default());
        let tables = Arc::new(memory.clone());
        let smmu = Smmu::restore(state, tables, host.clone(), interrupts.clone(), None)?;
        Ok(Self { memory, host, interrupts, smmu })
    }

    fn restored_on(&self, host: Arc<FakeHost>, state: &SmmuState) -> Result<Self, RestoreError> {
        self.restored_with(host, self.memory.clone(), state)
    }

    /// Of both pages, all that are not reserved.
    pub(super) fn every_register(&self) -> Vec<u64> {
        let pages = [0, 0x1_0000].map(|page| page..page + 0x200);
        pages.into_iter().flatten().step_by(8).map(|offset| self.read64(offset)).collect()
    }

    /// Three streams: with stage 1, blocked and wrong. [`OTHER`]'s entry is another by now, but the
    /// guest has not announced that.
    fn lived() -> Self {
        let guest = Self::running();
        guest.smmu.add_device(WRONG).unwrap();
        guest.write_entry(WRONG, BAD_ENTRY);
        guest.submit(&[cfgi_ste(WRONG), SYNC]);
        guest.write_entry(OTHER, stage1_entry(0x7000));
        guest.calls();
        guest
    }

    fn configure_calls(stage1_of_other: bool) -> [Call; 3] {
        let other = if stage1_of_other { stage1(0x7000) } else { ABORT };
        [
            Call::Configure(STREAM, stage1(CONTEXTS)),
            Call::Configure(OTHER, other),
            Call::Configure(WRONG, ABORT),
        ]
    }
}

#[test]
fn a_new_host_is_given_the_decisions_of_then_and_nothing_else() {
    let guest = Guest::lived();
    let state = guest.smmu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.calls(), Guest::configure_calls(false));
    assert_eq!(restored.every_register(), guest.every_register());
    assert_eq!(restored.smmu.snapshot().unwrap(), state);
    assert_eq!((restored.smmu.counters().policies, restored.interrupts()), (3, vec![]));
    // The earlier event is still there, and the reason of the block is still known.
    assert_eq!(restored.take_event().map(|event| event.stream()), Some(WRONG));
    assert_eq!(restored.told(WRONG), Some(EventId::BadSte));
    assert_eq!(restored.told(STREAM), Some(EventId::Translation));
    // What the guest announces again is not a new mistake; what it announces first is followed.
    restored.submit(&[cfgi_ste(WRONG), cfgi_ste(OTHER), SYNC]);
    assert_eq!(restored.take_event(), None);
    assert_eq!(restored.calls(), [Call::Configure(OTHER, stage1(0x7000))]);
    assert_eq!(restored.consumed(), (restored.read32(regs::CMDQ_PROD), None));
}

#[test]
fn an_unknown_stream_is_recorded_as_before() {
    for recording in [false, true] {
        let guest = Guest::new(&SmmuConfig::default());
        guest.smmu.add_device(StreamId(0x100)).unwrap();
        guest.write_table_registers();
        guest.write_queue_registers();
        guest.write32(regs::CR2, u32::from(recording) << 1);
        guest.write32(regs::CR0, 0b1101);
        let restored = guest.restored(&guest.smmu.snapshot().unwrap()).unwrap();
        let told = restored.told(StreamId(0x100));
        assert_eq!(told, recording.then_some(EventId::BadStreamId));
    }
}

#[test]
fn what_the_host_had_lost_is_given_once_more_by_the_table() {
    let guest = Guest::lived();
    guest.refuse(true);
    guest.submit(&[tlbi(1), SYNC]);
    let state = guest.smmu.snapshot().unwrap();
    assert!(state.unapplied);
    assert!(state.streams.iter().all(|stream| !stream.decision.unwrap().applied));
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.calls(), Guest::configure_calls(false));
    assert_eq!(restored.smmu.snapshot().unwrap(), state);
    // The guest acknowledges the error: the command is repeated, and with it what was lost.
    restored.acknowledge_errors();
    let [first, other, wrong] = Guest::configure_calls(true);
    assert_eq!(restored.calls(), [Call::Invalidate(vec![tlbi(1)]), first, other, wrong]);
    assert_eq!(restored.consumed(), (restored.read32(regs::CMDQ_PROD), None));
    assert!(!restored.smmu.snapshot().unwrap().unapplied);
}

#[test]
fn the_queue_goes_on_at_the_head_and_its_sync_is_answered_once() {
    let guest = Guest::running();
    let signal = SyncSignal::Interrupt { address: DOORBELL, data: 7 };
    let commands = [SYNC, tlbi(1), tlbi(2), Command::Sync { signal }];
    let words: Vec<_> = commands.iter().map(Command::encode).collect();
    let end = guest.queue_words(&words);
    guest.smmu.lock().cmdq_prod.set_wr(end);
    assert_eq!(guest.smmu.run_slice(&mut guest.smmu.lock()), Slice::More);
    let state = guest.smmu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.calls().len(), 2, "the decisions alone");
    assert_eq!(restored.consumed(), (1, None));
    for calls in [vec![Call::Invalidate(vec![tlbi(1), tlbi(2)])], vec![]] {
        restored.smmu.drain_queue();
        assert_eq!((restored.calls(), restored.consumed()), (calls, (4, None)));
    }
    assert_eq!((restored.interrupts(), guest.interrupts()), (vec![Interrupt::Message(7)], vec![]));
}

#[test]
fn a_command_that_the_host_refused_is_repeated_by_the_restored_smmu() {
    let guest = Guest::lived();
    guest.fail_to_block(true);
    guest.write32(regs::CR0, 0b1100);
    assert_eq!(guest.read32(regs::CR0ACK), 0b1101);
    let state = guest.smmu.snapshot().unwrap();
    assert!(state.unapplied && state.table.is_some());
    let restored = guest.restored(&state).unwrap();
    // Nothing of what was refused is left: those are blocked.
    let blocked = |stream| Call::Configure(stream, ABORT);
    assert_eq!(restored.calls(), [blocked(STREAM), blocked(OTHER), blocked(WRONG)]);
    restored.write32(regs::CR0, 0b1100);
    assert_eq!(Cr0::from_bits(restored.read32(regs::CR0ACK)), Cr0::from_bits(0b1100));
    let passes = |stream| Call::Configure(stream, StreamPolicy::GlobalBypass);
    assert_eq!(restored.calls(), [passes(STREAM), passes(OTHER), passes(WRONG)]);
}

#[test]
fn a_halted_smmu_has_no_snapshot() {
    let guest = Guest::lived();
    guest.smmu.halt();
    let error = guest.smmu.snapshot().unwrap_err();
    assert_eq!(error, SnapshotError::Halted { model: "SMMUv3" });
}

#[test]
fn another_version_is_refused_by_name() {
    let guest = Guest::lived();
    let mut state = guest.smmu.snapshot().unwrap();
    state.version = 2;
    let told = "this SMMUv3 snapshot has version 2; this build reads version 1";
    assert_eq!(guest.restored_on(Arc::default(), &state).err().unwrap().to_string(), told);
    #[cfg(feature = "serde")]
    {
        // Before anything else is looked at.
        let error = serde_json::from_str::<SmmuState>(r#"{"version":2,"new":{}}"#).unwrap_err();
        assert!(error.to_string().starts_with(told), "{error}");
        state.version = 1;
        let text = serde_json::to_string(&state).unwrap().replace("\"cr1\"", "\"new\":1,\"cr1\"");
        let error = serde_json::from_str::<SmmuState>(&text).unwrap_err();
        assert!(error.to_string().starts_with("unknown field `new`"), "{error}");
    }
}

#[cfg(feature = "serde")]
#[test]
fn no_part_of_a_snapshot_may_have_an_unknown_field() {
    let state = Guest::lived().smmu.snapshot().unwrap();
    let good = serde_json::to_value(&state).unwrap();
    assert_eq!(serde_json::from_value::<SmmuState>(good.clone()).unwrap(), state);
    for (place, changed) in crate::viommu::testing::with_unknown_fields(&good) {
        assert!(serde_json::from_value::<SmmuState>(changed).is_err(), "{place}");
    }
}

#[test]
fn what_no_smmu_can_have_is_refused_and_the_host_is_not_called() {
    let guest = Guest::lived();
    let good = guest.smmu.snapshot().unwrap();
    let damaged = "this SMMUv3 snapshot was changed or damaged: ";
    let has = |state: &mut SmmuState, index: usize, policy| {
        state.streams[index].decision.as_mut().unwrap().policy = Ok(policy);
    };
    let [qw0, qw1] = stage1_entry(CONTEXTS);
    let words = |qw0, qw1| StreamPolicy::Stage1 { ste: [qw0, qw1] };
    let stage_1 = |words: &str| format!("{damaged}stream 0x3 cannot have a stage 1 of {words}");
    let beyond = || format!("{damaged}stream 0x10000 has an entry, but StreamIDs have 16 bits");
    let changes: [(Change, String); 9] = [
        (
            &|state| state.config.stream_bits = 0,
            "this SMMUv3 snapshot has an impossible configuration: 0 StreamID bits are not \
             possible; use 1 to 32"
                .into(),
        ),
        (&|state| state.streams.reverse(), format!("{damaged}the streams do not ascend")),
        (&|state| state.streams[1].stream = STREAM, format!("{damaged}the streams do not ascend")),
        (
            &|state| {
                let fault = state.streams[2].decision.as_mut().unwrap();
                fault.policy =
                    fault.policy.map_err(|it| ConfigFault { event: EventId::Access, ..it });
            },
            format!("{damaged}stream 0x5 is blocked by F_ACCESS, which no entry causes"),
        ),
        // Nested; with more context descriptors than offered; without stalls, as the host would ask
        // for.
        (&|state| has(state, 0, words(qw0 | 2 << 1, qw1)), stage_1("0x600f 0x0")),
        (&|state| has(state, 0, words(qw0 | 1 << 59, qw1)), stage_1("0x80000000000600b 0x0")),
        (&|state| has(state, 0, words(qw0, qw1 | 1 << 27)), stage_1("0x600b 0x8000000")),
        (
            &|state| {
                state.streams[2].stream = StreamId(1 << 16);
                has(state, 2, StreamPolicy::Bypass);
            },
            beyond(),
        ),
        (
            &|state| {
                state.streams[2].stream = StreamId(1 << 16);
                has(state, 2, stage1(CONTEXTS));
            },
            beyond(),
        ),
    ];
    for (change, told) in changes {
        let mut state = good.clone();
        change(&mut state);
        let host = Arc::new(FakeHost::default());
        let error = guest.restored_on(host.clone(), &state).err().unwrap();
        assert_eq!((error.to_string(), host.calls.lock().len()), (told, 0));
    }
}

#[test]
fn what_an_smmu_can_have_is_restored() {
    // The host is asked for no stalls, which is not from the entry; a stream beyond the table.
    let guest = Guest::new(&SmmuConfig { host_stalls: true, ..Default::default() });
    guest.smmu.add_device(StreamId(1 << 16)).unwrap();
    guest.start();
    let state = guest.smmu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.smmu.snapshot().unwrap(), state);
    assert_eq!(restored.told(StreamId(1 << 16)), Some(EventId::BadStreamId));
}

#[test]
fn after_a_refusal_nothing_is_left_on_the_host() {
    let guest = Guest::lived();
    let state = guest.smmu.snapshot().unwrap();
    let streams = [STREAM, OTHER, WRONG];
    for failing in 0..=streams.len() {
        let host = Arc::new(FakeHost::default());
        host.refusals.after(failing as i64);
        let result = guest.restored_on(host.clone(), &state);
        let Some(refused) = streams.get(failing) else {
            assert!(result.is_ok());
            break;
        };
        assert_eq!(
            result.err().unwrap().to_string(),
            format!(
                "the host refused what stream {refused} had at the snapshot, which is not \
                 restored: test: refused"
            )
        );
        let called: Vec<_> = std::mem::take(&mut *host.calls.lock());
        let backwards = streams[..=failing].iter().rev();
        let undone: Vec<_> = backwards.map(|stream| Call::Configure(*stream, ABORT)).collect();
        assert_eq!(called[failing + 1..], undone);
        // Another attempt on the same host.
        assert_eq!(guest.restored_on(host, &state).unwrap().smmu.snapshot().unwrap(), state);
    }
}

#[test]
fn what_the_host_fails_to_block_after_a_refusal_is_told() {
    let guest = Guest::lived();
    let state = guest.smmu.snapshot().unwrap();
    // The blocks fail as well, or just the second decision and its own block.
    for all in [true, false] {
        let host = Arc::new(FakeHost::default());
        host.refusals.block_nothing(true);
        if all {
            host.refusals.everything(true);
        } else {
            host.refusals.after(1);
        }
        let Err(RestoreError::Refused { source, .. }) = guest.restored_on(host, &state) else {
            panic!()
        };
        assert_eq!(source.still_reachable, all);
    }
}

#[test]
fn a_reset_smmu_is_as_new() {
    let guest = Guest::lived();
    guest.refuse(true);
    guest.submit(&[tlbi(1), SYNC]);
    guest.refuse(false);
    guest.smmu.halt();
    guest.calls();
    guest.smmu.reset().unwrap();
    let passes = |stream| Call::Configure(stream, StreamPolicy::GlobalBypass);
    let flush =
        vec![Command::TlbiNsnhAll, cfgi_cd_all(STREAM), cfgi_cd_all(OTHER), cfgi_cd_all(WRONG)];
    assert_eq!(
        guest.calls(),
        [passes(STREAM), passes(OTHER), passes(WRONG), Call::Invalidate(flush)]
    );
    let new = Guest::new(&SmmuConfig::default());
    new.smmu.add_device(WRONG).unwrap();
    assert_eq!(guest.every_register(), new.every_register());
    assert_eq!(guest.smmu.snapshot().unwrap(), new.smmu.snapshot().unwrap());
}

#[test]
fn a_reset_that_the_host_refuses_is_told_and_can_be_repeated() {
    for failing in 0.. {
        let guest = Guest::lived();
        guest.smmu.halt();
        guest.host.refusals.after(failing);
        let result = guest.smmu.reset();
        let calls = guest.calls();
        let Some(call) = calls.get(failing as usize) else {
            result.unwrap();
            assert_eq!((failing, guest.smmu.counters().host_errors), (4, 0));
            return;
        };
        assert_eq!(result.unwrap_err().to_string(), "test: refused", "{call:?}");
        assert_eq!(guest.smmu.counters().host_errors, 1, "{call:?}");
        // The others are done.
        assert_eq!(calls.len(), 4, "{call:?}");
        assert!(guest.smmu.snapshot().is_err(), "{call:?}");
        assert_ne!(guest.smmu.streams.unapplied(), [], "{call:?}");
        guest.smmu.reset().unwrap();
        let state = guest.smmu.snapshot().unwrap();
        assert!(!state.unapplied && state.streams.len() == 3, "{call:?}");
        for stream in state.streams {
            let decision = stream.decision.unwrap();
            let passes = (Ok(StreamPolicy::GlobalBypass), true);
            assert_eq!((decision.policy, decision.applied), passes, "{call:?}");
        }
    }
}

#[test]
fn a_host_that_flushes_everything_instead_has_done_what_a_reset_asks_for() {
    let guest = Guest::lived();
    guest.host.flushes.store(true, Ordering::Relaxed);
    guest.host.refusals.after(3);
    guest.smmu.reset().unwrap();
    assert_eq!(guest.smmu.counters().host_errors, 1);
}

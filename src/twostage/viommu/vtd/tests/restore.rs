// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Snapshot, restore on a new host, and reset.

use std::collections::BTreeMap;

use super::slices::{PASIDS, PASID_CACHE, RTPS, TES};
use super::*;
use crate::spec::vtd::qi::{IotlbScope, StatusWrite};
use crate::spec::vtd::root::AddressWidth;
use crate::viommu::vtd::{VtdNested, VtdSecondStage};
use crate::viommu::{RestoreError, SnapshotError};

const GLOBAL: Descriptor =
    Descriptor::Iotlb { scope: IotlbScope::Global, drain_writes: false, drain_reads: false };

/// The root entry has no upper half.
const UPPER_BLOCKED: Policy = Policy::Blocked(FaultReason::RootNotPresent);

fn second_stage() -> Policy {
    let address_width = AddressWidth::Bits48;
    Policy::Stage1(Stage1::VtdSecondStage(VtdSecondStage {
        table: FIRST_STAGE,
        address_width,
        accessed_dirty: false,
    }))
}

fn five_levels() -> Policy {
    let Policy::Stage1(Stage1::VtdFirstStage(mut tables)) = first_stage(FIRST_STAGE) else {
        unreachable!()
    };
    tables.paging_mode = PagingMode::Level5;
    Policy::Stage1(Stage1::VtdFirstStage(tables))
}

/// First-stage tables over second-stage ones, with flags in the latter.
fn nested() -> Policy {
    let Policy::Stage1(Stage1::VtdFirstStage(first)) = first_stage(0x6000) else { unreachable!() };
    let address_width = AddressWidth::Bits48;
    let second = VtdSecondStage { table: FIRST_STAGE, address_width, accessed_dirty: true };
    Policy::Stage1(Stage1::VtdNested(VtdNested { first, second }))
}

/// Damage to a state.
type Change<'a> = &'a dyn Fn(&mut VtdState);

impl Guest {
    /// The guest on a new unit and host, in the same memory. The state goes through JSON, where
    /// that is possible.
    pub(super) fn restored(&self, state: &VtdState) -> Result<Self, RestoreError> {
        #[cfg(feature = "serde")]
        let state = &serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap();
        self.restored_on(FakeHost::new(self.memory.clone()), state)
    }

    /// With a host that has the memory to use.
    pub(super) fn restored_on(
        &self,
        host: Arc<FakeHost>,
        state: &VtdState,
    ) -> Result<Self, RestoreError> {
        let memory = host.memory.clone();
        let sink = Arc::new(FakeSink::default());
        let tables = Arc::new(memory.clone());
        let iommu = VtdIommu::restore(state, tables, host.clone(), sink.clone(), None)?;
        Ok(Self { memory, host, sink, iommu })
    }

    pub(super) fn every_register(&self) -> Vec<u64> {
        (0..MMIO_SIZE).step_by(8).map(|offset| self.read64(offset)).collect()
    }

    /// Two functions, the first with the PASIDs 5, 6 and 9. One more would be served by now, and
    /// another differently, but the guest has announced neither.
    fn lived() -> Self {
        let guest = Self::running();
        guest.iommu.add_device(UPPER_RID).unwrap();
        for (pasid, table) in [(5, 0x6000), (6, 0x6000), (9, 0x7000)] {
            guest.write_pasid(pasid, table);
        }
        guest.submit(&[PASID_CACHE, wait(1)]);
        guest.write_pasid(5, 0xa000);
        guest.write_pasid(7, 0x6000);
        guest.iommu.dma_fault(&fault(Requester::rid(UPPER_RID)));
        guest.calls();
        guest
    }
}

#[test]
fn a_new_host_is_given_the_decisions_of_then_and_nothing_else() {
    let guest = Guest::lived();
    let state = guest.iommu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    let given = |requester, table| Call::Configure(requester, first_stage(table));
    assert_eq!(
        restored.calls(),
        [
            given(Requester::rid(RID), FIRST_STAGE),
            given(with_pasid(5), 0x6000),
            given(with_pasid(6), 0x6000),
            given(with_pasid(9), 0x7000),
            Call::Configure(Requester::rid(UPPER_RID), UPPER_BLOCKED),
        ]
    );
    assert_eq!(restored.every_register(), guest.every_register());
    assert_eq!(restored.iommu.snapshot().unwrap(), state);
    assert_eq!(restored.iommu.counters().policies, 5);
    // The pending event of the recorded fault is sent when it is unmasked.
    assert_eq!(restored.messages(), []);
    restored.write32(regs::FECTL, 0);
    assert_eq!(restored.messages().len(), 1);
    // The guest goes on, and announces what it has changed.
    restored.submit(&[PASID_CACHE, wait(2)]);
    assert_eq!(restored.calls(), [given(with_pasid(5), 0xa000), given(with_pasid(7), 0x6000)]);
    assert_eq!(restored.status(), 2);
}

#[test]
fn what_the_host_had_lost_is_given_once_more_by_the_tables() {
    let guest = Guest::lived();
    guest.refuse(true);
    guest.submit(&[GLOBAL, wait(2)]);
    let state = guest.iommu.snapshot().unwrap();
    assert!(state.unapplied && state.faults.status.iqe());
    let decisions = state.functions.iter().filter_map(|function| function.decision);
    assert!(decisions.into_iter().all(|decision| !decision.applied));
    assert!(state.functions[0].pasids.iter().all(|pasids| !pasids.decision.applied));
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.calls().len(), 5);
    assert_eq!(restored.iommu.snapshot().unwrap(), state);
    // The guest clears the error: the invalidation is repeated, and with it what was lost.
    restored.write32(regs::FSTS, 1 << 4);
    let given = |requester, table| Call::Configure(requester, first_stage(table));
    assert_eq!(
        restored.calls(),
        [
            Call::Invalidate(vec![Invalidation::ALL]),
            given(Requester::rid(RID), FIRST_STAGE),
            given(with_pasid(5), 0xa000),
            given(with_pasid(6), 0x6000),
            given(with_pasid(9), 0x7000),
            Call::Configure(Requester::rid(UPPER_RID), UPPER_BLOCKED),
        ]
    );
    assert_eq!(restored.status(), 2);
    assert!(!restored.iommu.snapshot().unwrap().unapplied);
}

#[test]
fn a_batch_under_way_is_repeated_once_and_its_wait_answered_once() {
    let guest = Guest::running();
    guest.write32(regs::IECTL, 0);
    *guest.host.pieces.lock() = 3;
    let status = Some(StatusWrite { address: STATUS, data: 7 });
    let wait =
        Descriptor::Wait { status, interrupt: true, fence: false, drain_page_requests: false };
    guest.queue(&[GLOBAL, wait]);
    assert_eq!(guest.slice(), Slice::More);
    let state = guest.iommu.snapshot().unwrap();
    let restored = guest.restored(&state).unwrap();
    assert_eq!(restored.calls().len(), 1, "the decision alone");
    assert_eq!((restored.head(), restored.status()), (0, 0));
    for calls in [vec![Call::Invalidate(vec![Invalidation::ALL])], vec![]] {
        restored.iommu.drain_queue();
        assert_eq!(restored.calls(), calls);
        assert_eq!((restored.head(), restored.status()), (64, 7));
    }
    assert_eq!((restored.messages().len(), guest.messages().len()), (1, 0));
}

#[test]
fn tables_are_read_to_the_end_by_the_restored_unit() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    for _ in 0..3 {
        assert_eq!(guest.slice(), Slice::More);
    }
    let state = guest.iommu.snapshot().unwrap();
    let before = guest.calls().len();
    assert!(before > 1 && before < PASIDS as usize / 2, "{before}");
    let restored = guest.restored(&state).unwrap();
    let mut has = BTreeMap::new();
    restored.host_has(&mut has);
    assert!(has.len() <= before, "{}", has.len());
    restored.iommu.drain_queue();
    restored.host_has(&mut has);
    assert_eq!((has, restored.status()), (restored.tables_say(), 1));
}

#[test]
fn a_command_under_way_is_completed_by_the_snapshot() {
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.submit(&[PASID_CACHE]);
    assert_eq!(guest.iommu.snapshot().unwrap().functions[0].pasids.len(), 1);
    assert_eq!(guest.begin_command(|enabled| enabled & !TES), Slice::More);
    assert_eq!(guest.status_bits(TES), TES);
    let state = guest.iommu.snapshot().unwrap();
    assert!(!state.registers.gsts.tes() && !state.translating.enabled);
    assert_eq!(state.functions[0].pasids, []);
    assert_eq!(state.functions[0].decision.unwrap().config.policy, Policy::Bypass);
}

#[test]
fn a_halted_unit_has_no_snapshot() {
    let guest = Guest::lived();
    guest.iommu.halt();
    let error = guest.iommu.snapshot().unwrap_err();
    assert_eq!(error, SnapshotError::Halted { model: "VT-d" });
    assert_eq!(
        error.to_string(),
        "the virtual VT-d is halted and may have dropped a command: take the snapshot before halt()"
    );
}

#[test]
fn another_version_is_refused_by_name() {
    let guest = Guest::lived();
    let mut state = guest.iommu.snapshot().unwrap();
    state.version = 2;
    let told = "this VT-d snapshot has version 2; this build reads version 1";
    let host = FakeHost::new(guest.memory.clone());
    assert_eq!(guest.restored_on(host, &state).err().unwrap().to_string(), told);
    #[cfg(feature = "serde")]
    {
        // Before anything else is looked at.
        let error = serde_json::from_str::<VtdState>(r#"{"version":2,"new":{}}"#).unwrap_err();
        assert!(error.to_string().starts_with(told), "{error}");
        state.version = 1;
        let text = serde_json::to_string(&state).unwrap().replace("\"gsts\"", "\"new\":1,\"gsts\"");
        let error = serde_json::from_str::<VtdState>(&text).unwrap_err();
        assert!(error.to_string().starts_with("unknown field `new`"), "{error}");
    }
}

#[cfg(feature = "serde")]
#[test]
fn no_part_of_a_snapshot_may_have_an_unknown_field() {
    let mut state = Guest::lived().iommu.snapshot().unwrap();
    state.interrupt_entries = vec![InterruptEntryState { index: 3, entry: [0; 2] }];
    state.functions[1].decision.as_mut().unwrap().config.policy = second_stage();
    state.functions[0].decision.as_mut().unwrap().config.policy = nested();
    let good = serde_json::to_value(&state).unwrap();
    assert_eq!(serde_json::from_value::<VtdState>(good.clone()).unwrap(), state);
    for (place, changed) in crate::viommu::testing::with_unknown_fields(&good) {
        assert!(serde_json::from_value::<VtdState>(changed).is_err(), "{place}");
    }
}

#[test]
fn what_no_unit_can_have_is_refused_and_the_host_is_not_called() {
    let guest = Guest::lived();
    let good = guest.iommu.snapshot().unwrap();
    let refused = |change: Change| {
        let mut state = good.clone();
        change(&mut state);
        let host = FakeHost::new(guest.memory.clone());
        let error = guest.restored_on(host.clone(), &state).err().unwrap();
        assert_eq!(*host.calls.lock(), []);
        error.to_string()
    };
    let impossible = refused(&|state| state.config.address_width = 39);
    assert_eq!(
        impossible,
        "this VT-d snapshot has an impossible configuration: address width 39 is not supported; \
         it is 48 or 57"
    );
    let entry = |index| InterruptEntryState { index, entry: [0; 2] };
    let of_rid = |state: &mut VtdState, policy| {
        state.functions[0].decision.as_mut().unwrap().config.policy = policy;
    };
    let changes: [(Change, &str); 22] = [
        (&|state| state.faults.records.truncate(7), "7 fault records, but 8 are configured"),
        (&|state| state.faults.next = 8, "fault record 8 is the next one, but there are 8"),
        (
            &|state| state.registers.iqh = regs::QueuePointer::from_offset(0x10),
            "IQH is 0x10, which is inside a descriptor of 32 bytes",
        ),
        (&|state| state.registers.gsts.set_qies(false), "IQH is 0x40, but the queue is disabled"),
        (
            &|state| state.interrupt_entries = vec![entry(3), entry(3)],
            "the cached interrupt entries do not ascend",
        ),
        (&|state| state.functions.reverse(), "the functions do not ascend"),
        (&|state| state.functions[1].rid = RID, "the functions do not ascend"),
        (
            &|state| state.functions[0].pasids.reverse(),
            "PASIDs 0x5 to 0x6 of 01:01.0 do not ascend from 0xa",
        ),
        (
            &|state| state.functions[0].pasids[0].first = 0,
            "PASIDs 0x0 to 0x6 of 01:01.0 do not ascend from 0x1",
        ),
        (
            &|state| state.functions[0].pasids[0].last = 4,
            "PASIDs 0x5 to 0x4 of 01:01.0 do not ascend from 0x1",
        ),
        (
            &|state| state.functions[0].pasids[0].last = 9,
            "PASIDs 0x9 to 0x9 of 01:01.0 do not ascend from 0xa",
        ),
        (
            &|state| state.functions[0].pasids[1].last = 1 << 20,
            "PASIDs 0x9 to 0x100000 of 01:01.0 have more than 20 bits",
        ),
        (
            &|state| state.functions[0].pasids[1].decision.config.tag.pasid = 5,
            "PASIDs 0x9 to 0x9 of 01:01.0 cannot have RequesterConfig",
        ),
        (
            &|state| state.functions[0].pasids[1].decision.config.policy = first_stage(0x7010),
            "PASIDs 0x9 to 0x9 of 01:01.0 cannot have RequesterConfig",
        ),
        (
            &|state| state.functions[0].pasids[1].decision.config.policy = second_stage(),
            "PASIDs 0x9 to 0x9 of 01:01.0 cannot have RequesterConfig",
        ),
        (
            &|state| state.functions[0].pasids[1].last = 0x100,
            "PASIDs 0x9 to 0x100 of 01:01.0 have more than 8 bits",
        ),
        (&|state| of_rid(state, first_stage(0x5010)), "01:01.0 cannot have RequesterConfig"),
        (&|state| of_rid(state, first_stage(1 << 52)), "01:01.0 cannot have RequesterConfig"),
        (&|state| of_rid(state, second_stage()), "01:01.0 cannot have RequesterConfig"),
        (&|state| of_rid(state, five_levels()), "01:01.0 cannot have RequesterConfig"),
        (&|state| of_rid(state, nested()), "01:01.0 cannot have RequesterConfig"),
        // Both stages alone do not make a unit that nests.
        (
            &|state| {
                state.config.second_stage = true;
                of_rid(state, nested());
            },
            "01:01.0 cannot have RequesterConfig",
        ),
    ];
    for (change, what) in changes {
        let told = refused(change);
        let expected = format!("this VT-d snapshot was changed or damaged: {what}");
        assert!(told.starts_with(&expected), "{told}");
    }
    // Where they are offered, these are possible.
    let mut state = good.clone();
    state.config.address_width = 57;
    (state.config.second_stage, state.config.nest) = (true, true);
    for policy in [second_stage(), five_levels(), nested()] {
        of_rid(&mut state, policy);
        state.functions[0].pasids[1].decision.config.policy = policy;
        let restored = guest.restored(&state).unwrap();
        assert_eq!(restored.iommu.snapshot().unwrap(), state, "{policy:?}");
        let given = restored.calls();
        assert_eq!(given[0], Call::Configure(Requester::rid(RID), policy));
        assert_eq!(given[3], Call::Configure(with_pasid(9), policy));
    }
    // A head beyond the queue is the guest's to find out.
    let mut state = good.clone();
    state.registers.iqh = regs::QueuePointer::from_offset(0x4000);
    guest.restored(&state).unwrap().iommu.drain_queue();
}

#[test]
fn after_a_refusal_nothing_is_left_on_the_host() {
    let guest = Guest::lived();
    let state = guest.iommu.snapshot().unwrap();
    let requesters = [
        Requester::rid(RID),
        with_pasid(5),
        with_pasid(6),
        with_pasid(9),
        Requester::rid(UPPER_RID),
    ];
    for failing in 0..=requesters.len() {
        let host = FakeHost::new(guest.memory.clone());
        host.refusals.after(failing as i64);
        let result = guest.restored_on(host.clone(), &state);
        let Some(refused) = requesters.get(failing) else {
            assert!(result.is_ok());
            break;
        };
        assert_eq!(
            result.err().unwrap().to_string(),
            format!(
                "the host refused what {refused} had at the snapshot, which is not restored: \
                     test: refused"
            )
        );
        let called: Vec<_> = std::mem::take(&mut *host.calls.lock());
        let undone = called[failing + 1..].iter().map(|call| match call {
            Call::Configure(requester, Policy::Blocked(_)) => *requester,
            other => panic!("{other:?}"),
        });
        let backwards = requesters[..=failing].iter().rev().copied();
        assert!(undone.eq(backwards), "{called:?}");
        // Another attempt on the same host.
        assert_eq!(guest.restored_on(host, &state).unwrap().iommu.snapshot().unwrap(), state);
    }
}

#[test]
fn what_the_host_fails_to_block_after_a_refusal_is_told() {
    let guest = Guest::lived();
    let state = guest.iommu.snapshot().unwrap();
    // The blocks fail as well, or just the second decision and its own block.
    for all in [true, false] {
        let host = FakeHost::new(guest.memory.clone());
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
fn a_reset_unit_is_as_new() {
    let new = || {
        let guest = Guest::new(VtdConfig::default());
        guest.iommu.add_device(UPPER_RID).unwrap();
        (guest.every_register(), guest.iommu.snapshot().unwrap())
    };
    let guest = Guest::lived();
    guest.refuse(true);
    guest.submit(&[GLOBAL, wait(2)]);
    guest.refuse(false);
    guest.iommu.halt();
    guest.calls();
    guest.iommu.reset().unwrap();
    let gone = Policy::Blocked(FaultReason::PasidEntryNotPresent);
    let withdrawn = |value| Call::Configure(with_pasid(value), gone);
    let passes = |rid| Call::Configure(Requester::rid(rid), Policy::Bypass);
    assert_eq!(
        guest.calls(),
        [
            withdrawn(5),
            withdrawn(6),
            withdrawn(9),
            passes(RID),
            passes(UPPER_RID),
            Call::Invalidate(vec![Invalidation::ALL]),
        ]
    );
    assert_eq!((guest.every_register(), guest.iommu.snapshot().unwrap()), new());

    // So is one that is reset in the middle of a command and of the queue.
    let guest = Guest::with_directory();
    guest.write_every_pasid(0x6000);
    guest.queue(&[PASID_CACHE, wait(1)]);
    assert_eq!(guest.slice(), Slice::More);
    assert_eq!(guest.begin_command(|enabled| enabled | RTPS), Slice::More);
    guest.iommu.reset().unwrap();
    let state = guest.iommu.snapshot().unwrap();
    assert_eq!((state.registers, state.functions[0].pasids.len()), (Registers::default(), 0));
    guest.iommu.drain_queue();
    assert_eq!((guest.head(), guest.status()), (0, 0));
}

#[test]
fn a_reset_that_the_host_refuses_is_told_and_can_be_repeated() {
    for failing in 0.. {
        let guest = Guest::lived();
        guest.iommu.halt();
        guest.host.refusals.after(failing);
        let result = guest.iommu.reset();
        let calls = guest.calls();
        let Some(call) = calls.get(failing as usize) else {
            result.unwrap();
            assert_eq!((failing, guest.iommu.counters().host_errors), (6, 0));
            return;
        };
        assert_eq!(result.unwrap_err().to_string(), "test: refused", "{call:?}");
        assert_eq!(guest.iommu.counters().host_errors, 1, "{call:?}");
        // The others are done.
        assert_eq!(calls.len(), 6, "{call:?}");
        assert!(guest.iommu.snapshot().is_err(), "{call:?}");
        let (_, functions) = guest.iommu.requesters.snapshot();
        let owed = functions.iter().any(|function| {
            let pasids = function.pasids.iter().map(|pasids| pasids.decision);
            pasids.chain(function.decision).any(|decision| !decision.applied)
        });
        assert!(owed, "{call:?}");
        guest.iommu.reset().unwrap();
        let state = guest.iommu.snapshot().unwrap();
        assert!(!state.unapplied && state.functions.len() == 2, "{call:?}");
        for function in state.functions {
            let decision = function.decision.unwrap();
            assert_eq!((decision.config.policy, decision.applied), (Policy::Bypass, true));
            assert_eq!(function.pasids, [], "{call:?}");
        }
    }
}

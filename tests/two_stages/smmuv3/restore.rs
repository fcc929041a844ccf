// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine restored on another host, with a copy of its memory, goes on as the first one does.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use twostage::iommufd::Errno;
use twostage::nesting::smmuv3::SmmuNesting;
use twostage::patience::wait_until;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::command::{AddressRange, Command, RANGE_ALL};
use twostage::spec::smmuv3::event::EventId;
use twostage::spec::smmuv3::regs::{self, Cr0};
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::SmmuState;
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DmaError, DmaFaultReason, ObjectKind};

use super::guest::{cfgi_cd, Completion, Entry};
use super::machine::{self, Ground, Machine};
use super::page_of;
use crate::common::{A, B, PAGE};
use crate::conformance::{nested, Stack, Way, IOVA, NAME};

const RIDS: [Bdf; 2] = [A, B];
/// Pages that tables may map, from `IOVA`.
const SLOTS: u64 = 3;
/// The register pages.
const MMIO_SIZE: u64 = 0x2_0000;
const RANGE: Command = Command::CfgiSteRange { stream: StreamId(0), range: RANGE_ALL };

/// The machine on another host, once it was seen that no device reaches memory there before.
fn restored(machine: &Machine, state: &SmmuState) -> Machine {
    let ground = machine.next_ground();
    let nesting = ground.nest().unwrap();
    expect_blocked(&ground);
    machine.restored(state, &ground, nesting).unwrap()
}

#[track_caller]
fn expect_blocked(ground: &Ground) {
    for rid in RIDS {
        for iova in [IOVA, PAGE] {
            let read = machine::read(&ground.unit, rid, iova);
            assert!(matches!(read, Err(DmaError::Fault { .. })), "{rid}: {read:?}");
        }
    }
}

/// Every register.
fn registers(machine: &Machine) -> Vec<u32> {
    (0..MMIO_SIZE).step_by(4).map(|offset| machine.guest.registers.read32(offset)).collect()
}

/// All that is cached is dropped, also where the queue stopped at a command. What the host refused
/// at `state` is given again by a reading of the stream table: the guest may have taken back the
/// invalidation that would have done so.
fn forget_all(machine: &Machine, state: &SmmuState) -> Completion {
    let mut completion = machine.guest.submit(&[]);
    // As many as the queue has room for.
    for _ in 0..256 {
        if completion == Completion::Done {
            break;
        }
        completion = machine.guest.replace_and_resume(Command::TlbiNsnhAll);
    }
    let mut decisions = state.streams.iter().filter_map(|stream| stream.decision);
    let refused = state.unapplied || decisions.any(|decision| !decision.applied);
    let contexts = RIDS.map(|rid| Command::CfgiCdAll { stream: rid.into() });
    let table = refused.then_some(RANGE);
    let commands: Vec<_> =
        table.into_iter().chain(contexts).chain([Command::TlbiNsnhAll]).collect();
    machine.guest.submit(&commands)
}

/// What DMA finds; its event, if any, is in the guest's queue by then. There is none for what the
/// host's stage 2 refuses.
fn settled(
    machine: &Machine,
    dma: impl FnOnce() -> Result<u64, DmaError>,
) -> Result<u64, DmaError> {
    let events = machine.nesting.counters().events;
    let result = dma();
    let on = Cr0::from_bits(machine.guest.registers.read32(regs::CR0ACK)).smmuen();
    if let (true, Err(DmaError::Fault { reason: DmaFaultReason::SmmuV3(_), stage2: false, .. })) =
        (on, &result)
    {
        wait_until("the event of a fault", || machine.nesting.counters().events != events);
    }
    result
}

/// What each device finds at each address.
fn translations(machine: &Machine) -> Vec<Result<u64, DmaError>> {
    let slots = (0..SLOTS).map(|slot| IOVA + slot * PAGE).chain([PAGE]);
    let finds = |iova| RIDS.map(|rid| settled(machine, || machine.read(rid, iova)));
    slots.flat_map(finds).collect()
}

#[test]
fn what_was_decided_is_restored_and_not_what_entries_say_by_then() {
    let (machine, table, page) = nested::<Machine>();
    let guest = &machine.guest;
    let (other, second) = (guest.page(), guest.page());
    guest.store(second, 2);
    guest.map(other, IOVA, second, 3, true);
    machine.set(B, Way::Bypass);
    assert_eq!(guest.flush_entries(&[B]), Completion::Done);
    settled(&machine, || machine.read(A, IOVA + PAGE)).unwrap_err();
    // Not announced to the SMMU by an invalidation.
    machine.set(A, Way::Stage1 { table: other, name: NAME });
    machine.set(B, Way::Nowhere);

    let state = machine.guest.registers.snapshot().unwrap();
    let next = restored(&machine, &state);
    assert_eq!(registers(&next), registers(&machine));
    assert_eq!(next.guest.registers.snapshot().unwrap(), state);
    let event = next.guest.take_event().expect("it was pending");
    assert_eq!((event.id(), event.stream()), (Some(EventId::Translation), A.into()));
    assert_eq!(next.read(A, IOVA), Ok(1));
    assert_eq!(next.read(B, page), Ok(1));

    // The first machine is another one: nothing of it is used.
    machine.guest.unmap(table, IOVA);
    assert_eq!(machine.end(), 0);
    assert_eq!(next.read(A, IOVA), Ok(1));
    assert_eq!(next.guest.flush_entries(&[A, B]), Completion::Done);
    assert_eq!(next.guest.submit(&[Command::TlbiNsnhAll]), Completion::Done);
    assert_eq!(next.read(A, IOVA), Ok(2));
    assert!(next.read(B, page).is_err());
    assert_eq!(next.end(), 0);
}

#[test]
fn an_invalidation_that_the_host_refused_is_repeated_on_the_next_host() {
    let (machine, table, _) = nested::<Machine>();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, IOVA), Ok(1));
    let other = guest.page();
    guest.store(other, 2);
    guest.map(table, IOVA, other, 3, true);
    machine.host.fail_next(100, Errno::ENOMEM);
    let stopped = guest.submit(&[page_of(IOVA)]);
    assert!(matches!(stopped, Completion::Stopped(..)), "{stopped:?}");
    let next = restored(&machine, &machine.guest.registers.snapshot().unwrap());
    let commands = next.nesting.counters().commands_in;
    assert_eq!(next.guest.resume(), Completion::Done);
    assert_eq!(next.nesting.counters().commands_in, commands + 1);
    assert_eq!(next.read(A, IOVA), Ok(2));
    assert_eq!(next.end(), 0);
}

/// A machine, and what its driver uses.
struct Life {
    machine: Machine,
    tables: [u64; 2],
    pages: [u64; 3],
}

/// What happens to it. Devices, tables, pages and slots are indices.
#[derive(Debug, Clone)]
enum Step {
    Enable(bool),
    Map {
        table: usize,
        slot: u64,
        page: usize,
        writable: bool,
    },
    Unmap {
        table: usize,
        slot: u64,
    },
    /// Without an invalidation; no table is no way.
    Set {
        rid: usize,
        table: Option<usize>,
        asid: u16,
    },
    Bypass {
        rid: usize,
    },
    /// The stage 1 of `table` and `asid` is from now on at `to`, without an invalidation.
    Redirect {
        table: usize,
        asid: u16,
        to: usize,
    },
    Invalidate(Command),
    /// The host refuses some calls, if this is before the snapshot.
    Refuse {
        nth: u64,
        all: bool,
        command: Command,
    },
    /// A command that is mostly reserved.
    Garbage([u64; 2]),
    Resume,
    Replace,
    Dma {
        rid: usize,
        slot: u64,
        write: Option<u64>,
    },
    TakeEvent,
    EventInterrupt(u32),
    Replug(usize),
}

fn command() -> impl Strategy<Value = Command> {
    let asid = NAME..NAME + 2;
    let rid = || prop::sample::select(RIDS.as_slice());
    let at = (asid.clone(), 0..SLOTS).prop_map(|(asid, slot)| {
        let range = AddressRange::at(IOVA + slot * PAGE);
        Command::TlbiNhVa { vmid: 0, asid, range }
    });
    prop_oneof![
        2 => Just(RANGE),
        2 => rid().prop_map(|rid| Command::CfgiSte { stream: rid.into(), leaf: true }),
        1 => rid().prop_map(cfgi_cd),
        2 => at,
        1 => asid.prop_map(|asid| Command::TlbiNhAsid { vmid: 0, asid }),
        1 => Just(Command::TlbiNhAll { vmid: 0 }),
        1 => Just(Command::TlbiNsnhAll),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (rid, table, asid) = (0..2usize, 0..2usize, NAME..NAME + 2);
    prop_oneof![
        1 => any::<bool>().prop_map(Step::Enable),
        4 => (table.clone(), 0..SLOTS, 0..3usize, any::<bool>())
            .prop_map(|(table, slot, page, writable)| Step::Map { table, slot, page, writable }),
        1 => (table.clone(), 0..SLOTS).prop_map(|(table, slot)| Step::Unmap { table, slot }),
        4 => (rid.clone(), prop::option::weighted(0.8, table.clone()), asid.clone())
            .prop_map(|(rid, table, asid)| Step::Set { rid, table, asid }),
        1 => rid.clone().prop_map(|rid| Step::Bypass { rid }),
        1 => (table.clone(), asid, table)
            .prop_map(|(table, asid, to)| Step::Redirect { table, asid, to }),
        4 => command().prop_map(Step::Invalidate),
        2 => (1..6u64, any::<bool>(), command())
            .prop_map(|(nth, all, command)| Step::Refuse { nth, all, command }),
        1 => any::<[u64; 2]>().prop_map(Step::Garbage),
        1 => Just(Step::Resume),
        1 => Just(Step::Replace),
        6 => (rid.clone(), 0..SLOTS + 1, prop::option::weighted(0.3, any::<u64>()))
            .prop_map(|(rid, slot, write)| Step::Dma { rid, slot, write }),
        2 => Just(Step::TakeEvent),
        1 => any::<u32>().prop_map(Step::EventInterrupt),
        1 => rid.prop_map(Step::Replug),
    ]
}

impl Life {
    fn begin() -> Self {
        let machine = Machine::new();
        let guest = &machine.guest;
        let tables = [(); 2].map(|()| guest.page());
        let pages = [1, 2, 3].map(|value| {
            let page = guest.page();
            guest.store(page, value);
            page
        });
        Self { machine, tables, pages }
    }

    /// What the guest and the devices see of a step.
    fn take(&self, step: &Step, refusing: bool) -> String {
        let Self { machine, tables, pages } = self;
        let guest = &machine.guest;
        match *step {
            Step::Enable(on) => {
                let queues = Cr0::new().with_cmdqen(true).with_eventqen(true);
                guest.registers.write32(regs::CR0, queues.with_smmuen(on).into_bits());
                return format!("{:x}", guest.registers.read32(regs::CR0ACK));
            }
            Step::Map { table, slot, page, writable } => {
                guest.map(tables[table], IOVA + slot * PAGE, pages[page], 3, writable);
            }
            Step::Unmap { table, slot } => guest.unmap(tables[table], IOVA + slot * PAGE),
            Step::Set { rid, table, asid } => {
                let stage1 =
                    |table: usize| Entry::Stage1 { cd: guest.context(tables[table], asid) };
                guest.set_entry(RIDS[rid].into(), table.map_or(Entry::Abort, stage1));
            }
            Step::Bypass { rid } => guest.set_entry(RIDS[rid].into(), Entry::Bypass),
            Step::Redirect { table, asid, to } => {
                guest.write_context(guest.context(tables[table], asid), tables[to], asid);
            }
            Step::Invalidate(command) => return format!("{:?}", guest.submit(&[command])),
            Step::Refuse { nth, all, command } => {
                match (refusing, all) {
                    (false, _) => {}
                    (true, true) => machine.host.fail_next(100, Errno::ENOMEM),
                    (true, false) => machine.host.fail_nth(nth, Errno::ENOMEM),
                }
                let completion = guest.submit(&[command]);
                machine.host.fail_next(0, Errno::ENOMEM);
                return format!("{completion:?}");
            }
            Step::Garbage(words) => return format!("{:?}", guest.submit_words(&[words])),
            Step::Resume => return format!("{:?}", guest.resume()),
            Step::Replace => {
                return format!("{:?}", guest.replace_and_resume(Command::TlbiNsnhAll));
            }
            Step::Dma { rid, slot, write } => {
                let (rid, iova) = (RIDS[rid], IOVA + slot * PAGE);
                let iova = if slot < SLOTS { iova } else { pages[0] };
                let dma = || match write {
                    Some(value) => machine.write(rid, iova, value).map(|()| value),
                    None => machine.read(rid, iova),
                };
                return format!("{:?}", settled(machine, dma));
            }
            Step::TakeEvent => return format!("{:?}", guest.take_event()),
            Step::EventInterrupt(data) => guest.enable_event_interrupt(0x808_0040, data),
            Step::Replug(rid) => machine.replug(RIDS[rid], |_| {}),
        }
        String::new()
    }
}

proptest! {
    // As many as PROPTEST_CASES says.
    #![proptest_config(ProptestConfig {
        cases: if std::env::var_os("PROPTEST_CASES").is_some() {
            ProptestConfig::default().cases
        } else {
            32
        },
        ..ProptestConfig::default()
    })]

    #[test]
    fn restored_lives_go_on_as_the_first(
        steps in prop::collection::vec(step(), 1..60),
        cut in any::<Index>(),
    ) {
        let life = Life::begin();
        life.machine.guest.enable();
        let (before, after) = steps.split_at(cut.index(steps.len() + 1));
        for step in before {
            life.take(step, true);
        }
        let first = &life.machine;
        let state = first.guest.registers.snapshot().unwrap();
        let next = Life { machine: restored(first, &state), ..life };
        let second = &next.machine;
        prop_assert_eq!(&second.guest.registers.snapshot().unwrap(), &state);
        prop_assert_eq!(registers(second), registers(first));
        first.messages.take();

        // The first may have cached what the second has not.
        prop_assert_eq!(forget_all(second, &state), forget_all(first, &state));
        prop_assert_eq!(translations(second), translations(first));
        for step in after {
            prop_assert_eq!(next.take(step, false), life.take(step, false), "{:?}", step);
            let states = [second, first].map(|machine| machine.guest.registers.snapshot().unwrap());
            prop_assert_eq!(&states[0], &states[1], "{:?}", step);
            prop_assert_eq!(second.messages.take(), first.messages.take(), "{:?}", step);
        }
        prop_assert_eq!(translations(second), translations(first));
        prop_assert_eq!(registers(second), registers(first));
        prop_assert!(second.memory.contents() == first.memory.contents());
        prop_assert_eq!((next.machine.end(), life.machine.end()), (0, 0));
    }
}

/// Everything up to the restored machine, or the error, with the nesting that was given to it.
fn attempt(
    machine: &Machine,
    state: &SmmuState,
    ground: &Ground,
) -> Result<Machine, (String, Option<Arc<SmmuNesting>>)> {
    let nesting = ground.nest().map_err(|error| (error, None))?;
    machine
        .restored(state, ground, nesting.clone())
        .map_err(|error| (error.to_string(), Some(nesting)))
}

#[test]
fn every_host_call_of_a_restore_fails_in_turn() {
    let (machine, _, _) = nested::<Machine>();
    machine.set(B, Way::Bypass);
    assert_eq!(machine.guest.flush_entries(&[B]), Completion::Done);
    let state = machine.guest.registers.snapshot().unwrap();
    let (mut calls, mut repeated) = (0, 0);
    for n in 1.. {
        assert!(n < 100, "a restore ends");
        let ground = machine.next_ground();
        ground.host.fail_nth(n, Errno::ENOMEM);
        calls = n;
        let (error, nesting) = match attempt(&machine, &state, &ground) {
            Ok(next) => {
                let over = ground.host.is_armed();
                ground.host.fail_nth(0, Errno::ENOMEM);
                assert_eq!(translations(&next), translations(&machine), "call {n}");
                if over {
                    break;
                }
                // Nesting repeats these itself.
                repeated += 1;
                continue;
            }
            Err(refused) => refused,
        };
        assert!(!ground.host.is_armed(), "call {n}: {error}");
        assert!(RIDS.iter().any(|rid| error.contains(&rid.to_string())), "call {n}: {error}");
        expect_blocked(&ground);
        if let Some(nesting) = nesting {
            nesting.shutdown().unwrap();
        }
        let graph = ground.host.inner().inner().graph();
        let of_caller = [ObjectKind::Device, ObjectKind::Ioas];
        let left = graph.objects.iter().find(|object| !of_caller.contains(&object.kind));
        assert!(left.is_none(), "call {n} failed, and left\n{graph}");
        expect_blocked(&ground);

        let Ok(next) = attempt(&machine, &state, &ground) else { panic!("call {n} is over") };
        assert_eq!(translations(&next), translations(&machine));
        drop(ground);
        assert_eq!(next.end(), 0);
    }
    assert!(calls > 10, "only {calls} calls were made to fail");
    assert_eq!(repeated, 0, "a call failed, and nobody said so");
}

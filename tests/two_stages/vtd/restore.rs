// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A machine restored on another host, with a copy of its memory, goes on as the first one does.

use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use twostage::iommufd::Errno;
use twostage::nesting::vtd::VtdNesting;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::{Descriptor, IotlbScope, PasidCacheScope};
use twostage::spec::vtd::regs::{self, Gcmd};
use twostage::viommu::vtd::{FunctionState, VtdState, MMIO_SIZE};
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DmaError, ObjectKind, VtdUnitConfig};

use super::guest::{Completion, Entry, BELOW};
use super::machine::{self, Ground, Machine};
use super::{expect_fault, iotlb, nested, pages, pasid_pages, DOMAIN, IOVA};
use crate::common::{A, B, PAGE};

/// Requesters that have, or may have, tables of their own.
const REQUESTERS: [(Bdf, Option<u32>); 5] =
    [(A, None), (A, Some(1)), (A, Some(2)), (B, None), (B, Some(1))];
/// Pages that tables may map, from `IOVA`.
const SLOTS: u64 = 3;

/// The machine on another host, once it was seen that no device reaches memory there before.
fn restored(machine: &Machine, state: &VtdState) -> Machine {
    let ground = machine.next_ground();
    let nesting = ground.nest().unwrap();
    expect_blocked(&ground);
    machine.restored(state, &ground, nesting).unwrap()
}

#[track_caller]
fn expect_blocked(ground: &Ground) {
    for (rid, pasid) in REQUESTERS {
        for iova in [IOVA, PAGE] {
            let read = machine::read(&ground.unit, rid, pasid, iova);
            assert!(matches!(read, Err(DmaError::Fault { .. })), "{rid} {pasid:?}: {read:?}");
        }
    }
}

/// Every register, in both widths.
fn registers(machine: &Machine) -> Vec<u64> {
    let offsets = (0..MMIO_SIZE).step_by(4);
    let words = offsets.map(|offset| u64::from(machine.guest.registers.read32(offset)));
    words
        .chain((0..MMIO_SIZE).step_by(8).map(|offset| machine.guest.registers.read64(offset)))
        .collect()
}

/// All that is cached is dropped, also where the queue stopped at a descriptor. What the host
/// refused at `state` is given again by a reading of the tables: the guest may have taken back the
/// invalidation that would have done so.
fn forget_all(machine: &Machine, state: &VtdState) -> Completion {
    let all = iotlb(IotlbScope::Global);
    // As many as the queue has room for. A wait in it may be done before the last error.
    for _ in 0..128 {
        if !machine.guest.faults().iqe() {
            break;
        }
        machine.guest.replace_and_resume(all);
    }
    let refused = state.unapplied || state.functions.iter().any(has_refused);
    let tables = refused.then_some(Descriptor::PasidCache(PasidCacheScope::Global));
    let descriptors: Vec<_> = tables.into_iter().chain([all]).collect();
    machine.guest.submit(&descriptors)
}

fn has_refused(function: &FunctionState) -> bool {
    let of_pasids = function.pasids.iter().map(|run| run.decision);
    function.decision.into_iter().chain(of_pasids).any(|decision| !decision.applied)
}

/// What each requester finds at each address.
fn translations(machine: &Machine) -> Vec<Result<u64, DmaError>> {
    let slots = (0..SLOTS).map(|slot| IOVA + slot * PAGE).chain([PAGE]);
    slots.flat_map(|iova| REQUESTERS.map(|(rid, pasid)| machine.read(rid, pasid, iova))).collect()
}

#[test]
fn what_was_decided_is_restored_and_not_what_tables_say_by_then() {
    let (machine, table, page) = nested();
    let guest = &machine.guest;
    let (other, second) = (guest.page(), guest.page());
    guest.store(second, 2);
    guest.map(other, IOVA, second, 1, true);
    guest.set_entry(A, 1, Entry::FirstStage { table: other, domain: DOMAIN });
    guest.set_entry(B, 0, Entry::PassThrough { domain: DOMAIN });
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    machine.read(A, None, IOVA + PAGE).unwrap_err();
    // Not announced to the unit by an invalidation.
    guest.set_entry(A, 0, Entry::FirstStage { table: other, domain: DOMAIN });
    guest.set_entry(A, 1, Entry::NotPresent);

    let state = machine.iommu.snapshot().unwrap();
    let next = restored(&machine, &state);
    assert_eq!(registers(&next), registers(&machine));
    assert_eq!(next.iommu.snapshot().unwrap(), state);
    let guest = &next.guest;
    expect_fault(&next, FaultReason::FirstStageNotPresent, IOVA + PAGE, None);
    assert_eq!(next.read(A, None, IOVA), Ok(1));
    assert_eq!(next.read(A, Some(1), IOVA), Ok(2));
    assert_eq!(next.read(B, None, page), Ok(1));
    assert!(next.read(B, Some(1), IOVA).is_err());

    // The first machine is another one: nothing of it is used.
    machine.guest.unmap(table, IOVA);
    assert_eq!(machine.end(), 0);
    assert_eq!(next.read(A, None, IOVA), Ok(1));
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(next.read(A, None, IOVA), Ok(2));
    assert!(next.read(A, Some(1), IOVA).is_err());
    assert_eq!(next.end(), 0);
}

/// A guest that is a host.
#[test]
fn both_stages_of_the_guest_are_restored() {
    let config = machine::vtd_config().with_second_stage(true).with_nest(true);
    let machine = Machine::with(VtdUnitConfig::default(), config);
    let guest = &machine.guest;
    let [first, second, page, other] = [(); 4].map(|()| guest.page());
    guest.map_nested(first, second, IOVA, page, true);
    guest.store(page, 1);
    let nested = Entry::Nested { first, second, domain: DOMAIN, accessed_dirty: true };
    guest.set_entry(A, 0, nested);
    guest.set_entry(A, 1, nested);
    guest.enable();
    guest.set_entry(A, 1, Entry::NotPresent);
    let state = machine.iommu.snapshot().unwrap();
    let next = restored(&machine, &state);
    assert_eq!(next.iommu.snapshot().unwrap(), state);
    for pasid in [None, Some(1)] {
        assert_eq!(next.read(A, pasid, IOVA), Ok(1));
    }
    // What the guest invalidates is found under its names.
    next.guest.store(other, 2);
    next.guest.map_second_stage(second, BELOW + page, other, true);
    assert_eq!(next.read(A, None, IOVA), Ok(1));
    let range = pages(BELOW + page, 0);
    let done = next.guest.submit(&[iotlb(IotlbScope::Pages { domain: DOMAIN, range })]);
    assert_eq!((done, next.read(A, None, IOVA)), (Completion::Done, Ok(2)));
    next.iommu.reset().unwrap();
    assert_eq!(next.read(A, None, page), Ok(1));
    assert_eq!((machine.end(), next.end()), (0, 0));
}

#[test]
fn an_invalidation_that_the_host_refused_is_repeated_on_the_next_host() {
    let (machine, table, _) = nested();
    let guest = &machine.guest;
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    let other = guest.page();
    guest.store(other, 2);
    guest.map(table, IOVA, other, 1, true);
    machine.fail_next(100);
    let stopped = guest.submit(&[pasid_pages(DOMAIN, 0, None)]);
    assert!(matches!(stopped, Completion::Stopped(status) if status.iqe()), "{stopped:?}");
    let next = restored(&machine, &machine.iommu.snapshot().unwrap());
    assert!(next.guest.faults().iqe());
    let calls = next.nesting.counters().invalidations_in;
    assert_eq!(next.guest.resume(), Completion::Done);
    assert_eq!(next.nesting.counters().invalidations_in, calls + 1);
    assert_eq!(next.read(A, None, IOVA), Ok(2));
    assert_eq!(next.end(), 0);
}

/// A machine, and what its driver uses.
struct Life {
    machine: Machine,
    tables: [u64; 2],
    pages: [u64; 3],
}

/// What happens to it. Tables, pages and slots are indices.
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
    /// Without an invalidation.
    Set {
        requester: usize,
        table: Option<usize>,
        domain: u16,
    },
    PassThrough {
        requester: usize,
    },
    Invalidate(Descriptor),
    /// The host refuses some calls, if this is before the snapshot.
    Refuse {
        nth: u64,
        all: bool,
        descriptor: Descriptor,
    },
    /// Two words of descriptors that are mostly reserved.
    Garbage([u64; 2]),
    Resume,
    Replace,
    Dma {
        requester: usize,
        slot: u64,
        write: Option<u64>,
    },
    TakeFault,
    Register {
        offset: u64,
        value: u32,
    },
    Replug(Bdf),
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let (domain, pasid) = (DOMAIN..DOMAIN + 2, 0..3u32);
    let range = prop::option::of((0..SLOTS, 0..2u8));
    let range = range.prop_map(|range| range.map(|(slot, mask)| pages(IOVA + slot * PAGE, mask)));
    let of_pasid = (domain.clone(), pasid.clone()).prop_map(|(domain, pasid)| {
        PasidCacheScope::Pasid { domain, pasid: machine::pasid(pasid) }
    });
    prop_oneof![
        2 => Just(Descriptor::PasidCache(PasidCacheScope::Global)),
        1 => domain.clone().prop_map(|of| Descriptor::PasidCache(PasidCacheScope::Domain(of))),
        1 => of_pasid.prop_map(Descriptor::PasidCache),
        2 => (domain.clone(), pasid, range).prop_map(|(of, pasid, at)| pasid_pages(of, pasid, at)),
        1 => domain.prop_map(|of| iotlb(IotlbScope::Domain(of))),
        1 => Just(iotlb(IotlbScope::Global)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let (requester, table) = (0..REQUESTERS.len(), 0..2usize);
    let event = prop_oneof![regs::FECTL..=regs::FEADDR, regs::IECTL..=regs::IEADDR];
    let offset = prop_oneof![Just(regs::FSTS), Just(regs::ICS), event.prop_map(|at| at & !3)];
    prop_oneof![
        1 => any::<bool>().prop_map(Step::Enable),
        4 => (table.clone(), 0..SLOTS, 0..3usize, any::<bool>())
            .prop_map(|(table, slot, page, writable)| Step::Map { table, slot, page, writable }),
        1 => (table.clone(), 0..SLOTS).prop_map(|(table, slot)| Step::Unmap { table, slot }),
        4 => (requester.clone(), prop::option::weighted(0.8, table), DOMAIN..DOMAIN + 2)
            .prop_map(|(requester, table, domain)| Step::Set { requester, table, domain }),
        1 => requester.clone().prop_map(|requester| Step::PassThrough { requester }),
        4 => descriptor().prop_map(Step::Invalidate),
        2 => (1..6u64, any::<bool>(), descriptor())
            .prop_map(|(nth, all, descriptor)| Step::Refuse { nth, all, descriptor }),
        1 => any::<[u64; 2]>().prop_map(Step::Garbage),
        1 => Just(Step::Resume),
        1 => Just(Step::Replace),
        6 => (requester, 0..SLOTS + 1, prop::option::weighted(0.3, any::<u64>()))
            .prop_map(|(requester, slot, write)| Step::Dma { requester, slot, write }),
        2 => Just(Step::TakeFault),
        1 => (offset, any::<u32>()).prop_map(|(offset, value)| Step::Register { offset, value }),
        1 => prop_oneof![Just(A), Just(B)].prop_map(Step::Replug),
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
        // Tables of all levels, for `Step::Unmap`.
        tables.iter().for_each(|table| guest.map(*table, IOVA, pages[0], 1, true));
        Self { machine, tables, pages }
    }

    /// What the guest and the devices see of a step.
    fn take(&self, step: &Step, refusing: bool) -> String {
        let Self { machine, tables, pages } = self;
        let guest = &machine.guest;
        match *step {
            Step::Enable(te) => {
                guest
                    .registers
                    .write32(regs::GCMD, Gcmd::new().with_qie(true).with_te(te).into_bits());
                format!("{:?}", guest.status())
            }
            Step::Map { table, slot, page, writable } => {
                guest.map(tables[table], IOVA + slot * PAGE, pages[page], 1, writable);
                String::new()
            }
            Step::Unmap { table, slot } => {
                guest.unmap(tables[table], IOVA + slot * PAGE);
                String::new()
            }
            Step::Set { requester, table, domain } => {
                let entry = |table: usize| Entry::FirstStage { table: tables[table], domain };
                self.set(requester, table.map_or(Entry::NotPresent, entry))
            }
            Step::PassThrough { requester } => {
                self.set(requester, Entry::PassThrough { domain: DOMAIN })
            }
            Step::Invalidate(descriptor) => format!("{:?}", guest.submit(&[descriptor])),
            Step::Refuse { nth, all, descriptor } => {
                match (refusing, all) {
                    (false, _) => {}
                    (true, true) => machine.fail_next(100),
                    (true, false) => machine.fail_nth(nth),
                }
                let completion = guest.submit(&[descriptor]);
                machine.fail_next(0);
                format!("{completion:?}")
            }
            Step::Garbage([low, high]) => {
                format!("{:?}", guest.submit_words(&[[low, high, 0, 0]]))
            }
            Step::Resume => format!("{:?}", guest.resume()),
            Step::Replace => {
                format!("{:?}", guest.replace_and_resume(iotlb(IotlbScope::Global)))
            }
            Step::Dma { requester, slot, write } => {
                let (rid, pasid) = REQUESTERS[requester];
                let iova = if slot < SLOTS { IOVA + slot * PAGE } else { pages[0] };
                match write {
                    Some(value) => format!("{:?}", machine.write(rid, pasid, iova, value)),
                    None => format!("{:?}", machine.read(rid, pasid, iova)),
                }
            }
            Step::TakeFault => format!("{:?}", guest.take_fault()),
            Step::Register { offset, value } => {
                guest.registers.write32(offset, value);
                format!("{:x}", guest.registers.read32(offset))
            }
            Step::Replug(rid) => {
                let dev = machine.device(rid);
                machine.iommu.remove_device(rid);
                machine.nesting.remove_device(rid).unwrap();
                machine.nesting.add_device(rid, dev).unwrap();
                machine.iommu.add_device(rid).unwrap();
                String::new()
            }
        }
    }

    fn set(&self, requester: usize, entry: Entry) -> String {
        let (rid, pasid) = REQUESTERS[requester];
        self.machine.guest.set_entry(rid, pasid.unwrap_or(0), entry);
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
        enabled in prop::bool::weighted(0.9),
    ) {
        let life = Life::begin();
        if enabled {
            life.machine.guest.enable();
        }
        let (before, after) = steps.split_at(cut.index(steps.len() + 1));
        for step in before {
            life.take(step, true);
        }
        let first = &life.machine;
        let state = first.iommu.snapshot().unwrap();
        let next = Life { machine: restored(first, &state), ..life };
        let second = &next.machine;
        prop_assert_eq!(&second.iommu.snapshot().unwrap(), &state);
        prop_assert_eq!(registers(second), registers(first));
        first.interrupts.take();

        // The first may have cached what the second has not.
        prop_assert_eq!(forget_all(second, &state), forget_all(first, &state));
        prop_assert_eq!(translations(second), translations(first));
        for step in after {
            prop_assert_eq!(next.take(step, false), life.take(step, false), "{:?}", step);
            let states = [second, first].map(|machine| machine.iommu.snapshot().unwrap());
            prop_assert_eq!(&states[0], &states[1], "{:?}", step);
            prop_assert_eq!(second.interrupts.take(), first.interrupts.take(), "{:?}", step);
        }
        prop_assert_eq!(translations(second), translations(first));
        prop_assert_eq!(registers(second), registers(first));
        prop_assert!(second.memory.contents() == first.memory.contents());
        prop_assert_eq!((next.machine.end(), life.machine.end()), (0, 0));
    }
}

/// A machine whose devices use tables, a PASID and bypass, and its state.
fn busy() -> (Machine, VtdState) {
    let (machine, table, _) = nested();
    let guest = &machine.guest;
    guest.set_entry(A, 1, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_entry(B, 0, Entry::PassThrough { domain: DOMAIN });
    guest.set_entry(B, 1, Entry::FirstStage { table, domain: DOMAIN });
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    let state = machine.iommu.snapshot().unwrap();
    (machine, state)
}

/// Everything up to the restored machine, or the error, with the nesting that was given to it.
fn attempt(
    machine: &Machine,
    state: &VtdState,
    ground: &Ground,
) -> Result<Machine, (String, Option<Arc<VtdNesting>>)> {
    let nesting = ground.nest().map_err(|error| (error, None))?;
    machine
        .restored(state, ground, nesting.clone())
        .map_err(|error| (error.to_string(), Some(nesting)))
}

#[test]
fn every_host_call_of_a_restore_fails_in_turn() {
    let (machine, state) = busy();
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
        assert!([A, B].iter().any(|rid| error.contains(&rid.to_string())), "call {n}: {error}");
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
    assert!(calls > 8, "only {calls} calls were made to fail");
    assert_eq!(repeated, 1, "one HWPT is flushed for a new tag");
}

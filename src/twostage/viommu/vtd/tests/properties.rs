// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whatever a guest does, and whichever host call fails, the unit responds.

use proptest::prelude::*;

use super::remapping::{irte, SIZE};
use super::*;
use crate::spec::vtd::qi::{InterruptEntryScope, IotlbScope, PasidCacheScope};
use crate::viommu::testing::{any_access, any_refusal, contents, copy_of, AnyAccess};
use crate::viommu::{InterruptListener, InterruptRemapper};

/// For whom translations are.
struct Keeper;

impl InterruptListener for Keeper {
    fn interrupts_changed(&self) {}
}

fn words() -> impl Strategy<Value = [u64; 4]> {
    let sparse = any::<[u64; 4]>().prop_map(|[low, high, ..]| [low & !0xfffc_0e00, high, 0, 0]);
    // Random words nearly always have a reserved type; these are nearly always valid.
    let near = (0..16u64, 0..4u64, any::<u32>(), any::<u64>()).prop_map(|(kind, g, ids, high)| {
        [kind | g << 4 | u64::from(ids) << 16, high & !0xf80, 0, 0]
    });
    prop_oneof![any::<[u64; 4]>(), sparse, near]
}

fn access() -> impl Strategy<Value = AnyAccess> {
    any_access(prop_oneof![0..0x120u64, 0x220..0x2a0u64, 0..2 * MMIO_SIZE, any::<u64>()])
}

proptest! {
    #[test]
    fn a_queue_of_garbage_ends(
        descriptors in prop::collection::vec(words(), 1..128),
        clears in 0..40usize,
    ) {
        let guest = Guest::running();
        guest.submit_words(&descriptors);
        for _ in 0..clears {
            guest.write32(regs::FSTS, 0x70);
            guest.iommu.drain_queue();
        }
        let state = guest.iommu.snapshot().unwrap();
        let (head, tail) = (state.registers.iqh, state.registers.iqt);
        let stopped = state.faults.status.iqe() || state.faults.status.ite();
        prop_assert!(stopped || head == tail, "{head:?} {tail:?}");
    }

    #[test]
    fn any_accesses_are_answered(
        accesses in prop::collection::vec(access(), 0..64),
        tables in prop::collection::vec((0..0xa00u64, any::<u64>()), 0..32),
    ) {
        let guest = Guest::running();
        for (word, value) in tables {
            guest.write(8 * word, &[value]);
        }
        for access in accesses {
            guest.access(&access);
            guest.iommu.dma_fault(&fault(with_pasid((access.value & 0xf_ffff) as u32)));
        }
        // Whatever happened, the device exists and the records are consistent.
        let state = guest.iommu.snapshot().unwrap();
        let used = state.faults.records.iter().any(|record| record.high.f());
        prop_assert_eq!(state.faults.status.ppf(), used);
        prop_assert_eq!(guest.iommu.requesters.functions(), vec![RID]);
    }

    #[test]
    fn any_interrupts_are_answered(
        table in prop::collection::vec(any::<[u64; 2]>(), 256),
        present in any::<bool>(),
        flags in 0..0x1000u64,
        commands in prop::collection::vec(any::<u32>(), 0..8),
        messages in prop::collection::vec((any::<u16>(), any::<u32>(), any::<u32>()), 0..32),
    ) {
        let guest = Guest::new(VtdConfig { interrupt_remapping: true, ..Default::default() });
        for (index, [low, high]) in (0..).zip(table) {
            guest.write(0x9000 + 16 * index, &[low | u64::from(present), high]);
        }
        guest.enable_queue(0x800);
        guest.write64(regs::IRTA, 0x9000 | flags);
        guest.write32(regs::GCMD, 1 << 26 | 1 << 25 | 1 << 24);
        let keeper: Arc<dyn InterruptListener> = Arc::new(Keeper);
        guest.iommu.add_interrupt_listener(Arc::downgrade(&keeper));
        let mut commands = commands.into_iter();
        for (source, address, data) in messages {
            let message = MsiMessage { address: (0xfee0_0000 | address & 0xf_ffff).into(), data };
            let sink = FakeSink::default();
            let source = Bdf::from_raw(source);
            let expected = guest.iommu.translate(source, message);
            let sent = guest.iommu.send_remapped(source, message, &sink);
            prop_assert_eq!(sent, expected.is_some());
            let sent = sink.0.into_inner();
            let expected = expected.map(|message| (message.address, message.data));
            prop_assert_eq!(sent.first().copied(), expected);
            if let Some(command) = commands.next() {
                guest.write32(regs::GCMD, command);
            }
        }
        let state = guest.iommu.snapshot().unwrap();
        let used = state.faults.records.iter().any(|record| record.high.f());
        prop_assert_eq!(state.faults.status.ppf(), used);
    }

    #[test]
    fn any_tables_decide(
        root in any::<[u64; 2]>(),
        context in any::<[u64; 4]>(),
        entry in any::<[u64; 8]>(),
        pointers in any::<bool>(),
        ttm in 0..4u64,
        value in prop::option::of(0..1u32 << 20),
        nest: bool,
    ) {
        let stages = VtdConfig { second_stage: true, nest, ..Default::default() };
        let guest = Guest::new(stages.with_pasid_bits(Some(6)));
        let keep =
            |word: u64, address: u64| if pointers { word & 0xffe | address | 1 } else { word };
        guest.write(ROOT + 0x10, &[keep(root[0], CONTEXT), root[1]]);
        let [first, second, third, fourth] = context;
        guest.write(CONTEXT + 0x100, &[keep(first, DIRECTORY), second, third, fourth]);
        guest.write(DIRECTORY, &[PASID_TABLE | 1]);
        guest.write(PASID_TABLE, &entry);
        guest.set_root(ttm << 10);
        guest.enable_translation();
        let requester = Requester { rid: RID, pasid: value.and_then(Pasid::new) };
        guest.iommu.dma_fault(&fault(requester));
        prop_assert_eq!(guest.read32(regs::GSTS) >> 31, 1);
        // Whatever was decided is a decision that a unit can have, and go on with elsewhere.
        let state = guest.iommu.snapshot().unwrap();
        prop_assert_eq!(guest.restored(&state).unwrap().iommu.snapshot().unwrap(), state);
    }
}

/// Enables, serves, changes, invalidates and disables; clears IQE as often as a driver would.
fn life(guest: &Guest) {
    guest.write_tables();
    guest.write_pasid(5, 0x6000);
    guest.set_root(0x400);
    guest.enable_queue(0x800);
    guest.enable_translation();
    let changed = Descriptor::PasidCache(PasidCacheScope::Global);
    let stale = |value| Descriptor::PasidIotlb { domain: DOMAIN, pasid: pasid(value), range: None };
    guest.write_pasid(5, 0x7000);
    guest.submit(&[changed, stale(5), wait(1)]);
    guest.write(DIRECTORY, &[0]);
    guest.submit(&[changed, stale(0), wait(2)]);
    guest.iommu.add_device(UPPER_RID).unwrap_or(());
    guest.iommu.remove_device(UPPER_RID);
    guest.write32(regs::FSTS, 1 << 4);
    // Whatever the host did, the queue has been processed.
    assert_eq!(guest.status(), 2);
    guest.submit(&[changed, wait(3)]);
    assert_eq!(guest.status(), 3);
    for requester in [Requester::rid(RID), with_pasid(5)] {
        assert_eq!(guest.reason(requester), Some(0x51));
    }
    guest.disable_translation();
}

#[test]
fn each_failure_is_counted_told_and_survived() {
    for failing in 0.. {
        let guest = Guest::new(VtdConfig::default());
        guest.host.refusals.after(failing);
        life(&guest);
        let calls = guest.calls();
        let counters = guest.iommu.counters();
        let Some(call) = calls.get(failing as usize) else {
            assert_eq!((counters.host_errors, counters.queue_errors), (0, 0));
            assert!(failing > 10, "{calls:?}");
            return;
        };
        assert_eq!(counters.host_errors, 1, "{call:?}");
        // The first call is SRTP's, which cannot report a failure.
        let queue_errors = u64::from(matches!(call, Call::Invalidate(_)) && failing > 0);
        assert_eq!(counters.queue_errors, queue_errors, "{call:?}");
    }
}

/// A step of a guest and its devices.
#[derive(Debug, Clone)]
enum Step {
    /// A PASID table entry is written: absent, or with one of some tables.
    Pasid(u64, u64),
    /// An interrupt table entry is written.
    Irte(u64, u64),
    /// The root table or the interrupt table is set as it was at first.
    Root,
    InterruptTable,
    /// Descriptors are queued.
    Queue(Vec<[u64; 4]>),
    /// A bit of GCMD changes.
    Command(u32),
    Access(AnyAccess),
    /// Queue errors are cleared.
    Clear,
    /// Faults are cleared.
    ClearFaults,
    Fault(Requester),
    /// A blocked request, before it fails.
    Late(Requester),
    Interrupt(u16),
    /// The second function comes, or goes.
    Plug(bool),
}

fn descriptor() -> impl Strategy<Value = [u64; 4]> {
    let status = |data| Some(crate::spec::vtd::qi::StatusWrite { address: STATUS, data });
    let known = prop_oneof![
        Just(Descriptor::PasidCache(PasidCacheScope::Global)),
        Just(Descriptor::Iotlb {
            scope: IotlbScope::Global,
            drain_writes: false,
            drain_reads: false
        }),
        (1..8u32).prop_map(|value| Descriptor::PasidIotlb {
            domain: DOMAIN,
            pasid: pasid(value),
            range: None
        }),
        Just(Descriptor::InterruptEntryCache(InterruptEntryScope::Global)),
        (0..4u16).prop_map(|index| {
            Descriptor::InterruptEntryCache(InterruptEntryScope::Index { index, mask: 0 })
        }),
        (any::<u32>(), any::<bool>()).prop_map(move |(data, interrupt)| Descriptor::Wait {
            status: status(data),
            interrupt,
            fence: false,
            drain_page_requests: false,
        }),
    ];
    prop_oneof![12 => known.prop_map(|descriptor| descriptor.encode()), 1 => words()]
}

fn descriptors() -> impl Strategy<Value = Vec<[u64; 4]>> {
    prop::collection::vec(descriptor(), 1..8)
}

fn requester() -> impl Strategy<Value = Requester> {
    let with = |value| Requester { rid: RID, pasid: Pasid::new(value) };
    prop_oneof![
        (0..8u32).prop_map(with),
        Just(Requester::rid(RID)),
        Just(Requester::rid(UPPER_RID))
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..8u64, 0..4u64).prop_map(|(pasid, table)| Step::Pasid(pasid, table)),
        2 => (0..4u64, 0..256u64).prop_map(|(index, vector)| Step::Irte(index, vector)),
        1 => Just(Step::Root),
        1 => Just(Step::InterruptTable),
        6 => descriptors().prop_map(Step::Queue),
        2 => prop::sample::select(vec![31, 31, 30, 26, 25, 24, 23]).prop_map(Step::Command),
        2 => access().prop_map(Step::Access),
        3 => Just(Step::Clear),
        1 => Just(Step::ClearFaults),
        2 => requester().prop_map(Step::Fault),
        2 => requester().prop_map(Step::Late),
        2 => (0..4u16).prop_map(Step::Interrupt),
        1 => any::<bool>().prop_map(Step::Plug),
    ]
}

type Steps = Vec<(Step, Option<(i64, bool)>)>;

fn steps() -> impl Strategy<Value = Steps> {
    prop::collection::vec((step(), any_refusal()), 0..40)
}

impl Guest {
    fn step(&self, step: &Step) -> Option<u32> {
        match step {
            Step::Pasid(pasid, 0) => self.write(PASID_TABLE + 64 * pasid, &[0]),
            Step::Pasid(pasid, table) => self.write_pasid(*pasid, FIRST_STAGE + 0x1000 * table),
            Step::Irte(index, vector) => self.write_irte(*index, irte(*vector)),
            Step::Root => self.set_root(0x400),
            Step::InterruptTable => self.set_interrupt_table(SIZE),
            Step::Queue(descriptors) => self.submit_words(descriptors),
            Step::Command(bit) => self.command(|enabled| enabled ^ 1 << bit),
            Step::Access(access) => self.access(access),
            Step::Clear => self.write32(regs::FSTS, 0x71),
            Step::ClearFaults => {
                (0..8).for_each(|index| self.write64(0x228 + 16 * index, 1 << 63));
            }
            Step::Fault(requester) => self.iommu.dma_fault(&fault(*requester)),
            Step::Late(requester) => return Some(self.iommu.served_late(*requester).into()),
            Step::Interrupt(handle) => return self.vector(*handle),
            Step::Plug(true) => self.iommu.add_device(UPPER_RID).unwrap_or(()),
            Step::Plug(false) => self.iommu.remove_device(UPPER_RID),
        }
        None
    }

    /// Everything that is seen of the steps from outside.
    fn play(&self, steps: &Steps) -> Vec<String> {
        let step = |(step, refusal): &(Step, Option<(i64, bool)>)| {
            let result = self.host.refusals.during(*refusal, || self.step(step));
            let (calls, messages) = (self.calls(), self.messages());
            format!("{step:?}, {refusal:?}: {result:?} {calls:?} {messages:?} {}", self.status())
        };
        steps.iter().map(step).collect()
    }
}

proptest! {
    #[test]
    fn a_life_goes_on_in_a_restored_unit(
        caching_mode in any::<bool>(),
        before in steps(),
        (queued, slices, pieces) in (descriptors(), 0..4usize, 1..4u64),
        command in prop::option::of(prop::sample::select(vec![31, 30, 26, 25])),
        after in steps(),
    ) {
        let guest = Guest::with_remapping(VtdConfig { caching_mode, ..Default::default() });
        guest.write_tables();
        guest.set_root(0x400);
        guest.enable_queue(0x800);
        guest.set_interrupt_table(SIZE);
        guest.enable_remapping();
        guest.enable_translation();
        guest.write32(regs::IECTL, 0);
        guest.play(&before);
        // In the middle of the queue, and of a command.
        *guest.host.pieces.lock() = pieces;
        let tail = guest.queue_words(&queued);
        guest.iommu.lock().iqt = regs::QueuePointer::from_offset(tail);
        (0..slices).for_each(|_| {
            guest.slice();
        });
        if let Some(bit) = command {
            guest.begin_command(|enabled| enabled ^ 1 << bit);
        }
        let state = guest.iommu.snapshot().unwrap();
        let host = FakeHost::new(copy_of(&guest.memory));
        *host.pieces.lock() = pieces;
        let restored = guest.restored_on(host, &state).unwrap();
        prop_assert_eq!(restored.iommu.snapshot().unwrap(), state);
        prop_assert_eq!(restored.every_register(), guest.every_register());
        let rest = [&guest, &restored].map(|guest| {
            guest.calls();
            guest.messages();
            guest.iommu.drain_queue();
            let drained = format!("{:?} {:?}", guest.calls(), guest.messages());
            let steps = guest.play(&after);
            let state = guest.iommu.snapshot().unwrap();
            (drained, steps, guest.every_register(), state)
        });
        let [one, other] = rest;
        prop_assert_eq!(one, other);
        prop_assert!(contents(&guest.memory) == contents(&restored.memory), "memory differs");
    }
}

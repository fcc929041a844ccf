// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whatever a guest does, and whichever host call fails, the SMMU responds.

use proptest::prelude::*;

use super::*;
use crate::viommu::testing::{any_access, any_refusal, contents, copy_of, AnyAccess};

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
    guest.smmu.add_device(StreamId(5)).unwrap_or(());
    guest.smmu.remove_device(StreamId(5));
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

/// A step of a guest and its devices.
#[derive(Debug, Clone)]
enum Step {
    /// A stream table entry is written.
    Entry(StreamId, [u64; 2]),
    /// Commands are queued.
    Queue(Vec<Words>),
    /// CR0 is written.
    Enable(u32),
    Access(AnyAccess),
    /// Global errors are acknowledged.
    Acknowledge,
    Event(StreamId),
    /// Events are taken from the queue.
    TakeEvents,
    /// A stream comes, or goes.
    Plug(StreamId, bool),
}

fn stream() -> impl Strategy<Value = StreamId> {
    // One is not behind the SMMU, at first.
    prop::sample::select(vec![STREAM, OTHER, StreamId(5)])
}

fn command() -> impl Strategy<Value = Words> {
    let message =
        |(address, data)| Command::Sync { signal: SyncSignal::Interrupt { address, data } };
    let known = prop_oneof![
        Just(SYNC),
        Just(CFGI_ALL),
        Just(Command::TlbiNsnhAll),
        stream().prop_map(cfgi_ste),
        stream().prop_map(cfgi_cd_all),
        (0..4u16).prop_map(tlbi),
        (prop::sample::select(vec![DOORBELL, WORD, 0x40_0000]), any::<u32>()).prop_map(message),
    ];
    prop_oneof![12 => known.prop_map(|command| command.encode()), 1 => words()]
}

fn commands() -> impl Strategy<Value = Vec<Words>> {
    prop::collection::vec(command(), 1..8)
}

fn step() -> impl Strategy<Value = Step> {
    let entries =
        vec![[0, 0], [1, 0], BYPASS_ENTRY, BAD_ENTRY, stage1_entry(CONTEXTS), stage1_entry(0x7000)];
    prop_oneof![
        4 => (stream(), prop::sample::select(entries))
            .prop_map(|(stream, entry)| Step::Entry(stream, entry)),
        6 => commands().prop_map(Step::Queue),
        2 => prop::sample::select(vec![0b1101, 0b1101, 0b1100, 0b0101, 0]).prop_map(Step::Enable),
        2 => access().prop_map(Step::Access),
        3 => Just(Step::Acknowledge),
        2 => stream().prop_map(Step::Event),
        2 => Just(Step::TakeEvents),
        1 => (stream(), any::<bool>()).prop_map(|(stream, there)| Step::Plug(stream, there)),
    ]
}

type Steps = Vec<(Step, Option<(i64, bool)>)>;

fn steps() -> impl Strategy<Value = Steps> {
    prop::collection::vec((step(), any_refusal()), 0..40)
}

impl Guest {
    fn step(&self, step: &Step) -> Vec<EventRecord> {
        match step {
            Step::Entry(stream, entry) => self.write_entry(*stream, *entry),
            Step::Queue(commands) => self.submit_words(commands),
            Step::Enable(bits) => self.write32(regs::CR0, *bits),
            Step::Access(access) => self.access(access),
            Step::Acknowledge => self.acknowledge_errors(),
            Step::Event(stream) => self.smmu.event(translation_fault(*stream).to_words()),
            Step::TakeEvents => {
                return std::iter::from_fn(|| self.take_event()).take(16).collect();
            }
            Step::Plug(stream, true) => self.smmu.add_device(*stream).unwrap_or(()),
            Step::Plug(stream, false) => self.smmu.remove_device(*stream),
        }
        Vec::new()
    }

    /// Everything that is seen of the steps from outside.
    fn play(&self, steps: &Steps) -> Vec<String> {
        let step = |(step, refusal): &(Step, Option<(i64, bool)>)| {
            let result = self.host.refusals.during(*refusal, || self.step(step));
            let (calls, interrupts) = (self.calls(), self.interrupts());
            format!("{step:?}, {refusal:?}: {result:?} {calls:?} {interrupts:?}")
        };
        steps.iter().map(step).collect()
    }
}

proptest! {
    #[test]
    fn a_life_goes_on_in_a_restored_smmu(
        before in steps(),
        (queued, slices) in (commands(), 0..4usize),
        after in steps(),
    ) {
        let guest = Guest::running();
        guest.play(&before);
        // In the middle of the queue.
        let end = guest.queue_words(&queued);
        guest.smmu.lock().cmdq_prod.set_wr(end);
        (0..slices).for_each(|_| {
            guest.smmu.run_slice(&mut guest.smmu.lock());
        });
        let state = guest.smmu.snapshot().unwrap();
        let memory = copy_of(&guest.memory);
        let restored = guest.restored_with(Arc::default(), memory, &state).unwrap();
        prop_assert_eq!(restored.smmu.snapshot().unwrap(), state);
        prop_assert_eq!(restored.every_register(), guest.every_register());
        let rest = [&guest, &restored].map(|guest| {
            guest.calls();
            guest.interrupts();
            guest.smmu.drain_queue();
            let drained = format!("{:?} {:?}", guest.calls(), guest.interrupts());
            let steps = guest.play(&after);
            let state = guest.smmu.snapshot().unwrap();
            (drained, steps, guest.every_register(), state)
        });
        let [one, other] = rest;
        prop_assert_eq!(one, other);
        prop_assert!(contents(&guest.memory) == contents(&restored.memory), "memory differs");
    }
}

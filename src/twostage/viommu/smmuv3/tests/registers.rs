// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register pages.

use super::*;
use crate::spec::smmuv3::StreamId;
use crate::viommu::{FaultOutcome, RegisterAccess};

#[test]
fn the_pages_after_reset() {
    let guest = Guest::new(&SmmuConfig::default());
    let caps = guest.smmu.capabilities();
    assert_eq!(guest.read32(regs::IDR0), caps.idr0.into_bits());
    assert_eq!(guest.read32(regs::IDR1), caps.idr1.into_bits());
    assert_eq!(guest.read32(regs::IDR3), caps.idr3.into_bits());
    assert_eq!(guest.read32(regs::IDR5), caps.idr5.into_bits());
    assert_eq!(guest.read32(regs::IIDR), caps.iidr.into_bits());
    assert_eq!(guest.read32(regs::AIDR), caps.aidr.into_bits());
    assert_eq!(guest.read32(regs::GBPA), 0x1000);
    let known = [regs::IDR0, regs::IDR1, regs::IDR3, regs::IDR5, regs::AIDR, regs::GBPA];
    for offset in (0..regs::SIZE).step_by(4).filter(|offset| !known.contains(offset)) {
        assert_eq!(guest.read32(offset), 0, "{offset:#x}");
    }
}

#[test]
fn halves_of_a_register_are_the_register() {
    let guest = Guest::new(&SmmuConfig::default());
    let pair = guest.read64(regs::IDR0);
    assert_eq!(pair as u32, guest.read32(regs::IDR0));
    assert_eq!((pair >> 32) as u32, guest.read32(regs::IDR1));
    let registers = [
        (regs::STRTAB_BASE, 0x400f_ffff_ffff_ffc0),
        (regs::CMDQ_BASE, 0x400f_ffff_ffff_ffff),
        (regs::EVENTQ_BASE, 0x400f_ffff_ffff_ffff),
        (regs::GERROR_IRQ_CFG0, 0x000f_ffff_ffff_fffc),
        (regs::EVENTQ_IRQ_CFG0, 0x000f_ffff_ffff_fffc),
    ];
    for (offset, writable) in registers {
        guest.write32(offset + 4, u32::MAX);
        assert_eq!(guest.read64(offset), writable & 0xffff_ffff_0000_0000, "{offset:#x}");
        guest.write32(offset, u32::MAX);
        assert_eq!(guest.read64(offset), writable, "{offset:#x}");
        guest.write64(offset, 0x1_2345_6780);
        assert_eq!(guest.read64(offset), 0x1_2345_6780, "{offset:#x}");
    }
}

#[test]
fn reserved_bits_of_32_bit_registers_read_as_zero() {
    let guest = Guest::new(&SmmuConfig::default());
    for (offset, readable) in [
        (regs::CR1, 0xfff),
        // Without EL2 there is no E2H.
        (regs::CR2, 0b110),
        (regs::STRTAB_BASE_CFG, 0x3_07ff),
        (regs::CMDQ_PROD, 0xf_ffff),
        (regs::CMDQ_CONS, 0x7f0f_ffff),
        (regs::EVENTQ_PROD, 0x800f_ffff),
        (regs::EVENTQ_CONS, 0x800f_ffff),
        (regs::GERROR_IRQ_CFG1, u32::MAX),
        (regs::GERROR_IRQ_CFG2, 0x3f),
        (regs::EVENTQ_IRQ_CFG1, u32::MAX),
        (regs::EVENTQ_IRQ_CFG2, 0x3f),
        (regs::GBPA, 0x001f_3f1f),
        // Without page requests there is no PRIQ.
        (regs::IRQ_CTRL, 0b101),
        (regs::GERRORN, 0),
        (regs::PRIQ_BASE, 0),
        (regs::PRIQ_PROD, 0),
        (regs::PRIQ_IRQ_CFG0, 0),
        (regs::STATUSR, 0),
        (regs::AGBPA, 0),
    ] {
        guest.write32(offset, u32::MAX);
        assert_eq!(guest.read32(offset), readable, "{}", regs::name(offset));
    }
    // CR0 last, as it fixes others: without ATS there is no ATSCHK.
    guest.write32(regs::CR0, u32::MAX);
    assert_eq!(guest.read64(regs::CR0), 0xd_0000_000d);
}

#[test]
fn read_only_registers_keep_their_values() {
    let guest = Guest::new(&SmmuConfig::default());
    for offset in (regs::IDR0..regs::CR0).step_by(4).chain([
        regs::CR0ACK,
        regs::IRQ_CTRLACK,
        regs::GERROR,
        // Aliases of page 1 do not exist.
        0xa8,
        0xac,
        0xfd0,
        0x1_0000,
    ]) {
        let before = guest.read32(offset);
        guest.write32(offset, !before);
        assert_eq!(guest.read32(offset), before, "{offset:#x}");
    }
}

#[test]
fn other_accesses_read_as_zero_and_write_nothing() {
    let guest = Guest::new(&SmmuConfig::default());
    for (offset, size) in [(0, 1), (0, 2), (2, 4), (4, 8), (0, 3), (0, 16), (0, 0)] {
        let mut data = vec![0xff; size];
        guest.smmu.mmio_read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} {size}");
    }
    let before = guest.smmu.snapshot().unwrap();
    for (offset, size) in [(0x80, 2), (0x82, 4), (0x84, 8), (0x98, 1), (0x98, 16)] {
        guest.smmu.mmio_write(offset, &vec![0xff; size]);
    }
    for offset in [regs::SIZE, regs::SIZE + 8, u64::MAX - 7, u64::MAX] {
        let mut data = [0xff; 4];
        guest.smmu.mmio_read(offset, &mut data);
        assert_eq!(data, [0; 4]);
        guest.smmu.mmio_write(offset, &[0xff; 4]);
    }
    assert_eq!(guest.smmu.snapshot().unwrap(), before);
    assert_eq!(guest.smmu.counters().guest_errors, 9);
}

#[test]
fn what_is_in_use_is_fixed() {
    let guest = Guest::running();
    for offset in [
        regs::CR1,
        regs::CR2,
        regs::STRTAB_BASE,
        regs::STRTAB_BASE_CFG,
        regs::CMDQ_BASE,
        regs::CMDQ_CONS,
        regs::EVENTQ_BASE,
        regs::EVENTQ_PROD,
        regs::EVENTQ_IRQ_CFG0,
        regs::EVENTQ_IRQ_CFG1,
        regs::GERROR_IRQ_CFG0,
        regs::GERROR_IRQ_CFG1,
    ] {
        let before = guest.read32(offset);
        guest.write32(offset, !before);
        assert_eq!(guest.read32(offset), before, "{}", regs::name(offset));
    }
    assert_eq!(guest.calls(), []);
    // Disabled again, it is writable.
    guest.write32(regs::CR0, 0);
    guest.write32(regs::IRQ_CTRL, 0);
    for offset in [regs::STRTAB_BASE, regs::CMDQ_BASE, regs::EVENTQ_BASE, regs::GERROR_IRQ_CFG1] {
        guest.write32(offset, 0x1_0000);
        assert_eq!(guest.read32(offset), 0x1_0000, "{}", regs::name(offset));
    }
}

#[test]
fn attributes_of_queues_and_tables_are_fixed_apart() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write_queue_registers();
    guest.write32(regs::CR0, 0b1000);
    guest.write32(regs::CR1, 0xfff);
    assert_eq!(guest.read32(regs::CR1), 0xfc0);
    guest.write32(regs::CR0, 1);
    guest.write32(regs::CR1, 0x03f);
    assert_eq!(guest.read32(regs::CR1), 0xfff);
}

#[test]
fn gbpa_needs_its_update_bit() {
    let guest = Guest::new(&SmmuConfig::default());
    guest.write32(regs::GBPA, 1 << 20);
    assert_eq!((guest.read32(regs::GBPA), guest.calls()), (0x1000, vec![]));
    guest.write32(regs::GBPA, 1 << 31 | 1 << 20);
    assert_eq!(guest.read32(regs::GBPA), 1 << 20);
    let abort = StreamPolicy::Abort;
    assert_eq!(guest.calls(), [Call::Configure(STREAM, abort), Call::Configure(OTHER, abort)]);
    guest.write32(regs::GBPA, 1 << 31);
    let bypass = StreamPolicy::GlobalBypass;
    assert_eq!(guest.calls(), [Call::Configure(STREAM, bypass), Call::Configure(OTHER, bypass)]);
    // Not done: not acknowledged.
    guest.fail_to_block(true);
    guest.write32(regs::GBPA, 1 << 31 | 1 << 20);
    assert_eq!(guest.read32(regs::GBPA), 1 << 31 | 1 << 20);
    guest.fail_to_block(false);
    guest.write32(regs::GBPA, 1 << 31 | 1 << 20);
    assert_eq!(guest.read32(regs::GBPA), 1 << 20);
}

#[test]
fn what_cannot_be_disabled_for_all_is_enabled_for_all() {
    let guest = Guest::running();
    guest.calls();
    let enabled = guest.read32(regs::CR0);
    // One stream passes already, the other does not.
    guest.host.refusals.block_nothing(true);
    guest.host.refusals.after(1);
    guest.write32(regs::CR0, enabled & !1);
    assert_eq!(guest.read32(regs::CR0ACK), enabled);
    let by_table = |stream| {
        Call::Configure(stream, guest.smmu.policy_by_tables(stream).expect("it is enabled"))
    };
    let bypass = |stream| Call::Configure(stream, StreamPolicy::GlobalBypass);
    let calls = [bypass(STREAM), bypass(OTHER), by_table(STREAM), by_table(OTHER)];
    assert_eq!(guest.calls(), calls);
    // The guest has thought better of it.
    guest.write32(regs::CR0, enabled);
    assert_eq!((guest.read32(regs::CR0ACK), guest.calls()), (enabled, vec![]));
    guest.write32(regs::CR0, enabled & !1);
    assert_eq!(guest.read32(regs::CR0ACK), enabled & !1);
    assert_eq!(guest.calls(), [bypass(STREAM), bypass(OTHER)]);
}

#[test]
fn what_cannot_be_enabled_again_for_all_is_so_before_anything_is_complete() {
    for by_command in [false, true] {
        let guest = Guest::running();
        guest.calls();
        let enabled = guest.read32(regs::CR0);
        guest.host.refusals.block_nothing(true);
        guest.host.refusals.everything(true);
        guest.write32(regs::CR0, enabled & !1);
        assert_eq!((guest.read32(regs::CR0ACK), guest.calls().len()), (enabled, 4));
        guest.host.refusals.everything(false);
        match by_command {
            false => guest.write32(regs::CR0, enabled),
            true => guest.submit(&[SYNC]),
        }
        let by_table = |stream| {
            Call::Configure(stream, guest.smmu.policy_by_tables(stream).expect("it is enabled"))
        };
        assert_eq!(guest.calls(), [by_table(STREAM), by_table(OTHER)], "{by_command}");
    }
}

#[test]
fn features_make_their_bits() {
    let config = SmmuConfig { ats: true, msi: false, ..Default::default() };
    let guest = Guest::new(&config);
    guest.write32(regs::CR0, 1 << 4);
    assert_eq!(guest.read32(regs::CR0ACK), 1 << 4);
    for offset in [regs::GERROR_IRQ_CFG0, regs::GERROR_IRQ_CFG1, regs::EVENTQ_IRQ_CFG0] {
        guest.write64(offset, u64::MAX);
        assert_eq!(guest.read64(offset), 0);
    }
}

#[test]
fn an_impossible_configuration_makes_no_smmu() {
    let guest = Guest::new(&SmmuConfig::default());
    let config = SmmuConfig { stream_bits: 0, ..Default::default() };
    let memory = Arc::new(guest.memory.clone());
    let smmu = Smmu::new(&config, memory, guest.host.clone(), guest.interrupts.clone(), None);
    assert_eq!(smmu.unwrap_err(), SmmuConfigError::StreamBits(0));
}

#[derive(Default)]
struct Trace(Mutex<Vec<String>>);

impl Trace {
    fn push(&self, line: String) {
        self.0.lock().push(line);
    }
}

impl Observer for Trace {
    fn register(&self, access: &RegisterAccess) {
        let RegisterAccess { name, offset, size, value, write } = access;
        let verb = if *write { "write" } else { "read" };
        self.push(format!("{verb} {name} {offset:#x} {size} {value:#x}"));
    }

    fn disabling_translation(&self) {
        self.push("disabling".into());
    }

    fn descriptor(&self, name: &'static str, _: &dyn fmt::Debug) {
        self.push(name.into());
    }

    fn stream_policy(&self, stream: StreamId, policy: &StreamPolicy, applied: bool) {
        self.push(format!("policy {stream} {policy:?} {applied}"));
    }

    fn event(&self, record: &EventRecord, outcome: FaultOutcome) {
        let name = record.id().unwrap().name();
        self.push(format!("event {name} {} {outcome:?}", record.stream()));
    }
}

#[test]
fn an_observer_sees_everything_in_order() {
    let trace = Arc::new(Trace::default());
    let guest = Guest::observed(&SmmuConfig::default(), Some(trace.clone()));
    guest.write_queue_registers();
    guest.write_table_registers();
    guest.write_entry(STREAM, BYPASS_ENTRY);
    guest.write_entry(OTHER, BAD_ENTRY);
    guest.write32(regs::CR0, 0b1100);
    trace.0.lock().clear();
    guest.submit(&[Command::TlbiNsnhAll, SYNC]);
    guest.write32(regs::CR0, 0b1101);
    guest.smmu.event(translation_fault(OTHER).to_words());
    guest.read32(regs::EVENTQ_PROD);
    // Once: translation that is off is not disabled again.
    guest.write32(regs::CR0, 0b1100);
    guest.write32(regs::CR0, 0b1100);
    assert_eq!(
        *trace.0.lock(),
        [
            "read CMDQ_PROD 0x98 4 0x0",
            "write CMDQ_PROD 0x98 4 0x2",
            "CMD_TLBI_NSNH_ALL",
            "CMD_SYNC",
            "write CR0 0x20 4 0xd",
            "policy 0x3 Bypass true",
            "policy 0x4 Abort true",
            "event C_BAD_STE 0x4 Recorded",
            "read EVENTQ_PROD 0x100a8 4 0x1",
            "write CR0 0x20 4 0xc",
            "disabling",
            "policy 0x3 GlobalBypass true",
            "policy 0x4 GlobalBypass true",
            "write CR0 0x20 4 0xc",
        ]
    );
}

#[cfg(feature = "serde")]
#[test]
fn the_state_round_trips() {
    let guest = Guest::running();
    guest.smmu.event(translation_fault(STREAM).to_words());
    let state = guest.smmu.snapshot().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<SmmuState>(&text).unwrap(), state);
}

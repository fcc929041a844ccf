// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The register page.

use super::*;
use crate::spec::vtd::regs::{Cap, Ecap};
use crate::viommu::FaultOutcome;
use crate::viommu::RegisterAccess;

#[test]
fn the_page_after_reset() {
    let guest = Guest::new(VtdConfig::default());
    assert_eq!(guest.read32(regs::VER), 0x40);
    let caps = guest.iommu.capabilities();
    assert_eq!(Cap::from_bits(guest.read64(regs::CAP)), caps.cap);
    assert_eq!(Ecap::from_bits(guest.read64(regs::ECAP)), caps.ecap);
    let masked = [regs::FECTL, regs::IECTL, regs::PECTL];
    for offset in (0..MMIO_SIZE).step_by(4) {
        let value = guest.read32(offset);
        if masked.contains(&offset) {
            assert_eq!(value, 1 << 31);
        } else if offset >= 0x18 {
            assert_eq!(value, 0, "{offset:#x}");
        }
    }
}

#[test]
fn halves_of_a_register_are_the_register() {
    let guest = Guest::new(VtdConfig::default());
    let cap = guest.read64(regs::CAP);
    assert_eq!(u64::from(guest.read32(regs::CAP)), cap & 0xffff_ffff);
    assert_eq!(u64::from(guest.read32(regs::CAP + 4)), cap >> 32);
    guest.write32(regs::RTADDR + 4, 0x12);
    guest.write32(regs::RTADDR, 0x3456_7fff);
    // Bits 9:0 are reserved.
    assert_eq!(guest.read64(regs::RTADDR), 0x12_3456_7c00);
    assert_eq!(guest.read64(regs::GCMD) >> 32, u64::from(guest.read32(regs::GSTS)));
}

#[test]
fn other_accesses_read_all_ones_and_write_nothing() {
    let guest = Guest::new(VtdConfig::default());
    for (offset, size) in [(0, 1), (0, 2), (2, 4), (4, 8), (0, 3), (0, 16), (0, 0), (0xffc, 8)] {
        let mut data = vec![0; size];
        guest.iommu.mmio_read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff), "{offset:#x} {size}");
    }
    for offset in [MMIO_SIZE, u64::MAX - 7, u64::MAX] {
        let mut data = [0; 4];
        guest.iommu.mmio_read(offset, &mut data);
        assert_eq!(data, [0xff; 4]);
        guest.iommu.mmio_write(offset, &data);
    }
    let before = guest.iommu.snapshot().unwrap();
    guest.iommu.mmio_write(regs::RTADDR, &[0xff; 2]);
    guest.iommu.mmio_write(regs::RTADDR + 2, &[0xff; 4]);
    guest.iommu.mmio_write(regs::RTADDR + 4, &[0xff; 8]);
    assert_eq!(guest.iommu.snapshot().unwrap(), before);
}

#[test]
fn read_only_registers_keep_their_values() {
    let guest = Guest::new(VtdConfig::default());
    let offsets = [regs::VER, regs::CAP, regs::ECAP, regs::IQH, regs::IQERCD, regs::PMEN - 4];
    for offset in offsets.into_iter().chain([regs::PQH, regs::PQT, regs::PQA, regs::PECTL]) {
        let before = guest.read64(offset);
        guest.write64(offset, u64::MAX);
        assert_eq!(guest.read64(offset), before, "{offset:#x}");
    }
}

#[test]
fn what_is_not_offered_is_ignored() {
    let guest = Guest::new(VtdConfig::default());
    // SFL, EAFL, WBF, IRE, SIRTP, CFI.
    guest.write32(regs::GCMD, 1 << 29 | 1 << 28 | 1 << 27 | 1 << 25 | 1 << 24 | 1 << 23);
    assert_eq!(guest.read32(regs::GSTS), 0);
}

#[test]
fn the_root_table_is_latched_by_its_command() {
    let guest = Guest::new(VtdConfig::default());
    guest.write64(regs::RTADDR, ROOT | 0x400);
    assert_eq!(
        (guest.read32(regs::GSTS), guest.iommu.snapshot().unwrap().registers.root),
        (0, None)
    );
    guest.command(|enabled| enabled | 1 << 30);
    assert_eq!(guest.read32(regs::GSTS), 1 << 30);
    guest.write64(regs::RTADDR, 0x9000);
    let root = guest.iommu.snapshot().unwrap().registers.root.unwrap();
    assert_eq!(root.root_table(), ROOT);
    // RTPS stays through other commands.
    guest.command(|enabled| enabled);
    assert_eq!(guest.read32(regs::GSTS), 1 << 30);
}

#[test]
fn event_registers_hold_what_is_written() {
    let guest = Guest::new(VtdConfig::default());
    for base in [regs::FECTL, regs::IECTL] {
        guest.write64(base + 8, 0x5_fee0_1003);
        guest.write32(base + 4, 0x4321);
        assert_eq!(guest.read64(base + 8), 0x5_fee0_1000);
        guest.write32(base, 0x7fff_ffff);
        assert_eq!(guest.read64(base), 0x4321 << 32);
    }
}

#[test]
fn the_queue_address_is_fixed_while_the_queue_is_enabled() {
    let guest = Guest::new(VtdConfig::default());
    guest.write64(regs::IQA, 0x1234_5fff);
    assert_eq!(guest.read64(regs::IQA), 0x1234_5807);
    guest.command(|enabled| enabled | 1 << 26);
    guest.write64(regs::IQA, 0);
    assert_eq!(guest.read64(regs::IQA), 0x1234_5807);
    assert_eq!(guest.iommu.counters().guest_errors, 1);
}

const IVA: u64 = 0x100;
const IOTLB: u64 = 0x108;

#[test]
fn register_based_invalidation_in_legacy_mode() {
    let guest = Guest::new(VtdConfig::default());
    let done = |request: u64| {
        guest.write64(IOTLB, 1 << 63 | request);
        let value = guest.read64(IOTLB);
        assert_eq!(value >> 63, 0);
        (value >> 57 & 3, guest.calls())
    };
    let of = |range| Invalidation { domain: Some(3), pasid: None, range };
    assert_eq!(done(1 << 60), (1, vec![Call::Invalidate(vec![Invalidation::ALL])]));
    assert_eq!(done(2 << 60 | 3 << 32), (2, vec![Call::Invalidate(vec![of(None)])]));
    guest.write64(IVA, 0x1234_5041);
    let range = crate::spec::vtd::PageRange::new(0x1234_4000, 2, true);
    assert_eq!(done(3 << 60 | 3 << 32), (3, vec![Call::Invalidate(vec![of(Some(range))])]));
    // A mask beyond MAMV widens to the domain; granularity 00 does nothing.
    guest.write64(IVA, 0x1234_5000 | 19);
    assert_eq!(done(3 << 60 | 3 << 32), (2, vec![Call::Invalidate(vec![of(None)])]));
    assert_eq!(done(0), (0, vec![]));
    // The host fails: the guest must assume that nothing was done.
    guest.refuse(true);
    assert_eq!(done(1 << 60).0, 0);
}

#[test]
fn register_based_invalidation_fails_beside_the_queue_and_in_scalable_mode() {
    let beside = Guest::new(VtdConfig::default());
    beside.enable_queue(0);
    let scalable = Guest::new(VtdConfig::default());
    scalable.set_root(0x400);
    for guest in [beside, scalable] {
        guest.calls();
        // The command bit is in the upper half, written last.
        guest.write32(IOTLB + 4, 1 << 31 | 1 << 28);
        assert_eq!(guest.read32(IOTLB + 4), 1 << 28);
        guest.write32(regs::CCMD + 4, 1 << 31 | 1 << 29);
        assert_eq!(guest.read32(regs::CCMD + 4), 1 << 29);
        assert_eq!(guest.calls(), []);
        assert_eq!(guest.iommu.counters().guest_errors, 2);
    }
}

#[test]
fn context_commands_say_what_was_done() {
    let guest = Guest::new(VtdConfig::default());
    for granularity in 0..4 {
        guest.write64(regs::CCMD, 1 << 63 | granularity << 61);
        assert_eq!(guest.read64(regs::CCMD) >> 59, granularity << 2 | granularity);
    }
}

#[derive(Default)]
struct Trace(Mutex<Vec<String>>);

impl Observer for Trace {
    fn register(&self, access: &RegisterAccess) {
        let RegisterAccess { name, offset, size, value, write } = access;
        let verb = if *write { "write" } else { "read" };
        self.0.lock().push(format!("{verb} {name} {offset:#x} {size} {value:#x}"));
    }

    fn disabling_translation(&self) {
        self.0.lock().push("disabling".into());
    }

    fn descriptor(&self, name: &'static str, _: &dyn fmt::Debug) {
        self.0.lock().push(name.into());
    }

    fn policy(&self, requester: Requester, _: &RequesterConfig, applied: bool) {
        self.0.lock().push(format!("policy {requester} {applied}"));
    }

    fn fault(&self, _: &DmaFault, reason: Option<FaultReason>, outcome: FaultOutcome) {
        let reason = reason.map_or(0, FaultReason::code);
        self.0.lock().push(format!("fault {reason:#x} {outcome:?}"));
    }
}

#[test]
fn an_observer_sees_everything_in_order() {
    let guest = Guest::new(VtdConfig::default());
    let trace = Arc::new(Trace::default());
    let iommu = VtdIommu::new(
        &VtdConfig::default(),
        Arc::new(guest.memory.clone()),
        guest.host.clone(),
        guest.sink.clone(),
        Some(trace.clone()),
    );
    let guest = Guest { iommu: iommu.unwrap(), ..guest };
    guest.iommu.add_device(RID).unwrap();
    guest.enable_queue(0x800);
    guest.submit(&[wait(1)]);
    guest.read32(0x22c);
    guest.enable_translation();
    guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    // Once: translation that is off is not disabled again.
    guest.write32(regs::GCMD, 1 << 26);
    guest.write32(regs::GCMD, 1 << 26);
    let lines = trace.0.lock();
    let lines: Vec<_> = lines.iter().filter(|line| !line.contains("GSTS")).collect();
    assert_eq!(
        lines,
        [
            "policy 01:01.0 true",
            "write IQT 0x88 8 0x0",
            "write IQA 0x90 8 0x8800",
            "write GCMD 0x18 4 0x4000000",
            "read IQT 0x88 8 0x0",
            "write IQT 0x88 8 0x20",
            "wait",
            "read FRCD 0x22c 4 0x0",
            "write GCMD 0x18 4 0x84000000",
            "policy 01:01.0 true",
            "fault 0x30 Recorded",
            "write GCMD 0x18 4 0x4000000",
            "disabling",
            "policy 01:01.0 true",
            "write GCMD 0x18 4 0x4000000",
        ]
    );
}

#[cfg(feature = "serde")]
#[test]
fn the_state_round_trips() {
    let guest = Guest::running();
    guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    let state = guest.iommu.snapshot().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<VtdState>(&text).unwrap(), state);
}

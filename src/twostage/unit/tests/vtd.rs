// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d with its host side.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::{guest_memory, hw_info, is_told_at_once, waits_for_devices, write, Host, A, B};
use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, Errno, Extensions, HostFault, HwInfo, HwInfoData,
    ObjectId, Verb,
};
use crate::spec::pci::Bdf;
use crate::spec::vtd::regs::{self, Cap, Ecap};
use crate::sync::Mutex;
use crate::unit::{AddError, BuildError, RemoveError, Vtd, VtdBuilder};
use crate::viommu::vtd::{DmaFault, FaultTarget, VtdConfig, VtdIommu, VtdState};
use crate::viommu::{InterruptSink, RestoreError, SnapshotError};

/// PASID width of the devices.
pub(super) const PASID_BITS: u8 = 6;
pub(super) const ROOT: u64 = 0x1000;
const CONTEXT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const PASID_TABLE: u64 = 0x4000;
pub(super) const QUEUE: u64 = 0x8000;
pub(super) const STATUS: u64 = 0x7000;

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn send_msi(&self, _: u64, _: u32) {}
}

pub(super) fn able() -> (Cap, Ecap) {
    let ecap = Ecap::new().with_smts(true).with_nest(true).with_pasid(true).with_pss(19);
    let cap = Cap::new().with_mgaw(47).with_fs1gp(true);
    (cap, ecap.with_srs(true).with_eafs(true).with_sc(true).with_smpwcs(true))
}

pub(super) fn info((cap, ecap): (Cap, Ecap)) -> HwInfo {
    let (cap_reg, ecap_reg) = (cap.into_bits(), ecap.with_pss(PASID_BITS - 1).into_bits());
    let vtd = iommu_hw_info_vtd { cap_reg, ecap_reg, ..Default::default() };
    hw_info(HwInfoData::Vtd(vtd), PASID_BITS)
}

fn smmu_info() -> HwInfo {
    hw_info(HwInfoData::ArmSmmuV3(iommu_hw_info_arm_smmuv3::default()), 0)
}

impl Host {
    pub(super) fn vtd() -> Self {
        let extensions = Extensions { fault_reports: true, ..Extensions::default() };
        Self::of(RecordingHost::new(extensions), info(able()))
    }

    /// A builder for a guest with `memory`, without devices.
    pub(super) fn builder(&self, memory: &GuestMemoryMmap) -> VtdBuilder {
        VtdBuilder::new(self.ioas.clone(), Arc::new(memory.clone()), Arc::new(NoInterrupts))
    }

    /// The same with both devices.
    fn both(&self, memory: &GuestMemoryMmap) -> VtdBuilder {
        self.builder(memory).device(A, self.a, "nic0").device(B, self.b, "nic1")
    }

    /// A unit with both devices, on tables of the guest.
    fn running(&self, memory: &GuestMemoryMmap) -> Vtd {
        let vtd = self.both(memory).build().unwrap();
        write_tables(memory);
        run(&vtd);
        vtd
    }
}

/// Tables of both functions, each with its own for requests without PASID, and one for PASID 5.
pub(super) fn write_tables(memory: &GuestMemoryMmap) {
    write(memory, ROOT, &[CONTEXT | 1, 0]);
    for (number, rid) in [(0, A), (1, B)] {
        let (directory, table) = (DIRECTORY + 0x6000 * number, PASID_TABLE + 0x1000 * number);
        write(memory, CONTEXT + 32 * u64::from(rid.raw()), &[directory | 1 << 3 | 1, 0, 0, 0]);
        write(memory, directory, &[table | 1]);
        write(memory, table, &[1 << 6 | 1, 7 + number, 0x5_0000 + 0x1000 * number]);
        write(memory, table + 64 * 5, &[1 << 6 | 1, 7, 0x5_8000]);
    }
}

pub(super) fn command(vtd: &Vtd, bit: u32) {
    let mut enabled = [0; 4];
    vtd.mmio_read(regs::GSTS, &mut enabled);
    let command = u32::from_le_bytes(enabled) & 0x96ff_ffff | 1 << bit;
    vtd.mmio_write(regs::GCMD, &command.to_le_bytes());
}

/// Sets the root table, and enables the queue and translation.
pub(super) fn run(vtd: &Vtd) {
    vtd.mmio_write(regs::RTADDR, &(ROOT | 0x400).to_le_bytes());
    command(vtd, 30);
    vtd.mmio_write(regs::IQA, &(QUEUE | 0x800).to_le_bytes());
    command(vtd, 26);
    command(vtd, 31);
}

pub(super) fn fault(dev: ObjectId) -> HostFault {
    HostFault {
        dev,
        pasid: None,
        address: 0x1234_5000,
        write: true,
        execute: false,
        privileged: false,
        reason: 0x71,
        stage2: false,
    }
}

/// Where DMA goes: of both devices without PASID, and with PASID 5.
fn translations(host: &Host) -> [Option<ObjectId>; 4] {
    let with_pasid = [host.a, host.b].map(|dev| host.recording.reaches(dev, Some(5)));
    [host.reaches(), with_pasid].concat().try_into().unwrap()
}

#[test]
fn a_unit_is_joined_with_its_host_and_leaves_nothing() {
    let host = Host::vtd();
    let memory = guest_memory();
    let vtd = host.both(&memory).build().unwrap();
    assert_eq!(vtd.config().pasid_bits, Some(PASID_BITS));
    let [passing, other] = host.reaches();
    assert!(passing.is_some() && passing == other);
    write_tables(&memory);
    run(&vtd);
    let [a, b, a5, b5] = translations(&host);
    assert!([a, b, a5].iter().all(|to| to.is_some() && *to != passing));
    assert!(a != b && a5 == b5);
    // Faults find their way.
    host.recording.report_fault(&fault(host.b));
    let record = vtd.snapshot().unwrap().faults.records[0];
    assert!(record.high.f() && record.high.sid() == B.raw(), "{record:?}");
    // Even if somebody still has the model.
    let model = vtd.model().clone();
    drop(vtd);
    host.is_empty();
    assert_eq!(model.snapshot(), Err(SnapshotError::Halted { model: "VT-d" }));
}

#[test]
fn faults_go_through_what_the_machine_puts_before_the_unit() {
    struct Watch(Arc<VtdIommu>, Arc<Mutex<Vec<DmaFault>>>);
    impl FaultTarget for Watch {
        fn dma_fault(&self, fault: &DmaFault) {
            self.1.lock().push(*fault);
            self.0.dma_fault(fault);
        }
    }
    let host = Host::vtd();
    let seen = Arc::<Mutex<Vec<_>>>::default();
    let watched = seen.clone();
    let watch = move |model| Arc::new(Watch(model, watched)) as Arc<dyn FaultTarget>;
    let _vtd = host.both(&guest_memory()).fault_target(watch).build().unwrap();
    host.recording.report_fault(&fault(host.a));
    assert_eq!(seen.lock().iter().map(|fault| fault.requester.rid).collect::<Vec<_>>(), [A]);
}

/// Blocked before, each is attached once, when the unit lets it pass as a machine that starts does.
#[test]
fn devices_are_attached_once() {
    let host = Host::vtd();
    let _vtd = host.both(&guest_memory()).build().unwrap();
    assert!(host.reaches().iter().all(Option::is_some));
    let log = host.recording.take_log();
    assert_eq!(log.iter().filter(|call| call.contains("TACH")).count(), 2, "{log:?}");
}

#[test]
fn each_error_of_building_names_the_device_and_leaves_nothing() {
    let host = Host::vtd();
    let smmu = host.recording.add_device(1, smmu_info());
    let memory = guest_memory();
    let wide = VtdConfig { pasid_bits: Some(7), ..VtdConfig::default() };
    let silent = VtdConfig { fault_records: 0, ..VtdConfig::default() };
    let of = |builder: VtdBuilder| {
        let error = builder.build().unwrap_err();
        host.is_empty();
        error
    };
    let said = |builder| of(builder).to_string();
    assert!(matches!(of(host.builder(&memory)), BuildError::NoDevices { .. }));
    assert_eq!(
        said(host.builder(&memory)),
        "the virtual VT-d has no devices: add them with device(), or say without_devices() if they \
         come later"
    );
    assert_eq!(
        said(host.both(&memory).device(Bdf::from_raw(0x30), smmu, "odd0")),
        "odd0 is not behind a VT-d, which a virtual one needs: leave it out"
    );
    assert_eq!(
        said(host.both(&memory).config(&wide)),
        "the IOMMU of nic0 lacks ECAP.PSS: pasid-bits=7 was requested; say pasid-bits=6, the most \
         that all devices have"
    );
    assert_eq!(
        said(host.builder(&memory).without_devices().config(&silent)),
        "impossible configuration of the virtual VT-d: 0 fault records are not possible; from 1 to \
         128 are"
    );
    assert_eq!(
        said(host.both(&memory).device(A, smmu, "odd0")),
        "odd0 cannot be 00:04.0, which is nic0: remove that first, or use another place"
    );
    assert_eq!(
        said(host.both(&memory).device(Bdf::from_raw(0x30), host.a, "twin")),
        "twin cannot be added: 00:06.0 cannot be added: the Requester ID or the device object is \
         in use already"
    );
}

#[test]
fn what_fails_on_the_way_is_undone_and_works_the_next_time() {
    let memory = guest_memory();
    let mut failures = 0;
    for nth in 0.. {
        let host = Host::vtd();
        host.recording.fail_nth(nth, Errno::EIO);
        let built = host.both(&memory).build();
        if host.recording.failure_pending() {
            break;
        }
        match built {
            // Something that can be done twice, such as a detach.
            Ok(vtd) => drop(vtd),
            Err(error) => {
                assert!(error.to_string().contains("EIO") && error.to_string().contains("nic"));
                failures += 1;
                host.is_empty();
                drop(host.both(&memory).build().unwrap());
            }
        }
        host.is_empty();
    }
    assert!(failures > 5, "{failures}");
}

#[test]
fn a_restored_unit_has_the_same_host_objects() {
    let (old, memory) = (Host::vtd(), guest_memory());
    let vtd = old.running(&memory);
    old.recording.report_fault(&fault(old.a));
    let state = vtd.snapshot().unwrap();
    let new = Host::vtd();
    let restored = new.both(&memory).restore(&state).unwrap();
    assert_eq!(translations(&new), translations(&old));
    assert_eq!(new.recording.live_objects(), old.recording.live_objects());
    assert_eq!((restored.snapshot().unwrap(), restored.config()), (state, vtd.config()));
    // No device passed on the way: none was attached to the nesting parent.
    let log = new.recording.take_log();
    let parent = log.iter().find(|call| call.contains("NEST_PARENT")).unwrap();
    let to_it = format!(" to {}", parent.split(" = ").last().unwrap());
    assert!(parent.contains(" = ") && !log.iter().any(|call| call.ends_with(&to_it)), "{log:?}");
    // It goes on as before.
    new.recording.report_fault(&fault(new.b));
    assert!(restored.snapshot().unwrap().faults.records[1].high.f());
    restored.shutdown().unwrap();
    new.is_empty();
}

#[test]
fn a_restore_that_fails_leaves_devices_blocked_and_works_the_next_time() {
    let (old, memory) = (Host::vtd(), guest_memory());
    let state = old.running(&memory).snapshot().unwrap();
    let mut failures = 0;
    for nth in 0.. {
        let host = Host::vtd();
        host.recording.fail_nth(nth, Errno::EIO);
        let restored = host.both(&memory).restore(&state);
        if host.recording.failure_pending() {
            break;
        }
        match restored {
            Ok(vtd) => drop(vtd),
            Err(error) => {
                assert!(error.to_string().contains("EIO"), "{error}");
                failures += 1;
                host.is_empty();
                assert_eq!(translations(&host), [None; 4]);
                drop(host.both(&memory).restore(&state).unwrap());
            }
        }
        host.is_empty();
    }
    assert!(failures > 8, "{failures}");
}

#[test]
fn a_snapshot_needs_its_devices_and_what_the_guest_was_offered() {
    let (old, memory) = (Host::vtd(), guest_memory());
    let state = old.running(&memory).snapshot().unwrap();
    let restore = |host: &Host, builder: VtdBuilder, state: &VtdState| {
        let error = builder.restore(state).unwrap_err();
        host.is_empty();
        error
    };
    let host = Host::vtd();
    let one = host.builder(&memory).device(A, host.a, "nic0");
    assert_eq!(
        restore(&host, one, &state).to_string(),
        "the VT-d snapshot has 00:05.0, which was not given: add it with device()"
    );
    let more = host.both(&memory).device(Bdf::from_raw(0x30), host.b, "late");
    assert_eq!(
        restore(&host, more, &state).to_string(),
        "late was given as 00:06.0, which the snapshot has not: add it after the restore"
    );
    let (cap, ecap) = able();
    let poor =
        Host::of(RecordingHost::new(Extensions::default()), info((cap, ecap.with_sc(false))));
    assert_eq!(
        restore(&poor, poor.both(&memory), &state).to_string(),
        "the IOMMU of nic0 lacks ECAP.SC: the guest was offered it before this device came; give \
         the device to the guest from the start, or leave it out"
    );
    // What is known without a host is found before that is called.
    host.recording.take_log();
    let config = VtdConfig { fault_records: 0, ..state.config.clone() };
    let impossible = VtdState { config, ..state.clone() };
    assert!(matches!(
        restore(&host, host.both(&memory), &impossible),
        BuildError::Restore(RestoreError::Config { .. })
    ));
    let newer = VtdState { version: 2, ..state.clone() };
    assert!(matches!(
        restore(&host, host.both(&memory), &newer),
        BuildError::Restore(RestoreError::Version { found: 2, .. })
    ));
    let twice = host.both(&memory).device(A, host.b, "nic2");
    assert_eq!(
        restore(&host, twice, &state).to_string(),
        "nic2 cannot be 00:04.0, which is nic0: remove that first, or use another place"
    );
    let other = VtdConfig { caching_mode: false, ..state.config.clone() };
    assert_eq!(
        restore(&host, host.both(&memory).config(&other), &state).to_string(),
        "config() was given caching_mode: false, but the VT-d snapshot has caching_mode: true: \
         leave config() out before restore(), or give it the snapshot's"
    );
    assert!(host.recording.take_log().is_empty());
    drop(host.both(&memory).config(&state.config).restore(&state).unwrap());
}

#[test]
fn a_device_that_comes_late_follows_its_tables_or_is_refused() {
    let (host, memory) = (Host::vtd(), guest_memory());
    write_tables(&memory);
    let vtd = host.builder(&memory).without_devices().build().unwrap();
    run(&vtd);
    let (cap, ecap) = able();
    let poor = host.recording.add_device(2, info((cap.with_fs1gp(false), ecap)));
    let smmu = host.recording.add_device(1, smmu_info());
    let narrow = VtdConfig { pasid_bits: Some(PASID_BITS), ..VtdConfig::default() };
    let wide = vtd.add_device(A, host.a, "nic0").unwrap_err();
    assert!(matches!(&wide, AddError::Lacks(conflict) if conflict.bit == "ECAP.PSS"), "{wide}");
    drop(vtd);

    let vtd = host.builder(&memory).without_devices().config(&narrow).build().unwrap();
    run(&vtd);
    let refused = |dev, name| {
        let error = vtd.add_device(A, dev, name).unwrap_err();
        host.is_empty();
        error.to_string()
    };
    assert!(refused(poor, "old0").starts_with("the IOMMU of old0 lacks CAP.FS1GP: the guest was"));
    assert!(refused(smmu, "odd0").starts_with("odd0 is not behind a VT-d"));
    vtd.add_device(A, host.a, "nic0").unwrap();
    let [a, _, a5, _] = translations(&host);
    assert!(a.is_some() && a5.is_some() && a != a5);
    let error = vtd.add_device(A, host.b, "nic1").unwrap_err().to_string();
    assert!(error.starts_with("nic1 cannot be 00:04.0, which is nic0"), "{error}");
    assert_eq!(host.reaches(), [a, None]);
}

#[test]
fn a_late_device_that_the_host_refuses_is_not_there() {
    let memory = guest_memory();
    let mut refused = 0;
    for nth in 0.. {
        let host = Host::vtd();
        let vtd = host.builder(&memory).device(A, host.a, "nic0").build().unwrap();
        write_tables(&memory);
        run(&vtd);
        let before = (host.recording.live_objects(), host.reaches());
        host.recording.fail_nth(nth, Errno::EIO);
        let added = vtd.add_device(B, host.b, "nic1");
        if host.recording.failure_pending() {
            break;
        }
        if let Err(error) = added {
            refused += 1;
            assert!(error.to_string().starts_with("nic1 "), "{error}");
            assert_eq!((host.recording.live_objects(), host.reaches()), before);
            assert_eq!(vtd.snapshot().unwrap().functions.len(), 1);
            vtd.add_device(B, host.b, "nic1").unwrap();
        }
        assert!(host.reaches().iter().all(Option::is_some));
    }
    assert!(refused > 3, "{refused}");
}

#[test]
fn a_device_is_removed_while_the_guest_uses_it() {
    let (host, memory) = (Host::vtd(), guest_memory());
    let vtd = host.running(&memory);
    let before = translations(&host);
    vtd.remove_device(B).unwrap();
    assert_eq!(translations(&host), [before[0], None, before[2], None]);
    let nested = before[1].unwrap();
    assert!(!host.recording.live_objects().contains(&nested));
    // Its faults are nobody's, and what the guest still says of it has no effect.
    host.recording.report_fault(&fault(host.b));
    assert!(!vtd.snapshot().unwrap().faults.records[0].high.f());
    host.recording.take_log();
    // Of the function's contexts; everything of its domain; a wait.
    write(&memory, QUEUE, &[u64::from(B.raw()) << 32 | 3 << 4 | 1, 0, 0, 0]);
    write(&memory, QUEUE + 32, &[8 << 16 | 2 << 4 | 2, 0, 0, 0]);
    write(&memory, QUEUE + 64, &[1 << 32 | 1 << 5 | 5, STATUS, 0, 0]);
    vtd.mmio_write(regs::IQT, &96u64.to_le_bytes());
    let mut head = [0; 8];
    vtd.mmio_read(regs::IQH, &mut head);
    assert_eq!((u64::from_le_bytes(head), host.recording.take_log()), (96, vec![]));
    assert_eq!(vtd.remove_device(B).unwrap_err().to_string(), "no device was added as 00:05.0");
    // And back.
    vtd.add_device(B, host.b, "nic1").unwrap();
    assert!(translations(&host).iter().all(Option::is_some));
}

#[test]
fn a_removal_that_the_host_refuses_can_be_repeated() {
    let (host, memory) = (Host::vtd(), guest_memory());
    let vtd = host.running(&memory);
    for _ in 0..12 {
        host.recording.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    let error = vtd.remove_device(A).unwrap_err();
    assert!(matches!(&error, RemoveError::Host { device, .. } if device == "nic0"), "{error}");
    // For the guest, it is gone; its place is not free yet.
    assert_eq!(vtd.snapshot().unwrap().functions.len(), 1);
    assert!(matches!(vtd.add_device(A, host.a, "nic2"), Err(AddError::Exists { .. })));
    host.recording.forget_failures();
    vtd.remove_device(A).unwrap();
    assert_eq!(host.recording.reaches(host.a, None), None);
    vtd.add_device(A, host.a, "nic2").unwrap();
}

#[test]
fn a_late_device_that_is_left_on_the_host_is_named_and_can_be_removed() {
    let mut left = 0;
    for nth in 0..20 {
        let (host, memory) = (Host::vtd(), guest_memory());
        let vtd = host.running(&memory);
        vtd.remove_device(B).unwrap();
        host.recording.fail_nth(nth, Errno::EIO);
        (0..12).for_each(|_| host.recording.fail_next(Verb::DeviceDetach, Errno::EIO));
        let added = vtd.add_device(B, host.b, "nic1");
        host.recording.forget_failures();
        let Err(AddError::Left { rid: B, .. }) = added else { continue };
        left += 1;
        vtd.remove_device(B).unwrap();
        assert_eq!(host.recording.reaches(host.b, None), None);
        vtd.add_device(B, host.b, "nic1").unwrap();
    }
    assert!(left > 0);
}

#[test]
fn reset_leaves_the_tables_and_keeps_the_devices() {
    let (host, memory) = (Host::vtd(), guest_memory());
    let vtd = host.running(&memory);
    vtd.halt();
    vtd.reset().unwrap();
    let [a, b, a5, b5] = translations(&host);
    assert!(a.is_some() && a == b && a5.is_none() && b5.is_none());
    run(&vtd);
    assert!(host.reaches() != [a, b] && vtd.snapshot().is_ok());
    waits_for_devices(&vtd.names, || assert!(vtd.snapshot().is_ok()));
    waits_for_devices(&vtd.names, || vtd.reset().unwrap());
}

#[test]
fn interrupts_are_remapped_if_that_is_offered() {
    let (host, memory) = (Host::vtd(), guest_memory());
    let offers = |interrupt_remapping| {
        let config = VtdConfig { interrupt_remapping, ..VtdConfig::default() };
        let vtd = host.builder(&memory).without_devices().config(&config).build().unwrap();
        is_told_at_once(|listener| vtd.add_interrupt_listener(listener));
        vtd.interrupt_remapper().is_some()
    };
    assert_eq!((offers(true), offers(false)), (true, false));
}

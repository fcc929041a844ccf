// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual SMMUv3 with its host side.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;

use super::{guest_memory, hw_info, is_told_at_once, waits_for_devices, write, Host, A, B};
use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{
    iommu_hw_info_arm_smmuv3, iommu_hw_info_vtd, Errno, Extensions, HwInfo, HwInfoData, ObjectId,
    Verb, Vevent,
};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::command::{Command, SyncSignal};
use crate::spec::smmuv3::event::{EventId, EventRecord};
use crate::spec::smmuv3::regs::{self, Idr0, Idr1, Idr3, Idr5};
use crate::spec::smmuv3::StreamId;
use crate::unit::{AddError, BuildError, RemoveError, Smmuv3, Smmuv3Builder};
use crate::viommu::smmuv3::{
    EventRecordWords, EventTarget, Smmu, SmmuConfig, SmmuInterrupt, SmmuInterrupts, SmmuState,
};
use crate::viommu::{RestoreError, SnapshotError};

const STREAM_TABLE: u64 = 0x4000;
pub(super) const COMMANDS: u64 = 0x8000;
const EVENTS: u64 = 0xa000;
/// A place without a device.
const FREE: Bdf = Bdf::from_raw(0x30);

struct NoInterrupts;

impl SmmuInterrupts for NoInterrupts {
    fn message(&self, _: u64, _: u32) -> bool {
        true
    }

    fn wire(&self, _: SmmuInterrupt) {}
}

/// IDR0, IDR1, IDR3 and IDR5 of a unit with all features.
pub(super) type Idrs = (Idr0, Idr1, Idr3, Idr5);

pub(super) fn able() -> Idrs {
    (
        Idr0::new().with_ttf(3).with_asid16(true).with_cd2l(true).with_st_level(1),
        Idr1::new().with_sidsize(32).with_ssidsize(6),
        Idr3::new().with_ril(true).with_bbml(2),
        Idr5::new().with_gran4k(true).with_gran16k(true).with_gran64k(true).with_vax(1),
    )
}

pub(super) fn info((idr0, idr1, idr3, idr5): Idrs) -> HwInfo {
    let idr = [idr0.into(), idr1.into(), 0, idr3.into(), 0, idr5.into()];
    let smmu = iommu_hw_info_arm_smmuv3 { idr, aidr: 3, ..Default::default() };
    hw_info(HwInfoData::ArmSmmuV3(smmu), 6)
}

fn vtd_info() -> HwInfo {
    hw_info(HwInfoData::Vtd(iommu_hw_info_vtd::default()), 0)
}

impl Host {
    pub(super) fn smmu() -> Self {
        Self::of(RecordingHost::new(Extensions::default()), info(able()))
    }

    /// A builder for a guest with `memory`, without devices.
    pub(super) fn smmu_builder(&self, memory: &GuestMemoryMmap) -> Smmuv3Builder {
        Smmuv3Builder::new(self.ioas.clone(), Arc::new(memory.clone()), Arc::new(NoInterrupts))
    }

    /// The same with both devices.
    fn both_streams(&self, memory: &GuestMemoryMmap) -> Smmuv3Builder {
        self.smmu_builder(memory).device(A, self.a, "nic0").device(B, self.b, "nic1")
    }

    /// A unit with both devices, on tables of the guest.
    fn running_smmu(&self, memory: &GuestMemoryMmap) -> Smmuv3 {
        let smmu = self.both_streams(memory).build().unwrap();
        write_tables(memory);
        run(&smmu);
        smmu
    }

    /// The device of `rid` causes an event.
    fn event(&self, smmu: &Smmuv3, sequence: u32, rid: Bdf) {
        let record = EventRecord::new(EventId::Translation, StreamId::from(rid), None);
        let data = record.to_words().into_iter().flat_map(u64::to_le_bytes).collect();
        let viommu = smmu.nesting().objects().unit.unwrap().viommu;
        assert!(self.recording.push_event(viommu, Vevent::Event { sequence, data }));
    }
}

/// Stage 1 for both streams, each with its own contexts.
pub(super) fn write_tables(memory: &GuestMemoryMmap) {
    for (number, rid) in [(0, A), (1, B)] {
        let contexts = 0x5_0000 + 0x1000 * number;
        write(memory, STREAM_TABLE + 64 * u64::from(rid.raw()), &[contexts | 5 << 1 | 1, 0]);
    }
}

/// Sets the stream table and the queues, and enables everything.
pub(super) fn run(smmu: &Smmuv3) {
    let write32 = |offset, value: u32| smmu.mmio_write(offset, &value.to_le_bytes());
    let write64 = |offset, value: u64| smmu.mmio_write(offset, &value.to_le_bytes());
    write32(regs::CR2, 0b110);
    write64(regs::STRTAB_BASE, STREAM_TABLE);
    write32(regs::STRTAB_BASE_CFG, 6);
    write64(regs::CMDQ_BASE, COMMANDS | 8);
    write64(regs::EVENTQ_BASE, EVENTS | 4);
    write32(regs::CR0, 0b1101);
    assert_eq!(read32(smmu, regs::CR0ACK), 0b1101);
}

pub(super) fn read32(smmu: &Smmuv3, offset: u64) -> u32 {
    let mut data = [0; 4];
    smmu.mmio_read(offset, &mut data);
    u32::from_le_bytes(data)
}

/// The number of events in the guest's queue.
pub(super) fn events(smmu: &Smmuv3) -> u32 {
    read32(smmu, regs::EVENTQ_PROD)
}

#[test]
fn a_unit_is_joined_with_its_host_and_leaves_nothing() {
    let host = Host::smmu();
    let memory = guest_memory();
    let smmu = host.both_streams(&memory).build().unwrap();
    assert_eq!(smmu.config().substream_bits, Some(6));
    assert!(smmu.interrupt_remapper().is_none());
    let [passing, other] = host.reaches();
    assert!(passing.is_some() && passing == other);
    write_tables(&memory);
    run(&smmu);
    let [a, b] = host.reaches();
    assert!(a != passing && b != passing && a.is_some() && b.is_some() && a != b);
    host.event(&smmu, 0, B);
    smmu.snapshot().unwrap();
    assert_eq!(events(&smmu), 1);
    // Even if somebody still has the model.
    let model = smmu.model().clone();
    drop(smmu);
    host.is_empty();
    assert_eq!(model.snapshot(), Err(SnapshotError::Halted { model: "SMMUv3" }));
}

#[test]
fn a_snapshot_has_the_events_that_the_host_had() {
    struct Slow(Arc<Smmu>);
    impl EventTarget for Slow {
        fn event(&self, record: EventRecordWords) {
            thread::sleep(Duration::from_millis(30));
            self.0.event(record);
        }
        fn events_lost(&self) {
            self.0.events_lost();
        }
    }
    let (host, memory) = (Host::smmu(), guest_memory());
    let slow = |model| Arc::new(Slow(model)) as Arc<dyn EventTarget>;
    let smmu = host.both_streams(&memory).fault_target(slow).build().unwrap();
    write_tables(&memory);
    run(&smmu);
    for sequence in 0..4 {
        host.event(&smmu, sequence, A);
    }
    let state = smmu.snapshot().unwrap();
    assert_eq!((u32::from(state.faults.events.prod), events(&smmu)), (4, 4));
}

#[test]
fn each_error_of_building_names_the_device_and_leaves_nothing() {
    let host = Host::smmu();
    let vtd = host.recording.add_device(1, vtd_info());
    let far = host.recording.add_device(2, info(able()));
    let memory = guest_memory();
    let wide = SmmuConfig { substream_bits: Some(7), ..SmmuConfig::default() };
    let none = SmmuConfig { stream_bits: 0, ..SmmuConfig::default() };
    let of = |builder: Smmuv3Builder| {
        let error = builder.build().unwrap_err();
        host.is_empty();
        error
    };
    let said = |builder| of(builder).to_string();
    assert!(matches!(of(host.smmu_builder(&memory)), BuildError::NoDevices { model: "SMMUv3" }));
    assert_eq!(
        said(host.both_streams(&memory).device(FREE, vtd, "odd0")),
        "odd0 is not behind an SMMUv3, which a virtual one needs: leave it out"
    );
    assert_eq!(
        said(host.both_streams(&memory).device(FREE, far, "far0")),
        "far0 cannot be added: 00:06.0 is behind another SMMU than 00:04.0, and one virtual SMMU \
         cannot serve both: give each a virtual SMMU of its own"
    );
    assert_eq!(
        said(host.both_streams(&memory).config(&wide)),
        "the IOMMU of nic0 lacks IDR1.SSIDSIZE: pasid-bits=7 was requested; pasid-bits=6 is the \
         most that all devices have"
    );
    assert_eq!(
        said(host.smmu_builder(&memory).without_devices().config(&none)),
        "impossible configuration of the virtual SMMUv3: 0 StreamID bits are not possible; use 1 \
         to 32"
    );
    assert_eq!(
        said(host.both_streams(&memory).device(A, far, "far0")),
        "far0 cannot be 00:04.0, which is nic0: remove that first, or use another place"
    );
}

#[test]
fn what_fails_on_the_way_is_undone_and_works_the_next_time() {
    let memory = guest_memory();
    let mut failures = 0;
    for nth in 0.. {
        let host = Host::smmu();
        host.recording.fail_nth(nth, Errno::EIO);
        let built = host.both_streams(&memory).build();
        if host.recording.failure_pending() {
            break;
        }
        match built {
            Ok(smmu) => drop(smmu),
            Err(error) => {
                assert!(error.to_string().contains("EIO") && error.to_string().contains("nic"));
                failures += 1;
                host.is_empty();
                drop(host.both_streams(&memory).build().unwrap());
            }
        }
        host.is_empty();
    }
    assert!(failures > 7, "{failures}");
}

#[test]
fn a_restored_unit_has_the_same_host_objects() {
    let (old, memory) = (Host::smmu(), guest_memory());
    let smmu = old.running_smmu(&memory);
    old.event(&smmu, 0, A);
    let state = smmu.snapshot().unwrap();
    let new = Host::smmu();
    let restored = new.both_streams(&memory).restore(&state).unwrap();
    let shape = |smmu: &Smmuv3| {
        let nested = smmu.nesting().objects().nested;
        let nested = nested.into_iter().map(|nested| (nested.ste, nested.streams));
        nested.filter(|(_, streams)| !streams.is_empty()).collect::<Vec<_>>()
    };
    assert_eq!((shape(&restored), shape(&restored).len()), (shape(&smmu), 2));
    assert_eq!(
        (new.reaches(), new.recording.live_objects()),
        (old.reaches(), old.recording.live_objects())
    );
    assert_eq!((restored.snapshot().unwrap(), restored.config()), (state, smmu.config()));
    // It goes on as before.
    new.event(&restored, 0, B);
    restored.snapshot().unwrap();
    assert_eq!(events(&restored), 2);
    restored.shutdown().unwrap();
    new.is_empty();
}

#[test]
fn a_restore_that_fails_leaves_devices_blocked_and_works_the_next_time() {
    let (old, memory) = (Host::smmu(), guest_memory());
    let state = old.running_smmu(&memory).snapshot().unwrap();
    let mut failures = 0;
    for nth in 0.. {
        let host = Host::smmu();
        host.recording.fail_nth(nth, Errno::EIO);
        let restored = host.both_streams(&memory).restore(&state);
        if host.recording.failure_pending() {
            break;
        }
        match restored {
            Ok(smmu) => drop(smmu),
            Err(error) => {
                assert!(error.to_string().contains("EIO"), "{error}");
                failures += 1;
                host.is_empty();
                drop(host.both_streams(&memory).restore(&state).unwrap());
            }
        }
        host.is_empty();
    }
    assert!(failures > 9, "{failures}");
}

#[test]
fn a_snapshot_needs_its_devices_and_what_the_guest_was_offered() {
    let (old, memory) = (Host::smmu(), guest_memory());
    let state = old.running_smmu(&memory).snapshot().unwrap();
    let restore = |host: &Host, builder: Smmuv3Builder, state: &SmmuState| {
        let error = builder.restore(state).unwrap_err();
        host.is_empty();
        error
    };
    let host = Host::smmu();
    let one = host.smmu_builder(&memory).device(A, host.a, "nic0");
    assert_eq!(
        restore(&host, one, &state).to_string(),
        "the SMMUv3 snapshot has 00:05.0, which was not given: add it with device()"
    );
    let more = host.both_streams(&memory).device(FREE, host.b, "late");
    assert_eq!(
        restore(&host, more, &state).to_string(),
        "late was given as 00:06.0, which the snapshot has not: add it after the restore"
    );
    let poor = |change: fn(&mut Idrs)| {
        let mut idrs = able();
        change(&mut idrs);
        let poor = Host::of(RecordingHost::new(Extensions::default()), info(idrs));
        restore(&poor, poor.both_streams(&memory), &state).to_string()
    };
    assert_eq!(
        poor(|idrs| idrs.2.set_ril(false)),
        "the IOMMU of nic0 lacks IDR3.RIL: the guest was offered it before this device came; give \
         the device to the guest from the start, or leave it out"
    );
    assert!(poor(|idrs| idrs.1.set_ssidsize(5)).contains("lacks IDR1.SSIDSIZE: the guest was"));
    assert!(poor(|idrs| idrs.3.set_gran16k(false)).contains("lacks IDR5.GRAN16K: the guest was"));
    // What is known without a host is found before that is called.
    host.recording.take_log();
    let config = SmmuConfig { stream_bits: 0, ..state.config.clone() };
    let impossible = SmmuState { config, ..state.clone() };
    assert!(matches!(
        restore(&host, host.both_streams(&memory), &impossible),
        BuildError::Restore(RestoreError::Config { .. })
    ));
    let newer = SmmuState { version: 2, ..state.clone() };
    assert!(matches!(
        restore(&host, host.both_streams(&memory), &newer),
        BuildError::Restore(RestoreError::Version { found: 2, .. })
    ));
    let twice = host.both_streams(&memory).device(A, host.b, "nic2");
    assert_eq!(
        restore(&host, twice, &state).to_string(),
        "nic2 cannot be 00:04.0, which is nic0: remove that first, or use another place"
    );
    let other = SmmuConfig { asid16: false, ..state.config.clone() };
    assert_eq!(
        restore(&host, host.both_streams(&memory).config(&other), &state).to_string(),
        "config() was given asid16: false, but the SMMUv3 snapshot has asid16: true: \
         leave config() out before restore(), or give it the snapshot's"
    );
    assert!(host.recording.take_log().is_empty());
    drop(host.both_streams(&memory).config(&state.config).restore(&state).unwrap());
}

#[test]
fn a_device_that_comes_late_follows_its_entry_or_is_refused() {
    let (host, memory) = (Host::smmu(), guest_memory());
    write_tables(&memory);
    let stalls = SmmuConfig { host_stalls: true, ..SmmuConfig::default() };
    let smmu = host.smmu_builder(&memory).without_devices().config(&stalls).build().unwrap();
    run(&smmu);
    let (idr0, idr1, idr3, idr5) = able();
    let poor = host.recording.add_device(2, info((idr0.with_asid16(false), idr1, idr3, idr5)));
    let vtd = host.recording.add_device(1, vtd_info());
    let refused = |dev, name| {
        let error = smmu.add_device(A, dev, name).unwrap_err();
        host.is_empty();
        error.to_string()
    };
    assert!(refused(poor, "old0").starts_with("the IOMMU of old0 lacks IDR0.ASID16: the guest was"));
    assert!(refused(vtd, "odd0").starts_with("odd0 is not behind an SMMUv3"));
    smmu.add_device(A, host.a, "nic0").unwrap();
    let [a, none] = host.reaches();
    assert!(a.is_some() && none.is_none());
    let error = smmu.add_device(A, host.b, "nic1").unwrap_err().to_string();
    assert!(error.starts_with("nic1 cannot be 00:04.0, which is nic0"), "{error}");
    assert_eq!(host.reaches(), [a, None]);
}

#[test]
fn a_late_device_that_the_host_refuses_is_not_there() {
    let memory = guest_memory();
    let mut refused = 0;
    for nth in 0.. {
        let host = Host::smmu();
        let smmu = host.smmu_builder(&memory).device(A, host.a, "nic0").build().unwrap();
        write_tables(&memory);
        run(&smmu);
        let before = host.reaches();
        let devices = || smmu.nesting().objects().devices;
        host.recording.fail_nth(nth, Errno::EIO);
        let added = smmu.add_device(B, host.b, "nic1");
        if host.recording.failure_pending() {
            break;
        }
        if let Err(error) = added {
            refused += 1;
            assert!(error.to_string().starts_with("nic1 "), "{error}");
            assert_eq!((devices().len(), host.reaches()), (1, before));
            assert_eq!(smmu.snapshot().unwrap().streams.len(), 1);
            smmu.add_device(B, host.b, "nic1").unwrap();
        }
        assert!(host.reaches().iter().all(Option::is_some));
        drop(smmu);
        host.is_empty();
    }
    assert!(refused > 2, "{refused}");
}

#[test]
fn a_device_is_removed_while_the_guest_uses_it() {
    let (host, memory) = (Host::smmu(), guest_memory());
    let smmu = host.running_smmu(&memory);
    let before: [Option<ObjectId>; 2] = host.reaches();
    smmu.remove_device(B).unwrap();
    assert_eq!(host.reaches(), [before[0], None]);
    assert!(!host.recording.live_objects().contains(&before[1].unwrap()));
    // Its events are nobody's, and what the guest still says of it has no effect.
    host.event(&smmu, 0, B);
    smmu.snapshot().unwrap();
    assert_eq!(events(&smmu), 0);
    host.recording.take_log();
    let stream = StreamId::from(B);
    let commands = [
        Command::CfgiSte { stream, leaf: true },
        Command::CfgiCdAll { stream },
        Command::Sync { signal: SyncSignal::None },
    ];
    for (number, command) in (0..).zip(commands) {
        write(&memory, COMMANDS + 16 * number, &command.encode());
    }
    smmu.mmio_write(regs::CMDQ_PROD, &3u32.to_le_bytes());
    assert_eq!((read32(&smmu, regs::CMDQ_CONS), host.recording.take_log()), (3, vec![]));
    assert_eq!(smmu.remove_device(B).unwrap_err().to_string(), "no device was added as 00:05.0");
    // And back.
    smmu.add_device(B, host.b, "nic1").unwrap();
    assert!(host.reaches().iter().all(Option::is_some));
}

#[test]
fn a_removal_that_the_host_refuses_can_be_repeated() {
    let (host, memory) = (Host::smmu(), guest_memory());
    let smmu = host.running_smmu(&memory);
    for _ in 0..12 {
        host.recording.fail_next(Verb::DeviceDetach, Errno::EIO);
    }
    let error = smmu.remove_device(A).unwrap_err();
    assert!(matches!(&error, RemoveError::Host { device, .. } if device == "nic0"), "{error}");
    // For the guest, it is gone; its place is not free yet.
    assert_eq!(smmu.snapshot().unwrap().streams.len(), 1);
    assert!(matches!(smmu.add_device(A, host.a, "nic2"), Err(AddError::Exists { .. })));
    host.recording.forget_failures();
    smmu.remove_device(A).unwrap();
    assert_eq!(host.recording.reaches(host.a, None), None);
    smmu.add_device(A, host.a, "nic2").unwrap();
}

#[test]
fn reset_leaves_the_tables_and_keeps_the_devices() {
    let (host, memory) = (Host::smmu(), guest_memory());
    let smmu = host.running_smmu(&memory);
    smmu.halt();
    smmu.reset().unwrap();
    let [a, b] = host.reaches();
    assert!(a.is_some() && a == b);
    run(&smmu);
    assert!(host.reaches() != [a, b] && smmu.snapshot().is_ok());
    waits_for_devices(&smmu.names, || assert!(smmu.snapshot().is_ok()));
    waits_for_devices(&smmu.names, || smmu.reset().unwrap());
}

#[test]
fn without_a_thread_for_its_events_there_is_no_unit_and_no_device() {
    let (host, memory) = (Host::smmu(), guest_memory());
    let why = "nic0 cannot be added: no thread can be started to deliver the events of streams: ";
    host.recording.fail_next(Verb::Vevent, Errno::EMFILE);
    let error = host.both_streams(&memory).build().unwrap_err().to_string();
    assert!(error.starts_with(why) && error.contains("EMFILE"), "{error}");
    host.is_empty();
    let smmu = host.smmu_builder(&memory).without_devices().build().unwrap();
    host.recording.fail_next(Verb::Vevent, Errno::EMFILE);
    let error = smmu.add_device(A, host.a, "nic0").unwrap_err().to_string();
    assert!(error.starts_with(why) && error.contains("EMFILE"), "{error}");
    host.is_empty();
    host.both_streams(&memory).build().unwrap();
}

#[test]
fn interrupts_are_translated_like_any_write() {
    let (host, memory) = (Host::smmu(), guest_memory());
    let smmu = host.smmu_builder(&memory).without_devices().build().unwrap();
    assert!(smmu.interrupt_remapper().is_none());
    is_told_at_once(|listener| smmu.add_interrupt_listener(listener));
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtual IOMMUs in front of devices of two hosts, each of which records its calls.
//!
//! Both hosts number their objects alike, so whatever is mistaken for the other's shows.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::smmuv3::{self as streams, COMMANDS};
use super::vtd::{self as functions, QUEUE, STATUS};
use super::{guest_memory, write, Host, A, B, C};
use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{Errno, Extensions, ObjectId, Verb, Vevent};
use crate::spec::pci::Bdf;
use crate::spec::smmuv3::command::{Command, SyncSignal};
use crate::spec::smmuv3::event::{EventId, EventRecord};
use crate::spec::smmuv3::regs as smmu;
use crate::spec::smmuv3::StreamId;
use crate::spec::vtd::regs;
use crate::unit::{AddError, Smmuv3, Smmuv3Builder, Vtd, VtdBuilder};
use crate::viommu::vtd::VtdConfig;

/// The two hosts: A is of the first, B of the second.
struct Pair {
    own: Host,
    other: Host,
    memory: GuestMemoryMmap,
}

impl Pair {
    fn of(make: fn() -> Host) -> Self {
        Self { own: make(), other: make(), memory: guest_memory() }
    }

    fn vtd_builder(&self) -> VtdBuilder {
        let builder = self.own.builder(&self.memory).device(A, self.own.a, "nic0");
        builder.device_on(&self.other.ioas, B, self.other.a, "disk0")
    }

    /// A unit on tables of the guest.
    fn vtd(&self) -> Vtd {
        let vtd = self.vtd_builder().build().unwrap();
        functions::write_tables(&self.memory);
        functions::run(&vtd);
        vtd
    }

    fn smmu_builder(&self) -> Smmuv3Builder {
        let builder = self.own.smmu_builder(&self.memory).device(A, self.own.a, "nic0");
        builder.device_on(&self.other.ioas, B, self.other.a, "disk0")
    }

    /// The same of an SMMU.
    fn smmu(&self) -> Smmuv3 {
        let smmu = self.smmu_builder().build().unwrap();
        streams::write_tables(&self.memory);
        streams::run(&smmu);
        smmu
    }

    /// The calls of each since the last time.
    fn logs(&self) -> [Vec<String>; 2] {
        [&self.own, &self.other].map(|host| host.recording.take_log())
    }

    /// Where DMA of A and B goes.
    fn reaches(&self) -> [Option<ObjectId>; 2] {
        [&self.own, &self.other].map(|host| host.recording.reaches(host.a, None))
    }

    #[track_caller]
    fn is_empty(&self) {
        self.own.is_empty();
        self.other.is_empty();
    }

    /// The guest's queue of a VT-d from its start: `descriptors` and a wait. Whether it is done.
    fn submit(&self, vtd: &Vtd, descriptors: &[[u64; 2]]) -> bool {
        write(&self.memory, STATUS, &[0]);
        let mut tail = [0; 8];
        vtd.mmio_read(regs::IQT, &mut tail);
        let mut tail = u64::from_le_bytes(tail);
        for [low, high] in descriptors.iter().chain([&[1 << 32 | 1 << 5 | 5, STATUS]]) {
            write(&self.memory, QUEUE + tail, &[*low, *high, 0, 0]);
            tail += 32;
        }
        vtd.mmio_write(regs::IQT, &tail.to_le_bytes());
        self.memory.read_obj::<u32>(GuestAddress(STATUS)).unwrap() == 1
    }

    /// The guest's commands to an SMMU from the start of its queue, and a sync. The next index.
    fn command(&self, smmu: &Smmuv3, commands: &[Command]) -> u32 {
        let mut prod = streams::read32(smmu, smmu::CMDQ_PROD);
        for command in commands.iter().chain([&Command::Sync { signal: SyncSignal::None }]) {
            write(&self.memory, COMMANDS + 16 * u64::from(prod), &command.encode());
            prod += 1;
        }
        smmu.mmio_write(smmu::CMDQ_PROD, &prod.to_le_bytes());
        streams::read32(smmu, smmu::CMDQ_CONS)
    }
}

/// Of the pages of a first stage in `domain`, for requests without PASID.
fn of_page(domain: u64, address: u64) -> [u64; 2] {
    [domain << 16 | 3 << 4 | 6, address]
}

#[test]
fn devices_of_two_hosts_follow_one_guest_and_a_wait_is_for_both() {
    let pair = Pair::of(Host::vtd);
    let vtd = pair.vtd();
    let of_each = |table: &str| {
        [
            "GET_HW_INFO #1".to_owned(),
            "SET_FAULT_SINK #1".to_owned(),
            "HWPT_ALLOC paging NEST_PARENT PASID on #3 for #1 = #4".to_owned(),
            "DEVICE_ATTACH #1 to #4".to_owned(),
            format!("HWPT_ALLOC VTD_S1({table}, 48 bits, flags 0x0) PASID on #4 for #1 = #5"),
            "DEVICE_ATTACH #1 to #5".to_owned(),
            "HWPT_ALLOC VTD_S1(0x58000, 48 bits, flags 0x0) PASID on #4 for #1 = #6".to_owned(),
            "DEVICE_ATTACH #1 PASID 0x5 to #6".to_owned(),
        ]
    };
    assert_eq!(pair.logs(), [of_each("0x50000"), of_each("0x51000")]);
    // Domain 7 is A's, domain 8 is B's; of PASID 5 they share domain 7.
    assert!(pair.submit(&vtd, &[of_page(8, 0x5000)]));
    assert_eq!(pair.logs(), [vec![], vec!["HWPT_INVALIDATE #5 [0x5000/1]"]]);
    assert!(pair.submit(&vtd, &[of_page(7, 0x5000), of_page(8, 0x6000)]));
    let each = ["0x5000", "0x6000"].map(|page| vec![format!("HWPT_INVALIDATE #5 [{page}/1]")]);
    assert_eq!(pair.logs(), each);
    let of_domain = [7 << 16 | 2 << 4 | 2, 0];
    assert!(pair.submit(&vtd, &[of_domain]));
    let [five, six] = ["HWPT_INVALIDATE #5 [all]", "HWPT_INVALIDATE #6 [all]"];
    assert_eq!(pair.logs(), [vec![five, six], vec![six]]);
    // The second side's are counted there.
    let counted = vtd.nestings().iter().map(|side| side.counters().entries_out).collect::<Vec<_>>();
    assert_eq!((counted, vtd.nesting().counters().entries_out), (vec![3, 3], 3));

    // Faults of devices with the same number.
    for host in [&pair.other, &pair.own] {
        host.recording.report_fault(&functions::fault(host.a));
    }
    let state = vtd.snapshot().unwrap();
    let sources = [0, 1].map(|record| state.faults.records[record].high.sid());
    assert_eq!(sources, [B, A].map(Bdf::raw));
    let was = pair.reaches();
    vtd.reset().unwrap();
    assert_ne!(pair.reaches(), was);
    drop(vtd);
    pair.is_empty();

    // On two other hosts they are as they were; or the other way round.
    for builder in [
        |pair: &Pair| pair.vtd_builder(),
        |pair: &Pair| {
            let builder = pair.other.builder(&pair.memory).device(A, pair.other.a, "nic0");
            builder.device_on(&pair.own.ioas, B, pair.own.a, "disk0")
        },
        |pair: &Pair| {
            let (own, memory) = (&pair.own, &pair.memory);
            let builder = own.builder(memory).device(A, own.a, "nic0");
            builder.device_on(&own.ioas, B, own.b, "disk0")
        },
    ] {
        let new = Pair { memory: pair.memory.clone(), ..Pair::of(Host::vtd) };
        let restored = builder(&new).restore(&state).unwrap();
        assert_eq!(restored.snapshot().unwrap(), state);
        restored.shutdown().unwrap();
        new.is_empty();
    }
}

#[test]
fn a_guest_is_offered_what_the_hosts_have_in_common() {
    let poor = || {
        let (cap, ecap) = functions::able();
        let info = functions::info((cap.with_fs1gp(false), ecap.with_eafs(false)));
        Host::of(RecordingHost::new(Extensions::default()), info)
    };
    let pair = Pair { other: poor(), ..Pair::of(Host::vtd) };
    let vtd = pair.vtd_builder().build().unwrap();
    assert!(!vtd.config().first_stage_1g && !vtd.config().extended_accessed);
    assert!(vtd.config().supervisor_requests);
    drop(vtd);
    // Only a host that has a device counts.
    let late = VtdConfig { caching_mode: false, ..VtdConfig::default() };
    let alone = pair.own.builder(&pair.memory).device(A, pair.own.a, "nic0").config(&late);
    let vtd = alone.build().unwrap();
    let refused = [
        pair.vtd_builder().config(&late).build().unwrap_err().to_string(),
        vtd.add_device_on(&pair.other.ioas, B, pair.other.a, "disk0").unwrap_err().to_string(),
    ];
    for error in refused {
        let lacks = "the IOMMU of disk0 lacks fault_reports: caching-mode=off was requested";
        assert!(error.starts_with(lacks), "{error}");
    }
    drop(vtd);
    pair.is_empty();
    // All that one lacks is an SMMU that can stall: nothing of it is offered, and the one that can
    // is kept from it.
    let (idr0, idr1, idr3, idr5) = streams::able();
    let idr0 = idr0.with_stall_model(1);
    let info = streams::info((idr0, idr1, idr3, idr5));
    let other = Host::of(RecordingHost::new(Extensions::default()), info);
    let pair = Pair { other, ..Pair::of(Host::smmu) };
    let smmu = pair.smmu();
    assert!(smmu.config().host_stalls);
    let entry = |log: Vec<String>| log.into_iter().find(|call| call.contains("SMMUV3")).unwrap();
    let [own, other] = pair.logs().map(entry);
    assert!(own.contains("(0x5000b, 0x8000000)") && other.contains("(0x5100b, 0x0)"), "{other}");
    let state = smmu.snapshot().unwrap();
    drop(smmu);
    // Without the one that can, too.
    let two = pair.other.smmu_builder(&pair.memory).device(A, pair.other.a, "nic0");
    let smmu = two.device(B, pair.other.b, "disk0").restore(&state).unwrap();
    assert!(pair.other.reaches().iter().all(Option::is_some));
    drop(smmu);
    pair.is_empty();
}

#[test]
fn devices_of_both_kinds_come_and_go() {
    let pair = Pair::of(Host::vtd);
    let vtd = pair.vtd();
    let (own, other) = (&pair.own, &pair.other);
    let taken = vtd.add_device_on(&other.ioas, A, other.b, "disk1").unwrap_err();
    assert!(matches!(taken, AddError::Exists { .. }), "{taken}");
    vtd.remove_device(B).unwrap();
    assert_eq!((own.recording.reaches(own.a, None).is_some(), other.reaches()), (true, [None; 2]));
    assert_eq!(other.recording.live_objects(), [other.ioas.id()]);
    // Its place is free, for a device of either.
    vtd.add_device(B, own.b, "nic1").unwrap();
    assert!(own.reaches().iter().all(Option::is_some));
    vtd.remove_device(B).unwrap();
    vtd.add_device_on(&other.ioas, B, other.b, "disk1").unwrap();
    vtd.add_device_on(&own.ioas, C, own.b, "nic1").unwrap();
    assert_eq!(vtd.nestings().len(), 2, "that of its own memory is the first");
    // A third host, whose first device comes late, has its faults told, too.
    let third = Host::vtd();
    vtd.remove_device(C).unwrap();
    vtd.add_device_on(&third.ioas, C, third.a, "nic2").unwrap();
    third.recording.report_fault(&functions::fault(third.a));
    assert_eq!(vtd.snapshot().unwrap().faults.records[0].high.sid(), C.raw());
    vtd.shutdown().unwrap();
    for host in [own, other, &third] {
        host.is_empty();
    }
    let fourth = Host::vtd();
    let error = vtd.add_device_on(&fourth.ioas, A, fourth.a, "nic3").unwrap_err();
    assert!(matches!(error, AddError::Exists { .. }), "{error}");
    vtd.remove_device(C).unwrap_err();
    let free = Bdf::from_raw(0x38);
    let error = vtd.add_device_on(&fourth.ioas, free, fourth.a, "nic3").unwrap_err().to_string();
    assert!(error.contains("the host objects are gone already"), "{error}");
    fourth.is_empty();
}

/// Any call of either host fails, from the first device to the end.
#[test]
fn one_that_fails_blocks_its_own_and_the_guest_is_told() {
    let (mut unbuilt, mut told, mut not_ended) = (0, 0, 0);
    for fails in [0, 1] {
        for nth in 0.. {
            let pair = Pair::of(Host::vtd);
            let failing = [&pair.own.recording, &pair.other.recording][fails];
            failing.fail_nth(nth, Errno::EIO);
            let Ok(vtd) = pair.vtd_builder().build() else {
                unbuilt += 1;
                pair.is_empty();
                pair.vtd_builder().build().unwrap();
                continue;
            };
            functions::write_tables(&pair.memory);
            functions::run(&vtd);
            let of_domain = |domain: u64| [domain << 16 | 2 << 4 | 2, 0];
            let done = pair.submit(&vtd, &[of_domain(7), of_domain(8)]);
            assert!(pair.reaches()[1 - fails].is_some(), "call {nth} of host {fails}");
            let refused = vtd.model().counters().host_errors;
            assert!(done || refused > 0);
            told += refused;
            not_ended += u32::from(vtd.remove_device(B).is_err() | vtd.shutdown().is_err());
            vtd.shutdown().unwrap();
            pair.is_empty();
            if failing.failure_pending() {
                break;
            }
        }
    }
    // Of a detach or a destroy that fails, the second try is enough.
    assert_eq!((unbuilt, told, not_ended), (8, 8, 0));
}

/// The same of an SMMU, whose side also has a thread to start and to end.
#[test]
fn a_stream_s_host_that_fails_leaves_the_other_stream_as_it_is() {
    let (mut unbuilt, mut told) = (0, 0);
    for fails in [0, 1] {
        for nth in 0.. {
            let pair = Pair::of(Host::smmu);
            let failing = [&pair.own.recording, &pair.other.recording][fails];
            failing.fail_nth(nth, Errno::EIO);
            let Ok(smmu) = pair.smmu_builder().build() else {
                unbuilt += 1;
                pair.is_empty();
                pair.smmu_builder().build().unwrap();
                continue;
            };
            streams::write_tables(&pair.memory);
            streams::run(&smmu);
            pair.command(&smmu, &[Command::TlbiNhAll { vmid: 0 }]);
            assert!(pair.reaches()[1 - fails].is_some(), "call {nth} of host {fails}");
            told += smmu.model().counters().host_errors;
            let _ = smmu.remove_device(B);
            let _ = smmu.shutdown();
            smmu.shutdown().unwrap();
            pair.is_empty();
            if failing.failure_pending() {
                break;
            }
        }
    }
    // Six calls each until the device passes; then the entry, its attachment, and the command.
    assert_eq!((unbuilt, told), (12, 6));
}

#[test]
fn a_restore_that_either_host_refuses_leaves_nothing() {
    let pair = Pair::of(Host::vtd);
    let state = pair.vtd().snapshot().unwrap();
    let mut refused = [0, 0];
    for fails in [0, 1] {
        for nth in 0.. {
            let new = Pair { memory: pair.memory.clone(), ..Pair::of(Host::vtd) };
            let failing = [&new.own.recording, &new.other.recording][fails];
            failing.fail_nth(nth, Errno::EIO);
            let restored = new.vtd_builder().restore(&state);
            if failing.failure_pending() {
                break;
            }
            refused[fails] += u32::from(restored.is_err());
            drop(restored);
            new.is_empty();
            assert_eq!(new.reaches(), [None; 2]);
            new.vtd_builder().restore(&state).unwrap();
        }
    }
    assert!(refused[0] > 4 && refused[0] == refused[1], "{refused:?}");
}

#[test]
fn what_one_host_does_not_invalidate_is_blocked_there_alone() {
    let pair = Pair::of(Host::vtd);
    let vtd = pair.vtd();
    for fails in [0, 1] {
        let was = pair.reaches();
        let host = [&pair.own, &pair.other][fails];
        // Neither the page nor all; what is blocked stays so.
        for verb in [Verb::HwptInvalidate, Verb::HwptInvalidate, Verb::HwptAlloc] {
            host.recording.fail_next(verb, Errno::EIO);
        }
        pair.logs();
        assert!(!pair.submit(&vtd, &[of_page(7, 0x5000), of_page(8, 0x5000)]), "it is not told");
        let logs = pair.logs();
        assert_eq!(logs[1 - fails], ["HWPT_INVALIDATE #5 [0x5000/1]"], "it does its own");
        assert!(logs[fails].contains(&"DEVICE_DETACH #1".to_owned()), "{logs:?}");
        assert_eq!(pair.reaches()[1 - fails], was[1 - fails]);
        let mut status = [0; 4];
        vtd.mmio_read(regs::FSTS, &mut status);
        assert_ne!(u32::from_le_bytes(status) & 1 << 4, 0, "IQE");
        // The guest clears the error; the queue goes on, with all of it.
        host.recording.forget_failures();
        vtd.mmio_write(regs::FSTS, &(1u32 << 4).to_le_bytes());
        assert!(pair.submit(&vtd, &[]));
        assert!(pair.reaches().iter().all(Option::is_some), "{:?}", pair.logs());
    }
    drop(vtd);
    pair.is_empty();
}

#[test]
fn commands_of_a_stream_are_for_its_host_and_those_of_an_asid_for_both() {
    let pair = Pair::of(Host::smmu);
    let smmu = pair.smmu();
    let attach = |rid: &str, contexts: &str| {
        [
            "GET_HW_INFO #1".to_owned(),
            "HWPT_ALLOC paging NEST_PARENT on #3 for #1 = #4".to_owned(),
            "VIOMMU_ALLOC #1 on #4 = #5".to_owned(),
            "VEVENTQ_ALLOC #5 type 0x1 depth 256 = #6".to_owned(),
            format!("VDEVICE_ALLOC #5 #1 {rid} = #7"),
            "DEVICE_ATTACH #1 to #4".to_owned(),
            format!("HWPT_ALLOC ARM_SMMUV3({contexts}, 0x8000000) on #5 for #1 = #8"),
            "DEVICE_ATTACH #1 to #8".to_owned(),
        ]
    };
    assert_eq!(pair.logs(), [attach("0x20", "0x5000b"), attach("0x28", "0x5100b")]);
    let contexts = |rid| Command::CfgiCdAll { stream: StreamId::from(rid) };
    let asid = Command::TlbiNhAsid { vmid: 0, asid: 3 };
    assert_eq!(pair.command(&smmu, &[contexts(B)]), 2);
    assert_eq!(pair.logs(), [vec![], vec!["HWPT_INVALIDATE #5 [0x2800000006:0x0]"]]);
    assert_eq!(pair.command(&smmu, &[asid, contexts(A)]), 5);
    assert_eq!(
        pair.logs(),
        [
            ["HWPT_INVALIDATE #5 [0x3000000000011:0x0, 0x2000000006:0x0]"],
            ["HWPT_INVALIDATE #5 [0x3000000000011:0x0]"]
        ]
    );
    // Events of both.
    for (rid, side) in [A, B].into_iter().zip(smmu.nestings()) {
        let record = EventRecord::new(EventId::Translation, StreamId::from(rid), None);
        let data = record.to_words().into_iter().flat_map(u64::to_le_bytes).collect();
        let viommu = side.objects().unit.unwrap().viommu;
        let host = if rid == A { &pair.own } else { &pair.other };
        assert!(host.recording.push_event(viommu, Vevent::Event { sequence: 0, data }));
    }
    smmu.snapshot().unwrap();
    assert_eq!(streams::events(&smmu), 2);
    // An entry is read anew for its own.
    let entry = Command::CfgiSte { stream: StreamId::from(B), leaf: true };
    write(&pair.memory, 0x4000 + 64 * u64::from(B.raw()), &[1]);
    assert_eq!(pair.command(&smmu, &[entry]), 7);
    let [own, other] = pair.logs();
    assert!(own.is_empty() && other.iter().any(|call| call.contains("ARM_SMMUV3(0x1, 0x0)")));

    let state = smmu.snapshot().unwrap();
    smmu.shutdown().unwrap();
    pair.is_empty();
    let new = Pair { memory: pair.memory.clone(), ..Pair::of(Host::smmu) };
    let restored = new.smmu_builder().restore(&state).unwrap();
    assert_eq!(restored.snapshot().unwrap(), state);
    restored.remove_device(A).unwrap();
    restored.add_device_on(&new.other.ioas, A, new.other.b, "disk1").unwrap();
    assert!(new.other.recording.reaches(new.other.b, None).is_some());
    drop(restored);
    new.is_empty();
}

#[test]
fn a_command_that_one_host_refuses_is_blamed_and_the_other_has_done_all() {
    let asid = |asid| Command::TlbiNhAsid { vmid: 0, asid };
    let batch = [asid(1), asid(2), asid(3)];
    let refuse = |host: &Host, number: usize| {
        host.recording.refuse_command(batch[number].encode());
    };
    for (own, other, blamed) in [(Some(2), None, 2), (None, Some(1), 1), (Some(2), Some(1), 1)] {
        let pair = Pair::of(Host::smmu);
        let smmu = pair.smmu();
        pair.logs();
        own.into_iter().for_each(|number| refuse(&pair.own, number));
        other.into_iter().for_each(|number| refuse(&pair.other, number));
        let cons = pair.command(&smmu, &batch);
        // CERROR_ILL, at the command.
        assert_eq!((cons & 0xf_ffff, cons >> 24 & 0x7f), (blamed, 1));
        let all = "HWPT_INVALIDATE #5 [0x1000000000011:0x0, 0x2000000000011:0x0, \
                   0x3000000000011:0x0]";
        let [of_own, of_other] = pair.logs();
        for (log, refused) in [(of_own, own), (of_other, other)] {
            assert!(log[0].starts_with(all), "{log:?}");
            // A flush of everything makes good what was refused.
            assert_eq!(
                log.iter().any(|call| call.contains("[0x2000000006:0x0, 0x10:0x0]")
                    || call.contains("[0x2800000006:0x0, 0x10:0x0]")),
                refused.is_some(),
                "{log:?}"
            );
        }
        assert!(pair.reaches().iter().all(Option::is_some));
        drop(smmu);
        pair.is_empty();
    }
}

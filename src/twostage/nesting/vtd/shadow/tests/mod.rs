// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which host calls a mirror costs, and their order.

mod failures;
mod slices;
mod users;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::iommufd::fake::RecordingHost;
use crate::iommufd::{
    Errno, Extensions, HostIommu, HwInfo, HwInfoData, ObjectId, Protection, Verb,
};
use crate::nesting::vtd::{Nesting, Serving, VtdNesting};
use crate::nesting::{GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::root::AddressWidth;
use crate::spec::vtd::PageRange;
use crate::sync::Mutex;
use crate::viommu::vtd::walk::tests::{first_stage, second_stage};
use crate::viommu::vtd::{
    DmaFault, DomainTag, FaultTarget, Invalidation, Policy, Progress, RequesterConfig, Stage1,
    VtdConfig, VtdHostSide,
};
use crate::viommu::{HostSideError, Requester};

const A: Bdf = Bdf::from_raw(0x20);
const B: Bdf = Bdf::from_raw(0x28);
const DEV_A: ObjectId = ObjectId(1);
const DEV_B: ObjectId = ObjectId(2);
const TAG: DomainTag = DomainTag { domain: 7, pasid: 0 };
const RW: Protection = Protection::READ_WRITE;
const R: Protection = Protection::READ_ONLY;
/// Guest memory is 1 MiB, of which the last 64 KiB can be read only.
const SIZE: u64 = 0x10_0000;
const ROM: u64 = 0xf_0000;

#[derive(Default)]
struct Faults(Mutex<Vec<DmaFault>>);

impl FaultTarget for Faults {
    fn dma_fault(&self, fault: &DmaFault) {
        self.0.lock().push(*fault);
    }
}

/// Two devices without PASIDs behind an IOMMU that is no VT-d, which bypass; the log is empty.
struct Rig {
    host: Arc<RecordingHost>,
    nesting: VtdNesting,
    memory: Arc<GuestMemoryMmap>,
    faults: Arc<Faults>,
}

impl Rig {
    fn new() -> Self {
        Self::with(1 << 20, 0)
    }

    fn with(limit: u64, max_pasid_log2: u8) -> Self {
        Self::of(limit, max_pasid_log2, SIZE)
    }

    /// `end`: of the guest's memory, of which the first part is there for tables.
    fn of(limit: u64, max_pasid_log2: u8, end: u64) -> Self {
        let host = RecordingHost::new(Extensions::default());
        let info = HwInfo::new(HwInfoData::None).with_max_pasid_log2(max_pasid_log2);
        let (a, b) = (host.add_device(0, info), host.add_device(1, info));
        assert_eq!((a, b), (DEV_A, DEV_B));
        let ranges = [(GuestAddress(0), ROM as usize), (GuestAddress(ROM), 0x30_0000)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let ioas = host.ioas_alloc().unwrap();
        let map = [(0, ROM, RW), (ROM, SIZE - ROM, R), (SIZE, end - SIZE, RW)];
        let map: Vec<_> = map.into_iter().filter(|(_, length, _)| *length > 0).collect();
        let ioas = GuestIoas::adopt_mapped(host.clone(), ioas, &map).unwrap();
        let nesting = Nesting::Off { pieces: limit };
        let serving = Serving::new(nesting, memory.clone(), VtdConfig::default());
        let nesting = VtdNesting::serving(ioas, serving);
        let faults = Arc::new(Faults::default());
        nesting.set_fault_target(Arc::downgrade(&faults) as _);
        let rig = Self { host, nesting, memory, faults };
        for (rid, dev) in [(A, DEV_A), (B, DEV_B)] {
            rig.nesting.add_device(rid, dev).unwrap();
            rig.configure(rid, Policy::Bypass).unwrap();
        }
        // Two levels above pages at 0x1000 and 0x2000; those in 0x3000 and 0x4000.
        rig.put(0x1000, 0, 0x2007);
        rig.put(0x2000, 0, 0x3007);
        rig.put(0x2000, 1, 0x4007);
        rig.host.take_log();
        rig
    }

    fn put(&self, table: u64, number: u64, word: u64) {
        self.memory.write_obj(word, GuestAddress(table + number * 8)).unwrap();
    }

    /// `B` is in a domain of its own.
    fn configure(&self, rid: Bdf, policy: Policy) -> Result<(), HostSideError> {
        self.configure_in(TAG.domain + u16::from(rid == B), rid, policy)
    }

    fn configure_in(&self, domain: u16, rid: Bdf, policy: Policy) -> Result<(), HostSideError> {
        let config =
            RequesterConfig { policy, tag: DomainTag { domain, ..TAG }, fault_disabled: false };
        let configured = self.nesting.configure(Requester::rid(rid), &config);
        self.nesting.configured();
        configured
    }

    fn invalidate(&self, range: Option<(u64, u64)>) -> Result<(), HostSideError> {
        let range = range.map(|(address, pages)| PageRange::new(address, pages, true));
        let domain = Some(TAG.domain);
        self.nesting.invalidate(&[Invalidation { domain, pasid: None, range }])
    }

    #[track_caller]
    fn expect(&self, calls: &[&str]) {
        assert_eq!(self.host.take_log(), calls);
    }

    fn faults(&self) -> Vec<(Bdf, u64)> {
        let faults = std::mem::take(&mut *self.faults.0.lock());
        faults.iter().map(|fault| (fault.requester.rid, fault.address)).collect()
    }

    #[track_caller]
    fn ends_clean(self) {
        drop(self.nesting);
        // The adopted IOAS.
        assert_eq!(self.host.live_objects(), [ObjectId(3)]);
    }
}

/// Second-stage tables of three levels.
fn tables() -> Policy {
    Policy::Stage1(second_stage(0x1000, AddressWidth::Bits39))
}

#[test]
fn tables_are_mirrored_once_for_all_their_users_before_they_are_used() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    rig.put(0x3000, 1, 0xa003);
    rig.put(0x3000, 2, 0xb001);
    rig.put(0x3000, 3, 0xc002);
    // Memory that can be read only, none at all, and a reserved bit.
    rig.put(0x3000, 4, ROM | 3);
    rig.put(0x3000, 5, ROM | 2);
    rig.put(0x3000, 6, SIZE | 3);
    rig.put(0x4000, 0, 1 << 51 | 0xd003);
    rig.configure(A, tables()).unwrap();
    rig.configure(B, tables()).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #4",
        "IOAS_COPY #4 0x0 from #3 0x9000+0x2000 rw",
        "IOAS_COPY #4 0x2000 from #3 0xb000+0x1000 r",
        "IOAS_COPY #4 0x3000 from #3 0xc000+0x1000 w",
        "IOAS_COPY #4 0x4000 from #3 0xf0000+0x1000 r",
        "DEVICE_ATTACH #1 to #4",
        "DEVICE_ATTACH #2 to #4",
    ]);
    rig.configure(A, Policy::Bypass).unwrap();
    rig.configure(B, Policy::Blocked(FaultReason::RootNotPresent)).unwrap();
    rig.expect(&["DEVICE_ATTACH #1 to #3", "DEVICE_DETACH #2", "DESTROY #4"]);
    rig.ends_clean();
}

#[test]
fn an_invalidation_unmaps_what_went_and_maps_what_came() {
    let rig = Rig::new();
    (0..4).for_each(|page| rig.put(0x3000, page, (9 + page) << 12 | 3));
    rig.put(0x3000, 8, 0x1_0003);
    rig.configure(A, tables()).unwrap();
    rig.host.take_log();
    (0..4).for_each(|page| rig.put(0x3000, page, 0));
    rig.put(0x3000, 8, 0);
    rig.put(0x3000, 9, 0x2_0003);
    // Part of what went is enough; what is not named stays.
    rig.invalidate(Some((0x1000, 1))).unwrap();
    rig.expect(&["IOAS_UNMAP #4 0x0+0x4000"]);
    rig.invalidate(Some((0x8000, 2))).unwrap();
    rig.expect(&["IOAS_UNMAP #4 0x8000+0x1000", "IOAS_COPY #4 0x9000 from #3 0x20000+0x1000 rw"]);
    rig.invalidate(None).unwrap();
    rig.invalidate(Some((0x8000, 2))).unwrap();
    rig.expect(&[]);
    // A large page that is named by one of its own, as far as it is memory.
    rig.put(0x2000, 4, 0x83);
    rig.invalidate(Some((0x80_7000, 1))).unwrap();
    rig.expect(&[
        "IOAS_COPY #4 0x800000 from #3 0x0+0xf0000 rw",
        "IOAS_COPY #4 0x8f0000 from #3 0xf0000+0x10000 r",
    ]);
    assert_eq!(rig.nesting.counters().mirror_pieces, 3);
    rig.ends_clean();
}

#[test]
fn what_changes_while_it_is_in_use_is_replaced_without_a_gap() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    rig.put(0x3000, 7, 0xa003);
    rig.configure(A, tables()).unwrap();
    rig.configure(B, tables()).unwrap();
    rig.host.take_log();
    rig.put(0x3000, 7, 0xb003);
    rig.invalidate(Some((0x7000, 1))).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #5",
        "IOAS_COPY #5 0x0 from #3 0x9000+0x1000 rw",
        "IOAS_COPY #5 0x7000 from #3 0xb000+0x1000 rw",
        "DEVICE_ATTACH #1 to #5",
        "DEVICE_ATTACH #2 to #5",
        "DESTROY #4",
    ]);
    assert_eq!(rig.nesting.counters().mirror_rebuilds, 1);
    assert_eq!(rig.nesting.counters().mirror_pieces, 2);
    rig.ends_clean();
}

#[test]
fn devices_with_pasids_have_page_tables_of_their_own_on_the_mirror() {
    let rig = Rig::with(1 << 20, 8);
    rig.put(0x3000, 0, 0x9003);
    rig.configure(A, tables()).unwrap();
    rig.configure(B, tables()).unwrap();
    rig.expect(&[
        "IOAS_ALLOC - = #6",
        "IOAS_COPY #6 0x0 from #3 0x9000+0x1000 rw",
        "HWPT_ALLOC paging PASID on #6 for #1 = #7",
        "DEVICE_ATTACH #1 to #7",
        "HWPT_ALLOC paging PASID on #6 for #2 = #8",
        "DEVICE_ATTACH #2 to #8",
    ]);
    // What it has for one device goes when that uses it no more.
    rig.configure(A, Policy::Bypass).unwrap();
    rig.expect(&["DEVICE_ATTACH #1 to #4", "DESTROY #7"]);
    rig.host.fail_next(Verb::DeviceAttach, Errno::ENOMEM);
    rig.configure(A, tables()).unwrap_err();
    rig.expect(&[
        "HWPT_ALLOC paging PASID on #6 for #1 = #7",
        "DEVICE_ATTACH #1 to #7 ! ENOMEM",
        "DEVICE_DETACH #1",
        "DESTROY #7",
    ]);
    rig.nesting.remove_device(B).unwrap();
    rig.expect(&["DEVICE_DETACH #2", "DESTROY #8", "DESTROY #6", "DESTROY #5"]);
    rig.ends_clean();
}

/// A function's PASID still uses what the function itself has left.
#[test]
fn what_a_mirror_has_for_a_device_stays_with_its_last_user() {
    let rig = Rig::with(1 << 20, 8);
    rig.configure(B, tables()).unwrap();
    let configure = |policy, pasid| {
        let requester = Requester { rid: A, pasid: crate::spec::pci::Pasid::new(pasid) };
        let tag = DomainTag { pasid, ..TAG };
        let config = RequesterConfig { policy, tag, fault_disabled: false };
        rig.nesting.configure(requester, &config).unwrap();
    };
    configure(tables(), 5);
    rig.configure(A, tables()).unwrap();
    let before = rig.host.live_objects().len();
    rig.configure(A, Policy::Bypass).unwrap();
    assert_eq!(rig.host.live_objects().len(), before);
    configure(Policy::Blocked(FaultReason::PasidEntryNotPresent), 5);
    assert_eq!(rig.host.live_objects().len(), before - 1);
    rig.ends_clean();
}

/// The page table for a device that the host does not attach to a new mirror goes, too.
#[test]
fn what_a_new_mirror_has_for_a_lost_device_goes() {
    let rig = Rig::with(1 << 20, 8);
    rig.put(0x3000, 0, 0x9003);
    rig.configure(A, tables()).unwrap();
    rig.configure(B, tables()).unwrap();
    let before = rig.host.live_objects().len();
    rig.put(0x3000, 0, 0xa003);
    (0..2).for_each(|_| rig.host.fail_next(Verb::DeviceAttach, Errno::ENOMEM));
    rig.invalidate(None).unwrap();
    assert_eq!(rig.host.live_objects().len(), before);
    rig.ends_clean();
}

#[test]
fn tables_that_name_too_much_block_their_users_until_they_do_not() {
    let rig = Rig::with(2, 0);
    (0..3).for_each(|page| rig.put(0x3000, 2 * page, 0x9003));
    rig.configure(A, tables()).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_A, None)), (vec![(A, 0x4000)], None));
    rig.invalidate(None).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_A, None)), (vec![(A, 0x4000)], None));
    rig.put(0x3000, 0, 0);
    // Another domain; then this one.
    rig.nesting.invalidate(&[Invalidation { domain: Some(8), pasid: None, range: None }]).unwrap();
    assert_eq!(rig.host.reaches(DEV_A, None), None);
    rig.invalidate(Some((0, 1))).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 2);
    // While it is used.
    rig.put(0x3000, 9, 0xa003);
    rig.invalidate(Some((0x9000, 1))).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_A, None)), (vec![(A, 0x9000)], None));
    assert_eq!(rig.nesting.counters().mirror_pieces, 0);
    rig.put(0x3000, 9, 0);
    rig.invalidate(Some((0x9000, 1))).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A).len(), 2);
    rig.ends_clean();
}

#[test]
fn reserved_iovas_are_the_guest_s_mistake() {
    for (verb, errno) in [(Verb::IoasCopy, Errno::EINVAL), (Verb::DeviceAttach, Errno::EADDRINUSE)]
    {
        let rig = Rig::new();
        rig.put(0x3000, 5, 0x9003);
        rig.host.fail_next(verb, errno);
        rig.configure(A, tables()).unwrap();
        assert_eq!((rig.faults().len(), rig.host.reaches(DEV_A, None)), (1, None));
        rig.invalidate(None).unwrap();
        assert_eq!(rig.host.reaches_copies(DEV_A), [(0x5000, 0x1000, 0x9000, RW)]);
        rig.ends_clean();
    }
}

#[test]
fn two_tables_that_name_everything_end() {
    let rig = Rig::with(100, 0);
    (0..512).for_each(|number| rig.put(0x1000, number, 0x1003));
    rig.configure(A, Policy::Stage1(second_stage(0x1000, AddressWidth::Bits57))).unwrap();
    assert_eq!((rig.faults().len(), rig.host.reaches(DEV_A, None)), (1, None));
    rig.ends_clean();
}

#[test]
fn tables_that_translate_nothing_are_limited_too() {
    let rig = Rig::with(1, 0);
    rig.put(0x2000, 0, 0);
    rig.put(0x2000, 1, 0);
    rig.configure(A, tables()).unwrap();
    let other = Policy::Stage1(second_stage(0x5000, AddressWidth::Bits39));
    rig.configure(B, other).unwrap();
    assert_eq!((rig.faults(), rig.host.reaches(DEV_B, None)), (vec![(B, 0)], None));
    rig.ends_clean();
}

#[test]
fn memory_that_goes_is_mirrored_no_more_before_it_is_gone() {
    let rig = Rig::new();
    rig.put(0x3000, 0, 0x9003);
    rig.put(0x3000, 1, ROM | 1);
    rig.configure(A, tables()).unwrap();
    rig.host.take_log();
    rig.nesting.ioas().unwrap().unmap(ROM, SIZE - ROM).unwrap();
    rig.expect(&["IOAS_UNMAP #4 0x1000+0x1000", "IOAS_UNMAP #3 0xf0000+0x10000"]);
    rig.ends_clean();
    // Refused, it is as before.
    let rig = Rig::new();
    rig.put(0x3000, 1, ROM | 1);
    rig.configure(A, tables()).unwrap();
    rig.host.fail_calls(1, 2, Errno::EBUSY);
    rig.nesting.ioas().unwrap().unmap(ROM, SIZE - ROM).unwrap_err();
    assert_eq!(rig.host.reaches_copies(DEV_A), [(0x1000, 0x1000, ROM, R)]);
    rig.ends_clean();
}

/// A host that nests for one device and not for another, behind an IOMMU without it.
#[test]
fn one_device_that_cannot_nest_is_enough() {
    let (host, intel) = RecordingHost::with_vtd();
    let amd = host.add_device(1, HwInfo::new(HwInfoData::Other(3)));
    let memory = Arc::new(crate::viommu::vtd::walk::tests::memory());
    let serving = |nesting, config| Serving::new(nesting, memory.clone(), config);
    let (config, auto) = (VtdConfig::default(), Nesting::Auto { pieces: 1 });
    let second = config.clone().with_second_stage(true);
    for (nesting, config, dev, nests) in [
        (auto, &config, intel, true),
        (auto, &config, amd, false),
        (auto, &second, intel, false),
        (Nesting::On, &config, amd, true),
        (Nesting::Off { pieces: 1 }, &config, intel, false),
    ] {
        assert_eq!(serving(nesting, config.clone()).nests_for(&*host, dev), nests);
    }
    let ioas = GuestIoas::new(host.clone()).unwrap();
    let nesting = VtdNesting::serving(ioas, serving(auto, config));
    nesting.add_device(A, amd).unwrap();
    nesting.add_device(B, intel).unwrap();
    assert_eq!(nesting.mirrors_because().unwrap(), "00:04.0 is not behind a VT-d");
    let unit = |rid| nesting.host_unit(rid, "it".into()).unwrap();
    assert!(unit(A).mirrored && unit(A).ecap.pasid_bits() == 0);
    assert!(unit(B).mirrored && unit(B).ecap.pasid_bits() == 20);
    drop(nesting);
    assert_eq!(host.live_objects(), []);
}

/// Adding a device fails at every call: nothing of it stays.
#[test]
fn a_device_that_is_not_added_leaves_nothing() {
    for nth in 0.. {
        let rig = Rig::with(1, 8);
        rig.nesting.remove_device(B).unwrap();
        let before = rig.host.live_objects();
        rig.host.fail_nth(nth, Errno::ENOMEM);
        let added = rig.nesting.add_device(B, DEV_B);
        if rig.host.failure_pending() {
            assert!(added.is_ok() && nth > 4);
            break;
        }
        if added.is_err() {
            // What could not be destroyed is when something else is.
            rig.configure(A, tables()).unwrap();
            rig.configure(A, Policy::Bypass).unwrap();
            assert_eq!((rig.host.live_objects(), rig.host.reaches(DEV_B, None)), (before, None));
        }
    }
}

/// Without devices nothing is decided: a device whose IOMMU nests comes after one that had mirrors,
/// and was refused or removed.
#[test]
fn the_first_device_of_any_time_decides() {
    let (host, intel) = RecordingHost::with_vtd();
    let amd = host.add_device(1, HwInfo::new(HwInfoData::Other(3)));
    let memory = Arc::new(crate::viommu::vtd::walk::tests::memory());
    let serving = Serving::new(Nesting::Auto { pieces: 1 }, memory, VtdConfig::default());
    let nesting = VtdNesting::serving(GuestIoas::new(host.clone()).unwrap(), serving);
    for mirrored in [false, true, false, true] {
        nesting.add_device(A, if mirrored { amd } else { intel }).unwrap();
        assert_eq!(nesting.mirrors_because().is_some(), mirrored);
        assert_eq!(nesting.host_unit(A, String::new()).unwrap().mirrored, mirrored);
        nesting.remove_device(A).unwrap();
        assert_eq!(nesting.mirrors_because(), None);
    }
    host.fail_next(Verb::DeviceAttach, Errno::ENOMEM);
    nesting.add_device(A, amd).unwrap_err();
    nesting.add_device(A, intel).unwrap();
    assert_eq!(nesting.mirrors_because(), None);
    drop(nesting);
    assert_eq!(host.live_objects(), []);
}

/// The walk goes by what the guest is offered, not by what was wanted.
#[test]
fn pages_of_a_gigabyte_are_those_that_the_guest_is_offered() {
    for huge in [true, false] {
        let rig = Rig::new();
        rig.nesting.offers(&VtdConfig::default().with_first_stage_1g(huge));
        rig.put(0x1000, 0, 0x2007);
        rig.put(0x2000, 0, 0x87);
        rig.configure(A, Policy::Stage1(first_stage(0x1000))).unwrap();
        assert_eq!(!rig.host.reaches_copies(DEV_A).is_empty(), huge);
        rig.ends_clean();
    }
}

#[test]
fn an_ioas_whose_map_is_not_known_is_refused() {
    let host = RecordingHost::new(Extensions::default());
    let ioas = host.ioas_alloc().unwrap();
    let adopted = GuestIoas::adopt(host.clone(), ioas, &[]).unwrap();
    let memory = Arc::new(crate::viommu::vtd::walk::tests::memory());
    let serving = Serving::new(Nesting::Auto { pieces: 1 }, memory, VtdConfig::default());
    let dev = host.add_device(0, HwInfo::new(HwInfoData::None));
    let error = VtdNesting::serving(adopted, serving).add_device(A, dev).unwrap_err();
    assert!(matches!(error, NestingError::UnknownMap(_)), "{error}");
}

#[test]
fn first_stage_tables_get_their_flags_when_they_are_mirrored() {
    let rig = Rig::new();
    (0..4).for_each(|level| rig.put(0x1000 + (level << 12), 0, 0x2007 + (level << 12)));
    let Stage1::VtdFirstStage(_) = first_stage(0x1000) else { panic!("first-stage tables") };
    rig.configure(A, Policy::Stage1(first_stage(0x1000))).unwrap();
    assert_eq!(rig.host.reaches_copies(DEV_A), [(0, 0x1000, 0x5000, RW)]);
    let word: u64 = rig.memory.read_obj(GuestAddress(0x4000)).unwrap();
    assert_eq!(word, 0x5067);
    rig.ends_clean();
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of emulated devices, from the DMA without a page to the response.

use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;
use twostage::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

use crate::{
    DeviceConfig, DmaAccess, DmaAttributes, DmaError, DmaPort, DmaServices, EmulatedHost,
    EmulatedUnit, MachineError, SmmuV3Unit, SmmuV3UnitConfig, UnitId, VtdUnit, VtdUnitConfig,
};
use twostage::iommufd::{
    iommu_hwpt_arm_smmuv3, iommu_hwpt_vtd_s1, Errno, FaultQueue, FaultSink, HostFault, HostIommu,
    HwInfoData, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId, PageRequest, PageRequestFlags,
    PageRequestGroup, PageRequestPermissions, PageResponseCode, Protection, Readiness, UserMemory,
    ViommuKind,
};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs::Idr0;
use twostage::spec::vtd::regs::Ecap;

const PLAIN: DmaAttributes = DmaAttributes { pasid: None, privileged: false, execute: false };
const FAULT: HwptFlags = HwptFlags::new().with_fault_id_valid(true);
const NONE: HwptData = HwptData::None;
/// The guest's memory: context descriptor, tables, a page.
const MEMORY: u64 = 0x10_0000;
const CONTEXT: u64 = 0x1000;
const TABLES: u64 = 0x2000;
const PAGE: u64 = 0x8000;
const IOVA: u64 = 0x12_3456_7000;
/// How often a device requests one page.
const TRIES: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Architecture {
    Vtd,
    SmmuV3,
}
use Architecture::{SmmuV3, Vtd};

const BOTH: [Architecture; 2] = [Vtd, SmmuV3];

impl Architecture {
    /// A unit with or without page requests.
    fn unit(self, page_requests: bool) -> EmulatedUnit {
        match self {
            Vtd => {
                let config = VtdUnitConfig::default();
                VtdUnit::new(VtdUnitConfig { device_tlb: true, page_requests, ..config }).into()
            }
            SmmuV3 => {
                let config = SmmuV3UnitConfig::default();
                SmmuV3Unit::new(SmmuV3UnitConfig { ats: true, page_requests, ..config }).into()
            }
        }
    }

    /// A table pointer, and a readable and writable page.
    fn entries(self) -> (u64, u64) {
        match self {
            Vtd => (7, 7),
            SmmuV3 => (3, 0xc43),
        }
    }
}

/// Wakes the test when there is something to read.
struct Bell(mpsc::Sender<bool>);

impl Readiness for Bell {
    fn changed(&self, readable: bool) {
        // Nobody listens at the end of a test.
        let _ = self.0.send(readable);
    }
}

/// A bound device with page requests; a guest's memory, identity-mapped in an IOAS; and a fault
/// queue.
struct Rig {
    architecture: Architecture,
    host: Arc<EmulatedHost>,
    unit: UnitId,
    memory: Arc<GuestRegionMmap>,
    dev: ObjectId,
    ioas: ObjectId,
    queue: Arc<dyn FaultQueue>,
    bell: mpsc::Receiver<bool>,
}

fn asking() -> DeviceConfig {
    DeviceConfig { pasid_bits: 8, ats: true, pri: true, ..DeviceConfig::default() }
}

impl Rig {
    fn new(architecture: Architecture) -> Self {
        Self::with(architecture, true, asking())
    }

    fn with(architecture: Architecture, page_requests: bool, device: DeviceConfig) -> Self {
        let host = EmulatedHost::new();
        let unit = host.add_unit(architecture.unit(page_requests));
        host.add_device("edu", unit, Bdf::from_raw(0x20), device).unwrap();
        let memory =
            Arc::new(GuestRegionMmap::from_range(GuestAddress(0), MEMORY as usize, None).unwrap());
        let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let whole = UserMemory::whole(memory.clone());
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        let queue = host.fault_queue_alloc().unwrap();
        let (sender, bell) = mpsc::channel();
        queue.watch(Arc::new(Bell(sender))).unwrap();
        Self { architecture, host, unit, memory, dev, ioas, queue, bell }
    }

    fn hwpt(&self, pt: ObjectId, flags: HwptFlags, data: HwptData) -> ObjectId {
        let fault = flags.fault_id_valid().then(|| self.queue.object());
        self.host.hwpt_alloc(&HwptAlloc { flags, dev: self.dev, pt, data, fault }).unwrap()
    }

    /// The device attached to the IOAS by a HWPT with the fault queue.
    fn paging() -> impl Iterator<Item = Self> {
        BOTH.map(Self::new).into_iter().inspect(|rig| {
            let hwpt = rig.hwpt(rig.ioas, FAULT, NONE);
            rig.host.device_attach(rig.dev, None, hwpt).unwrap();
        })
    }

    /// The device attached to the guest's stage 1, which maps nothing at [`IOVA`].
    fn nested() -> impl Iterator<Item = Self> {
        BOTH.map(Self::new).into_iter().inspect(|rig| {
            let parent = rig.hwpt(rig.ioas, HwptFlags::new().with_nest_parent(true), NONE);
            let (table, _) = rig.architecture.entries();
            for (level, shift) in [39, 30, 21].into_iter().enumerate() {
                let at = TABLES + 0x1000 * level as u64;
                rig.set(at + (IOVA >> shift & 0x1ff) * 8, (at + 0x1000) | table);
            }
            let (pt, data) = match rig.architecture {
                Vtd => {
                    let (pgtbl_addr, addr_width) = (TABLES, 48);
                    let tables = iommu_hwpt_vtd_s1 { pgtbl_addr, addr_width, ..Default::default() };
                    (parent, HwptData::VtdS1(tables))
                }
                SmmuV3 => {
                    rig.set(CONTEXT, 16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45);
                    rig.set(CONTEXT + 8, TABLES);
                    let viommu = rig.host.viommu_alloc(ViommuKind::ArmSmmuV3, rig.dev, parent);
                    let viommu = viommu.unwrap();
                    rig.host.vdevice_alloc(viommu, rig.dev, 0x55).unwrap();
                    let ste = [1 | 5 << 1 | CONTEXT, 0];
                    (viommu, HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste }))
                }
            };
            let nested = rig.hwpt(pt, FAULT, data);
            rig.host.device_attach(rig.dev, None, nested).unwrap();
        })
    }

    fn set(&self, gpa: u64, word: u64) {
        self.memory.write_obj(word, MemoryRegionAddress(gpa)).unwrap();
    }

    fn get(&self, gpa: u64) -> u64 {
        self.memory.read_obj(MemoryRegionAddress(gpa)).unwrap()
    }

    /// Makes the guest's tables map `iova`, next to [`IOVA`], to `page`.
    fn lead(&self, iova: u64, page: u64) {
        let (_, leaf) = self.architecture.entries();
        self.set(TABLES + 0x3000 + (iova >> 12 & 0x1ff) * 8, page | leaf);
    }

    fn port(&self) -> DmaPort {
        self.host.dma_port("edu").unwrap()
    }

    /// Waits for the next group of page requests.
    #[track_caller]
    fn asked(&self) -> PageRequestGroup {
        loop {
            if let Some(group) = self.queue.next_group().unwrap() {
                return group;
            }
            self.bell.recv_timeout(Duration::from_secs(60)).expect("the device asks for a page");
        }
    }

    fn answer(&self, code: PageResponseCode) {
        self.queue.respond(self.asked().cookie, code).unwrap();
    }

    /// The result of a DMA write to `iova` whose requests `serve` answers.
    fn write(&self, iova: u64, bytes: &[u8], serve: impl FnOnce(&Self)) -> Result<(), DmaError> {
        let mut port = self.port();
        thread::scope(|scope| {
            let dma = scope.spawn(move || port.write(PLAIN, iova, bytes));
            serve(self);
            dma.join().unwrap()
        })
    }
}

fn refused(address: u64, response: PageResponseCode) -> Result<(), DmaError> {
    Err(DmaError::PageRefused { address, response })
}

#[test]
fn a_dma_waits_for_a_page_of_the_guests_tables() {
    for rig in Rig::nested() {
        rig.lead(IOVA, PAGE);
        // The first page is present, the second is not.
        let bytes: Vec<u8> = (0..16).collect();
        let outcome = rig.write(IOVA + 0xff8, &bytes, |rig| {
            let group = rig.asked();
            let request = PageRequest {
                flags: PageRequestFlags::new().with_last_page(true),
                pasid: 0,
                group: 0,
                permissions: PageRequestPermissions::new().with_write(true),
                address: IOVA + 0x1000,
            };
            assert_eq!((group.dev, group.requests), (rig.dev, vec![request]));
            rig.lead(IOVA + 0x1000, PAGE + 0x2000);
            rig.queue.respond(group.cookie, PageResponseCode::Success).unwrap();
        });
        assert_eq!(outcome, Ok(()), "{:?}", rig.architecture);
        let found = [rig.get(PAGE + 0xff8), rig.get(PAGE + 0x2000)];
        assert_eq!(
            found,
            [0, 8].map(|at| u64::from_le_bytes(bytes[at..][..8].try_into().unwrap()))
        );
        assert_eq!(rig.queue.next_group().unwrap(), None);
    }
}

#[test]
fn a_dma_waits_for_a_page_of_the_ioas() {
    for rig in Rig::paging() {
        let outcome = rig.write(0x80_0000, b"paged in", |rig| {
            let group = rig.asked();
            assert_eq!(group.requests[0].address, 0x80_0000);
            let target = MapTarget::Fixed(0x80_0000);
            rig.host
                .ioas_copy(rig.ioas, target, rig.ioas, 0, MEMORY, Protection::READ_WRITE)
                .unwrap();
            rig.queue.respond(group.cookie, PageResponseCode::Success).unwrap();
        });
        assert_eq!((outcome, rig.get(0)), (Ok(()), u64::from_le_bytes(*b"paged in")));
    }
}

#[test]
fn a_page_that_does_not_allow_the_access_is_asked_for() {
    for rig in Rig::nested() {
        let read_only = match rig.architecture {
            Vtd => 5,
            SmmuV3 => 0xc43 | 1 << 7,
        };
        rig.set(TABLES + 0x3000 + (IOVA >> 12 & 0x1ff) * 8, PAGE | read_only);
        let mut bytes = [0; 8];
        rig.port().read(PLAIN, IOVA, &mut bytes).unwrap();
        let outcome = rig.write(IOVA, &[1], |rig| {
            let group = rig.asked();
            rig.lead(IOVA, PAGE);
            rig.queue.respond(group.cookie, PageResponseCode::Success).unwrap();
        });
        // The cached old entry does not allow it either, which must not fail the DMA.
        assert_eq!((outcome, rig.get(PAGE)), (Ok(()), 1));
    }
}

#[test]
fn requests_of_a_pasid_say_so() {
    let rig = Rig::new(Vtd);
    let hwpt = rig.hwpt(rig.ioas, FAULT.with_pasid(true), NONE);
    rig.host.device_attach(rig.dev, Some(5), hwpt).unwrap();
    let attributes = DmaAttributes { pasid: Some(5), ..PLAIN };
    let error = rig.port().translate(attributes, MEMORY + 0x123, 1, DmaAccess::Read).unwrap_err();
    assert_eq!(error, DmaError::PageRequested { address: MEMORY + 0x123, group: 0 });
    let request = rig.asked().requests[0];
    assert!(request.flags.pasid_valid() && request.permissions.read());
    assert_eq!((request.pasid, request.address), (5, MEMORY));
}

#[test]
fn nobody_needs_to_wait_for_an_answer() {
    for rig in Rig::paging() {
        let mut port = rig.port();
        let mut ask = || port.translate(PLAIN, MEMORY, 1, DmaAccess::Read).map(|_| ()).unwrap_err();
        assert_eq!(ask(), DmaError::PageRequested { address: MEMORY, group: 0 });
        assert_eq!(ask(), DmaError::PageRequested { address: MEMORY, group: 1 });
        assert_eq!(rig.port().page_response(0), None);
        let groups = [rig.asked(), rig.asked()];
        assert_eq!([0, 1].map(|index| groups[index].requests[0].group), [0, 1]);
        rig.queue.respond(groups[1].cookie, PageResponseCode::Success).unwrap();
        let port = rig.port();
        assert_eq!(port.page_response(0), None);
        assert_eq!(port.page_response(1), Some(PageResponseCode::Success));
        assert_eq!(port.page_response(1), Some(PageResponseCode::Invalid), "taken already");
        rig.queue.respond(groups[0].cookie, PageResponseCode::Invalid).unwrap();
        assert_eq!(port.wait_for_page(0), PageResponseCode::Invalid);
    }
}

#[test]
fn what_software_has_not_enabled_is_not_asked_for_and_a_reset_ends_a_wait() {
    for rig in Rig::paging() {
        let mut port = rig.port();
        let off = DmaServices { page_requests: false, ..DmaServices::default() };
        port.set_services(off);
        assert!(matches!(port.write(PLAIN, MEMORY, &[1]), Err(DmaError::Fault { .. })));
        assert_eq!(rig.queue.next_group().unwrap(), None);
        port.set_services(DmaServices { wait_for_pages: false, ..DmaServices::default() });
        let error = port.clone().write(PLAIN, MEMORY, &[1]);
        assert_eq!(error, Err(DmaError::PageRequested { address: MEMORY, group: 0 }));
        let device = port.control();
        assert_eq!(device.outstanding_page_requests(), 1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| device.wait_for_page(0));
            device.reset_page_requests();
            assert_eq!(waiting.join().unwrap(), PageResponseCode::Invalid);
        });
        assert_eq!(device.outstanding_page_requests(), 0);
        // A response that comes later is for nobody.
        rig.answer(PageResponseCode::Success);
        assert_eq!(device.outstanding_page_requests(), 0);
    }
}

#[test]
fn a_device_asks_for_a_page_a_bounded_number_of_times() {
    for rig in Rig::paging() {
        let outcome = rig.write(MEMORY, &[1], |rig| rig.answer(PageResponseCode::Invalid));
        assert_eq!(outcome, refused(MEMORY, PageResponseCode::Invalid));
        let outcome = rig.write(MEMORY, &[1], |rig| {
            (0..TRIES).for_each(|_| rig.answer(PageResponseCode::Success));
        });
        assert_eq!(outcome, refused(MEMORY, PageResponseCode::Success));
        assert_eq!(rig.queue.next_group().unwrap(), None);
    }
}

#[test]
fn what_ends_an_attachment_ends_the_wait() {
    type End = fn(&Rig);
    let ends: [End; 3] = [
        |rig| rig.host.device_detach(rig.dev, None).unwrap(),
        |rig| {
            rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
        },
        |rig| rig.host.device_unbind(rig.dev).unwrap(),
    ];
    for end in ends {
        for read in [false, true] {
            for rig in Rig::paging() {
                let outcome = rig.write(MEMORY, &[1], |rig| {
                    let group = match read {
                        true => Some(rig.asked()),
                        // Until there is something to read.
                        false => {
                            let minute = Duration::from_secs(60);
                            while !rig.bell.recv_timeout(minute).expect("a page request") {}
                            None
                        }
                    };
                    end(rig);
                    if let Some(group) = group {
                        let late = rig.queue.respond(group.cookie, PageResponseCode::Success);
                        assert_eq!(late.unwrap_err().errno, Errno::EINVAL);
                    }
                });
                assert_eq!(outcome, refused(MEMORY, PageResponseCode::Invalid));
                assert_eq!(rig.queue.next_group().unwrap(), None);
            }
        }
    }
}

#[test]
fn unbinding_ends_the_wait_while_the_rest_of_the_group_stays_attached() {
    for architecture in BOTH {
        let grouped = DeviceConfig { group: Some(1), ..asking() };
        let mut rig = Rig::with(architecture, true, grouped.clone());
        // No device can join a group that is in use.
        rig.host.device_unbind(rig.dev).unwrap();
        rig.host.add_device("mate", rig.unit, Bdf::from_raw(0x28), grouped).unwrap();
        rig.dev = rig.host.device_bind("edu").unwrap();
        let mate = rig.host.device_bind("mate").unwrap();
        let hwpt = rig.hwpt(rig.ioas, FAULT, NONE);
        for dev in [rig.dev, mate] {
            rig.host.device_attach(dev, None, hwpt).unwrap();
        }
        let (mut port, (sender, ended)) = (rig.port(), mpsc::channel());
        thread::spawn(move || sender.send(port.write(PLAIN, MEMORY, &[1])));
        rig.asked();
        rig.host.device_unbind(rig.dev).unwrap();
        let outcome = ended.recv_timeout(Duration::from_secs(60)).expect("the wait ends");
        assert_eq!(outcome, refused(MEMORY, PageResponseCode::Invalid), "{architecture:?}");
    }
}

#[test]
fn closing_the_iommufd_ends_the_wait() {
    for rig in Rig::paging() {
        let mut port = rig.port();
        let dma = thread::spawn(move || port.write(PLAIN, MEMORY, &[1]));
        rig.asked();
        drop(rig);
        assert_eq!(dma.join().unwrap(), refused(MEMORY, PageResponseCode::Invalid));
    }
}

#[derive(Default)]
struct Seen(Mutex<Vec<HostFault>>);

impl FaultSink for Seen {
    fn dma_fault(&self, fault: &HostFault) {
        self.0.lock().push(*fault);
    }
}

#[test]
fn what_nobody_serves_is_a_fault() {
    for rig in BOTH.map(Rig::new) {
        let seen = Arc::new(Seen::default());
        let sink = Arc::downgrade(&seen);
        rig.host.set_fault_sink(rig.dev, sink).unwrap();
        rig.host.device_attach(rig.dev, None, rig.ioas).unwrap();
        let error = rig.port().write(PLAIN, MEMORY, &[1]).unwrap_err();
        assert!(matches!(error, DmaError::Fault { address: MEMORY, .. }), "{error}");
        assert_eq!(seen.0.lock().len(), 1);
        // There is either a page request or a fault, never both.
        let hwpt = rig.hwpt(rig.ioas, FAULT, NONE);
        rig.host.device_attach(rig.dev, None, hwpt).unwrap();
        let mut port = rig.port();
        for _ in 0..512 {
            let error = port.translate(PLAIN, MEMORY, 1, DmaAccess::Write).unwrap_err();
            assert!(matches!(error, DmaError::PageRequested { address: MEMORY, .. }), "{error}");
        }
        assert_eq!(seen.0.lock().len(), 1);
        let error = port.write(PLAIN, MEMORY, &[1]).unwrap_err();
        assert!(matches!(error, DmaError::Fault { .. }), "no group is left: {error}");
        assert_eq!(seen.0.lock().len(), 2);
    }
}

#[test]
fn what_no_page_mends_is_a_fault() {
    let rig = Rig::nested().find(|rig| rig.architecture == Vtd).unwrap();
    let not_canonical = 1 << 60;
    let error = rig.port().write(PLAIN, not_canonical, &[1]).unwrap_err();
    assert!(matches!(error, DmaError::Fault { .. }), "{error}");
    let rig = Rig::nested().find(|rig| rig.architecture == SmmuV3).unwrap();
    rig.set(CONTEXT, 0);
    let error = rig.port().write(PLAIN, IOVA, &[1]).unwrap_err();
    assert!(matches!(error, DmaError::Fault { .. }), "{error}");
}

#[test]
fn page_requests_take_a_device_and_an_iommu_that_have_them() {
    let silent = DeviceConfig { pri: false, ..asking() };
    for architecture in BOTH {
        for (page_requests, device) in [(true, silent.clone()), (false, asking())] {
            let rig = Rig::with(architecture, page_requests, device);
            let hwpt = rig.hwpt(rig.ioas, FAULT, NONE);
            let attached = rig.host.device_attach(rig.dev, None, hwpt);
            match architecture {
                Vtd => assert_eq!(attached.unwrap_err().errno, Errno::ENODEV),
                SmmuV3 => assert_eq!(attached.map_err(|error| error.errno), Ok(hwpt)),
            }
            let error = rig.port().write(PLAIN, MEMORY, &[1]).unwrap_err();
            assert!(matches!(error, DmaError::Fault { .. }), "{error}");
        }
        let said = |page_requests| {
            let rig = Rig::with(architecture, page_requests, asking());
            match rig.host.get_hw_info(rig.dev).unwrap().data {
                HwInfoData::Vtd(info) => {
                    let ecap = Ecap::from_bits(info.ecap_reg);
                    assert_eq!(ecap.prs(), ecap.pds());
                    ecap.prs()
                }
                HwInfoData::ArmSmmuV3(info) => Idr0::from_bits(info.idr[0]).pri(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!([false, true].map(said), [false, true]);
    }
    let host = EmulatedHost::new();
    let unit = host.add_unit(Vtd.unit(true));
    let without_ats = DeviceConfig { ats: false, ..asking() };
    let added = host.add_device("edu", unit, Bdf::from_raw(0x20), without_ats);
    assert_eq!(added, Err(MachineError::PriWithoutAts));
}

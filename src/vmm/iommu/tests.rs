// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Virtual IOMMUs on the emulated host, without a guest.

use super::*;
use crate::bus::BusDevice;
use crate::config::{testing, SmmuV3Options, VtdOptions, DEV_IOMMU};
use crate::report::ModelReport;
use twostage::nesting::smmuv3::SmmuObjects;
use twostage::nesting::survey::{survey, Offer};
use twostage::spec::pci::Pasid;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use twostage::spec::smmuv3::StreamId;
use twostage::sync::Mutex;
use twostage::viommu::MsiMessage;
use twostage_emulated::kit::smmuv3::{Completion, Driver};
use twostage_emulated::kit::{Mmio, Pages};
use twostage_emulated::{
    DeviceConfig, EmulatedHost, EmulatedUnit, ObjectKind, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit,
    VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress};

struct NoInterrupts;

impl InterruptSink for NoInterrupts {
    fn send_msi(&self, _: u64, _: u32) {}
}

fn no_interrupts(_: Bdf) -> Arc<dyn InterruptSink> {
    Arc::new(NoInterrupts)
}

pub(super) const FUNCTION: AssignedFunction = AssignedFunction {
    bdf: Bdf::from_raw(8),
    pasid: true,
    pri: false,
    stall: false,
    iommu: 0,
    vfio: None,
};
const OTHER: AssignedFunction = AssignedFunction {
    bdf: Bdf::from_raw(16),
    pasid: true,
    pri: false,
    stall: false,
    iommu: 1,
    vfio: None,
};

fn iommus(
    configs: &[IommuConfig],
    functions: &[AssignedFunction],
    memory: &MachineMemory,
) -> Result<Iommus> {
    iommus_with(configs, functions, memory, &no_interrupts)
}

/// The same, with a sink for messages.
pub(super) fn iommus_with(
    configs: &[IommuConfig],
    functions: &[AssignedFunction],
    memory: &MachineMemory,
    messages: &dyn Fn(Bdf) -> Arc<dyn InterruptSink>,
) -> Result<Iommus> {
    let config = MachineConfig { iommus: configs.to_vec(), ..testing::machine() };
    Iommus::new(&config, false, memory, None, functions, messages, None).map(Option::unwrap)
}

/// A single one, in front of one function.
fn one(config: IommuConfig, memory: &MachineMemory) -> Iommus {
    iommus(&[config], &[FUNCTION], memory).unwrap()
}

/// Enables translation, with an empty root table at 0, in scalable mode (RTADDR.TTM 01b).
fn enable(iommu: &Iommu) {
    let write = |offset, value: u32| iommu.model.registers().write(offset, &value.to_le_bytes());
    write(0x20, 1 << 10);
    // SRTP, then TE.
    write(0x18, 1 << 30);
    write(0x18, 1 << 31);
}

/// The number of faults each has recorded.
fn faults(iommus: &Iommus) -> Vec<u64> {
    let faults = |report: IommuReport| match report.of {
        ModelReport::Vtd(of) => of.viommu.faults_recorded,
        ModelReport::SmmuV3(of) => panic!("{of:?}"),
    };
    iommus.reports().into_iter().map(faults).collect()
}

#[test]
fn an_smmu_passes_until_translation_is_enabled_and_aborts_then() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let start = memory.start_of(&memory.regions()[0]);
    let iommus = one(SmmuV3Options::default().into(), &memory);
    let iommu = &iommus.all()[0];
    assert_eq!(iommu.id, "smmu0");
    let mut dma = iommu.dma_master(FUNCTION.bdf, Arc::new(NoInterrupts)).unwrap();
    dma.write(None, start + 0x4000, b"passes").unwrap();
    let write = |offset, value: u32| iommu.model.registers().write(offset, &value.to_le_bytes());
    // CR0.SMMUEN, with a stream table of one invalid entry.
    write(0x20, 1);
    dma.write(None, start + 0x4000, b"aborts").unwrap_err();
    write(0x20, 0);
    dma.write(None, start + 0x4000, b"passes").unwrap();
    let ModelReport::SmmuV3(report) = iommus.reports().remove(0).of else { panic!() };
    assert_eq!(report.nesting.nested_allocs, 1);
    let attached = |objects: &SmmuObjects| objects.devices[0].attached;
    assert_ne!(attached(&report.objects), attached(&report.objects_in_use.unwrap()));
    let left = iommus.close().unwrap();
    assert_eq!(left, ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
}

#[test]
fn a_machine_has_iommus_of_one_model() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let configs = [IommuConfig::default(), SmmuV3Options::default().into()];
    let error = iommus(&configs, &[], &memory).unwrap_err();
    assert!(error.to_string().contains("one model"), "{error}");
}

#[test]
fn a_machine_without_has_none() {
    let (config, memory) = (testing::machine(), MachineMemory::new(1 << 20).unwrap());
    let none = Iommus::new(&config, false, &memory, None, &[], &no_interrupts, None);
    assert!(none.unwrap().is_none());
}

#[test]
fn a_function_passes_until_translation_is_enabled_and_is_blocked_then() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let iommus = one(IommuConfig::default(), &memory);
    let iommu = &iommus.all()[0];
    let mut dma = iommu.dma_master(FUNCTION.bdf, Arc::new(NoInterrupts)).unwrap();
    dma.write(None, 0x4000, b"passes").unwrap();
    let mut bytes = [0; 6];
    memory.map().read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
    assert_eq!(&bytes, b"passes");
    assert!(dma.write(None, 1 << 20, b"no memory").is_err());
    assert!(dma.write(Pasid::new(1), 0x4000, b"no PASIDs yet").is_err());

    enable(iommu);
    assert!(dma.read(None, 0x4000, &mut bytes).is_err());
    assert_eq!(faults(&iommus)[0], 1);
    // When it was blocked, and not before.
    assert_eq!(iommus.host_report().calls["DEVICE_DETACH"].calls, 1);
}

#[test]
fn each_has_its_own_functions_over_the_same_memory() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let configs = [IommuConfig::default(), IommuConfig::default()];
    let iommus = iommus(&configs, &[FUNCTION, OTHER], &memory).unwrap();
    let [first, second] = iommus.all() else { panic!("{iommus:?}") };
    assert_eq!((&*first.id, &*second.id), ("vtd0", "vtd1"));
    enable(second);
    first
        .dma_master(FUNCTION.bdf, Arc::new(NoInterrupts))
        .unwrap()
        .write(None, 0x4000, b"passes")
        .unwrap();
    second
        .dma_master(OTHER.bdf, Arc::new(NoInterrupts))
        .unwrap()
        .write(None, 0x4000, b"blocked")
        .unwrap_err();
    // Neither unit knows the function of the other.
    first
        .dma_master(OTHER.bdf, Arc::new(NoInterrupts))
        .unwrap()
        .write(None, 0x4000, b"unknown")
        .unwrap_err();
    let faults: Vec<_> = faults(&iommus);
    assert_eq!(faults, [0, 1]);
    let graph = iommus.host_report().graph.unwrap();
    let count = |kind| graph.of_kind(kind).count();
    assert_eq!((count(ObjectKind::Ioas), count(ObjectKind::HwptPaging)), (1, 2));
    assert_eq!(graph.pinned_bytes, 1 << 20);
}

#[test]
fn nothing_is_left_on_the_host() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let configs = [IommuConfig::default(), IommuConfig::default()];
    let iommus = iommus(&configs, &[FUNCTION, OTHER], &memory).unwrap();
    let host = iommus.host.emulated.clone().unwrap();
    assert_eq!(host.pinned_bytes(), 1 << 20);
    assert_eq!(iommus.close(), Some(ObjectGraph { objects: Vec::new(), pinned_bytes: 0 }));
    assert_eq!((host.live_objects(), host.pinned_bytes()), (0, 0));
}

#[test]
fn what_is_left_on_the_host_is_told() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let iommus = one(IommuConfig::default(), &memory);
    let forgotten = iommus.host.verbs.ioas_alloc().unwrap();
    let left = iommus.close().unwrap();
    assert_eq!(left.objects.iter().map(|object| object.id).collect::<Vec<_>>(), [forgotten]);
}

#[test]
fn the_report_has_the_objects_from_before_translation_was_switched_off() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let iommus = one(IommuConfig::default(), &memory);
    let iommu = &iommus.all()[0];
    let disable = || iommu.model.registers().write(0x18, &0u32.to_le_bytes());
    disable();
    assert_eq!(iommus.host_report().in_use, None, "it was not on");
    enable(iommu);
    let blocked = iommus.host_report().graph;
    disable();
    let report = iommus.host_report();
    assert_eq!(report.in_use, blocked);
    let at_start = report.at_start.unwrap().objects;
    assert_eq!(report.graph.unwrap().objects, at_start);
    assert_ne!(report.in_use.unwrap().objects, at_start, "the function is blocked");
}

#[test]
fn the_emulated_host_serves_what_is_asked_for() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let config = |asked: bool| {
        let (address_width, pasid_bits) = if asked { (57, 20) } else { (48, 6) };
        let (ats, second_stage, nest) = (asked, asked, asked);
        let (pasid_bits, second_stage) = (Some(pasid_bits), Some(second_stage));
        VtdOptions { address_width, pasid_bits, ats, second_stage, nest, ..VtdOptions::default() }
    };
    let check = |iommu: &Iommu, asked: bool| {
        let (offered, config) = (iommu.model.vtd_capabilities().unwrap(), config(asked));
        assert_eq!(offered.cap.mgaw() + 1, config.address_width);
        assert_eq!(Some(offered.ecap.pasid_bits()), config.pasid_bits);
        let ecap = offered.ecap;
        let both = [ecap.dt(), ecap.ssts(), ecap.nest(), ecap.ssads()];
        assert_eq!(both, [asked; 4]);
    };
    for asked in [false, true] {
        check(&one(config(asked).into(), &memory).all()[0], asked);
    }
    // Both in one machine, too.
    let both =
        iommus(&[config(false).into(), config(true).into()], &[FUNCTION, OTHER], &memory).unwrap();
    check(&both.all()[0], false);
    check(&both.all()[1], true);
}

/// Compares `twostage info`'s capabilities with the registers of a machine that asks for them.
#[test]
fn a_machine_has_the_registers_of_the_offer() {
    let host = EmulatedHost::new();
    let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
    let device = DeviceConfig::default().with_pasid_bits(20);
    host.add_device("edu", unit, FUNCTION.bdf, device).unwrap();
    let offer = Offer::new(&survey(&*host, &["edu".to_owned()]).unwrap()).unwrap();
    let json = serde_json::to_value(&offer).unwrap();
    assert_eq!(json["registers"]["CAP"], format!("{:#x}", offer.registers["CAP"]));

    let memory = MachineMemory::new(1 << 20).unwrap();
    let asked = VtdOptions {
        pasid_bits: Some(offer.pasid_bits),
        second_stage: Some(false),
        ..VtdOptions::default()
    };
    let config = MachineConfig { iommus: vec![asked.into()], ..testing::machine() };
    let iommus = Iommus::new(&config, true, &memory, None, &[FUNCTION], &no_interrupts, None);
    let iommus = iommus.unwrap().unwrap();
    let ModelReport::Vtd(report) = iommus.all()[0].report().of else { panic!("a VT-d") };
    assert_eq!(report.registers, offer.registers);
    // One call of each for the single device.
    let calls = iommus.host_report().calls;
    let of = |verb| calls.get(verb).map_or(0, |report| report.calls);
    assert_eq!(["GET_HW_INFO", "DEVICE_ATTACH", "DEVICE_DETACH"].map(of), [1, 1, 0]);
}

/// What stands in for the kernel's host, with the physical device [`PHYSICAL`] behind `unit`.
fn kernel(memory: &MachineMemory, unit: impl Into<EmulatedUnit>) -> (Host, Arc<EmulatedHost>) {
    kernel_with(memory, unit, DeviceConfig::default())
}

/// The same, with a device of this kind.
fn kernel_with(
    memory: &MachineMemory,
    unit: impl Into<EmulatedUnit>,
    device: DeviceConfig,
) -> (Host, Arc<EmulatedHost>) {
    let mut host = Host::emulated(memory, None).unwrap();
    let process = host.emulated.take().unwrap();
    let unit = process.add_unit(unit);
    process.add_device("/physical", unit, PHYSICAL, device).unwrap();
    (host, process)
}

const PHYSICAL: Bdf = Bdf::from_raw(24);

/// A virtual IOMMU in front of [`FUNCTION`], which is emulated, and of [`PHYSICAL`].
fn mixed(model: IommuModel, memory: &MachineMemory, kernel: &Host) -> Iommus {
    let config =
        IommuConfig { host: HostChoice::Kernel(DEV_IOMMU.into()), model, ..IommuConfig::default() };
    let config = MachineConfig { iommus: vec![config], ..testing::machine() };
    let path = Some(PathBuf::from("/physical"));
    let functions = [
        FUNCTION,
        AssignedFunction {
            bdf: PHYSICAL,
            pasid: false,
            pri: false,
            stall: false,
            iommu: 0,
            vfio: path,
        },
    ];
    let iommus =
        Iommus::new(&config, false, memory, Some(kernel), &functions, &no_interrupts, None);
    iommus.unwrap().unwrap()
}

#[test]
fn an_emulated_function_beside_a_physical_one_has_a_host_of_its_own() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let unit = VtdUnit::new(VtdUnitConfig::default());
    let (host, process) = kernel(&memory, unit.clone());
    let options = VtdOptions { second_stage: Some(false), ..VtdOptions::default() };
    let iommus = mixed(IommuModel::Vtd(options), &memory, &host);
    let iommu = &iommus.all()[0];
    let mut physical = unit.port(PHYSICAL.raw());
    let mut emulated = iommu.dma_master(FUNCTION.bdf, Arc::new(NoInterrupts)).unwrap();
    DmaMaster::write(&mut physical, None, 0x4000, b"passes").unwrap();
    emulated.write(None, 0x5000, b"passes").unwrap();
    enable(iommu);
    DmaMaster::write(&mut physical, None, 0x4000, b"blocked").unwrap_err();
    emulated.write(None, 0x5000, b"blocked").unwrap_err();
    let ModelReport::Vtd(of) = iommu.report().of else { panic!("a VT-d") };
    assert_eq!(
        (of.nesting.replaces, of.nesting_beside.map(|beside| beside.replaces)),
        (0, Some(0))
    );
    // One device and one IOAS on each.
    let [own, beside] = [iommus.host_report(), iommus.beside_report().unwrap()];
    for report in [&own, &beside] {
        let of = |verb: &str| report.calls[verb].calls;
        assert_eq!(["DEVICE_BIND", "IOAS_MAP", "DEVICE_DETACH"].map(of), [1, 1, 1]);
    }
    assert!(own.at_start.is_none() && beside.at_start.is_some());
    let bound: Vec<_> = iommu.devices.iter().map(|device| device.host.emulated.is_some()).collect();
    assert_eq!(bound, [true, false]);
    let left = iommus.close().unwrap();
    assert_eq!(left, ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
    drop(host);
    assert_eq!((process.live_objects(), process.pinned_bytes()), (0, 0));
}

#[test]
fn only_an_emulated_function_needs_an_emulated_host() {
    let memory = MachineMemory::new(1 << 20).unwrap();
    let (host, _process) = kernel(&memory, VtdUnit::new(VtdUnitConfig::default()));
    let options = VtdOptions { second_stage: Some(false), ..VtdOptions::default() };
    let config = IommuConfig { host: HostChoice::Kernel(DEV_IOMMU.into()), ..options.into() };
    let config = MachineConfig { iommus: vec![config], ..testing::machine() };
    let with = |functions: &[AssignedFunction]| {
        let iommus =
            Iommus::new(&config, false, &memory, Some(&host), functions, &no_interrupts, None);
        let iommus = iommus.unwrap().unwrap();
        let served = iommus.all()[0].dma_port(FUNCTION.bdf).map(drop);
        (iommus.beside_report().is_some(), served)
    };
    let (beside, refused) = with(&[]);
    assert!(!beside && refused.unwrap_err().to_string().contains("no emulated device behind vtd0"));
    let (beside, served) = with(&[FUNCTION]);
    assert!(beside && served.is_ok());
}

#[test]
fn messages_of_either_kind_go_their_own_way() {
    struct Arrived(Mutex<Vec<u32>>);
    impl InterruptSink for Arrived {
        fn send_msi(&self, _: u64, data: u32) {
            self.0.lock().push(data);
        }
    }
    let memory = MachineMemory::new(1 << 20).unwrap();
    let (host, process) = kernel(&memory, SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    let iommus = mixed(IommuModel::SmmuV3(SmmuV3Options::default()), &memory, &host);
    let iommu = &iommus.all()[0];
    let remapper = iommu.model.interrupt_remapper().unwrap().upgrade().unwrap();
    let arrived = Arrived(Mutex::default());
    let message = |data| MsiMessage { address: messages::DOORBELL, data };
    assert!(remapper.send_remapped(PHYSICAL, message(1), &arrived));
    assert!(remapper.send_remapped(FUNCTION.bdf, message(2), &arrived));
    // CR0.SMMUEN, with a stream table of one invalid entry: what is translated here is blocked.
    iommu.model.registers().write(0x20, &1u32.to_le_bytes());
    assert!(remapper.send_remapped(PHYSICAL, message(3), &arrived));
    assert!(!remapper.send_remapped(FUNCTION.bdf, message(4), &arrived));
    assert_eq!(*arrived.0.lock(), [1, 2, 3]);
    assert!(remapper.translate(PHYSICAL, message(5)).is_some());
    assert_eq!(remapper.translate(FUNCTION.bdf, message(5)), None);
    drop(remapper);
    assert!(iommus.close().unwrap().objects.is_empty());
    drop(host);
    assert_eq!(process.live_objects(), 0);
}

/// Registers, for a guest's driver.
struct Registers(Arc<dyn BusDevice>);

impl Mmio for Registers {
    fn read(&self, offset: u64, bytes: &mut [u8]) {
        self.0.read(offset, bytes);
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.0.write(offset, bytes);
    }
}

/// By what the guest writes, as behind an SMMU the host has its table of context descriptors.
#[test]
fn substreams_of_an_assigned_function_are_attached_replaced_and_detached() {
    const IOVA: u64 = 0x12_3456_7000;
    let memory = MachineMemory::new(4 << 20).unwrap();
    let unit = SmmuV3Unit::new(SmmuV3UnitConfig::default());
    let device = DeviceConfig::default().with_pasid_bits(5);
    let (host, process) = kernel_with(&memory, unit.clone(), device);
    let iommus = mixed(IommuModel::SmmuV3(SmmuV3Options::default()), &memory, &host);
    let iommu = &iommus.all()[0];
    // The device's, of which there are fewer than of the SMMU.
    let offered = iommu.services(PHYSICAL).0.pasid.map(|pasid| pasid.max_width());
    assert_eq!(offered, Some(5));

    let start = memory.start_of(&memory.regions()[0]);
    let pages = Pages::new(Arc::new(memory.map().clone()), start + (1 << 20));
    let guest = Driver::new(pages, Registers(iommu.model.registers()));
    let stream = StreamId::from(PHYSICAL);
    let contexts = guest.page();
    let ste = Ste0::new().with_v(true).with_config(StreamConfig::Stage1.into_bits());
    let ste = ste.with_s1contextptr(contexts >> 6).with_s1cdmax(5);
    let attributes = Ste1::new().with_s1dss(2).with_shcfg(1);
    guest.set_raw_entry(stream, [ste.into_bits(), attributes.into_bits()]);
    guest.enable();
    let tables = [*b"one.....", *b"two....."].map(|bytes| {
        let (table, page) = (guest.page(), guest.page());
        guest.store(page, u64::from_le_bytes(bytes));
        guest.map(table, IOVA, page, 3, true);
        table
    });
    let pasid = |number| Pasid::new(number).unwrap();
    let put = |substream, table: Option<u64>| {
        let at = contexts + u64::from(substream) * 64;
        match table {
            Some(table) => guest.write_context(at, table, substream as u16),
            None => guest.store(at, 0),
        }
        let substream = pasid(substream);
        let asid = substream.raw() as u16;
        let commands = [
            Command::CfgiCd { stream, substream, leaf: true },
            Command::TlbiNhAsid { vmid: 0, asid },
        ];
        assert_eq!(guest.submit(&commands), Completion::Done);
    };
    let mut physical = unit.port(PHYSICAL.raw());
    let mut read = || {
        [3, 4].map(|number| {
            let mut bytes = [0; 8];
            let read = DmaMaster::read(&mut physical, Some(pasid(number)), IOVA, &mut bytes);
            read.ok().map(|()| bytes)
        })
    };
    let [one, two] = [*b"one.....", *b"two....."];
    assert_eq!(read(), [None, None]);
    put(3, Some(tables[0]));
    assert_eq!(read(), [Some(one), None]);
    put(4, Some(tables[1]));
    assert_eq!(read(), [Some(one), Some(two)]);
    put(3, Some(tables[1]));
    assert_eq!(read(), [Some(two), Some(two)]);
    put(4, None);
    assert_eq!(read(), [Some(two), None]);
    assert!(iommus.close().unwrap().objects.is_empty());
    drop(host);
    assert_eq!(process.live_objects(), 0);
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Mistakes of wiring, and nesting by the host's verbs without a virtual IOMMU.

use std::sync::Arc;

use twostage::iommufd::{
    iommu_hwpt_arm_smmuv3, iommu_viommu_arm_smmuv3_invalidate, HostIommu, HwptAlloc, HwptData,
    HwptFlags, InvalidateData, MapTarget, Protection, UserMemory, ViommuKind,
};
use twostage::nesting::vtd::VtdNesting;
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::stream_table::{Ste0, Ste1, StreamConfig};
use twostage::unit::VtdBuilder;
use twostage::viommu::vtd::{VtdConfig, VtdIommu};
use twostage::viommu::{InterruptSink, IntersectError};
use twostage_emulated::kit::smmuv3::Driver;
use twostage_emulated::kit::{Mmio, Pages};
use twostage_emulated::{
    DeviceConfig, DmaAttributes, EmulatedHost, EmulatedUnit, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit,
    VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

type Outcome = Result<(), Box<dyn std::error::Error>>;

struct Nowhere;

impl InterruptSink for Nowhere {
    fn send_msi(&self, _address: u64, _data: u32) {}
}

/// For a driver whose tables are used, and nothing else.
struct NoRegisters;

impl Mmio for NoRegisters {
    fn read(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write(&self, _offset: u64, _bytes: &[u8]) {}
}

fn slot(device: u8) -> Bdf {
    Bdf::new(0, device, 0).unwrap()
}

fn host(unit: impl Into<EmulatedUnit>) -> Arc<EmulatedHost> {
    let host = EmulatedHost::new();
    let unit = host.add_unit(unit);
    host.add_device("nic", unit, slot(4), DeviceConfig::default()).unwrap();
    host
}

/// What `build` says on `host`, which it leaves as it was.
fn said(host: &Arc<EmulatedHost>, wire: impl FnOnce(VtdBuilder) -> VtdBuilder) -> String {
    let region =
        Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None).unwrap());
    let memory = GuestMemoryMmap::from_arc_regions(vec![region]).unwrap();
    let before = host.live_objects();
    let ioas = GuestIoas::new(host.clone()).unwrap();
    let builder = VtdBuilder::new(ioas, Arc::new(memory), Arc::new(Nowhere));
    let error = wire(builder).build().unwrap_err().to_string();
    assert_eq!(host.live_objects(), before, "{error}");
    error
}

/// Each mistake is an error, which names the device and what is wrong.
#[test]
fn mistakes_are_named() {
    let vtd = host(VtdUnit::new(VtdUnitConfig::default()));
    let nic = vtd.device_bind("nic").unwrap();
    let flat = host(VtdUnit::new(VtdUnitConfig::default().with_nesting(false)));
    let flat_nic = flat.device_bind("nic").unwrap();
    let smmu = host(SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    let smmu_nic = smmu.device_bind("nic").unwrap();
    let wide = VtdConfig::default().with_address_width(57);
    let odd = VtdConfig::default().with_address_width(52);
    for (said, parts) in [
        (said(&vtd, |unit| unit), ["no devices", "without_devices()"]),
        (said(&flat, |unit| unit.device(slot(3), flat_nic, "nic")), ["nic", "HWPT_ALLOC"]),
        (said(&smmu, |unit| unit.device(slot(3), smmu_nic, "nic")), ["nic", "VT-d"]),
        (
            said(&vtd, |unit| unit.device(slot(3), nic, "nic").device(slot(3), nic, "disk")),
            ["disk cannot be 00:03.0", "nic"],
        ),
        (said(&vtd, |unit| unit.device(slot(3), nic, "nic").config(&wide)), ["nic", "57"]),
        (said(&vtd, |unit| unit.device(slot(3), nic, "nic").config(&odd)), ["", "52"]),
    ] {
        assert!(parts.iter().all(|part| said.contains(part)), "{said:?} without {parts:?}");
    }
    for name in ["nic", "nope"] {
        let error = vtd.device_bind(name).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let region =
        Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None).unwrap());
    let ioas = GuestIoas::new(vtd.clone()).unwrap();
    let whole = UserMemory::whole(region.clone());
    ioas.map(0x1000, &whole, Protection::READ_WRITE).unwrap();
    let error = ioas.map(0x1000, &whole, Protection::READ_WRITE).unwrap_err().to_string();
    assert!(error.contains("0x1000"), "{error}");
    let error = UserMemory::new(region, 0x800, 0x1000).unwrap_err().to_string();
    assert!(error.contains("0x800"), "{error}");
}

/// Without the builder, a function that the host side was never told of is not added either.
#[test]
fn a_model_names_what_its_host_side_has_not() {
    let host = host(VtdUnit::new(VtdUnitConfig::default()));
    let nesting = Arc::new(VtdNesting::new(GuestIoas::new(host).unwrap()));
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let (config, nowhere) = (VtdConfig::default(), Arc::new(Nowhere));
    assert!(matches!(config.intersect(&[]), Err(IntersectError::NoHosts)));
    let vtd = VtdIommu::new(&config, Arc::new(memory), nesting, nowhere, None).unwrap();
    let error = vtd.add_device(slot(3)).unwrap_err().to_string();
    assert!(error.contains("no device was added as 00:03.0"), "{error}");
    assert!(vtd.snapshot().unwrap().functions.is_empty());
}

/// A user's tables on top of an IOAS behind an SMMUv3: a changed entry has no effect before the
/// invalidation.
#[test]
fn nesting_by_verbs_alone() -> Outcome {
    let host = host(SmmuV3Unit::new(SmmuV3UnitConfig::default()));
    let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4_0000, None)?);
    let memory = Arc::new(GuestMemoryMmap::<()>::from_arc_regions(vec![region.clone()])?);
    let (dev, ioas) = (host.device_bind("nic")?, host.ioas_alloc()?);
    let whole = UserMemory::whole(region);
    host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE)?;
    let (flags, fault) = (HwptFlags::new().with_nest_parent(true), None);
    let parent = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault };
    let parent = host.hwpt_alloc(&parent)?;
    let viommu = host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)?;
    host.vdevice_alloc(viommu, dev, 0x18)?;

    let tables = Driver::new(Pages::new(memory.clone(), 0x1_0000), NoRegisters);
    let [table, old, new] = [(); 3].map(|()| tables.page());
    tables.map(table, 0x1000, old, 3, true);
    let low = Ste0::new().with_v(true).with_config(StreamConfig::Stage1.into_bits());
    let low = low.with_s1contextptr(tables.context(table, 7) >> 6);
    let ste = [low.into_bits(), Ste1::new().into_bits()];
    let data = HwptData::ArmSmmuV3(iommu_hwpt_arm_smmuv3 { ste });
    let nested = HwptAlloc { flags: HwptFlags::new(), dev, pt: viommu, data, fault };
    host.device_attach(dev, None, host.hwpt_alloc(&nested)?)?;

    let mut nic = host.dma_port("nic").unwrap();
    let mut write = |value| nic.write(DmaAttributes::default(), 0x1000, &[value]);
    let at = |gpa| memory.read_obj::<u8>(GuestAddress(gpa));
    write(1)?;
    tables.map(table, 0x1000, new, 3, true);
    write(2)?;
    assert_eq!((at(old)?, at(new)?), (2, 0));
    let cmd = Command::TlbiNhAsid { vmid: 0, asid: 7 }.encode();
    let commands = [iommu_viommu_arm_smmuv3_invalidate { cmd }];
    host.hwpt_invalidate(viommu, InvalidateData::ArmSmmuV3(&commands))?;
    write(3)?;
    assert_eq!((at(old)?, at(new)?), (2, 3));
    Ok(())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An emulated host's devices, about which it is asked while one of its verbs may fail.

use std::ops::RangeInclusive;
use std::sync::Arc;

use twostage::iommufd::{Errno, FailNth, HwInfoData};
use twostage::nesting::survey::{self, DeviceFacts, NestingReport};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs::Httu;
use twostage::spec::smmuv3::translation::Granule;
use twostage_emulated::{
    AddressWidth, DeviceConfig, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit, VtdUnitConfig,
};

use super::{registers, report};
use crate::input::Input;

/// A unit, as it was configured.
enum Unit {
    Vtd(VtdUnitConfig),
    Smmu(SmmuV3UnitConfig),
}

impl Unit {
    fn is_unmappable(&self) -> bool {
        matches!(self, Self::Smmu(config) if !config.granules.contains(&Granule::K4))
    }
}

/// A device, its unit, and its configuration.
struct Device {
    name: String,
    unit: usize,
    config: DeviceConfig,
}

pub fn survey(input: &mut Input<'_>) {
    let host = EmulatedHost::new();
    let is_smmu = input.flag();
    let units: Vec<_> = (0..input.byte() % 2 + 1).map(|_| unit(input, is_smmu)).collect();
    let ids: Vec<_> = units
        .iter()
        .map(|unit| match unit {
            Unit::Vtd(config) => host.add_unit(VtdUnit::new(config.clone())),
            Unit::Smmu(config) => host.add_unit(SmmuV3Unit::new(config.clone())),
        })
        .collect();
    let mut devices = Vec::new();
    for number in 0..input.byte() % 4 {
        let (name, unit) = (format!("device {number}"), input.below(ids.len()));
        let config = device(input);
        let rid = Bdf::from_raw(u16::from(number) << 3 | 0x100);
        host.add_device(&name, ids[unit], rid, config.clone()).expect("a new device");
        devices.push(Device { name, unit, config });
    }
    let names: Vec<_> = devices.iter().map(|device| device.name.clone()).collect();
    let (before, failing) = (host.live_objects(), Arc::new(FailNth::new(host.clone())));
    if input.one_in(4) {
        failing
            .fail_nth(u64::from(input.byte() % 64) + 1, input.pick(&[Errno::ENOMEM, Errno::EIO]));
    }
    let armed = failing.is_armed();
    let facts = survey::survey(failing.as_ref(), &names);
    assert_eq!(host.live_objects(), before, "something is left");
    let failed = armed && !failing.is_armed();
    let facts = match facts {
        Ok(facts) => facts,
        // Linux cannot have page tables of larger pages than its own, which have 4 KiB.
        Err(error) => {
            let unmappable = devices.iter().any(|device| units[device.unit].is_unmappable());
            return assert!(failed || unmappable, "{error}");
        }
    };
    report::check(&NestingReport::new(&facts), &facts);
    if failed {
        // What is said of a device is then less than it can do.
        return;
    }
    for (device, facts) in devices.iter().zip(&facts) {
        as_configured(device, &units[device.unit], facts);
    }
    // Devices of one SMMU have one number, and those of two have two.
    for (one, first) in devices.iter().zip(&facts) {
        for (other, second) in devices.iter().zip(&facts) {
            if let (Some(first), Some(second)) = (first.smmu, second.smmu) {
                assert_eq!(first == second, one.unit == other.unit);
            }
        }
    }
}

/// The facts are those that the device and its unit were made with.
fn as_configured(device: &Device, unit: &Unit, facts: &DeviceFacts) {
    let Device { name, config, .. } = device;
    let capabilities = facts.info.capabilities;
    assert_eq!(facts.name, *name);
    assert_eq!(capabilities.pci_ats_not_supported(), !config.ats, "{name}");
    let [pasid_bits, dirty_nesting] = match (unit, facts.info.data) {
        (Unit::Vtd(unit), HwInfoData::Vtd(said)) => {
            let said = [said.cap_reg, said.ecap_reg, said.flags.into()];
            assert_eq!(said, registers::vtd(unit), "{name}: CAP, ECAP, flags");
            assert_eq!(facts.refusal.is_none(), unit.nesting, "{name}: {:?}", facts.refusal);
            assert_eq!(facts.smmu, None);
            assert_eq!(capabilities.dirty_tracking(), unit.dirty_tracking, "{name}");
            let asks = config.pri && config.ats && unit.page_requests && unit.device_tlb;
            assert_eq!(facts.page_requests, asks && unit.pasid_bits > 0, "{name}");
            [unit.pasid_bits, (unit.nesting && unit.dirty_tracking).into()]
        }
        (Unit::Smmu(unit), HwInfoData::ArmSmmuV3(said)) => {
            assert_eq!(said.idr, registers::smmuv3(unit), "{name}: IDR0 to IDR5");
            assert_eq!((said.flags, said.iidr, said.aidr), (0, 0, 2), "{name}");
            let nests = unit.nesting && (unit.s2fwb || unit.canwbs);
            assert_eq!(facts.refusal.is_none(), nests, "{name}: {:?}", facts.refusal);
            assert_eq!(facts.smmu.is_some(), nests);
            // Linux has fault queues for all of them.
            assert!(facts.page_requests, "{name}");
            let dirty = unit.nesting && unit.httu == Httu::Dirty;
            assert_eq!(capabilities.dirty_tracking(), dirty, "{name}");
            // Its driver tracks what stage 1 writes, never stage 2.
            // Linux has no table of one level for more.
            let most = if unit.two_level_cd { 20 } else { 10 };
            [unit.ssid_bits.min(most), 0]
        }
        (_, data) => panic!("{name} is behind {data:?}"),
    };
    assert_eq!(facts.info.max_pasid_log2, config.pasid_bits.min(pasid_bits), "{name}");
    assert_eq!(facts.dirty_nesting, dirty_nesting != 0, "{name}");
    for range in &config.reserved {
        let covered = |address: u64| {
            let within = |range: &RangeInclusive<u64>| range.contains(&address);
            facts.reserved.iter().any(within) || !facts.iovas.iter().any(within)
        };
        assert!(covered(*range.start()) && covered(*range.end()), "{range:#x?} is not reserved");
    }
}

fn unit(input: &mut Input<'_>, is_smmu: bool) -> Unit {
    // No cache is used here.
    if is_smmu {
        let granules = [Granule::K4, Granule::K16, Granule::K64];
        let which = input.byte();
        let granules = granules.into_iter().enumerate();
        let granules = granules.filter(|(number, _)| which >> number & 1 == 0);
        return Unit::Smmu(
            SmmuV3UnitConfig::default()
                .with_address_width(input.pick(&[48, 48, 40, 52, 44]))
                .with_va_52(input.one_in(4))
                .with_granules(granules.map(|(_, granule)| granule).collect())
                .with_ssid_bits(input.byte() % 21)
                .with_two_level_cd(input.flag())
                .with_range_invalidation(input.flag())
                .with_ats(input.flag())
                .with_page_requests(input.flag())
                .with_stalls(input.flag())
                .with_httu(input.pick(&[Httu::None, Httu::Access, Httu::Dirty]))
                .with_nesting(!input.one_in(4))
                .with_s2fwb(input.flag())
                .with_canwbs(input.flag())
                .with_iotlb_entries(0)
                .with_paging_structure_entries(0)
                .with_stage2_entries(0),
        );
    }
    let widths = [AddressWidth::Bits39, AddressWidth::Bits48, AddressWidth::Bits57];
    Unit::Vtd(
        VtdUnitConfig::default()
            .with_address_width(input.pick(&widths))
            .with_huge_pages(input.flag())
            .with_pasid_bits(input.byte() % 21)
            .with_supervisor_requests(input.flag())
            .with_extended_accessed(input.flag())
            .with_device_tlb(input.flag())
            .with_page_requests(input.flag())
            .with_nesting(!input.one_in(4))
            .with_guest_second_stage(input.flag())
            .with_dirty_tracking(input.flag())
            .with_erratum_772415(input.flag())
            .with_iotlb_entries(0)
            .with_paging_structure_entries(0)
            .with_stage2_entries(0),
    )
}

fn device(input: &mut Input<'_>) -> DeviceConfig {
    let reserved = (0..input.byte() % 3).map(|_| {
        let start = input.number() & !0xfff;
        start..=start.saturating_add(input.number()) | 0xfff
    });
    let reserved = reserved.collect();
    let (ats, asks) = (input.flag(), input.flag());
    DeviceConfig::default()
        .with_pasid_bits(input.byte() % 21)
        .with_ats(ats)
        .with_pri(ats && asks)
        .with_stalls(!ats && asks)
        .with_reserved(reserved)
}

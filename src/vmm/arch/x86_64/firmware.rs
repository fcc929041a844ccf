// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a PC's firmware leaves in memory: ACPI's tables, the BIOS data area, and the reset vector.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::acpi::{self, IoApic, IommuPlatform, IommuUnit, Platform};
use super::boot::StartState;
use super::layout::{BASE_MEMORY_KIB, EXTENDED_BIOS_DATA, IOAPIC_ADDRESS, IOAPIC_BDF, IOAPIC_ID};
use super::{power, IrqChip};
use crate::config::{DeviceConfig, MachineConfig, Place};
use crate::memory::MachineMemory;
use crate::{Error, Result};
use twostage::acpi::dmar::DeviceScope;

/// In the BIOS data area, the segment of the extended one: a word.
const EXTENDED_SEGMENT: u64 = 0x40e;
/// The memory below the extended area, in KiB: a word.
const BASE_MEMORY: u64 = 0x413;
/// The extended area's length in KiB, stored in its first byte.
const EXTENDED_KIB: u8 = 1;

/// Writes the firmware's tables for the machine of `config`, whose kernel has `_start`.
///
/// # Errors
/// There is no room for it.
pub(crate) fn write(
    memory: &MachineMemory,
    config: &MachineConfig,
    chip: IrqChip,
    _start: &StartState,
) -> Result<()> {
    write_bios_data(memory)
        .map_err(|error| Error::Firmware(format!("the BIOS data area: {error}")))?;
    power::write_reset_vector(memory)
        .map_err(|error| Error::Firmware(format!("the reset vector: {error}")))?;
    acpi::write_tables(memory, &platform(config, chip)?)
}

/// The contents of the ACPI tables.
fn platform(config: &MachineConfig, chip: IrqChip) -> Result<Platform> {
    let interrupt_remapping = chip.remaps_interrupts(config);
    let scopes = scopes(config, interrupt_remapping)?;
    let in_scope = config
        .devices
        .iter()
        .filter(|device| scope_of(config, device, interrupt_remapping).is_some())
        .count();
    let unit = |(number, scopes)| {
        let address = config.iommu_address(number);
        IommuUnit { address, scopes }
    };
    let iommu = (!config.iommus.is_empty()).then(|| IommuPlatform {
        units: scopes.into_iter().enumerate().map(unit).collect(),
        all_functions: in_scope == config.devices.len(),
        interrupt_remapping,
        ats: config.iommus.iter().any(|iommu| iommu.model.vtd().is_some_and(|vtd| vtd.ats)),
    });
    let ioapic = IoApic { id: IOAPIC_ID, address: IOAPIC_ADDRESS, bdf: IOAPIC_BDF };
    let pic = chip == IrqChip::InKernel;
    // No more than there can be.
    let last_bus = (config.buses() - 1) as u8;
    Ok(Platform { vcpus: config.vcpus, ioapic: Some(ioapic), pic, last_bus, iommu })
}

/// The virtual IOMMU in whose scope `device` is in the ACPI tables.
fn scope_of(config: &MachineConfig, device: &DeviceConfig, remapping: bool) -> Option<usize> {
    match remapping {
        true => config.interrupt_iommu_of(device),
        false => config.iommu_of(device.iommu()),
    }
}

/// What is in the scope of each virtual IOMMU in the ACPI tables.
fn scopes(config: &MachineConfig, remapping: bool) -> Result<Vec<Vec<DeviceScope>>> {
    let mut scopes = vec![Vec::new(); config.iommus.len()];
    for (device, Place { bdf, bridges, .. }) in config.devices.iter().zip(config.places()?) {
        let iommu = scope_of(config, device, remapping);
        let scope = DeviceScope::of_function(bdf, &bridges);
        if let Some(scopes) = iommu.and_then(|iommu| scopes.get_mut(iommu)) {
            // Several functions may be in that of one bridge.
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
    }
    Ok(scopes)
}

/// Writes the BIOS data area in the first 640 KiB, and the extended one at their end. An operating
/// system that starts its other processors looks there for unused memory.
///
/// Source: System BIOS for IBM PCs, Compatibles, and EISA Computers (Phoenix), "BIOS Data Area".
fn write_bios_data(memory: &MachineMemory) -> std::result::Result<(), GuestMemoryError> {
    let (map, segment) = (memory.map(), (EXTENDED_BIOS_DATA >> 4) as u16);
    map.write_slice(&segment.to_le_bytes(), GuestAddress(EXTENDED_SEGMENT))?;
    map.write_slice(&BASE_MEMORY_KIB.to_le_bytes(), GuestAddress(BASE_MEMORY))?;
    map.write_slice(&[EXTENDED_KIB], GuestAddress(EXTENDED_BIOS_DATA))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{testing, EduConfig, IommuChoice, IommuConfig};
    use crate::config::{PciBridgeConfig, RootPortConfig};
    use twostage::acpi::dmar::PciPath;

    #[test]
    fn what_is_behind_bridges_is_in_scopes_by_its_path() {
        let edu = |bus: &str, iommu: IommuChoice| {
            let bus = Some(bus.to_owned()).filter(|bus| !bus.is_empty());
            DeviceConfig::Edu(EduConfig { bus, iommu, ..EduConfig::default() })
        };
        let (first, off) = (IommuChoice::First, IommuChoice::Off);
        let second = IommuChoice::Named("vtd1".into());
        let ports = ["rp0", "rp1"].map(|id| RootPortConfig { id: id.into() });
        let mut config = MachineConfig {
            iommus: vec![IommuConfig::default(); 2],
            devices: vec![
                edu("", first.clone()),
                edu("rp0", second),
                edu("br0", first.clone()),
                edu("br0", first),
                edu("", off),
            ],
            root_ports: ports.to_vec(),
            pci_bridges: vec![PciBridgeConfig { id: "br0".into(), bus: "rp1".into() }],
            ..testing::machine()
        };
        let platform = |config: &MachineConfig| {
            let platform = platform(config, IrqChip::InKernel).unwrap();
            let iommu = platform.iommu.unwrap();
            let scopes: Vec<_> = iommu.units.into_iter().map(|unit| unit.scopes).collect();
            (scopes, iommu.all_functions, platform.last_bus)
        };
        let root = DeviceScope::pci_endpoint(PciPath::new(0, 1, 0));
        // The root ports are 00:03.0 and 00:04.0.
        let behind_port = DeviceScope::pci_endpoint(PciPath::new(0, 3, 0).then(0, 0));
        let bridge = DeviceScope::pci_sub_hierarchy(PciPath::new(0, 4, 0).then(0, 0));
        let scopes = vec![vec![root, bridge], vec![behind_port]];
        assert_eq!(platform(&config), (scopes, false, 3));
        config.devices.pop();
        assert!(platform(&config).1, "the last unit has the rest");
    }

    #[test]
    fn the_data_area_tells_where_base_memory_ends() {
        let memory = MachineMemory::new(1 << 20).unwrap();
        write_bios_data(&memory).unwrap();
        let word = |at| memory.map().read_obj::<u16>(GuestAddress(at)).unwrap();
        assert_eq!((word(0x40e), word(0x413)), (0x9fc0, 639));
        assert_eq!(word(0x9_fc00), 1);
    }
}

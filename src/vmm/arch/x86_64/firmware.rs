// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a PC's firmware leaves in memory: ACPI's tables, the BIOS data area, and the reset vector.

use super::acpi::{self, IoApic, IommuPlatform, IommuUnit, Platform};
use super::boot::StartState;
use super::layout::{IOAPIC_ADDRESS, IOAPIC_BDF, IOAPIC_ID};
use super::{bios_data, power, IrqChip};
use crate::config::bdf_of;
use crate::config::MachineConfig;
use crate::memory::MachineMemory;
use crate::{Error, Result};
use twostage::spec::pci::Bdf;

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
    bios_data::write(memory)
        .map_err(|error| Error::Firmware(format!("the BIOS data area: {error}")))?;
    power::write_reset_vector(memory)
        .map_err(|error| Error::Firmware(format!("the reset vector: {error}")))?;
    acpi::write_tables(memory, &platform(config, chip)?)
}

/// The contents of the ACPI tables.
fn platform(config: &MachineConfig, chip: IrqChip) -> Result<Platform> {
    let interrupt_remapping = chip.remaps_interrupts(config);
    let scopes = scopes(config, interrupt_remapping)?;
    let in_scope = scopes.iter().map(Vec::len).sum::<usize>();
    let unit = |(number, functions)| {
        let address = config.iommu_address(number);
        IommuUnit { address, functions }
    };
    let iommu = (!config.iommus.is_empty()).then(|| IommuPlatform {
        units: scopes.into_iter().enumerate().map(unit).collect(),
        all_functions: in_scope == config.devices.len(),
        interrupt_remapping,
        ats: config.iommus.iter().any(|iommu| iommu.model.vtd().is_some_and(|vtd| vtd.ats)),
    });
    let ioapic = IoApic { id: IOAPIC_ID, address: IOAPIC_ADDRESS, bdf: IOAPIC_BDF };
    let pic = chip == IrqChip::InKernel;
    Ok(Platform { vcpus: config.vcpus, ioapic: Some(ioapic), pic, iommu })
}

/// The functions in the scope of each virtual IOMMU in the ACPI tables.
fn scopes(config: &MachineConfig, interrupt_remapping: bool) -> Result<Vec<Vec<Bdf>>> {
    let mut scopes = vec![Vec::new(); config.iommus.len()];
    for (number, device) in config.devices.iter().enumerate() {
        let iommu = match interrupt_remapping {
            true => config.interrupt_iommu_of(device),
            false => config.iommu_of(device.iommu()),
        };
        if let Some(scope) = iommu.and_then(|iommu| scopes.get_mut(iommu)) {
            scope.push(bdf_of(number)?);
        }
    }
    Ok(scopes)
}

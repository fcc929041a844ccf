// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device tree, which describes the machine to an arm64 guest.

use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};

use super::boot::{StartState, DEVICE_TREE_SIZE};
use super::layout::*;
use super::IrqChip;
use crate::arch::devicetree::{self, Assigned, Gic, Pci, Platform, Serial, Smmu, Span, Stalled};
use crate::config::{IommuConfig, MachineConfig};
use crate::iommu::{interrupt_source, AssignedFunction};
use crate::machine::topology::assigned_functions;
use crate::memory::MachineMemory;
use crate::vfio::message_window;
use crate::{Error, Result};
use twostage::viommu::bridges::looked_up;

/// Writes the device tree of the machine of `config` for a kernel with `start`.
///
/// # Errors
/// There is no room for it.
pub(crate) fn write(
    memory: &MachineMemory,
    config: &MachineConfig,
    _chip: IrqChip,
    start: &StartState,
) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::Firmware(format!("device tree: {error}"));
    let platform = platform(memory, config, start)?;
    let tree = devicetree::tree(&platform).map_err(|error| failed(&error))?;
    if tree.len() as u64 > DEVICE_TREE_SIZE {
        return Err(failed(&format_args!("{} bytes are too many", tree.len())));
    }
    memory.map().write_slice(&tree, GuestAddress(start.device_tree)).map_err(|error| failed(&error))
}

/// The contents of the tree.
fn platform<'a>(
    memory: &MachineMemory,
    config: &'a MachineConfig,
    start: &StartState,
) -> Result<Platform<'a>> {
    let redistributors = REDISTRIBUTOR_SIZE * u64::from(config.vcpus);
    Ok(Platform {
        vcpus: config.vcpus,
        memory: memory.ranges().map(|(start, length)| Span { start, length }).collect(),
        cmdline: &config.payload.cmdline,
        initramfs: start.initramfs,
        gic: Gic {
            distributor: Span { start: DISTRIBUTOR_ADDRESS, length: DISTRIBUTOR_SIZE },
            redistributors: Span { start: REDISTRIBUTORS_ADDRESS, length: redistributors },
            its: Span { start: ITS_ADDRESS, length: ITS_SIZE },
        },
        serial: Serial {
            registers: Span { start: SERIAL_ADDRESS, length: SERIAL_SIZE },
            spi: SERIAL_IRQ,
        },
        clock: Span { start: CLOCK_ADDRESS, length: CLOCK_SIZE },
        pci: Pci {
            ecam: Span { start: ECAM_START, length: config.buses() << 20 },
            // No more than there can be.
            last_bus: (config.buses() - 1) as u8,
            mmio: Span { start: PCI_MMIO_START, length: PCI_MMIO_LAST - PCI_MMIO_START + 1 },
            intx: INTX_LINES.iter().flat_map(|line| line.gsis).copied().collect(),
        },
        smmus: smmus(config)?,
        assigned: assigned(config, memory)?,
        stalled: stalled(config)?,
    })
}

/// The virtual SMMUs, and what is behind each.
fn smmus(config: &MachineConfig) -> Result<Vec<Smmu>> {
    let smmu = |(number, iommu): (usize, &IommuConfig)| Smmu {
        registers: Span { start: config.iommu_address(number), length: iommu.model.registers() },
        spis: iommu_interrupts(number),
        device_id: interrupt_source(number).raw().into(),
        requesters: Vec::new(),
    };
    let mut smmus: Vec<_> = config.iommus.iter().enumerate().map(smmu).collect();
    for (device, place) in config.devices.iter().zip(config.places()?) {
        let iommu = config.iommu_of(device.iommu());
        let Some(smmu) = iommu.and_then(|iommu| smmus.get_mut(iommu)) else { continue };
        for requesters in looked_up(place.bdf, &place.bridges, place.last_bus) {
            // Those behind a bridge to PCI are one for several devices.
            if !smmu.requesters.contains(&requesters) {
                smmu.requesters.push(requesters);
            }
        }
    }
    Ok(smmus)
}

/// The functions that can be stalled. None is behind a bridge to PCI, where others have its
/// requester ID.
fn stalled(config: &MachineConfig) -> Result<Vec<Stalled>> {
    let places = config.devices.iter().zip(config.places()?);
    let stalled = places.filter(|(device, _)| device.stall());
    Ok(stalled
        .map(|(_, place)| Stalled { bdf: place.bdf, port: place.bridges.first().map(|it| it.bdf) })
        .collect())
}

/// The assigned devices behind a virtual SMMU: the host maps their MSIs to its own window, which
/// stage 1 must map 1:1.
fn assigned(config: &MachineConfig, memory: &MachineMemory) -> Result<Vec<Assigned>> {
    let (functions, places) = (assigned_functions(config)?, config.places()?);
    let assigned = |function: &AssignedFunction, path: &PathBuf| {
        let window = message_window(&path.display().to_string(), path, memory.ranges())?;
        let (start, last) = window.into_inner();
        let identity = Span { start, length: (last - start).saturating_add(1) };
        // It is not behind a bridge to PCI, and so known by its own address.
        let place = places.iter().find(|place| place.bdf == function.bdf);
        let port = place.and_then(|place| place.bridges.first()).map(|port| port.bdf);
        Ok(Assigned { bdf: function.bdf, port, identity })
    };
    let vfio = |function: &AssignedFunction| Some(assigned(function, function.vfio.as_ref()?));
    functions.iter().filter_map(vfio).collect()
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What tells an arm64 guest of its machine: the device tree.
#![forbid(unsafe_code)]

use vm_memory::{Bytes, GuestAddress};

use super::boot::{StartState, DEVICE_TREE_SIZE};
use super::layout::*;
use super::IrqChip;
use crate::vmm::arch::devicetree::{self, Gic, Pci, Platform, Serial, Span};
use crate::vmm::config::MachineConfig;
use crate::vmm::memory::MachineMemory;
use crate::vmm::{Error, Result};

/// Tells the guest, whose kernel starts with `start`, of the machine that `config` describes.
///
/// # Errors
/// There is no room for it.
pub(in crate::vmm) fn write(
    memory: &MachineMemory,
    config: &MachineConfig,
    _chip: IrqChip,
    start: &StartState,
) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| Error::Firmware(format!("device tree: {error}"));
    let tree =
        devicetree::tree(&platform(memory, config, start)).map_err(|error| failed(&error))?;
    if tree.len() as u64 > DEVICE_TREE_SIZE {
        return Err(failed(&format_args!("{} bytes are too many", tree.len())));
    }
    memory.map().write_slice(&tree, GuestAddress(start.device_tree)).map_err(|error| failed(&error))
}

/// What the tree tells the guest.
fn platform<'a>(
    memory: &MachineMemory,
    config: &'a MachineConfig,
    start: &StartState,
) -> Platform<'a> {
    let redistributors = REDISTRIBUTOR_SIZE * u64::from(config.vcpus);
    Platform {
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
        pci: Pci {
            ecam: Span { start: ECAM_START, length: ECAM_SIZE },
            // A bus number has eight bits.
            last_bus: (PCI_BUSES - 1) as u8,
            mmio: Span { start: PCI_MMIO_START, length: PCI_MMIO_LAST - PCI_MMIO_START + 1 },
            intx: INTX_LINES.iter().flat_map(|line| line.gsis).copied().collect(),
        },
        smmus: Vec::new(),
        assigned: Vec::new(),
    }
}

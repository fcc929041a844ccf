// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `pci-host-ecam-generic`: the root of the PCI hierarchy, with the routing of MSIs, INTx and DMA.
//!
//! Source: IEEE 1275 PCI bus binding 2.1; Linux, `pci/pci-iommu.txt` and `pci/pci-msi.txt` of the
//! bindings.

use vm_fdt::{Error, FdtWriter};

use super::reserved;
use super::{interrupts, Pci, Platform, ADDRESS_CELLS, FIRST_SMMU, GIC, ITS};

/// The first of an address's three cells: memory below 4 GiB, not prefetchable.
const MEMORY_32: u32 = 0x0200_0000;
/// Number of requester IDs.
const REQUESTERS: u32 = 0x1_0000;
/// INTA.
const PIN: u32 = 1;

/// The host bridge of `platform`, with the functions that need nodes.
pub(super) fn host_bridge(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
    let pci = &platform.pci;
    let node = fdt.begin_node(&format!("pcie@{:x}", pci.ecam.start))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_array_u64("reg", &pci.ecam.cells())?;
    fdt.property_array_u32("bus-range", &[0, pci.last_bus.into()])?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    let [start, length] = [pci.mmio.start, pci.mmio.length].map(cells);
    let window = [&[MEMORY_32][..], &start, &start, &length].concat();
    fdt.property_array_u32("ranges", &window)?;
    fdt.property_null("dma-coherent")?;
    interrupt_map(fdt, pci)?;
    // A function's device ID at the translation service is its requester ID.
    fdt.property_array_u32("msi-map", &[0, ITS, 0, REQUESTERS])?;
    iommu_map(fdt, platform)?;
    reserved::functions(fdt, &platform.assigned)?;
    fdt.end_node(node)
}

fn cells(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

/// Routing of INTx: by the low bits of the device number.
fn interrupt_map(fdt: &mut FdtWriter, pci: &Pci) -> Result<(), Error> {
    // A device number is in bits 15:11 of an address's first cell.
    let address = |device: u32| device << 11;
    let mut map = Vec::new();
    for (device, spi) in (0..).zip(&pci.intx) {
        map.extend([address(device), 0, 0, PIN, GIC]);
        // The unit address of an interrupt at the GIC: empty.
        map.extend([0; ADDRESS_CELLS as usize]);
        map.extend(interrupts::level(*spi));
    }
    let devices = address((pci.intx.len() as u32).saturating_sub(1));
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u32("interrupt-map", &map)?;
    fdt.property_array_u32("interrupt-map-mask", &[devices, 0, 0, 7])
}

/// The SMMU of each function; the StreamID is its requester ID.
fn iommu_map(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
    let mut map = Vec::new();
    for (handle, smmu) in (FIRST_SMMU..).zip(&platform.smmus) {
        for function in &smmu.functions {
            let rid = u32::from(function.raw());
            map.extend([rid, handle, rid, 1]);
        }
    }
    if map.is_empty() {
        return Ok(());
    }
    fdt.property_array_u32("iommu-map", &map)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Addresses that an assigned device's IOMMU must always map 1:1.
//!
//! The host maps the MSIs of assigned devices to addresses of its own choice. If the hardware walks
//! the guest's tables first, these must map them 1:1, or MSIs are lost.
//!
//! Source: Linux, `reserved-memory/reserved-memory.yaml` of the bindings (`iommu-addresses`).

use std::collections::BTreeMap;

use vm_fdt::{Error, FdtWriter};

use super::{Assigned, Span, ADDRESS_CELLS, FIRST_ASSIGNED, SIZE_CELLS};

/// Phandles of reserved memory follow those of devices, of which bus 0 has fewer.
const FIRST_RESERVED: u32 = FIRST_ASSIGNED + 0x1000;

/// The first cell of a 32-bit memory address of a PCI device: `iommu-addresses` has the cells of
/// the device's bus (IEEE 1275's PCI binding, 2.2.1.1).
const PCI_MEMORY: u32 = 0x0200_0000;

/// Each range of memory, with the phandles of its devices.
fn pieces(assigned: &[Assigned]) -> BTreeMap<(u64, u64), Vec<u32>> {
    let mut pieces = BTreeMap::<_, Vec<_>>::new();
    for (handle, device) in (FIRST_ASSIGNED..).zip(assigned) {
        let Span { start, length } = device.identity;
        pieces.entry((start, length)).or_default().push(handle);
    }
    pieces
}

/// `reserved-memory`, if there is anything to reserve.
pub(super) fn memory(fdt: &mut FdtWriter, assigned: &[Assigned]) -> Result<(), Error> {
    if assigned.is_empty() {
        return Ok(());
    }
    let node = fdt.begin_node("reserved-memory")?;
    fdt.property_u32("#address-cells", ADDRESS_CELLS)?;
    fdt.property_u32("#size-cells", SIZE_CELLS)?;
    fdt.property_null("ranges")?;
    for (number, ((start, length), devices)) in (0..).zip(pieces(assigned)) {
        let piece = fdt.begin_node(&format!("messages@{start:x}"))?;
        // The same addresses on both sides: without `reg` they would be reserved, but not mapped.
        fdt.property_array_u64("reg", &[start, length])?;
        let half = |value: u64| [(value >> 32) as u32, value as u32];
        let addresses: Vec<_> = devices
            .into_iter()
            .flat_map(|device| [&[device, PCI_MEMORY][..], &half(start), &half(length)].concat())
            .collect();
        fdt.property_array_u32("iommu-addresses", &addresses)?;
        fdt.property_phandle(FIRST_RESERVED + number)?;
        fdt.end_node(piece)?;
    }
    fdt.end_node(node)
}

/// The functions of bus 0 with reservations, which a guest finds by their nodes.
pub(super) fn functions(fdt: &mut FdtWriter, assigned: &[Assigned]) -> Result<(), Error> {
    let pieces = pieces(assigned);
    for (handle, Assigned { bdf, .. }) in (FIRST_ASSIGNED..).zip(assigned) {
        let node = fdt.begin_node(&format!("device@{:x},{:x}", bdf.device(), bdf.function()))?;
        // Its configuration space, by bus, device and function in bits 23:8.
        fdt.property_array_u32("reg", &[u32::from(bdf.raw()) << 8, 0, 0, 0, 0])?;
        let reserved = (FIRST_RESERVED..).zip(pieces.values());
        let reserved = reserved.filter(|(_, devices)| devices.contains(&handle));
        let reserved: Vec<_> = reserved.map(|(reserved, _)| reserved).collect();
        fdt.property_array_u32("memory-region", &reserved)?;
        fdt.property_phandle(handle)?;
        fdt.end_node(node)?;
    }
    Ok(())
}

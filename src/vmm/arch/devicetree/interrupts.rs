// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `arm,gic-v3`, `arm,gic-v3-its`, and how other nodes refer to interrupts.

use vm_fdt::{Error, FdtWriter};

use super::{Gic, ADDRESS_CELLS, GIC, ITS, SIZE_CELLS};

/// The first of an interrupt's three cells: shared by all processors, or private.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
/// The last of them.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// A private interrupt for the GIC's maintenance: architecturally 25.
const MAINTENANCE: u32 = 9;

/// Shared peripheral interrupt `spi`, edge-triggered.
pub(super) fn edge(spi: u32) -> [u32; 3] {
    [SHARED, spi, EDGE_RISING]
}

/// Shared peripheral interrupt `spi`, level-triggered.
pub(super) fn level(spi: u32) -> [u32; 3] {
    [SHARED, spi, LEVEL_HIGH]
}

/// Private peripheral interrupt `ppi`, level-triggered.
pub(super) fn private(ppi: u32) -> [u32; 3] {
    [PRIVATE, ppi, LEVEL_HIGH]
}

/// The interrupt controller and its translation service.
pub(super) fn gic(fdt: &mut FdtWriter, gic: &Gic) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", gic.distributor.start))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    let registers = [gic.distributor.cells(), gic.redistributors.cells()].concat();
    fdt.property_array_u64("reg", &registers)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u32("interrupts", &private(MAINTENANCE))?;
    fdt.property_u32("#address-cells", ADDRESS_CELLS)?;
    fdt.property_u32("#size-cells", SIZE_CELLS)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(GIC)?;

    let its = fdt.begin_node(&format!("msi-controller@{:x}", gic.its.start))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_array_u64("reg", &gic.its.cells())?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_phandle(ITS)?;
    fdt.end_node(its)?;
    fdt.end_node(node)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nodes of the device tree, by their bindings.

use super::{
    Gic, Pci, Platform, Serial, Span, ADDRESS_CELLS, ASSIGNED, BUS_CLOCK, FIRST_SMMU, GIC, ITS,
    SIZE_CELLS,
};
use std::ops::RangeInclusive;
use twostage::devicetree::{self, Behind, Error, FdtWriter};
use twostage::spec::pci::Bdf;

/// `chosen`: what the kernel starts with.
pub(super) fn chosen(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", platform.cmdline)?;
    fdt.property_string("stdout-path", &format!("/{}", serial_name(&platform.serial)))?;
    if let Some(module) = platform.initramfs {
        fdt.property_u64("linux,initrd-start", module.start)?;
        fdt.property_u64("linux,initrd-end", module.start + module.length)?;
    }
    fdt.end_node(node)
}

fn serial_name(serial: &Serial) -> String {
    format!("serial@{:x}", serial.registers.start)
}

/// The serial port: `ns16550a`.
pub(super) fn serial(fdt: &mut FdtWriter, serial: &Serial) -> Result<(), Error> {
    /// As in a PC's serial port; nothing here depends on it.
    const CLOCK: u32 = 1_843_200;
    let node = fdt.begin_node(&serial_name(serial))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &serial.registers.cells())?;
    fdt.property_u32("clock-frequency", CLOCK)?;
    fdt.property_array_u32("interrupts", &edge_spi(serial.spi))?;
    fdt.end_node(node)
}

/// The real-time clock: `arm,pl031`, with the bus clock that its binding requires.
pub(super) fn clock(fdt: &mut FdtWriter, registers: Span) -> Result<(), Error> {
    /// Nothing here depends on it.
    const BUS_HERTZ: u32 = 24_000_000;
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", BUS_HERTZ)?;
    fdt.property_phandle(BUS_CLOCK)?;
    fdt.end_node(node)?;
    let node = fdt.begin_node(&format!("rtc@{:x}", registers.start))?;
    let compatible = ["arm,pl031", "arm,primecell"].map(str::to_owned);
    fdt.property_string_list("compatible", compatible.into())?;
    fdt.property_array_u64("reg", &registers.cells())?;
    fdt.property_u32("clocks", BUS_CLOCK)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.end_node(node)
}

/// Private interrupts of the architecture's timers: EL1 secure and non-secure, virtual, EL2.
const TIMERS: [u32; 4] = [13, 14, 11, 10];

/// MPIDR_EL1 of the processor `id` in KVM: sixteen in a cluster, clusters above.
fn affinity(id: u8) -> u32 {
    let id = u32::from(id);
    id >> 4 << 8 | id & 0xf
}

/// Processors, their start method and their timers: `cpus`, `arm,psci-1.0` and `arm,armv8-timer`.
pub(super) fn processors(fdt: &mut FdtWriter, vcpus: u8) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for affinity in (0..vcpus).map(affinity) {
        let cpu = fdt.begin_node(&format!("cpu@{affinity:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", affinity)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)?;

    let psci = fdt.begin_node("psci")?;
    let compatible = ["arm,psci-1.0", "arm,psci-0.2"].map(str::to_owned);
    fdt.property_string_list("compatible", compatible.into())?;
    fdt.property_string("method", "hvc")?;
    fdt.end_node(psci)?;

    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_array_u32("interrupts", &TIMERS.map(ppi).concat())?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)
}

/// The first of an interrupt's three cells: shared by all processors, or private.
const SHARED: u32 = 0;
const PRIVATE: u32 = 1;
/// The last of them.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// A private interrupt for the GIC's maintenance: architecturally 25.
const MAINTENANCE: u32 = 9;

/// Shared peripheral interrupt `spi`, edge-triggered.
fn edge_spi(spi: u32) -> [u32; 3] {
    [SHARED, spi, EDGE_RISING]
}

/// Shared peripheral interrupt `spi`, level-triggered.
fn level_spi(spi: u32) -> [u32; 3] {
    [SHARED, spi, LEVEL_HIGH]
}

/// Private peripheral interrupt `ppi`, level-triggered.
fn ppi(ppi: u32) -> [u32; 3] {
    [PRIVATE, ppi, LEVEL_HIGH]
}

/// The interrupt controller and its translation service: `arm,gic-v3` and `arm,gic-v3-its`.
pub(super) fn gic(fdt: &mut FdtWriter, gic: &Gic) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", gic.distributor.start))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    let registers = [gic.distributor.cells(), gic.redistributors.cells()].concat();
    fdt.property_array_u64("reg", &registers)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_array_u32("interrupts", &ppi(MAINTENANCE))?;
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

/// The first of the three cells of a PCI device's address: memory below 4 GiB, not prefetchable
/// (IEEE 1275's PCI binding, 2.2.1.1).
const PCI_MEMORY: u32 = 0x0200_0000;
/// Number of requester IDs.
const REQUESTERS: u32 = 0x1_0000;
/// The number of the pin INTA.
const INTA: u32 = 1;
/// Number of pins of a device.
const PINS: usize = 4;

/// The host bridge of `platform`: `pci-host-ecam-generic`, with the routing of MSIs, INTx and DMA,
/// and with the functions that need nodes.
///
/// Source: IEEE 1275 PCI bus binding 2.1; Linux, `pci/pci-iommu.txt` and `pci/pci-msi.txt` of the
/// bindings.
pub(super) fn host_bridge(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
    let pci = &platform.pci;
    let node = fdt.begin_node(&format!("pcie@{:x}", pci.ecam.start))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_array_u64("reg", &pci.ecam.cells())?;
    fdt.property_array_u32("bus-range", &[0, pci.last_bus.into()])?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    let [start, length] = [pci.mmio.start, pci.mmio.length].map(halves);
    let window = [&[PCI_MEMORY][..], &start, &start, &length].concat();
    fdt.property_array_u32("ranges", &window)?;
    fdt.property_null("dma-coherent")?;
    interrupt_map(fdt, pci)?;
    // A function's device ID at the translation service is its requester ID.
    fdt.property_array_u32("msi-map", &[0, ITS, 0, REQUESTERS])?;
    iommu_map(fdt, platform)?;
    devicetree::assigned_functions(fdt, &platform.assigned, ASSIGNED)?;
    devicetree::stalled_functions(fdt, &platform.stalled)?;
    fdt.end_node(node)
}

fn halves(value: u64) -> [u32; 2] {
    [(value >> 32) as u32, value as u32]
}

/// Routing of INTx: by the low bits of the device number, and the pin.
fn interrupt_map(fdt: &mut FdtWriter, pci: &Pci) -> Result<(), Error> {
    // A device number is in bits 15:11 of an address's first cell.
    let address = |device: u32| device << 11;
    let pins = if pci.last_bus == 0 { 1 } else { PINS };
    let mut map = Vec::new();
    for (number, device) in (0..).zip(0..pci.intx.len()) {
        let lines = pci.intx.iter().cycle().skip(device).take(pins);
        for (pin, spi) in (INTA..).zip(lines) {
            map.extend([address(number), 0, 0, pin, GIC]);
            // The unit address of an interrupt at the GIC: empty.
            map.extend([0; ADDRESS_CELLS as usize]);
            map.extend(level_spi(*spi));
        }
    }
    let devices = address((pci.intx.len() as u32).saturating_sub(1));
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_array_u32("interrupt-map", &map)?;
    fdt.property_array_u32("interrupt-map-mask", &[devices, 0, 0, 7])
}

/// The SMMU of each function.
fn iommu_map(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
    let smmus = (FIRST_SMMU..).zip(&platform.smmus);
    let behind = |smmu: u32, requesters: &RangeInclusive<u16>| {
        let (first, last) = (*requesters.start(), *requesters.end());
        let count = u32::from(last.saturating_sub(first)) + 1;
        Behind { first: Bdf::from_raw(first), count, smmu }
    };
    let functions = smmus.flat_map(|(handle, smmu)| {
        smmu.requesters.iter().map(move |requesters| behind(handle, requesters))
    });
    devicetree::iommu_map(fdt, functions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_have_sixteen_processors() {
        assert_eq!([0, 15, 16, 254].map(affinity), [0, 0xf, 0x100, 0xf0e]);
    }
}

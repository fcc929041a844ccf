// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The device tree, which describes the machine to a guest without ACPI.
//!
//! Source: Devicetree Specification 0.4; Linux, `Documentation/devicetree/bindings`, by the names
//! in `compatible`.

mod interrupts;
mod pci;
mod processors;
mod reserved;

use vm_fdt::{Error, FdtWriter};

use crate::boot::Module;
use twostage::spec::pci::Bdf;

/// Cells of an address, and of a size, of 32 bits each.
const ADDRESS_CELLS: u32 = 2;
const SIZE_CELLS: u32 = 2;

/// Phandles. Those of node types with several instances count up from here.
const GIC: u32 = 1;
const ITS: u32 = 2;
const BUS_CLOCK: u32 = 3;
const FIRST_SMMU: u32 = 0x100;
const FIRST_ASSIGNED: u32 = 0x1000;

/// Guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first one.
    pub start: u64,
    /// How many there are.
    pub length: u64,
}

impl Span {
    /// As the property `reg` has it.
    fn cells(self) -> [u64; 2] {
        [self.start, self.length]
    }
}

/// What the tree describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform<'a> {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// RAM.
    pub memory: Vec<Span>,
    /// The kernel's command line, without a zero byte.
    pub cmdline: &'a str,
    /// The initramfs.
    pub initramfs: Option<Module>,
    /// The interrupt controller.
    pub gic: Gic,
    /// The serial port.
    pub serial: Serial,
    /// Registers of a PL031 real-time clock.
    pub clock: Span,
    /// The PCI host bridge.
    pub pci: Pci,
    /// The virtual SMMUs.
    pub smmus: Vec<Smmu>,
    /// Assigned devices of the host.
    pub assigned: Vec<Assigned>,
}

/// A GICv3 with one interrupt translation service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gic {
    /// Registers of the distributor.
    pub distributor: Span,
    /// Registers of the redistributors, one after the other.
    pub redistributors: Span,
    /// Registers of the interrupt translation service.
    pub its: Span,
}

/// A 16550.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serial {
    /// Its registers, of a byte each.
    pub registers: Span,
    /// Its shared peripheral interrupt, edge-triggered.
    pub spi: u32,
}

/// A PCI host bridge with one root bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pci {
    /// Configuration space.
    pub ecam: Span,
    /// The last bus.
    pub last_bus: u8,
    /// Where memory BARs are.
    pub mmio: Span,
    /// The shared peripheral interrupts for INTA of the devices, round-robin: a power of two of
    /// them.
    pub intx: Vec<u32>,
}

/// A virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smmu {
    /// Its registers.
    pub registers: Span,
    /// Shared peripheral interrupts, edge-triggered: for the event queue, global errors, and
    /// CMD_SYNC. Without, it uses MSIs only.
    pub spis: Option<[u32; 3]>,
    /// Its device ID at the interrupt translation service.
    pub device_id: u32,
    /// The functions behind it. A function's StreamID is its RID.
    pub functions: Vec<Bdf>,
}

/// An assigned device of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// Its address.
    pub bdf: Bdf,
    /// The range that its IOMMU must always map 1:1: the host's MSI window.
    pub identity: Span,
}

/// The flattened tree of `platform`.
///
/// # Errors
/// A string contains a zero byte, or the tree is too large.
pub fn tree(platform: &Platform<'_>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "twostage")?;
    fdt.property_u32("#address-cells", ADDRESS_CELLS)?;
    fdt.property_u32("#size-cells", SIZE_CELLS)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    chosen(&mut fdt, platform)?;
    for span in &platform.memory {
        let node = fdt.begin_node(&format!("memory@{:x}", span.start))?;
        fdt.property_string("device_type", "memory")?;
        fdt.property_array_u64("reg", &span.cells())?;
        fdt.end_node(node)?;
    }
    reserved::memory(&mut fdt, &platform.assigned)?;
    processors::nodes(&mut fdt, platform.vcpus)?;
    interrupts::gic(&mut fdt, &platform.gic)?;
    serial(&mut fdt, &platform.serial)?;
    clock(&mut fdt, platform.clock)?;
    for (number, smmu) in (0..).zip(&platform.smmus) {
        smmu_node(&mut fdt, number, smmu)?;
    }
    pci::host_bridge(&mut fdt, platform)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen(fdt: &mut FdtWriter, platform: &Platform<'_>) -> Result<(), Error> {
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

/// `ns16550a`.
fn serial(fdt: &mut FdtWriter, serial: &Serial) -> Result<(), Error> {
    /// As in a PC's serial port; nothing here depends on it.
    const CLOCK: u32 = 1_843_200;
    let node = fdt.begin_node(&serial_name(serial))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &serial.registers.cells())?;
    fdt.property_u32("clock-frequency", CLOCK)?;
    fdt.property_array_u32("interrupts", &interrupts::edge(serial.spi))?;
    fdt.end_node(node)
}

/// `arm,pl031`, with the bus clock that its binding requires.
fn clock(fdt: &mut FdtWriter, registers: Span) -> Result<(), Error> {
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

/// `arm,smmu-v3`.
fn smmu_node(fdt: &mut FdtWriter, number: u32, smmu: &Smmu) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("iommu@{:x}", smmu.registers.start))?;
    fdt.property_string("compatible", "arm,smmu-v3")?;
    fdt.property_array_u64("reg", &smmu.registers.cells())?;
    if let Some(spis) = smmu.spis {
        fdt.property_array_u32("interrupts", &spis.map(interrupts::edge).concat())?;
        let names = ["eventq", "gerror", "cmdq-sync"].map(str::to_owned);
        fdt.property_string_list("interrupt-names", names.into())?;
    }
    fdt.property_array_u32("msi-parent", &[ITS, smmu.device_id])?;
    fdt.property_null("dma-coherent")?;
    fdt.property_u32("#iommu-cells", 1)?;
    fdt.property_phandle(FIRST_SMMU + number)?;
    fdt.end_node(node)
}

#[cfg(test)]
mod tests;

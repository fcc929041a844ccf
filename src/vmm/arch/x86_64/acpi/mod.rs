// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI: the tables that describe the machine to a guest.
//!
//! The machine has the fixed hardware that ACPI requires, the power management registers, without
//! any event. It is not hardware-reduced: on such a machine Linux assumes no interval timer, and as
//! Xen's first domain not even Xen's. The tables are in a PC's BIOS area, which no memory map
//! declares as RAM.
//!
//! Source: ACPI 6.5; PCI Firmware 3.3 (MCFG); VT-d (DMAR).

#[cfg_attr(not(test), allow(dead_code, reason = "all of the table, as acpi_tables would have it"))]
mod dmar;
mod dsdt;
mod fadt;
mod madt;

use acpi_tables::facs::FACS;
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use super::layout::{ECAM_START, PCI_BUSES};
use crate::memory::MachineMemory;
use crate::{Error, Result};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::HOST_ADDRESS_WIDTH;

/// Guest-physical address of the RSDP; the other tables follow. Guests also search for it here
/// (ACPI §5.2.5.1).
pub const RSDP_ADDRESS: u64 = 0xe_0000;
/// End of the tables' area.
const TABLES_END: u64 = 0x10_0000;
/// Alignment of tables, in bytes.
const TABLE_ALIGNMENT: u64 = 64;

/// The tables' manufacturer.
const OEM_ID: [u8; 6] = *b"TWOSTG";
const OEM_TABLE_ID: [u8; 8] = *b"TWOSTAGE";
const OEM_REVISION: u32 = 1;
/// Length of the header of all tables except the RSDP, in bytes.
const HEADER_LENGTH: u32 = 36;

/// The last PCI bus. A bus number has eight bits.
const LAST_BUS: u8 = (PCI_BUSES - 1) as u8;

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Number of vCPUs; their APIC IDs count from 0.
    pub vcpus: u8,
    /// The IOAPIC, if there is one.
    pub ioapic: Option<IoApic>,
    /// There is also a PC's pair of 8259s.
    pub pic: bool,
    /// The virtual VT-d units, if there are any.
    pub iommu: Option<IommuPlatform>,
}

/// An IOAPIC, whose inputs are the global system interrupts from 0 up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoApic {
    /// Its APIC id.
    pub id: u8,
    /// Guest-physical address of its registers.
    pub address: u32,
    /// The source id of its interrupt requests.
    pub bdf: Bdf,
}

/// Virtual VT-d units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuPlatform {
    /// At least one. The IOAPIC is behind the first.
    pub units: Vec<IommuUnit>,
    /// Every function, including hot-plugged ones, is behind one: the last one if no other has it.
    pub all_functions: bool,
    /// They remap interrupts, including the IOAPIC's.
    pub interrupt_remapping: bool,
    /// Functions may use device TLBs.
    pub ats: bool,
}

/// A virtual VT-d unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuUnit {
    /// Guest-physical address of the register page.
    pub address: u64,
    /// The functions behind it.
    pub functions: Vec<Bdf>,
}

/// Writes the tables of `platform` to `memory`.
///
/// # Errors
/// There is no room for them.
pub(super) fn write_tables(memory: &MachineMemory, platform: &Platform) -> Result<()> {
    let mut writer = Writer { memory, next: RSDP_ADDRESS };
    // The RSDP comes first in memory, but needs the others' addresses.
    writer.reserve(Rsdp::len());
    let dsdt = writer.write(&dsdt::dsdt())?;
    let facs = writer.write(&FACS::new())?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(writer.write(&fadt::fadt(dsdt, facs))?);
    xsdt.add_entry(writer.write(&madt::madt(platform))?);
    xsdt.add_entry(writer.write(&mcfg())?);
    if let Some(iommu) = &platform.iommu {
        xsdt.add_entry(writer.write(&dmar(iommu, platform.ioapic))?);
    }
    let xsdt = writer.write(&xsdt)?;
    writer.next = RSDP_ADDRESS;
    writer.write(&Rsdp::new(OEM_ID, xsdt))?;
    Ok(())
}

/// PCI configuration space.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, LAST_BUS);
    mcfg
}

/// The remapping hardware.
fn dmar(iommu: &IommuPlatform, ioapic: Option<IoApic>) -> dmar::DMAR {
    let mut dmar = dmar::DMAR::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, HOST_ADDRESS_WIDTH);
    if iommu.interrupt_remapping {
        dmar = dmar.flag(dmar::Flags::IntrRemap);
    }
    for (number, unit) in iommu.units.iter().enumerate() {
        let mut drhd = dmar::Drhd::new(0, unit.address);
        // INCLUDE_PCI_ALL must be the last (§8.3).
        if iommu.all_functions && number + 1 == iommu.units.len() {
            drhd = drhd.include_pci_all();
        } else {
            for function in &unit.functions {
                drhd.add_scope(dmar::DeviceScope::pci_endpoint(path(*function)));
            }
        }
        if let Some(ioapic) = ioapic.filter(|_| iommu.interrupt_remapping && number == 0) {
            drhd.add_scope(dmar::DeviceScope::ioapic(ioapic.id, path(ioapic.bdf)));
        }
        dmar.add_structure(drhd);
    }
    if iommu.ats {
        dmar.add_structure(dmar::Atsr::new(0).all_ports());
    }
    dmar
}

fn path(bdf: Bdf) -> dmar::PciPath {
    dmar::PciPath::new(bdf.bus(), bdf.device(), bdf.function())
}

/// A table without a dedicated type.
struct Table(Sdt);

impl Aml for Table {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

/// Writes tables to memory one after the other.
struct Writer<'a> {
    memory: &'a MachineMemory,
    next: u64,
}

impl Writer<'_> {
    /// Skips `length` bytes.
    fn reserve(&mut self, length: usize) {
        self.next = (self.next + length as u64).next_multiple_of(TABLE_ALIGNMENT);
    }

    /// Writes `table` and returns its address.
    fn write(&mut self, table: &dyn Aml) -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next;
        self.reserve(bytes.len());
        if self.next > TABLES_END {
            return Err(Error::Firmware("the ACPI tables do not fit below 1 MiB".to_owned()));
        }
        self.memory
            .map()
            .write_slice(&bytes, GuestAddress(address))
            .map_err(|error| Error::Firmware(error.to_string()))?;
        Ok(address)
    }
}

#[cfg(test)]
mod tests;

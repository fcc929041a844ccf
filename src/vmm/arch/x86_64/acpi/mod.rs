// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! ACPI: the tables that describe the machine to a guest.
//!
//! The machine has the fixed hardware that ACPI requires, the power management registers, without
//! any event. It is not hardware-reduced: on such a machine Linux assumes no interval timer, and as
//! Xen's first domain not even Xen's. The tables are in a PC's BIOS area, which no memory map
//! declares as RAM.
//!
//! Source: ACPI 6.5; PCI Firmware 3.3 (MCFG).

mod dsdt;

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, FADT};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic as IoApicEntry, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::layout::{ECAM_START, SCI, TIMER_ISA_IRQ, TIMER_PIN};
use super::power::{
    PM1_CONTROL_PORT, PM1_CONTROL_SIZE, PM1_EVENT_PORT, PM1_EVENT_SIZE, PM_TIMER_PORT,
    PM_TIMER_SIZE, RESET_PORT, RESET_VALUE,
};
use super::timers::CENTURY;
use crate::memory::MachineMemory;
use crate::{Error, Result};
use twostage::acpi::dmar;
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

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Number of vCPUs; their APIC IDs count from 0.
    pub vcpus: u8,
    /// The IOAPIC, if there is one.
    pub ioapic: Option<IoApic>,
    /// There is also a PC's pair of 8259s.
    pub pic: bool,
    /// The last PCI bus.
    pub last_bus: u8,
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
    /// What is behind it.
    pub scopes: Vec<dmar::DeviceScope>,
}

/// Writes the tables of `platform` to `memory`.
///
/// # Errors
/// There is no room for them.
pub(super) fn write_tables(memory: &MachineMemory, platform: &Platform) -> Result<()> {
    let mut writer = Writer { memory, next: RSDP_ADDRESS };
    // The RSDP comes first in memory, but needs the others' addresses.
    writer.reserve(Rsdp::len());
    let dsdt = writer.write(&dsdt::dsdt(platform.last_bus))?;
    let facs = writer.write(&FACS::new())?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(writer.write(&fadt(dsdt, facs))?);
    xsdt.add_entry(writer.write(&madt(platform))?);
    xsdt.add_entry(writer.write(&mcfg(platform.last_bus))?);
    if let Some(iommu) = &platform.iommu {
        xsdt.add_entry(writer.write(&dmar(iommu, platform.ioapic))?);
    }
    let xsdt = writer.write(&xsdt)?;
    writer.next = RSDP_ADDRESS;
    writer.write(&Rsdp::new(OEM_ID, xsdt))?;
    Ok(())
}

/// IA-PC boot architecture flags (§5.2.9.3). The bits for legacy devices and an 8042 stay clear:
/// guests with ACPI need neither.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;

/// Latencies in microseconds that indicate that the C-state does not exist.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The fixed features (§5.2.9) of a machine whose DSDT is at `dsdt`, and whose FACS at `facs`.
fn fadt(dsdt: u64, facs: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        // Below 1 MiB, like all tables.
        .firmware_ctrl_32(facs as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        // The real-time clock cannot wake the system.
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS).into();
    fadt.century = CENTURY;
    // An ISA interrupt.
    fadt.sci_int = (SCI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT_PORT).into();
    fadt.pm1_evt_len = PM1_EVENT_SIZE;
    fadt.x_pm1a_evt_blk = io_ports(PM1_EVENT_PORT, PM1_EVENT_SIZE, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1_CONTROL_SIZE;
    fadt.x_pm1a_cnt_blk = io_ports(PM1_CONTROL_PORT, PM1_CONTROL_SIZE, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = PM_TIMER_SIZE;
    fadt.x_pm_tmr_blk = io_ports(PM_TIMER_PORT, PM_TIMER_SIZE, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.reset_reg = io_ports(RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Registers of `length` bytes from the port `first` on.
fn io_ports(first: u16, length: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8 * length, 0, access, first.into())
}

/// Revision of the MADT.
const MADT_REVISION: u8 = 5;
/// Address of every LAPIC after reset.
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// PCAT_COMPAT: there is also a pair of 8259s, to be masked by users of the IOAPIC.
const PCAT_COMPAT: u32 = 1 << 0;

/// MPS INTI flags (table 5.27).
const AS_ISA: u16 = 0;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

/// Interrupt source override (§5.2.12.5).
#[derive(Debug, Clone, Copy, IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct InterruptSourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    global_system_interrupt: U32,
    flags: U16,
}

impl InterruptSourceOverride {
    /// ISA interrupt `source` leads to `gsi`, with this polarity and trigger mode.
    fn new(source: u8, gsi: u32, flags: u16) -> Self {
        const KIND: u8 = 2;
        const ISA: u8 = 0;
        Self {
            kind: KIND,
            length: size_of::<Self>() as u8,
            bus: ISA,
            source,
            global_system_interrupt: gsi.into(),
            flags: flags.into(),
        }
    }
}

/// Processors and interrupt controllers (§5.2.12).
fn madt(platform: &Platform) -> Table {
    let mut sdt =
        Sdt::new(*b"APIC", HEADER_LENGTH, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let flags = if platform.pic { PCAT_COMPAT } else { 0 };
    sdt.append_slice(&LAPIC_ADDRESS.to_le_bytes());
    sdt.append_slice(&flags.to_le_bytes());
    for id in 0..platform.vcpus {
        let lapic = ProcessorLocalApic::new(id, id, EnabledStatus::Enabled);
        sdt.append_slice(lapic.as_bytes());
    }
    if let Some(ioapic) = platform.ioapic {
        sdt.append_slice(IoApicEntry::new(ioapic.id, ioapic.address, 0).as_bytes());
        let timer = InterruptSourceOverride::new(TIMER_ISA_IRQ as u8, TIMER_PIN, AS_ISA);
        let sci = InterruptSourceOverride::new(SCI as u8, SCI, ACTIVE_HIGH_LEVEL);
        for source_override in [timer, sci] {
            sdt.append_slice(source_override.as_bytes());
        }
    }
    Table(sdt)
}

/// PCI configuration space.
fn mcfg(last_bus: u8) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, last_bus);
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
            for scope in &unit.scopes {
                drhd.add_scope(scope.clone());
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MADT: processors and interrupt controllers (ACPI 6.5, §5.2.12).

use acpi_tables::madt::{EnabledStatus, IoApic as IoApicEntry, ProcessorLocalApic};
use acpi_tables::sdt::Sdt;
use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes, Unaligned};

use super::super::layout::{SCI, TIMER_ISA_IRQ, TIMER_PIN};
use super::{Platform, Table, HEADER_LENGTH, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const REVISION: u8 = 5;
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

/// The MADT of `platform`.
pub(super) fn madt(platform: &Platform) -> Table {
    let mut sdt = Sdt::new(*b"APIC", HEADER_LENGTH, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
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

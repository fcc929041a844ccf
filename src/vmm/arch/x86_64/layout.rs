// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where everything is in a PC's guest-physical address space.

use std::ops::RangeInclusive;

use crate::pci::IntxLine;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::interrupt::INTERRUPT_RANGE;

/// First address of RAM.
pub const RAM_START: u64 = 0;
/// The BIOS's extended data area, at the end of the first 640 KiB: all memory below it is RAM.
pub const EXTENDED_BIOS_DATA: u64 = 0x9_fc00;
/// The memory below it, in KiB.
pub const BASE_MEMORY_KIB: u16 = (EXTENDED_BIOS_DATA >> 10) as u16;
/// End of the RAM below 4 GiB, and start of PCI configuration space (ECAM).
const LOW_RAM_END: u64 = 0xb000_0000;
/// Start of the RAM that does not fit below [`LOW_RAM_END`].
const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// PCI configuration space: one bus per MiB.
pub const ECAM_START: u64 = LOW_RAM_END;
/// The most buses there can be: the root bus and those behind bridges. A machine has as many as it
/// needs: a kernel probes every bus in the range it is given, with one or two exits each.
pub const MAX_BUSES: u64 = 16;
/// Length of configuration space with all of them, in bytes.
pub const ECAM_SIZE: u64 = MAX_BUSES << 20;
/// First address of PCI memory BARs.
pub const PCI_MMIO_START: u64 = 0xe000_0000;
/// Last address of PCI memory BARs, included.
pub const PCI_MMIO_LAST: u64 = 0xfebf_ffff;
/// Default address of a virtual IOMMU's registers.
pub const IOMMU_REGISTERS: u64 = 0xfed9_0000;
/// Addresses that devices write to for an interrupt.
pub const MESSAGE_RANGE: RangeInclusive<u64> = INTERRUPT_RANGE;
/// Where the IOAPIC's registers are.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Length of the IOAPIC's registers, in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// KVM's task-state segment, just below the usual place of a BIOS.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// First of the serial port's eight I/O ports.
pub const SERIAL_PORT: u64 = 0x3f8;
/// ISA interrupt of the first serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of ACPI events, level-triggered; there are no events.
pub const SCI: u32 = 9;
/// ISA interrupt of the interval timer.
pub const TIMER_ISA_IRQ: u32 = 0;
/// The IOAPIC pin of the interval timer: pin 0 is connected to the PIC, if there is one.
pub const TIMER_PIN: u32 = 2;
/// First of the debug exit's I/O ports: four, as usual for QEMU's isa-debug-exit.
pub const DEBUG_EXIT_PORT: u64 = 0xf4;

/// The IOAPIC's ID after reset, as in the MADT.
pub const IOAPIC_ID: u8 = 0;
/// The IOAPIC's source ID for a virtual IOMMU, as in the DMAR table: unused by functions.
pub const IOAPIC_BDF: Bdf = Bdf::from_raw(0xfff8);
/// Pins of the IOAPIC, which are the first GSIs.
pub const PINS: u32 = 24;
/// The first IOAPIC input for PCI's interrupt lines: separate from the PIC's, as in a PC's chipset.
pub const INTX_PINS_START: u32 = 16;
/// PCI's interrupt lines: inputs of the PIC without ISA devices, and of the IOAPIC.
pub const INTX_LINES: [IntxLine; 4] = [
    IntxLine { register: 10, gsis: &[10, INTX_PINS_START] },
    IntxLine { register: 11, gsis: &[11, INTX_PINS_START + 1] },
    IntxLine { register: 5, gsis: &[5, INTX_PINS_START + 2] },
    IntxLine { register: 12, gsis: &[12, INTX_PINS_START + 3] },
];

/// Fixed addresses besides RAM, both ends inclusive.
pub const FIXED: [(u64, u64, &str); 5] = [
    (ECAM_START, ECAM_START + (ECAM_SIZE - 1), "PCI configuration space"),
    (PCI_MMIO_START, PCI_MMIO_LAST, "PCI memory"),
    (IOAPIC_ADDRESS as u64, IOAPIC_ADDRESS as u64 + (IOAPIC_SIZE - 1), "the IOAPIC"),
    (*INTERRUPT_RANGE.start(), *INTERRUPT_RANGE.end(), "the LAPICs and interrupt messages"),
    // An identity page table, then three pages of task-state segment.
    (KVM_TSS - 0x1000, KVM_TSS + 0x2fff, "KVM"),
];

/// The ranges of `size` bytes of RAM: (first address, length).
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_RAM_END {
        vec![(RAM_START, size)]
    } else {
        vec![(RAM_START, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END)]
    }
}

/// Wired interrupts of the virtual IOMMU `number`: on a PC it uses MSIs only.
pub const fn iommu_interrupts(_number: usize) -> Option<[u32; 4]> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::occupant;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(ram_ranges(4 << 30), [(0, LOW_RAM_END), (HIGH_RAM_START, 0x5000_0000)]);
    }

    #[test]
    fn it_is_known_who_stands_where() {
        assert_eq!(occupant(512 << 20, IOMMU_REGISTERS), None);
        assert_eq!(occupant(512 << 20, 0), Some("RAM"));
        assert_eq!(occupant(512 << 20, 512 << 20), None);
        assert_eq!(occupant(4 << 30, HIGH_RAM_START), Some("RAM"));
        assert_eq!(
            occupant(512 << 20, ECAM_START + ECAM_SIZE - 1),
            Some("PCI configuration space")
        );
        assert_eq!(occupant(512 << 20, 0xfee0_1000), Some("the LAPICs and interrupt messages"));
        assert_eq!(occupant(512 << 20, KVM_TSS), Some("KVM"));
        // Impossible sizes are refused elsewhere; they must not panic here.
        assert_eq!(occupant(!0xfff, 0), Some("RAM"));
    }
}

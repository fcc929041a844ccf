// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where everything is in an arm64 machine's guest-physical address space.
//!
//! 0x0800_0000 to 0x080f_ffff are unused: there Linux, as a host, maps the MSIs of assigned
//! devices, and a guest's stage 1 must map it 1:1.

use std::ops::RangeInclusive;

use crate::pci::IntxLine;

/// First address of RAM.
pub const RAM_START: u64 = 0x4000_0000;
/// Registers of the serial port.
pub const SERIAL_ADDRESS: u64 = 0x0900_0000;
/// Length of its page, in bytes.
pub const SERIAL_SIZE: u64 = 0x1000;
/// Registers of the debug exit.
pub const DEBUG_EXIT_ADDRESS: u64 = 0x0901_0000;
/// Registers of the real-time clock.
pub const CLOCK_ADDRESS: u64 = 0x0902_0000;
/// Length of its page, in bytes.
pub const CLOCK_SIZE: u64 = 0x1000;
/// Default address of a virtual IOMMU's registers.
pub const IOMMU_REGISTERS: u64 = 0x0a00_0000;
/// Registers of the GIC's distributor.
pub const DISTRIBUTOR_ADDRESS: u64 = 0x0c00_0000;
/// Their length, in bytes.
pub const DISTRIBUTOR_SIZE: u64 = 0x1_0000;
/// Registers of the GIC's interrupt translation service: a page of 64 KiB, and one for
/// GITS_TRANSLATER.
pub const ITS_ADDRESS: u64 = 0x0c10_0000;
/// Their length, in bytes.
pub const ITS_SIZE: u64 = 0x2_0000;
/// Registers of the GIC's redistributors, one after the other.
pub const REDISTRIBUTORS_ADDRESS: u64 = 0x0d00_0000;
/// Length of those of one vCPU, in bytes.
pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// The maximum number of vCPUs fits.
const REDISTRIBUTORS_LAST: u64 = REDISTRIBUTORS_ADDRESS + REDISTRIBUTOR_SIZE * 256 - 1;
/// PCI configuration space: one bus per MiB.
pub const ECAM_START: u64 = 0x0f00_0000;
/// The most buses there can be: the root bus and those behind bridges. A machine has as many as it
/// needs: a kernel probes every bus in the range it is given.
pub const MAX_BUSES: u64 = 16;
/// Length of configuration space with all of them, in bytes.
pub const ECAM_SIZE: u64 = MAX_BUSES << 20;
/// First address of PCI memory BARs.
pub const PCI_MMIO_START: u64 = 0x1000_0000;
/// Last address of PCI memory BARs, included.
pub const PCI_MMIO_LAST: u64 = RAM_START - 1;
/// Addresses that devices write to for an interrupt: the page with GITS_TRANSLATER.
pub const MESSAGE_RANGE: RangeInclusive<u64> =
    ITS_ADDRESS + 0x1_0000..=ITS_ADDRESS + (ITS_SIZE - 1);

/// Number of the GIC's shared peripheral interrupts, which are the first GSIs.
pub const PINS: u32 = 64;
/// The first shared interrupt: those before are private to a processor.
pub const FIRST_SPI: u32 = 32;
/// Shared peripheral interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 1;
/// The interrupt lines of PCI.
pub const INTX_LINES: [IntxLine; 4] = [
    IntxLine { register: 4, gsis: &[4] },
    IntxLine { register: 5, gsis: &[5] },
    IntxLine { register: 6, gsis: &[6] },
    IntxLine { register: 7, gsis: &[7] },
];

/// The first shared peripheral interrupt for virtual IOMMUs.
const IOMMU_IRQS: u32 = 16;

/// The shared peripheral interrupts of the virtual IOMMU `number`: for events, global errors,
/// CMD_SYNC and page requests. If none are left, it uses MSIs only.
pub fn iommu_interrupts(number: usize) -> Option<[u32; 4]> {
    let first = u32::try_from(number).ok()?.checked_mul(4)?.checked_add(IOMMU_IRQS)?;
    (first + 4 <= PINS).then_some([first, first + 1, first + 2, first + 3])
}

/// Fixed addresses besides RAM, both ends inclusive.
pub const FIXED: [(u64, u64, &str); 9] = [
    (0x0800_0000, 0x080f_ffff, "room for the host's messages"),
    (SERIAL_ADDRESS, SERIAL_ADDRESS + (SERIAL_SIZE - 1), "the serial port"),
    (DEBUG_EXIT_ADDRESS, DEBUG_EXIT_ADDRESS + 0xfff, "the debug exit"),
    (CLOCK_ADDRESS, CLOCK_ADDRESS + (CLOCK_SIZE - 1), "the clock"),
    (DISTRIBUTOR_ADDRESS, DISTRIBUTOR_ADDRESS + (DISTRIBUTOR_SIZE - 1), "the GIC's distributor"),
    (ITS_ADDRESS, ITS_ADDRESS + (ITS_SIZE - 1), "the GIC's translation service"),
    (REDISTRIBUTORS_ADDRESS, REDISTRIBUTORS_LAST, "the GIC's redistributors"),
    (ECAM_START, ECAM_START + (ECAM_SIZE - 1), "PCI configuration space"),
    (PCI_MMIO_START, PCI_MMIO_LAST, "PCI memory"),
];

/// The ranges of `size` bytes of RAM: (first address, length).
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    vec![(RAM_START, size)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_on_top_of_anything() {
        let mut spans = FIXED.to_vec();
        spans.sort();
        for pair in spans.windows(2) {
            assert!(pair[0].0 <= pair[0].1 && pair[0].1 < pair[1].0, "{pair:x?}");
        }
        assert!(spans.iter().all(|(_, last, _)| *last < RAM_START));
    }
}

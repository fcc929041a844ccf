// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! FADT: the fixed features, of which a hardware-reduced machine has few (ACPI 6.5, §5.2.9).

use acpi_tables::fadt::{FADTBuilder, Flags, FADT};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::vmm::arch::x86_64::power::{
    RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::vmm::arch::x86_64::timers::{CENTURY, PM_TIMER_PORT, PM_TIMER_SIZE};

/// IA-PC boot architecture flags (§5.2.9.3). The bits for legacy devices and an 8042 stay clear:
/// a guest that knows ACPI has no use for either.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;

/// The FADT of a machine whose DSDT is at `dsdt`.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        // The clock that runs on a battery wakes nobody up.
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | PCIE_ASPM_CONTROLS).into();
    fadt.century = CENTURY;
    // Fixed hardware, for who looks for it even so, as some do who know of no other clock.
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = PM_TIMER_SIZE;
    fadt.x_pm_tmr_blk =
        GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, PM_TIMER_PORT.into());
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// A register of one byte.
fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! FADT: the fixed features (ACPI 6.5, §5.2.9).

use acpi_tables::fadt::{FADTBuilder, Flags, FADT};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::arch::x86_64::layout::SCI;
use crate::arch::x86_64::power::{
    PM1_CONTROL_PORT, PM1_CONTROL_SIZE, PM1_EVENT_PORT, PM1_EVENT_SIZE, RESET_PORT, RESET_VALUE,
};
use crate::arch::x86_64::timers::{CENTURY, PM_TIMER_PORT, PM_TIMER_SIZE};

/// IA-PC boot architecture flags (§5.2.9.3). The bits for legacy devices and an 8042 stay clear:
/// guests with ACPI need neither.
const VGA_NOT_PRESENT: u16 = 1 << 2;
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;

/// Latencies in microseconds that indicate that the C-state does not exist.
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;

/// The FADT of a machine whose DSDT is at `dsdt`, and whose FACS at `facs`.
pub(super) fn fadt(dsdt: u64, facs: u64) -> FADT {
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
    fadt.x_pm1a_evt_blk = ports(PM1_EVENT_PORT, PM1_EVENT_SIZE, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1_CONTROL_SIZE;
    fadt.x_pm1a_cnt_blk = ports(PM1_CONTROL_PORT, PM1_CONTROL_SIZE, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = PM_TIMER_SIZE;
    fadt.x_pm_tmr_blk = ports(PM_TIMER_PORT, PM_TIMER_SIZE, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.reset_reg = ports(RESET_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Registers of `length` bytes from the port `first` on.
fn ports(first: u16, length: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8 * length, 0, access, first.into())
}

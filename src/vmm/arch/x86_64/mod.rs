// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC: PIC, IOAPIC and LAPICs, I/O ports, ACPI.

pub mod acpi;
mod bios_data;
mod board;
pub mod boot;
mod config_ports;
mod cpuid;
mod exits;
pub(crate) mod firmware;
mod interrupts;
mod keyboard;
pub mod layout;
pub(crate) mod message;
mod power;
pub mod probe;
mod processor;
mod timers;

use kvm_ioctls::{Cap, Kvm, VmFd};

pub(crate) use board::Board;
pub(crate) use interrupts::{EdgeLine, IrqChip, Lines};
pub(crate) use processor::{Processor, Processors};

use crate::{Error, Result};

/// KVM capabilities that the machine requires, besides those of every architecture.
pub(crate) const KVM_CAPABILITIES: &[(Cap, &str)] =
    &[(Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"), (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID")];

/// The virtual IOMMU that its firmware can describe.
pub(crate) const IOMMU: &str = "vtd";

/// A virtual machine without memory or vCPUs.
///
/// # Errors
/// KVM cannot create one.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))?;
    // Ignored by processors that need no such segment; KVM requires it before any vCPU.
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("placing its TSS"))?;
    Ok(vm)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PC: PIC, IOAPIC and LAPICs, I/O ports, ACPI.

pub mod acpi;
mod bios_data;
mod board;
pub mod boot;
mod config_ports;
mod cpuid;
mod exits;
pub(in crate::vmm) mod firmware;
mod interrupts;
mod keyboard;
pub mod layout;
pub(in crate::vmm) mod message;
mod power;
pub mod probe;
mod processor;
mod timers;

use kvm_ioctls::{Cap, Kvm, VmFd};

pub(in crate::vmm) use board::Board;
pub(in crate::vmm) use interrupts::{EdgeLine, IrqChip, Lines};
pub(in crate::vmm) use processor::{Processor, Processors};

use crate::vmm::{Error, Result};

/// What the machine cannot do without, besides what every machine needs.
pub(in crate::vmm) const KVM_CAPABILITIES: &[(Cap, &str)] =
    &[(Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"), (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID")];

/// The virtual IOMMU that its firmware can tell a guest of.
pub(in crate::vmm) const IOMMU: &str = "vtd";

/// A virtual machine without memory or vCPUs.
///
/// # Errors
/// KVM has none to give.
pub(in crate::vmm) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm.create_vm().map_err(Error::kvm("making a virtual machine"))?;
    // Ignored by processors that need no such segment; KVM wants it before any vCPU.
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(Error::kvm("placing its TSS"))?;
    Ok(vm)
}

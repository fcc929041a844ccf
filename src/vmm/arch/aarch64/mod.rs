// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine: a GICv3 with an interrupt translation service, PSCI, a device tree.

mod board;
pub mod boot;
pub(in crate::vmm) mod firmware;
mod interrupts;
pub mod layout;
pub(in crate::vmm) mod message;
pub mod probe;
mod processor;

use kvm_ioctls::{Cap, Kvm, VmFd};

pub(in crate::vmm) use board::Board;
pub(in crate::vmm) use interrupts::{EdgeLine, IrqChip, Lines};
pub(in crate::vmm) use processor::{Processor, Processors};

use crate::vmm::{Error, Result};

/// What the machine cannot do without, besides what every machine needs.
pub(in crate::vmm) const KVM_CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL"),
];

/// The virtual IOMMU that its firmware can tell a guest of.
pub(in crate::vmm) const IOMMU: &str = "smmuv3";

/// A virtual machine without memory or vCPUs.
///
/// # Errors
/// KVM has none to give.
pub(in crate::vmm) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    kvm.create_vm().map_err(Error::kvm("making a virtual machine"))
}

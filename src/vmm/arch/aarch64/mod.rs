// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An arm64 machine: a GICv3 with an interrupt translation service, PSCI, a device tree.

mod board;
pub mod boot;
pub(crate) mod firmware;
mod interrupts;
pub mod layout;
pub mod probe;
mod processor;

use kvm_ioctls::{Cap, Kvm, VmFd};
use serde_json::{json, Value};

pub(crate) use board::Board;
pub(crate) use interrupts::{EdgeLine, IrqChip, Lines};
pub(crate) use processor::{Processor, Processors};

use crate::{Error, Result};
use twostage::viommu::MsiMessage;

/// KVM capabilities that the machine requires, besides those of every architecture.
pub(crate) const KVM_CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL"),
];

/// The virtual IOMMU that its firmware can describe.
pub(crate) const IOMMU: &str = "smmuv3";

/// A virtual machine without memory or vCPUs.
///
/// # Errors
/// KVM cannot create one.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    kvm.create_vm().map_err(Error::kvm("creating a virtual machine"))
}

/// Whether the guest's accesses to registers in memory, which it maps as those of a device, and
/// those of this process see each other.
pub(crate) fn memory_is_coherent(vm: &VmFd) -> bool {
    // They do if stage 2 makes all memory write-back (FEAT_S2FWB). KVM says so only by a capability
    // for something else that needs it: KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED.
    const CACHEABLE_PFNMAP: u64 = 243;
    vm.check_extension_raw(CACHEABLE_PFNMAP) > 0
}

/// From now on, a memory slot that `vm` loses does not take the page tables of all others with it.
/// Returns whether that is so.
pub(crate) fn keep_other_slots(_: &VmFd) -> bool {
    // Stage 2 is unmapped by address.
    true
}

/// An interrupt's `message`, decoded for traces: its data is the event number, which the interrupt
/// translation service looks up by the sender's device ID.
pub(crate) fn decoded_message(message: MsiMessage) -> Value {
    let MsiMessage { address, data } = message;
    json!({ "address": format!("{address:#x}"), "event": data })
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The parts of a machine that depend on the processor's architecture, with the same names for
//! each.
//!
//! ```text
//!  boot -------> boot::{Image, StartState}     kernel images, and what the first vCPU starts with
//!  machine ----> create_vm, Processors         the virtual machine, vCPUs, interrupt controllers
//!     |  ------> Board                         the devices that are not on the PCI bus
//!     |  ------> firmware::write               what tells the guest all of it: ACPI, a device tree
//!  interrupts -> IrqChip, Lines, EdgeLine      the inputs of the interrupt controllers
//!  memory, pci -> layout                       where everything is
//!  cli --------> probe::Probe                  what this machine's KVM can do
//!  trace ------> decoded_message               what an interrupt's message says
//! ```
//!
//! This is the only file that depends on the target architecture.

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

// Parts of an arm64 machine that do not depend on the processor: tested on all architectures.
#[cfg(any(target_arch = "aarch64", test, feature = "test-support"))]
pub mod arm64_image;
#[cfg(any(target_arch = "aarch64", test))]
pub mod devicetree;
pub(crate) mod exits;
#[cfg(any(target_arch = "aarch64", test))]
mod pl031;

#[cfg(target_arch = "aarch64")]
pub use aarch64 as current;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;

pub use current::{boot, layout, probe};
pub(super) use current::{
    create_vm, decoded_message, firmware, keep_other_slots, memory_is_coherent, Board, EdgeLine,
    IrqChip, Lines, Processor, Processors, IOMMU, KVM_CAPABILITIES,
};

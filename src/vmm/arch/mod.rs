// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a machine is made of that depends on the processor's architecture: the same names on each.
//!
//! ```text
//!  boot ───────► boot::{Image, StartState}     kernel images, and what the first vCPU starts with
//!  machine ────► create_vm, Processors         the virtual machine, its vCPUs and interrupt controllers
//!     │  ──────► Board                         the devices that are not on the PCI bus
//!     │  ──────► firmware::write               what tells the guest all of it: ACPI, a device tree
//!  interrupts ─► IrqChip, Lines, EdgeLine      the inputs of the interrupt controllers
//!  memory, pci ► layout                        where everything is
//!  cli ────────► probe::Probe                  what this machine's KVM can do
//!  trace ──────► message                       what an interrupt's message says
//! ```
//!
//! This is the only file that asks which architecture it is built for.

use std::sync::Arc;

use super::interrupts::Interrupts;
use super::pci::PciBus;
use super::serial::SerialPort;
use super::stop::Stopper;

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;

pub use current::{boot, layout, probe};
pub(super) use current::{
    create_vm, firmware, message, Board, EdgeLine, IrqChip, Lines, Processor, Processors,
    KVM_CAPABILITIES,
};

/// What the devices that are not on the PCI bus are made of.
pub(super) struct BoardParts<'a> {
    /// For ways to PCI configuration space.
    pub pci: &'a Arc<PciBus>,
    /// For interrupt controllers.
    pub interrupts: &'a Interrupts,
    /// The serial port.
    pub serial: &'a Arc<SerialPort>,
    /// For what switches the machine off or resets it.
    pub stopper: &'a Stopper,
}

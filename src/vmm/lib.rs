// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lightweight VMM: a KVM machine just large enough to put a guest, a virtual IOMMU and PCI
//! devices together.
//!
//! [`Machine`] is built from a [`config::MachineConfig`] and runs until the guest ends it. vCPU
//! threads bring register accesses to the [`bus`]; one event loop serves file descriptors; each
//! device that does DMA has a worker of its own, and so has what the guest says, so that nobody
//! waits for who reads it. Nothing here decides what a DMA may reach: that is the IOMMU's.
#![deny(missing_docs)]
#![warn(missing_debug_implementations)]

pub mod arch;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod config;
mod console;
pub mod devices;
pub mod error;
mod interrupts;
mod iommu;
mod machine;
pub mod memory;
pub mod pci;
mod process;
pub mod report;
pub mod trace;
pub mod vfio;

pub use error::{Error, Result};
pub use machine::Machine;
pub use process::exit_code;
pub use process::stop::StopReason;

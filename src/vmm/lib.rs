// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The lightweight VMM: a KVM machine just large enough to connect a guest, a virtual IOMMU and PCI
//! devices.
//!
//! `Machine` is built from a `config::MachineConfig` and runs until the guest ends it. vCPU
//! threads dispatch register accesses through the `bus`; one event loop serves file descriptors;
//! each device that does DMA has a worker thread, and so has each output, so that nobody waits for
//! readers. Nothing here decides what a DMA may access: that is the IOMMU's job.
//!
//! # Features
//!
//! None is on by default.
//!
//! * `test-support`: assigned devices, for tests of what they need. It may change in any version.
#![deny(missing_docs)]
#![warn(missing_debug_implementations)]

mod arch;
mod boot;
mod bus;
pub mod cli;
mod config;
mod console;
mod devices;
mod error;
mod interrupts;
mod iommu;
mod machine;
mod memory;
mod pci;
mod process;
mod report;
mod trace;
mod vfio;

use error::{Error, Result};
use machine::Machine;
pub use process::exit_code;
/// For the tests of what `vfio-ioctls` lacks; no part of the API.
#[cfg(feature = "test-support")]
#[doc(hidden)]
pub use vfio::{AssignedDevice, HostDevice, Irq, IrqInfo, Mapping, Region};

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
//! * `test-support`: assigned devices and what fuzzers need, for tests. It may change in any
//!   version.
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
pub use process::heap::Heap;
/// What guests and files reach, for fuzzers; no part of the API.
#[cfg(feature = "test-support")]
#[doc(hidden)]
pub mod inside {
    pub use crate::arch::arm64_image;
    pub use crate::arch::boot::StartState;
    pub use crate::arch::layout::{PCI_MMIO_LAST, PCI_MMIO_START};
    #[cfg(target_arch = "x86_64")]
    pub use crate::arch::x86_64::{ConfigPorts, Ioapic};
    pub use crate::boot::{load, BootError};
    pub use crate::bus::{Bus, BusDevice};
    pub use crate::cli::parsed;
    pub use crate::config::{EduConfig, MachineConfig, ModuleConfig, PayloadConfig};
    pub use crate::devices::{edu, threadless, virtio, HostServices};
    pub use crate::devices::{
        DirectMemory, DmaError, DmaMaster, MessageWrites, OfferedServices, ServiceControl, Services,
    };
    pub use crate::memory::MachineMemory;
    pub mod config {
        pub use crate::config::{
            DeviceConfig, DiskConfig, HostChoice, IommuChoice, IommuConfig, IommuModel, NetConfig,
            PciBridgeConfig, RngConfig, RootPortConfig, SerialConfig, SideCoreChoice,
            SideCoreConfig, SmmuV3Options, TapConfig, VfioConfig, VtdOptions,
        };
    }
    pub mod pci {
        pub use crate::pci::{
            BarPlacement, Bridge, BusNumbers, ConfigLender, ConfigPage, ConfigSpace, Ecam,
            EventLine, EventVector, HostBridge, InterruptVector, IntxRouter, Location, MsiMessage,
            PageLoan, PasidCapabilities, PciBus, PciFunction, PciMemory,
        };
    }
    pub mod vfio {
        pub use crate::vfio::{Lender, Loan, Surroundings, VfioPci};
    }
}
/// For the tests of what `vfio-ioctls` lacks; no part of the API.
#[cfg(feature = "test-support")]
#[doc(hidden)]
pub use vfio::{AssignedDevice, HostDevice, Irq, IrqInfo, Mapping, Region};

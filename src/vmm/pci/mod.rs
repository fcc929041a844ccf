// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI Express: a root bus, bridges, functions, and how a guest accesses them.
//!
//! Sources: PCI Local Bus Specification 3.0 (chapter 6), PCI Express Base Specification 6.0
//! (§6.6.2 function-level reset, §7.2 ECAM, §7.5 registers, §7.7.1 MSI, §7.7.2 MSI-X, §7.8.9
//! PASID, §10.5 ATS and PRI).

mod bridge;
mod bus;
mod capabilities;
mod config_page;
mod config_space;
mod function;
mod intx;
pub(crate) mod layout;
mod memory_bar;
mod msix;
mod way;

pub use bridge::{Bridge, BusNumbers, WINDOW_ALIGNMENT};
pub use bus::{Ecam, HostBridge, PciBus, PciMemory};
pub use capabilities::{
    make_endpoint, AtsCapability, ExpressCapability, MsiCapability, PasidCapability, PriCapability,
};
pub use config_page::{ConfigLender, ConfigPage, PageLoan};
pub use config_space::{ConfigSpace, Identity};
pub use function::{Location, PciFunction};
#[cfg(target_arch = "x86_64")]
pub use intx::line_of_pin;
pub use intx::{EventLine, IntxLine, IntxPin, IntxRouter};
pub use layout::{AtsCapabilities, MsixControl, PasidCapabilities};
pub use memory_bar::{BarPlacement, MemoryBar};
pub use msix::{EventVector, InterruptVector, Msix, MsixCapability, MsixPlace};

pub use way::Way;

pub use twostage::viommu::MsiMessage;

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Assigned PCI devices of the host, through VFIO's character devices.
//!
//! [`VfioPci`] is the function that the guest sees. Its memory is mapped into the guest as far as
//! the device and the page size allow, except the MSI-X table, which is trapped; its configuration
//! space follows the tables of `config_image.rs` and `capabilities.rs`, which give reasons; its
//! interrupts go from VFIO to KVM by eventfds, with the same remapping as those of every device.
//!
//! Nothing here maps DMA: the device is bound and attached by the host side of its virtual IOMMU,
//! which blocks it until the guest maps something. VFIO's refusals become [`VfioError`], one line
//! that says what to do. The guest's errors are ignored as a device would, and logged with a limit.
//! No P2P: BARs are not mapped in the IOMMU, so a device cannot access another's.
//!
//! Sources: Linux `include/uapi/linux/vfio.h` and `Documentation/driver-api/vfio.rst`; PCI Express
//! Base Specification 6.0 (§7.5 headers and PCI Express, §7.7 MSI and MSI-X, §7.9 vendor's
//! capabilities, §10.5 ATS and PRI); PCI Power Management 1.2.

mod bars;
mod capabilities;
mod config_image;
mod function;
mod host_device;
mod interrupts;
mod mapping;
mod message_window;
mod msix_structures;
mod services;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vectors;
mod vfio_device;

use std::io;
use std::ops::RangeInclusive;

use config_image::ConfigError;
pub use function::{Surroundings, VfioPci};
#[cfg(feature = "test-support")]
pub use host_device::{HostDevice, Irq, IrqInfo, Region};
pub use mapping::{page_size, KvmSlots, Lender};
#[cfg(feature = "test-support")]
pub use mapping::{Loan, Mapping};
pub use message_window::{message_window, DoorbellWatch};
use twostage::iommufd::HostError;
pub use vfio_device::AssignedDevice;

/// A device cannot be assigned.
#[derive(Debug, thiserror::Error)]
#[error("--vfio {device}: {problem}")]
pub struct VfioError {
    device: String,
    problem: VfioProblem,
}

impl VfioError {
    /// `device`, as named by the user, has `problem`.
    pub fn new(device: &str, problem: VfioProblem) -> Self {
        Self { device: device.to_owned(), problem }
    }
}

/// Why a device cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum VfioProblem {
    /// It is not bound to vfio-pci, or in use: the host's error says what to do.
    #[error(transparent)]
    Bind(#[from] HostError),
    /// VFIO refused something.
    #[error("{what}: {source}")]
    Call {
        /// The operation.
        what: &'static str,
        /// VFIO's error.
        source: io::Error,
    },
    /// The host's MSI window overlaps guest memory.
    #[error(
        "the host directs its interrupt messages to {0:#x?}, where the guest has memory: none \
         would arrive; reduce --memory so that it ends before, or leave the device out"
    )]
    Messages(RangeInclusive<u64>),
    /// It cannot be assigned.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

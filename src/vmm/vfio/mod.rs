// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PCI devices of the host assigned to the guest, through VFIO's character devices.
//!
//! [`VfioPci`] is the function that the guest sees. Its memory is the guest's own where the device
//! and the page size allow, and trapped where MSI-X has its table; its configuration space is what
//! `config_image.rs` and `capabilities.rs` say, each line of their tables with its reason; its
//! interrupts go from VFIO to KVM by eventfds, through the same remapping as those of every device.
//!
//! Nobody here maps DMA: the device is bound and attached by the host side of its virtual IOMMU,
//! which blocks it until the guest says otherwise. What VFIO refuses becomes [`VfioError`], one
//! line that says what to do. What the guest does wrong is ignored as a device would, and logged
//! with a limit. No P2P: BARs are not mapped in the IOMMU, so that a device cannot reach another's.
//!
//! Sources: Linux `include/uapi/linux/vfio.h` and `Documentation/driver-api/vfio.rst`; PCI Express
//! Base Specification 6.0 (§7.5 headers and PCI Express, §7.7 MSI and MSI-X, §7.9 vendor's
//! capabilities); PCI Power Management 1.2.

mod bars;
mod capabilities;
mod config_draft;
mod config_image;
mod device_file;
mod doorbell;
mod error;
mod function;
mod host_device;
mod interrupts;
mod intx;
mod kvm_slots;
mod mapping;
mod message_window;
mod msi;
mod region;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod vectors;

pub use bars::{Lender, Loan};
pub use config_image::ConfigError;
pub use device_file::DeviceFile;
pub use doorbell::DoorbellWatch;
pub use error::{VfioError, VfioProblem};
pub use function::{Surroundings, VfioPci};
pub use host_device::{HostDevice, Irq, IrqInfo};
pub use kvm_slots::KvmSlots;
pub use mapping::{page_size, Mapping};
pub use message_window::message_window;
pub use region::Region;
pub use vectors::MakeVector;

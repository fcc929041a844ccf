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

pub use bars::Lender;
pub use device_file::DeviceFile;
pub use doorbell::DoorbellWatch;
pub use error::{VfioError, VfioProblem};
pub use function::{Surroundings, VfioPci};
pub use kvm_slots::KvmSlots;
pub use mapping::page_size;
pub use message_window::message_window;

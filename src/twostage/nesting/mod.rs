// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Turns the decisions of a virtual IOMMU into host objects.
//!
//! [`vtd`] and [`smmuv3`] implement the host-side traits of the virtual IOMMUs with the verbs of a
//! [`HostIommu`](crate::iommufd::HostIommu). Common to both:
//!
//! * one IOAS ([`GuestIoas`]) holds the guest's memory map (GPA → host memory) and changes only
//!   with it. All virtual IOMMUs of a guest, and devices without one, share it;
//! * its stage 2 is one nesting parent per physical IOMMU;
//! * one `HWPT_NESTED` per stage 1, shared by all requesters that use it, created with the first
//!   and destroyed with the last;
//! * a changed attachment is replaced directly; an unchanged one costs no call;
//! * a batch of invalidations becomes one call; what the host fails to invalidate is blocked and
//!   reported.
//!
//! Files of the same name in both folders do the same and can be read side by side: `attachments`
//! (from policies to host objects), `invalidate` and `merge` (from invalidations to host calls),
//! `nested` and `unit` (the objects), `state`, `faults` (back to the virtual IOMMU), `counters`.
//!
//! Nothing here accesses guest memory or registers, or leaves DMA on a translation that the guest
//! has revoked.

mod error;
mod guest_ioas;
mod host_unit;
mod hw_flags;
mod nested;
mod objects;
pub mod smmuv3;
pub mod survey;
pub mod vtd;

use crate::iommufd::{HwInfo, ObjectId};
use crate::spec::pci::Bdf;
pub use error::NestingError;
pub use guest_ioas::GuestIoas;
pub use host_unit::{host_smmu, host_vtd};

/// The host's description of one device, from which the guest's capabilities are derived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceInfo {
    /// The device's identity for the guest.
    pub rid: Bdf,
    /// The device's identity for the host.
    pub dev: ObjectId,
    /// The registers of its IOMMU, and its PASID width.
    pub info: HwInfo,
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual IOMMU decides, as host objects.
//!
//! [`vtd`] and [`smmuv3`] implement the host-side traits of the virtual IOMMUs with the verbs of a
//! [`HostIommu`](crate::iommufd::HostIommu). What they share:
//!
//! * one IOAS ([`GuestIoas`]) holds the guest's memory map (GPA → host memory), and changes only
//!   with it. All virtual IOMMUs of one guest share it, and devices outside of them;
//! * one nesting parent per physical IOMMU is its stage 2;
//! * one `HWPT_NESTED` per stage 1, shared by all that name it, made with the first and destroyed
//!   with the last;
//! * a change replaces one attachment by the next; what did not change costs no call;
//! * a batch of invalidations becomes one call, and what the host fails to invalidate is blocked
//!   and reported.
//!
//! Files of the same name in both folders do the same, and can be read side by side: `attachments`
//! (from policies to host objects), `invalidate` and `merge` (from invalidations to host calls),
//! `nested` and `unit` (the objects), `state`, `faults` (back to the virtual IOMMU), `counters`.
//!
//! Nothing here ever sees guest memory or registers, nor leaves DMA on a translation that the guest
//! has taken back.

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

/// What the host says of one device, for the capabilities that the guest is offered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeviceInfo {
    /// The device, as the guest knows it.
    pub rid: Bdf,
    /// The device, as the host knows it.
    pub dev: ObjectId,
    /// Its IOMMU's registers, and the width of its PASIDs.
    pub info: HwInfo,
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual IOMMU whose guest-programmed stage-1 tables run in hardware.
//!
//! A guest programs a virtual IOMMU ([`viommu`]); what it wrote becomes iommufd `HWPT_NESTED`
//! objects over one nesting-parent `HWPT_PAGING` ([`nesting`]), through the verbs of the host
//! ([`iommufd`]): the kernel's `/dev/iommu`, or the emulated host IOMMU of the package
//! `twostage-emulated`, which keeps the same objects, errors and caches. [`spec`] holds the layouts
//! all of them share.
//!
//! Dependencies run downward only: `nesting` implements the host-side trait that `viommu`
//! declares and calls `iommufd`; `iommufd` and `spec` import nothing of ours.
//!
//! # Features
//!
//! * `kernel`: the host that is the kernel's `/dev/iommu`, with VFIO's character devices.
//! * `serde`: `Serialize` on reports, counters and guest-visible states.
#![deny(missing_docs)]
#![warn(missing_debug_implementations)]

pub mod iommufd;
pub mod nesting;
#[cfg(any(test, feature = "test-support"))]
#[doc(hidden)]
pub mod patience;
pub mod ratelimit;
pub mod runs;
pub mod spec;
pub mod sync;
pub mod viommu;

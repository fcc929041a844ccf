// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual IOMMU whose guest-programmed stage-1 tables are walked by hardware.
//!
//! The way in is [`mod@unit`]: [`unit::VtdBuilder`], with an example, and [`unit::Smmuv3Builder`]
//! join the parts of a virtual IOMMU and its devices; [`unit::Vtd`] and [`unit::Smmuv3`] have the
//! verbs that a VMM needs. The package's `examples` has a whole program on the kernel's host; those
//! on the emulated host are in `twostage-emulated`.
//!
//! A guest programs a virtual IOMMU ([`viommu`]); its tables become iommufd `HWPT_NESTED` objects
//! on one nesting-parent `HWPT_PAGING` ([`nesting`]), through the verbs of the host ([`iommufd`]):
//! the kernel's `/dev/iommu`, or the emulated host IOMMU of the package `twostage-emulated`, which
//! has the same objects, errors and caches. [`spec`] has the common layouts.
//!
//! Dependencies point downward only: `unit` joins `viommu` and `nesting`; `nesting` implements the
//! host-side trait that `viommu` declares and calls `iommufd`; `iommufd` and `spec` depend on none
//! of these. Below all are small modules that depend on nothing else here, such as [`sync`] and
//! [`jail`], and [`threads`], which needs these two.
//!
//! # Features
//!
//! None is on by default.
//!
//! * `kernel`: the host on the kernel's `/dev/iommu`, with VFIO's character devices.
//! * `vfio-ioctls`: that host takes over devices of the package `vfio-ioctls`.
//! * `acpi`: the firmware tables DMAR and IORT, in the form of the package `acpi_tables`.
//! * `devicetree`: the nodes of virtual SMMUs in device trees, with the package `vm-fdt`.
//! * `serde`: `Serialize` for reports, counters and snapshots, and `Deserialize` for snapshots.
//! * `test-support`: a host that records its calls, for tests of code that uses the verbs. It may
//!   change in any version.
//!
//! # Versions
//!
//! Semantic versions. So that more can be added without breaking code:
//!
//! * Configurations, counters, states and errors are `#[non_exhaustive]`, or all their fields are
//!   private. A configuration starts from its default, and is changed by `with_…` or field by
//!   field: `VtdConfig::default().with_pasid_bits(Some(16))`.
//! * So are [`iommufd::HwInfo`], [`iommufd::Extensions`], [`viommu::vtd::HostVtd`] and
//!   [`viommu::smmuv3::HostSmmu`], which new abilities of hosts are added to. `new` makes these,
//!   and the errors that implementers of a trait return.
//! * What someone has to handle completely is not: [`viommu::vtd::Policy`],
//!   [`viommu::smmuv3::StreamPolicy`] and what they contain or are contained in
//!   ([`viommu::vtd::RequesterConfig`]). Nor are plain values of which a specification or the uAPI
//!   gives every field ([`iommufd::HwptAlloc`]; nodes of a device tree). More of these are a
//!   breaking change.
//! * Traits are there to be implemented and wrapped by others. A method that a trait gets later has
//!   a default body; a verb of [`iommufd::HostIommu`] is then refused with `EOPNOTSUPP`.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(missing_docs)]
#![warn(missing_debug_implementations)]

#[cfg(feature = "acpi")]
pub mod acpi;
pub mod counters;
#[cfg(feature = "devicetree")]
pub mod devicetree;
pub mod iommufd;
pub mod jail;
pub mod nesting;
#[cfg(any(test, feature = "test-support"))]
#[doc(hidden)]
pub mod patience;
pub mod ratelimit;
pub mod runs;
#[cfg(any(test, feature = "test-support"))]
#[doc(hidden)]
pub mod skips;
pub mod spec;
pub mod sync;
pub mod threads;
pub mod unit;
pub mod viommu;

/// A whole program, which the package's tests run. More are in `twostage-emulated`.
#[cfg(all(doc, not(doctest)))]
pub mod examples {
    #![doc = concat!("# `kernel_host`\n\n```\n", include_str!("examples/kernel_host.rs"), "```\n")]
}

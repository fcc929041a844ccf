// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! DMA through two stages: a guest's driver programs a virtual IOMMU by its registers, and devices
//! do DMA through an emulated host IOMMU with caches.
//!
//! What every architecture guarantees to its guest is in [`conformance`]; the rest is next to its
//! driver. What each invalidation drops is compared with [`caches`] that follow the specification's
//! text.

mod caches;
mod common;
mod conformance;
mod smmuv3;
mod vtd;

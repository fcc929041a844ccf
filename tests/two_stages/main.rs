// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One DMA through two stages: a guest's driver programs a virtual IOMMU by its registers, and
//! devices do DMA through an emulated host IOMMU with caches.
//!
//! What every architecture owes to its guest is in [`conformance`]; what is its own, beside its
//! driver. What each invalidation drops is compared with [`caches`] that do what the text says.

mod caches;
mod common;
mod conformance;
mod smmuv3;
mod vtd;

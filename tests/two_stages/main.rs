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
#[path = "../fuzz/src/states.rs"]
mod states;
mod vtd;

proptest::proptest! {
    /// As `make fuzz` does with more states.
    #[test]
    fn a_changed_snapshot_is_refused_or_what_the_restored_one_has(
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)
    ) {
        states::run(&bytes);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One contract for every host: the same checks on the emulated host and on `/dev/iommu`.
//!
//! A kernel's host needs a device: QEMU's `edu`, bound to vfio-pci. Without
//! `TWOSTAGE_CONTRACT_DEVICE` the test reports that it is skipped.
//!
//!   TWOSTAGE_CONTRACT_DEVICE=/dev/vfio/devices/vfio0 host_contract --exact kernel --nocapture

mod contract;
mod emulated;

#[test]
fn emulated_vtd() {
    contract::check(&emulated::vtd());
}

#[test]
fn emulated_vtd_without_nesting() {
    contract::check(&emulated::vtd_without_nesting());
}

#[test]
fn emulated_smmuv3() {
    contract::check(&emulated::smmuv3());
}

#[test]
fn emulated_smmuv3_without_nesting() {
    contract::check(&emulated::smmuv3_without_nesting());
}

#[test]
fn kernel() {
    contract::kernel::check_named();
}

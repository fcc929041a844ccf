// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One contract for every host: the same checks over the emulated host and over `/dev/iommu`.
//!
//! Over a kernel's host it needs a device: an `edu` of QEMU's, bound to vfio-pci. Where
//! `TWOSTAGE_CONTRACT_DEVICE` names none, the test says that it is skipped.
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One contract for every host: the same checks over the emulated host and over `/dev/iommu`.
//!
//! Over a kernel's host the test is ignored unless asked for, as it needs a device: an `edu` of
//! QEMU's, bound to vfio-pci. `TWOSTAGE_CONTRACT_DEVICE` names it, as `twostage run --vfio path=`
//! does:
//!
//!   TWOSTAGE_CONTRACT_DEVICE=/dev/vfio/devices/vfio0 host_contract --ignored --nocapture

mod contract;
mod emulated;

#[test]
fn emulated_vtd() {
    contract::check(&emulated::vtd());
}

#[test]
#[ignore = "needs an edu behind vfio-pci: TWOSTAGE_CONTRACT_DEVICE names it"]
fn kernel() {
    contract::kernel::check_named();
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A program that uses iommufd and VFIO by raw ioctls, and prints the results.
//!
//!   raw-ioctls flow DEVICE      the nested flow on a VFIO device behind a VT-d
//!   raw-ioctls flow-without-dirty DEVICE    the same without dirty tracking
//!   raw-ioctls pasids DEVICE    the same for PASIDs of the device
//!   raw-ioctls asking DEVICE    and for page requests
//!   raw-ioctls smmu DEVICE      the same behind an SMMUv3
//!   raw-ioctls NAME             one of the others; see `main`
//!
//! It does not depend on who provides `/dev/iommu`. It panics if a required system call fails;
//! results that may differ are printed, and compared by whoever started it.

mod asking;
mod container;
mod descriptors;
mod express;
mod memory;
mod pasids;
mod smmu;
mod sysfs;
mod uapi;
mod vtd;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["flow", device] => vtd::flow(device, true),
        ["flow-without-dirty", device] => vtd::flow(device, false),
        ["smmu", device] => smmu::flow(device),
        ["container", group, device, own] => container::run(group, device, own),
        ["descriptors"] => descriptors::run(),
        ["ranges"] => descriptors::ranges(),
        ["memory", device] => memory::run(device),
        ["protected", device] => memory::protected(device),
        ["files", device] => memory::files(device),
        ["closing"] => descriptors::closing(),
        ["asking", device] => asking::run(device),
        ["pasids", device] => pasids::run(device),
        ["page-requests", device] => vtd::page_requests(device),
        ["addresses", device] => vtd::addresses(device),
        ["express", device] => express::run(device),
        ["hot-reset", device, group, name] => express::hot_reset(device, group, name),
        ["sysfs"] => sysfs::run(),
        ["fortified", device] => sysfs::fortified(device),
        ["fork"] => descriptors::fork(),
        ["vfork"] => descriptors::vfork(),
        ["exec"] => descriptors::exec(),
        ["inherited", fd] => descriptors::inherited(fd.parse().expect("a number")),
        ["threads"] => descriptors::threads(),
        _ => panic!("no such program: {arguments:?}"),
    }
}

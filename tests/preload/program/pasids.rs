// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! PASIDs of a device behind a VT-d: a guest's tables for each, attached, replaced and detached.

use std::io::Result;
use std::mem::size_of;

use iommufd_bindings::{
    iommu_hw_info, iommu_hwpt_alloc, iommu_hwpt_vtd_s1, IOMMUFD_CMD_GET_HW_INFO,
};

use crate::uapi::*;
use crate::vtd::map_in;

/// `IOMMU_HWPT_ALLOC_NEST_PARENT`, `IOMMU_HWPT_ALLOC_PASID`.
pub const NEST_PARENT: u32 = 1 << 0;
pub const PASID: u32 = 1 << 3;
/// Tables, and a page that each maps.
const SPACES: [(u64, u64); 2] = [(0x10_0000, 0x20_0000), (0x11_0000, 0x20_1000)];
/// Where results go, which all tables map.
const RESULT: u64 = 0x20_2000;
const IOVA: u64 = 0x12_3456_7000;
/// The register that selects the PASID of DMA, and its bit that there is one.
const DMA_PASID: u64 = 0xa0;
const VALID: u32 = 1 << 31;

/// `VFIO_DEVICE_ATTACH_IOMMUFD_PT` with `VFIO_DEVICE_ATTACH_PASID`.
pub fn attach(device: &Device, pasid: u32, pt: u32) -> Result<()> {
    // argsz, flags, pt_id, pasid
    ioctl(device.fd(), vfio(19), &mut [16, 1, pt, pasid])
}

/// `VFIO_DEVICE_DETACH_IOMMUFD_PT` likewise.
pub fn detach(device: &Device, pasid: u32) -> Result<()> {
    // argsz, flags, pasid
    ioctl(device.fd(), vfio(20), &mut [12, 1, pasid])
}

/// The width of its PASIDs in bits, and whether requests may ask for execute and for supervisor
/// rights.
fn widths(iommufd: i32, dev: u32) -> Result<(u8, bool, bool)> {
    let size = size_of::<iommu_hw_info>() as u32;
    let mut info = iommu_hw_info { size, dev_id: dev, ..Default::default() };
    ioctl(iommufd, IOMMUFD_CMD_GET_HW_INFO, &mut info)?;
    // `IOMMU_HW_CAP_PCI_PASID_EXEC`, `IOMMU_HW_CAP_PCI_PASID_PRIV`.
    let capable = |bit: u64| info.out_capabilities & bit != 0;
    Ok((info.out_max_pasid_log2, capable(1 << 1), capable(1 << 2)))
}

/// Tables at `tables`, nested on `parent`, with `flags`; page requests go to `fault`, if one says
/// so.
pub fn nested(
    iommufd: i32,
    dev: u32,
    parent: u32,
    tables: u64,
    flags: u32,
    fault: u32,
) -> Result<u32> {
    let data = iommu_hwpt_vtd_s1 { pgtbl_addr: tables, addr_width: 48, ..Default::default() };
    let alloc = iommu_hwpt_alloc {
        flags,
        dev_id: dev,
        pt_id: parent,
        fault_id: fault,
        // `IOMMU_HWPT_DATA_VTD_S1`.
        data_type: 1,
        data_len: size_of::<iommu_hwpt_vtd_s1>() as u32,
        data_uptr: &raw const data as u64,
        ..Default::default()
    };
    hwpt_alloc(iommufd, alloc)
}

/// From now on DMA has `pasid`.
pub fn select(device: &Device, pasid: Option<u32>) {
    device.write32(DMA_PASID, pasid.map_or(0, |pasid| pasid | VALID));
}

/// What the device reads at the address that all tables map, with `pasid` or without: 0 if it is
/// blocked.
fn found(guest: &Guest, device: &Device, pasid: Option<u32>) -> String {
    guest.set(RESULT, 0);
    select(device, pasid);
    if device.fetch(IOVA, 8) {
        device.store(IOVA + PAGE, 8);
    }
    format!("{:#x}", guest.get(RESULT))
}

/// The flow on the device at `path`.
pub fn run(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    println!("attach before bind: {}", outcome(attach(&device, 5, 1)));
    let dev = device.bind(iommufd).expect("bind");
    println!("PASIDs: {:?}", widths(iommufd, dev).expect("GET_HW_INFO"));
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    ioas_map(iommufd, ioas, guest.address(), MEMORY, 0).expect("IOAS_MAP");
    let parent = |flags| {
        let flags = NEST_PARENT | flags;
        let alloc = iommu_hwpt_alloc { flags, dev_id: dev, pt_id: ioas, ..Default::default() };
        hwpt_alloc(iommufd, alloc).expect("a nesting parent")
    };
    let (plain, parent) = (parent(0), parent(PASID));
    for (number, (tables, page)) in (1..).zip(SPACES) {
        guest.set(page, 0x1111 * number);
        map_in(&guest, tables, IOVA + PAGE, Some(RESULT));
        map_in(&guest, tables, IOVA, Some(page));
    }
    let spaces = SPACES.map(|(tables, _)| nested(iommufd, dev, parent, tables, PASID, 0));
    let spaces = spaces.map(|space| space.expect("nested tables"));
    let without = nested(iommufd, dev, plain, SPACES[0].0, 0, 0).expect("nested tables");

    println!("attach one without the flag: {}", outcome(attach(&device, 5, without)));
    println!("attach: {}", outcome(attach(&device, 5, spaces[0])));
    println!("PASID 5: {}", found(&guest, &device, Some(5)));
    println!("attach another PASID: {}", outcome(attach(&device, 0xf_ffff, spaces[1])));
    println!("PASID 0xfffff: {}", found(&guest, &device, Some(0xf_ffff)));
    println!("PASID 5: {}", found(&guest, &device, Some(5)));
    println!("attach one too wide: {}", outcome(attach(&device, 0x10_0000, spaces[1])));
    println!("attach the IOAS for requests without: {}", outcome(device.attach(plain)));
    println!("attach the parent: {}", outcome(device.attach(parent)));
    println!("PASID 5: {}", found(&guest, &device, Some(5)));

    println!("replace: {}", outcome(attach(&device, 5, spaces[1])));
    println!("PASID 5: {}", found(&guest, &device, Some(5)));
    println!("replace again: {}", outcome(attach(&device, 5, spaces[1])));
    map_in(&guest, SPACES[1].0, IOVA, Some(SPACES[0].1));
    let (result, done) = invalidate(iommufd, spaces[1], &[(IOVA, 1)]);
    println!("invalidate: {}, {done} done", outcome(result));
    for pasid in [5, 0xf_ffff] {
        println!("PASID {pasid:#x}: {}", found(&guest, &device, Some(pasid)));
    }
    println!("destroy one in use: {}", outcome(destroy(iommufd, spaces[1])));
    println!("destroy one not in use: {}", outcome(destroy(iommufd, spaces[0])));

    println!("detach: {}", outcome(detach(&device, 5)));
    println!("PASID 5: {}", found(&guest, &device, Some(5)));
    println!("detach again: {}", outcome(detach(&device, 5)));
    println!("PASID 0xfffff: {}", found(&guest, &device, Some(0xf_ffff)));
    println!("detach the parent: {}", outcome(device.detach()));
    println!("PASID 0xfffff: {}", found(&guest, &device, Some(0xf_ffff)));
    // The other PASID is still attached.
    println!("destroy device: {}", outcome(destroy(iommufd, dev)));
}

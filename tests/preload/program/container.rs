// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VFIO before iommufd: a container, a group, a device of the group.
#![allow(unsafe_code)]

use crate::descriptors::child;
use crate::uapi::*;
use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::FromRawFd;

const LENGTH: u64 = 0x2000;
const IOVA: u64 = 0x10_0000;

/// An ioctl that takes a number, or an address.
fn call(fd: i32, number: u32, argument: u64) -> Result<i32> {
    // SAFETY: the ioctls below take a number, or the address of a structure.
    match unsafe { libc::ioctl(fd, request(vfio(number)), argument) } {
        -1 => Err(Error::last_os_error()),
        value => Ok(value),
    }
}

/// Maps, makes the device at the PCI address `device` of the group at `path` do DMA, and unmaps;
/// then checks that the group and the device's own character device `own` exclude each other.
pub fn run(path: &str, device: &str, own: &str) {
    let container = open("/dev/vfio/vfio");
    println!("version {:?}, type1v2 {:?}", call(container, 0, 0).ok(), call(container, 1, 3).ok());
    println!("type1v2 without a group: {}", outcome(call(container, 2, 3)));
    let group = open(path);
    // argsz, flags
    let mut status = [8u32, 0];
    ioctl(group, vfio(3), &mut status).expect("VFIO_GROUP_GET_STATUS");
    println!("group: flags {}", status[1]);
    let name = CString::new(device).expect("no zero");
    println!("device without a container: {}", outcome(call(group, 6, name.as_ptr() as u64)));
    println!("no container: {}", outcome(call(group, 4, &raw const group as u64)));
    println!("container: {}", outcome(call(group, 4, &raw const container as u64)));
    println!("another: {}", outcome(call(group, 4, &raw const container as u64)));
    ioctl(group, vfio(3), &mut status).expect("VFIO_GROUP_GET_STATUS");
    println!("group: flags {}", status[1]);
    println!("type1v2: {}", outcome(call(container, 2, 3)));
    let other = CString::new("0000:7f:00.0").expect("no zero");
    println!("no such device: {}", outcome(call(group, 6, other.as_ptr() as u64)));
    let fd = call(group, 6, name.as_ptr() as u64).expect("VFIO_GROUP_GET_DEVICE_FD");
    let second = call(group, 6, name.as_ptr() as u64).expect("the device again");
    println!("another descriptor: {}", second != fd);
    child(|| println!("in a child: {}", outcome(call(group, 6, name.as_ptr() as u64))));
    // SAFETY: the descriptor is new.
    let mut device = Device::from(unsafe { File::from_raw_fd(fd) });
    device.start().expect("the device");

    let memory = vec![0x5au8; LENGTH as usize + 0x1000];
    let address = (memory.as_ptr() as u64).next_multiple_of(0x1000);
    // argsz, flags, vaddr, iova, size
    let mut map = [32 | 3 << 32, address, IOVA, LENGTH];
    println!("map: {}", outcome(ioctl(container, vfio(13), &mut map)));
    println!("fetch {}, store {}", device.fetch(IOVA, 16), device.store(IOVA + LENGTH, 16));
    // argsz, flags, iova, size
    let mut unmap = [24, IOVA, LENGTH];
    println!("unmap: {}, {:#x}", outcome(ioctl(container, vfio(14), &mut unmap)), unmap[2]);
    println!("fetch {}", device.fetch(IOVA, 16));
    drop(device);
    // SAFETY: the descriptor is new.
    let mut device = Device::from(unsafe { File::from_raw_fd(second) });
    device.start().expect("the device");
    println!("map: {}", outcome(ioctl(container, vfio(13), &mut map)));
    println!("the other descriptor: fetch {}", device.fetch(IOVA, 16));
    // Through the device's own character device, which can be opened at any time.
    let iommufd = open("/dev/iommu");
    let mut own = Device::open(own);
    println!("bind beside the group: {}", outcome(own.bind(iommufd)));
    drop(device);
    println!("no container any more: {}", outcome(call(group, 5, 0)));
    println!("none: {}", outcome(call(group, 5, 0)));
    println!("bind beside the open group: {}", outcome(own.bind(iommufd)));
    // SAFETY: the descriptor is this function's.
    unsafe { libc::close(group) };
    println!("bind: {}", outcome(own.bind(iommufd)));
    println!("the group beside: {}", outcome(File::open(path)));
    drop(own);
    println!("the group: {}", outcome(File::open(path)));
}

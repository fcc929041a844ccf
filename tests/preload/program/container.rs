// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! VFIO as programs knew it before iommufd: a container, a group, a device of the group.

use crate::uapi::*;
use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::FromRawFd;

const LENGTH: u64 = 0x2000;
const IOVA: u64 = 0x10_0000;

/// An ioctl that takes a number, or an address.
fn call(fd: i32, number: u32, argument: u64) -> Result<i32> {
    // SAFETY: the ioctls below take a number, or the address of what they ask for.
    match unsafe { libc::ioctl(fd, request(vfio(number)), argument) } {
        -1 => Err(Error::last_os_error()),
        value => Ok(value),
    }
}

/// Maps, lets the device at the PCI address `device` of the group do DMA, and unmaps.
pub fn run(group: &str, device: &str) {
    let container = open("/dev/vfio/vfio");
    println!("version {:?}, type1v2 {:?}", call(container, 0, 0).ok(), call(container, 1, 3).ok());
    println!("type1v2 without a group: {}", outcome(call(container, 2, 3)));
    let group = open(group);
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
    println!("the device again: {}", outcome(call(group, 6, name.as_ptr() as u64)));
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
    println!("no container any more: {}", outcome(call(group, 5, 0)));
    println!("none: {}", outcome(call(group, 5, 0)));
}

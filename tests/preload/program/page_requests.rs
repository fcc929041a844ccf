// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: a device requests a page that is missing in the guest's tables, and continues
//! after a response that it is there.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::mem::size_of;
use std::os::fd::RawFd;

use iommufd_bindings::{iommu_hwpt_page_response, iommu_hwpt_pgfault};

use crate::flow::{map, FIRST, IOVA, SECOND, TABLES};
use crate::guest::{Guest, MEMORY};
use crate::processes::child;
use crate::uapi::*;

/// `IOMMUFD_PAGE_RESP_SUCCESS`, `IOMMUFD_PAGE_RESP_INVALID`.
const SUCCESS: u32 = 0;
const INVALID: u32 = 1;

/// The pending request in the fault queue `fd`, if any.
fn asked(fd: RawFd) -> Option<iommu_hwpt_pgfault> {
    let mut fault = iommu_hwpt_pgfault::default();
    let size = size_of::<iommu_hwpt_pgfault>();
    // SAFETY: there is room for a record.
    let read = unsafe { libc::read(fd, (&raw mut fault).cast(), size) };
    (read == size as isize).then_some(fault)
}

/// Responds to a request.
fn respond(fd: RawFd, cookie: u32, code: u32) -> Result<()> {
    let response = iommu_hwpt_page_response { cookie, code };
    let size = size_of::<iommu_hwpt_page_response>();
    // SAFETY: the structure is as long as that.
    match unsafe { libc::write(fd, (&raw const response).cast(), size) } {
        written if written == size as isize => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: there is one.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}

/// On the device at `path`, which sends page requests.
pub fn run(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    let dev = device.bind(iommufd).expect("bind");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    ioas_map(iommufd, ioas, guest.address(), MEMORY, 0).expect("IOAS_MAP");
    let parent = plain_nesting_parent(iommufd, dev, ioas).expect("a nesting parent");
    let (id, faults) = fault_queue(iommufd).expect("FAULT_QUEUE_ALLOC");
    map(&guest, IOVA, None);
    let nested = nested(iommufd, dev, parent, TABLES, Some(id)).expect("nested tables");
    println!("attach: {}", outcome(device.attach(nested)));

    // The contents of the buffer come from the guest, too.
    map(&guest, IOVA, Some(FIRST));
    guest.set(FIRST, 0x1111);
    assert!(device.fetch(IOVA, 8));
    println!("readable {}", is_readable(faults));
    device.start_store(IOVA + 0x1008, 8);
    println!("readable {}, busy {}, {:?}", is_readable(faults), device.is_busy(), device.result());
    let fault = asked(faults).expect("a request");
    assert_eq!(fault.dev_id, dev);
    let iommu_hwpt_pgfault { flags, pasid, grpid, perm, addr, length, cookie, .. } = fault;
    println!("asked: {flags:#x} {pasid} {grpid} {perm:#x} {addr:#x} {length} {cookie}");
    println!("readable {}, busy {}", is_readable(faults), device.is_busy());
    map(&guest, IOVA + 0x1000, Some(SECOND));
    println!("moved {:#x}", guest.get(SECOND + 8));
    println!("respond: {}", outcome(respond(faults, cookie, SUCCESS)));
    println!("moved {:#x}", guest.get(SECOND + 8));
    println!("busy {}, {:?}", device.is_busy(), device.result());
    println!("respond again: {}", outcome(respond(faults, cookie, SUCCESS)));

    // The response claims that it is there; then it is refused.
    device.start_store(IOVA + 0x2000, 8);
    for code in [SUCCESS, SUCCESS, INVALID] {
        let fault = asked(faults).expect("a request");
        println!("asked: {:#x}", fault.addr);
        respond(faults, fault.cookie, code).expect("a response");
    }
    println!("busy {}, {:x?}, {}", device.is_busy(), device.result(), is_readable(faults));

    // The attachment ends.
    device.start_store(IOVA + 0x2000, 8);
    println!("busy {}", device.is_busy());
    println!("detach: {}", outcome(device.detach()));
    println!("busy {}, {:x?}", device.is_busy(), device.result());
    println!("nothing to read: {}", asked(faults).is_none());

    // A child process serves.
    device.attach(nested).expect("attach");
    device.start_store(IOVA + 0x2000, 8);
    child(|| {
        let fault = asked(faults).expect("a request");
        map(&guest, IOVA + 0x2000, Some(FIRST));
        respond(faults, fault.cookie, SUCCESS).expect("a response");
    });
    println!("busy {}, {:?}", device.is_busy(), device.result());

    // Nobody responds.
    device.start_store(IOVA + 0x3000, 8);
    let cookie = asked(faults).expect("a request").cookie;
    drop(device);
    println!("respond too late: {}", outcome(respond(faults, cookie, SUCCESS)));
    println!("destroy nested: {}", outcome(destroy(iommufd, nested)));
}

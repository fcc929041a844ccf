// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nested flow on a VT-d: guest memory on a nesting parent, guest tables on it, DMA through
//! both; and the page requests of a device.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::mem::size_of;
use std::os::fd::RawFd;

use iommufd_bindings::{iommu_hwpt_page_response, iommu_hwpt_pgfault};

use crate::descriptors::child;
use crate::uapi::*;

/// The guest's tables, and two pages for data.
const TABLES: u64 = 0x10_0000;
const FIRST: u64 = 0x20_0000;
const SECOND: u64 = 0x20_1000;
/// The guest's address of the data.
const IOVA: u64 = 0x12_3456_7000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;

/// Makes the tables of four levels map `iova` to `page`; `None`: to nothing.
fn map(guest: &Guest, iova: u64, page: Option<u64>) {
    map_in(guest, TABLES, iova, page);
}

/// The same, in the tables at `tables`.
pub fn map_in(guest: &Guest, tables: u64, iova: u64, page: Option<u64>) {
    for level in (0..4u64).rev() {
        // One table for each level is enough.
        let table = tables + (3 - level) * PAGE;
        let entry = table + (iova >> (12 + 9 * level) & 0x1ff) * 8;
        let value = match (level, page) {
            (0, Some(page)) => page | ENTRY,
            (0, None) => 0,
            _ => (table + PAGE) | ENTRY,
        };
        guest.set(entry, value);
    }
}

/// A fault queue without faults.
fn faults(iommufd: i32) {
    let (id, fd) = fault_queue(iommufd).expect("FAULT_QUEUE_ALLOC");
    let mut poll = libc::pollfd { fd, events: libc::POLLIN | libc::POLLOUT, revents: 0 };
    let mut record = [0u8; 40];
    // SAFETY: there is room for a record; the descriptor is this function's.
    unsafe {
        assert_eq!(libc::poll(&mut poll, 1, 0), 1);
        println!("fault queue: readable {}", poll.revents & libc::POLLIN != 0);
        println!("writable {}", poll.revents & libc::POLLOUT != 0);
        println!("read: {}", libc::read(fd, record.as_mut_ptr().cast(), record.len()));
        println!("destroy while open: {}", outcome(destroy(iommufd, id)));
        libc::close(fd);
    }
    println!("destroy: {}", outcome(destroy(iommufd, id)));
}

/// Prints which pages of data are dirty, and cleans them if `clear`. Pages of tables may be dirty,
/// too, with the flags that the IOMMU sets in their entries.
fn print_dirty(iommufd: i32, parent: u32, clear: bool) {
    let dirty = dirty_pages(iommufd, parent, MEMORY, clear).expect("GET_DIRTY_BITMAP");
    let [first, second] = [FIRST, SECOND].map(|page| dirty.contains(&(page / PAGE)));
    println!("dirty{}: first {first}, second {second}", if clear { ", and cleared" } else { "" });
}

/// Dirty pages of data at `first` and `second` in the address space that `device` is attached to,
/// while the second is written. Tracking goes on.
fn dirty(iommufd: i32, parent: u32, device: &Device, first: u64, second: u64) {
    println!("track dirty pages: {}", outcome(track_dirty(iommufd, parent, true)));
    println!("dirty at the start: {}", dirty_pages(iommufd, parent, MEMORY, false).unwrap().len());
    println!("fetch, which makes nothing dirty: {}", device.fetch(first, 8));
    println!("store, the page is dirty: {}", device.store(second, 8));
    print_dirty(iommufd, parent, false);
    print_dirty(iommufd, parent, true);
    println!("dirty since: {}", dirty_pages(iommufd, parent, MEMORY, true).unwrap().len());
    // The IOMMU may not remember that it has set the flag.
    println!("store again, the page is dirty again: {}", device.store(second, 8));
    print_dirty(iommufd, parent, true);
}

/// What has no dirty pages.
fn not_dirty(iommufd: i32, dev: u32, ioas: u32, nested: u32) {
    let of = |hwpt| {
        let [set, get] = [
            outcome(track_dirty(iommufd, hwpt, true)),
            outcome(dirty_pages(iommufd, hwpt, MEMORY, true)),
        ];
        format!("{set}, its bitmap: {get}")
    };
    println!("track dirty pages of nested: {}", of(nested));
    let plain = plain_nesting_parent(iommufd, dev, ioas).expect("a nesting parent");
    println!("track dirty pages of another: {}", of(plain));
    println!("destroy the one without dirty pages: {}", outcome(destroy(iommufd, plain)));
}

/// The addresses that the unit of the device at `path` translates, and those past them.
pub fn addresses(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    let dev = device.bind(iommufd).expect("bind");
    let (vtd, _) = hw_info_vtd(iommufd, dev).expect("GET_HW_INFO");
    let cap = vtd.expect("a VT-d").cap_reg;
    println!("CAP.MGAW {}, CAP.SAGAW {:#x}", (cap >> 16 & 0x3f) + 1, cap >> 8 & 0x1f);
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    device.attach(ioas).expect("attach");
    let ranges = ioas_iova_ranges(iommufd, ioas).expect("IOAS_IOVA_RANGES");
    for (first, last) in &ranges {
        println!("from {first:#x} to {last:#x}");
    }
    let end = ranges.last().expect("a range").1 + 1;
    let map_at = |iova| outcome(ioas_map(iommufd, ioas, guest.address() + FIRST, PAGE, iova));
    println!("map the last page: {}", map_at(end - PAGE));
    println!("past it: {}", map_at(end));
    guest.set(FIRST, 0x1111);
    println!("fetch {}, past it {}", device.fetch(end - PAGE, 8), device.fetch(end, 8));
    println!("store {}", device.store(end - PAGE + 8, 8));
    println!("moved {:#x}", guest.get(FIRST + 8));

    // What the guest's tables lead to, the second stage translates.
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    ioas_map(iommufd, ioas, guest.address(), MEMORY, 0).expect("IOAS_MAP");
    let parent = plain_nesting_parent(iommufd, dev, ioas).expect("a nesting parent");
    let ranges = ioas_iova_ranges(iommufd, ioas).expect("IOAS_IOVA_RANGES");
    let end = ranges.last().expect("a range").1 + 1;
    let past = outcome(ioas_map(iommufd, ioas, guest.address(), PAGE, end));
    println!("second stage: to {:#x}, past it: {past}", end - 1);
    let nested = nested(iommufd, dev, parent, TABLES, None).expect("nested tables");
    device.attach(nested).expect("attach");
    map(&guest, IOVA, Some(end | FIRST));
    println!("tables that lead past it: fetch {}", device.fetch(IOVA, 8));
    map(&guest, IOVA + PAGE, Some(FIRST));
    println!("within: fetch {}", device.fetch(IOVA + PAGE, 8));
}

/// The flow on the device at `path`, with dirty tracking if `track`.
pub fn flow(path: &str, track: bool) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    println!("attach before bind: {}", outcome(device.attach(1)));
    let dev = device.bind(iommufd).expect("bind");
    println!("bound again: {}", outcome(device.bind(iommufd)));
    let (vtd, tracks) = hw_info_vtd(iommufd, dev).expect("GET_HW_INFO");
    let nesting = vtd.is_some_and(|vtd| vtd.ecap_reg >> 26 & 1 != 0);
    println!("VT-d {}, nesting {nesting}", vtd.is_some());
    if track {
        println!("dirty tracking {tracks}");
    }

    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    println!("small pages: {}", outcome(small_pages(iommufd, ioas)));
    let mapped = ioas_map(iommufd, ioas, guest.address(), MEMORY, 0);
    println!("map: {}", outcome(mapped));
    let mapped = ioas_map(iommufd, ioas, guest.address(), MEMORY, 0);
    println!("map again: {}", outcome(mapped));
    let parent = if track { nesting_parent } else { plain_nesting_parent };
    let parent = parent(iommufd, dev, ioas).expect("a nesting parent");
    println!("attach parent: {}", outcome(device.attach(parent)));
    guest.set(FIRST, 0x1111);
    println!("fetch from the parent: {}", device.fetch(FIRST, 8));
    println!("store to the parent: {}", device.store(SECOND, 8));
    println!("moved {:#x}", guest.get(SECOND));
    if track {
        dirty(iommufd, parent, &device, FIRST, SECOND);
    }

    map(&guest, IOVA, Some(FIRST));
    let nested = nested(iommufd, dev, parent, TABLES, None).expect("nested tables");
    println!("attach nested: {}", outcome(device.attach(nested)));
    println!("fetch through the tables: {}", device.fetch(IOVA, 8));
    if track {
        // Since before the nested tables were there; then from now on.
        map(&guest, IOVA + PAGE, Some(SECOND));
        println!("store through the tables, the page is dirty: {}", device.store(IOVA + PAGE, 8));
        println!("track dirty pages no more: {}", outcome(track_dirty(iommufd, parent, false)));
        // What was dirty by then still is, until it is cleared.
        print_dirty(iommufd, parent, true);
        println!("store, no page is dirty: {}", device.store(IOVA + PAGE, 8));
        print_dirty(iommufd, parent, true);
        dirty(iommufd, parent, &device, IOVA, IOVA + PAGE);
        not_dirty(iommufd, dev, ioas, nested);
    }
    guest.set(SECOND, 0);
    map(&guest, IOVA, Some(SECOND));
    let (result, done) = invalidate(iommufd, nested, &[(IOVA, 1)]);
    println!("invalidate: {}, {done} done", outcome(result));
    println!("store through the changed tables: {}", device.store(IOVA, 8));
    println!("first {:#x}, second {:#x}", guest.get(FIRST), guest.get(SECOND));

    if track {
        print_dirty(iommufd, parent, true);
        println!("track dirty pages no more: {}", outcome(track_dirty(iommufd, parent, false)));
    }

    map(&guest, IOVA, None);
    let (result, done) = invalidate(iommufd, nested, &[(IOVA, 1), (IOVA + 1, 1), (IOVA, 1)]);
    println!("invalidate with a bad entry: {}, {done} done", outcome(result));
    guest.set(SECOND, 0x2222);
    if device.tells {
        assert!(!device.store(IOVA, 8), "nothing is mapped");
    } else {
        device.store(IOVA, 8);
    }
    println!("nothing mapped: second {:#x}", guest.get(SECOND));

    faults(iommufd);
    println!("destroy nested: {}", outcome(destroy(iommufd, nested)));
    println!("attach the IOAS: {}", outcome(device.attach(ioas)));
    println!("destroy nested: {}", outcome(destroy(iommufd, nested)));
    println!("destroy parent: {}", outcome(destroy(iommufd, parent)));
    println!("destroy IOAS: {}", outcome(destroy(iommufd, ioas)));
    println!("detach: {}", outcome(device.detach()));
    println!("unmap: {:#x}", ioas_unmap(iommufd, ioas, 0, u64::MAX).expect("IOAS_UNMAP"));
    println!("destroy IOAS: {}", outcome(destroy(iommufd, ioas)));
    println!("destroy device: {}", outcome(destroy(iommufd, dev)));
}

/// `IOMMUFD_PAGE_RESP_SUCCESS`, `IOMMUFD_PAGE_RESP_INVALID`.
pub const SUCCESS: u32 = 0;
pub const INVALID: u32 = 1;

/// The pending request in the fault queue `fd`, if any.
pub fn asked(fd: RawFd) -> Option<iommu_hwpt_pgfault> {
    let mut fault = iommu_hwpt_pgfault::default();
    let size = size_of::<iommu_hwpt_pgfault>();
    // SAFETY: there is room for a record.
    let read = unsafe { libc::read(fd, (&raw mut fault).cast(), size) };
    (read == size as isize).then_some(fault)
}

/// Responds to a request.
pub fn respond(fd: RawFd, cookie: u32, code: u32) -> Result<()> {
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

/// The device at `path` requests a page that is missing in the guest's tables, and continues after
/// a response that it is there.
pub fn page_requests(path: &str) {
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

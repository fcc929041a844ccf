// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nested flow: guest memory on a nesting parent, guest tables on it, DMA through both.
#![allow(unsafe_code)]

use crate::guest::{Guest, MEMORY, PAGE};
use crate::uapi::*;

/// The guest's tables, and two pages for data.
pub const TABLES: u64 = 0x10_0000;
pub const FIRST: u64 = 0x20_0000;
pub const SECOND: u64 = 0x20_1000;
/// The guest's address of the data.
pub const IOVA: u64 = 0x12_3456_7000;
/// Present, writable, user, accessed, dirty.
const ENTRY: u64 = 0x67;

/// Makes the tables of four levels map `iova` to `page`; `None`: to nothing.
pub fn map(guest: &Guest, iova: u64, page: Option<u64>) {
    for level in (0..4u64).rev() {
        // One table for each level is enough.
        let table = TABLES + (3 - level) * PAGE;
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

/// The flow on the device at `path`.
pub fn run(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    println!("attach before bind: {}", outcome(device.attach(1)));
    let dev = device.bind(iommufd).expect("bind");
    println!("bound again: {}", outcome(device.bind(iommufd)));
    let vtd = hw_info_vtd(iommufd, dev).expect("GET_HW_INFO");
    let nesting = vtd.is_some_and(|vtd| vtd.ecap_reg >> 26 & 1 != 0);
    println!("VT-d {}, nesting {nesting}", vtd.is_some());

    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    let mapped = ioas_map(iommufd, ioas, guest.address(), MEMORY, 0);
    println!("map: {}", outcome(mapped));
    let mapped = ioas_map(iommufd, ioas, guest.address(), MEMORY, 0);
    println!("map again: {}", outcome(mapped));
    let parent = nesting_parent(iommufd, dev, ioas).expect("a nesting parent");
    println!("attach parent: {}", outcome(device.attach(parent)));
    guest.set(FIRST, 0x1111);
    println!("fetch from the parent: {}", device.fetch(FIRST, 8));
    println!("store to the parent: {}", device.store(SECOND, 8));
    println!("moved {:#x}", guest.get(SECOND));

    map(&guest, IOVA, Some(FIRST));
    let nested = nested(iommufd, dev, parent, TABLES, None).expect("nested tables");
    println!("attach nested: {}", outcome(device.attach(nested)));
    guest.set(SECOND, 0);
    println!("fetch through the tables: {}", device.fetch(IOVA, 8));
    println!("track dirty pages: {}", outcome(track_dirty(iommufd, parent, true)));
    map(&guest, IOVA, Some(SECOND));
    let (result, done) = invalidate(iommufd, nested, &[(IOVA, 1)]);
    println!("invalidate: {}, {done} done", outcome(result));
    println!("store through the changed tables: {}", device.store(IOVA, 8));
    println!("first {:#x}, second {:#x}", guest.get(FIRST), guest.get(SECOND));

    let dirty = dirty_pages(iommufd, parent, MEMORY).expect("GET_DIRTY_BITMAP");
    println!("the second is dirty: {}", dirty.contains(&(SECOND / PAGE)));
    println!("the first is: {}", dirty.contains(&(FIRST / PAGE)));
    let dirty = dirty_pages(iommufd, parent, MEMORY).expect("GET_DIRTY_BITMAP");
    println!("dirty since: {}", dirty.len());
    println!("track no more: {}", outcome(track_dirty(iommufd, parent, false)));

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

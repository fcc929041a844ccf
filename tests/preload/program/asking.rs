// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests of a device behind a VT-d with PASIDs, through a fault queue. Unlike those of
//! `vtd.rs`, this waits: on Linux, requests and responses take their time.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use iommufd_bindings::{iommu_hwpt_alloc, iommu_hwpt_pgfault};

use crate::pasids::{attach, detach, nested, select, NEST_PARENT, PASID};
use crate::uapi::*;
use crate::vtd::{asked, map_in, respond, INVALID, SUCCESS};

/// `IOMMU_HWPT_FAULT_ID_VALID`.
const FAULT_ID_VALID: u32 = 1 << 2;
const TABLES: u64 = 0x10_0000;
const PAGE_OF_DATA: u64 = 0x20_0000;
const IOVA: u64 = 0x12_3456_7000;
const WHO: u32 = 5;
const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `is` returns something.
fn wait<T>(what: &str, mut is: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(it) = is() {
            return it;
        }
        assert!(begun.elapsed() < LIMIT, "no {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next request, printed.
fn request(faults: RawFd, dev: u32) -> u32 {
    let fault = wait("request", || asked(faults));
    let iommu_hwpt_pgfault { flags, dev_id, pasid, perm, addr, length, cookie, .. } = fault;
    assert_eq!(dev_id, dev);
    // Valid PASID, last page: Linux has another one for itself.
    println!("asked: {:#x} {pasid} {perm:#x} {addr:#x} {length}", flags & 3);
    cookie
}

fn end(device: &Device) {
    wait("end of the DMA", || (!device.is_busy()).then_some(()));
}

/// The flow on the device at `path`.
pub fn run(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    println!("attach before bind: {}", outcome(attach(&device, WHO, 1)));
    let dev = device.bind(iommufd).expect("bind");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    ioas_map(iommufd, ioas, guest.address(), MEMORY, 0).expect("IOAS_MAP");
    let flags = NEST_PARENT | PASID;
    let parent = iommu_hwpt_alloc { flags, dev_id: dev, pt_id: ioas, ..Default::default() };
    let parent = hwpt_alloc(iommufd, parent).expect("a nesting parent");
    let (id, faults) = fault_queue(iommufd).expect("FAULT_QUEUE_ALLOC");
    map_in(&guest, TABLES, IOVA, None);
    let flags = PASID | FAULT_ID_VALID;
    let space = nested(iommufd, dev, parent, TABLES, flags, id).expect("nested tables");
    println!("attach: {}", outcome(attach(&device, WHO, space)));
    println!("nothing to read: {}", asked(faults).is_none());
    select(&device, Some(WHO));

    // The page is brought. What the buffer has is the guest's, too.
    map_in(&guest, TABLES, IOVA, Some(PAGE_OF_DATA));
    guest.set(PAGE_OF_DATA, 0x1111);
    device.fetch(IOVA, 8);
    device.start_store(IOVA + PAGE + 8, 8);
    let cookie = request(faults, dev);
    println!("busy {}", device.is_busy());
    map_in(&guest, TABLES, IOVA + PAGE, Some(PAGE_OF_DATA));
    println!("respond: {}", outcome(respond(faults, cookie, SUCCESS)));
    end(&device);
    println!("moved {:#x}", guest.get(PAGE_OF_DATA + 8));
    println!("respond again: {}", outcome(respond(faults, cookie, SUCCESS)));
    println!("another response: {}", outcome(respond(faults, cookie, 2)));

    // It is refused; then the attachment ends.
    device.start_store(IOVA + 2 * PAGE, 8);
    let cookie = request(faults, dev);
    println!("respond: {}", outcome(respond(faults, cookie, INVALID)));
    end(&device);
    device.start_store(IOVA + 2 * PAGE, 8);
    let cookie = request(faults, dev);
    println!("detach: {}", outcome(detach(&device, WHO)));
    end(&device);
    println!("respond too late: {}", outcome(respond(faults, cookie, SUCCESS)));
    println!("nothing to read: {}", asked(faults).is_none());
    println!("destroy: {}", outcome(destroy(iommufd, space)));
    println!("destroy device: {}", outcome(destroy(iommufd, dev)));
}

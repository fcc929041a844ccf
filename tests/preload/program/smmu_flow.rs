// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nested flow on an SMMUv3: guest memory on a nesting parent, a vIOMMU on it, a guest's stream
//! with its context descriptor and tables. The same program runs on Linux's iommufd, with the same
//! output.
#![allow(unsafe_code)]

use crate::guest::{Guest, MEMORY, PAGE};
use crate::smmu::*;
use crate::uapi::*;

/// Addresses in the guest.
const TABLES: Tables = Tables { context: 0x11_0000, tables: 0x10_0000 };
const FIRST: u64 = 0x20_0000;
const SECOND: u64 = 0x20_1000;
/// The guest's names of the data and the device.
const IOVA: u64 = 0x234_5000;
const STREAM: u64 = 0x123;

/// Linux's MSI window.
const MSI_WINDOW: u64 = 0x0800_0000;

/// A vIOMMU and its events.
struct Viommu {
    iommufd: i32,
    /// What it depends on.
    ioas: u32,
    id: u32,
    queue: u32,
    events: i32,
}

impl Viommu {
    fn invalidate(&self, what: &str, commands: &[[u64; 2]]) {
        let (result, done) = issue(self.iommufd, self.id, commands);
        println!("{what}: {}, {done} done", outcome(result));
    }

    /// Prints the next event, and drops those after it: one DMA may be several transactions.
    fn print_event(&self) {
        let Some(first) = event(self.events, 60_000) else {
            println!("no event");
            return;
        };
        let Event { flags, sequence, id, stream, address, read } = first;
        println!("event {id:#x} of {stream:#x} at {address:#x}, read {read}, {flags} {sequence}");
        while event(self.events, 1000).is_some() {}
    }
}

/// The flow on the device at `path`.
pub fn run(path: &str) {
    let guest = Guest::new();
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    let dev = device.bind(iommufd).expect("bind");
    let idr0 = idr0(iommufd, dev).expect("GET_HW_INFO");
    println!("SMMUv3, both stages {:?}", idr0.map(|idr0| idr0 & 3 == 3));

    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    println!("map: {}", outcome(ioas_map(iommufd, ioas, guest.address(), MEMORY, 0)));
    println!("with dirty tracking: {}", outcome(nesting_parent(iommufd, dev, ioas)));
    let parent = plain_nesting_parent(iommufd, dev, ioas).expect("a nesting parent");
    window_is_in_the_way(&guest, &device, iommufd);
    print_usable("usable", iommufd, ioas);
    println!("attach parent: {}", outcome(device.attach(parent)));
    print_usable("usable, attached", iommufd, ioas);
    let window = ioas_map(iommufd, ioas, guest.address(), PAGE, MSI_WINDOW);
    println!("map the window of messages: {}", outcome(window));
    let last = MSI_WINDOW + 0x10_0000;
    println!("... behind it: {}", outcome(ioas_map(iommufd, ioas, guest.address(), PAGE, last)));
    println!("ask for it: {}", outcome(ioas_allow_iovas(iommufd, ioas, 0, last)));
    guest.set(FIRST, 0x1111);
    device.fetch(FIRST, 4);
    device.store(SECOND, 4);
    println!("moved {:#x}", guest.get(SECOND));

    println!(
        "nested without vIOMMU: {}",
        outcome(nested_stream(iommufd, dev, parent, TABLES.entry()))
    );
    println!("vIOMMU of the IOAS: {}", outcome(viommu_alloc(iommufd, dev, ioas)));
    let id = viommu_alloc(iommufd, dev, parent).expect("VIOMMU_ALLOC");
    let (queue, events) = veventq_alloc(iommufd, id).expect("VEVENTQ_ALLOC");
    let viommu = Viommu { iommufd, ioas, id, queue, events };
    println!("another queue: {}", outcome(veventq_alloc(iommufd, id)));
    entries(&viommu, &guest, &device, dev);
    translated(&viommu, &guest, &device, dev);
    println!("detach: {}", outcome(device.detach()));
    print_usable("usable, detached", iommufd, ioas);
    println!("destroy parent: {}", outcome(destroy(iommufd, parent)));
    println!("destroy vIOMMU: {}", outcome(destroy(iommufd, viommu.id)));
    // SAFETY: the descriptor is this function's.
    unsafe { libc::close(viommu.events) };
    println!("destroy queue: {}", outcome(destroy(iommufd, viommu.queue)));
    println!("destroy vIOMMU: {}", outcome(destroy(iommufd, viommu.id)));
    println!("destroy parent: {}", outcome(destroy(iommufd, parent)));
    println!("unmap: {:#x}", ioas_unmap(iommufd, ioas, 0, u64::MAX).expect("IOAS_UNMAP"));
    println!("destroy IOAS: {}", outcome(destroy(iommufd, ioas)));
}

/// The mappable part of the lowest 4 GiB: above, it depends on the IOMMU's address width.
fn print_usable(what: &str, iommufd: i32, ioas: u32) {
    const LAST: u64 = u32::MAX as u64;
    let ranges = ioas_iova_ranges(iommufd, ioas).expect("IOAS_IOVA_RANGES");
    let below = ranges.into_iter().filter(|(start, _)| *start <= LAST);
    let below: Vec<_> = below.map(|(start, last)| (start, last.min(LAST))).collect();
    println!("{what}: {below:x?}");
}

/// An IOAS that maps something in the MSI window, or whose user requires its IOVAs, cannot be used
/// for the device.
fn window_is_in_the_way(guest: &Guest, device: &Device, iommufd: i32) {
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    let window = ioas_map(iommufd, ioas, guest.address(), PAGE, MSI_WINDOW);
    println!("map the window of messages before: {}", outcome(window));
    println!("attach: {}", outcome(device.attach(ioas)));
    println!("unmap: {}", outcome(ioas_unmap(iommufd, ioas, MSI_WINDOW, PAGE)));
    println!("ask for it: {}", outcome(ioas_allow_iovas(iommufd, ioas, 0, MSI_WINDOW)));
    println!("attach: {}", outcome(device.attach(ioas)));
    println!("destroy: {}", outcome(destroy(iommufd, ioas)));
}

/// Stream table entries that abort and bypass, and some invalid ones.
fn entries(viommu: &Viommu, guest: &Guest, device: &Device, dev: u32) {
    let Viommu { iommufd, id, .. } = *viommu;
    let with = |words| nested_stream(iommufd, dev, id, words);
    for words in [[1 | 6 << 1, 0], [1 | 7 << 1, 0], [1 | 4 << 1, 1 << 44], [1 | 5 << 1, 2 << 28]] {
        println!("{words:x?}: {}", outcome(with(words)));
    }
    let (bypass, abort) = (with(BYPASS).expect("bypass"), with(ABORT).expect("abort"));
    println!("attach abort: {}", outcome(device.attach(abort)));
    print_usable("usable, aborted", iommufd, viommu.ioas);
    guest.set(SECOND, 0);
    device.store(SECOND, 4);
    println!("aborted: {:#x}", guest.get(SECOND));
    println!("attach bypass: {}", outcome(device.attach(bypass)));
    device.store(SECOND, 4);
    println!("bypassed: {:#x}", guest.get(SECOND));
    println!("destroy abort: {}", outcome(destroy(iommufd, abort)));
    println!("detach: {}", outcome(device.detach()));
    println!("destroy bypass: {}", outcome(destroy(iommufd, bypass)));
}

/// The guest's stage 1.
fn translated(viommu: &Viommu, guest: &Guest, device: &Device, dev: u32) {
    let Viommu { iommufd, id, .. } = *viommu;
    let hwpt = nested_stream(iommufd, dev, id, TABLES.entry()).expect("nested");
    println!("attach without vDEVICE: {}", outcome(device.attach(hwpt)));
    let vdevice = vdevice_alloc(iommufd, id, dev, STREAM).expect("VDEVICE_ALLOC");
    println!("another vDEVICE: {}", outcome(vdevice_alloc(iommufd, id, dev, STREAM + 1)));
    TABLES.write_context(guest);
    TABLES.map(guest, IOVA, Some(SECOND));
    guest.set(SECOND, 0);
    println!("attach: {}", outcome(device.attach(hwpt)));
    println!("destroy: {}", outcome(destroy(iommufd, hwpt)));
    device.store(IOVA, 4);
    println!("through both stages: {:#x}", guest.get(SECOND));

    TABLES.map(guest, IOVA, Some(FIRST));
    guest.set(FIRST, 0);
    viommu.invalidate("a page", &[tlbi_va(IOVA)]);
    device.store(IOVA, 4);
    println!("to another page: {:#x}", guest.get(FIRST));
    viommu.invalidate("nothing", &[]);
    viommu.invalidate("more than a batch", &vec![tlbi_va(IOVA); 200]);
    viommu.invalidate("a context", &[cfgi_cd(STREAM)]);
    viommu.invalidate("of nobody", &[tlbi_va(IOVA), tlbi_va(IOVA), cfgi_cd(STREAM + 1)]);
    viommu.invalidate("a CMD_SYNC", &[tlbi_va(IOVA), SYNC, tlbi_va(IOVA)]);
    let mut late = vec![tlbi_va(IOVA); 100];
    late.push(SYNC);
    viommu.invalidate("a late one", &late);

    TABLES.map(guest, IOVA, None);
    viommu.invalidate("the page", &[tlbi_va(IOVA)]);
    device.store(IOVA, 4);
    viommu.print_event();
    device.fetch(IOVA + 4 * PAGE, 4);
    viommu.print_event();
    guest.set(TABLES.context, 0);
    viommu.invalidate("the context", &[cfgi_cd(STREAM)]);
    device.store(IOVA, 4);
    viommu.print_event();
    println!("destroy vDEVICE: {}", outcome(destroy(iommufd, vdevice)));
    viommu.invalidate("its context", &[cfgi_cd(STREAM)]);
    println!("detach: {}", outcome(device.detach()));
    println!("destroy: {}", outcome(destroy(iommufd, hwpt)));
}

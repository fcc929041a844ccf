// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The nested flow on an SMMUv3: guest memory on a nesting parent, a vIOMMU on it, a guest's stream
//! with its context descriptor and tables. The same program runs on Linux's iommufd, with the same
//! output.
#![allow(unsafe_code)]

use std::io::Result;
use std::mem::size_of;
use std::os::fd::RawFd;

use iommufd_bindings::*;

use crate::uapi::*;

/// `IOMMU_VIOMMU_TYPE_ARM_SMMUV3`, which is also the number of its events, and one less than that
/// of its GET_HW_INFO.
const TYPE: u32 = 1;

/// ASID of the guest's tables.
const ASID: u64 = 7;

/// The addresses of a context descriptor, and of four adjacent tables.
#[derive(Clone, Copy)]
struct Tables {
    context: u64,
    tables: u64,
}

impl Tables {
    /// Writes the context descriptor: 48 bits in pages of 4 KiB by TTB0, no TTB1.
    fn write_context(self, guest: &Guest) {
        /// T0SZ, cacheability, EPD1, V, IPS of 44 bits, AA64, R, A, ASET.
        const WORD: u64 =
            16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 4 << 32 | 1 << 41 | 7 << 45;
        // MAIR: normal memory, write-back.
        let words = [WORD | ASID << 48, self.tables, 0, 0xff, 0, 0, 0, 0];
        for (index, word) in (0..).zip(words) {
            guest.set(self.context + index * 8, word);
        }
    }

    /// Makes the tables map `iova` to `page`; `None`: to nothing.
    fn map(self, guest: &Guest, iova: u64, page: Option<u64>) {
        /// A page: AP, shareable, accessed, not global.
        const LEAF: u64 = 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11;
        for level in 0..4u64 {
            let table = self.tables + level * PAGE;
            let entry = table + (iova >> (39 - 9 * level) & 0x1ff) * 8;
            let value = match (level, page) {
                (3, Some(page)) => page | LEAF,
                (3, None) => 0,
                _ => (table + PAGE) | 3,
            };
            guest.set(entry, value);
        }
    }

    /// The user's half of a stream table entry: stage 1 with the context descriptor.
    fn entry(self) -> [u64; 2] {
        [1 | 5 << 1 | self.context, 1 << 2 | 1 << 4 | 3 << 6]
    }
}

/// A stream table entry that bypasses, and one that aborts.
const BYPASS: [u64; 2] = [1 | 4 << 1, 0];
const ABORT: [u64; 2] = [1, 0];

/// `CMD_TLBI_NH_VA`.
fn tlbi_va(iova: u64) -> [u64; 2] {
    [0x12 | ASID << 48, iova & !0xfff]
}

/// `CMD_CFGI_CD`.
fn cfgi_cd(stream: u64) -> [u64; 2] {
    [0x05 | stream << 32, 1]
}

/// `CMD_SYNC`.
const SYNC: [u64; 2] = [0x46, 0];

/// Whether the device is behind an SMMUv3, and its IDR0.
fn idr0(fd: RawFd, dev: u32) -> Result<Option<u32>> {
    let mut smmu = iommu_hw_info_arm_smmuv3::default();
    let mut info = iommu_hw_info {
        size: size_of::<iommu_hw_info>() as u32,
        dev_id: dev,
        data_len: size_of::<iommu_hw_info_arm_smmuv3>() as u32,
        data_uptr: &raw mut smmu as u64,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_GET_HW_INFO, &mut info)?;
    // SAFETY: both members of the union are this number.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    Ok((kind == TYPE + 1).then_some(smmu.idr[0]))
}

/// A vIOMMU on the nesting parent `hwpt`.
fn viommu_alloc(fd: RawFd, dev: u32, hwpt: u32) -> Result<u32> {
    let mut alloc = iommu_viommu_alloc {
        size: size_of::<iommu_viommu_alloc>() as u32,
        type_: TYPE,
        dev_id: dev,
        hwpt_id: hwpt,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VIOMMU_ALLOC, &mut alloc)?;
    Ok(alloc.out_viommu_id)
}

/// The guest's StreamID of a device.
fn vdevice_alloc(fd: RawFd, viommu: u32, dev: u32, stream: u64) -> Result<u32> {
    let mut alloc = iommu_vdevice_alloc {
        size: size_of::<iommu_vdevice_alloc>() as u32,
        viommu_id: viommu,
        dev_id: dev,
        virt_id: stream,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VDEVICE_ALLOC, &mut alloc)?;
    Ok(alloc.out_vdevice_id)
}

/// A vEVENTQ of the vIOMMU: its object and its descriptor.
fn veventq_alloc(fd: RawFd, viommu: u32) -> Result<(u32, RawFd)> {
    let mut alloc = iommu_veventq_alloc {
        size: size_of::<iommu_veventq_alloc>() as u32,
        viommu_id: viommu,
        type_: TYPE,
        veventq_depth: 16,
        ..Default::default()
    };
    ioctl(fd, IOMMUFD_CMD_VEVENTQ_ALLOC, &mut alloc)?;
    Ok((alloc.out_veventq_id, alloc.out_veventq_fd as RawFd))
}

/// A nested page table with these words of a stream table entry.
fn nested_stream(fd: RawFd, dev: u32, pt: u32, ste: [u64; 2]) -> Result<u32> {
    let alloc = iommu_hwpt_alloc {
        dev_id: dev,
        pt_id: pt,
        // `IOMMU_HWPT_DATA_ARM_SMMUV3`.
        data_type: 2,
        data_len: size_of::<[u64; 2]>() as u32,
        data_uptr: &raw const ste as u64,
        ..Default::default()
    };
    hwpt_alloc(fd, alloc)
}

/// Gives commands to a vIOMMU; returns the number completed according to the kernel.
fn issue(fd: RawFd, viommu: u32, commands: &[[u64; 2]]) -> (Result<()>, u32) {
    let mut invalidate = iommu_hwpt_invalidate {
        size: size_of::<iommu_hwpt_invalidate>() as u32,
        hwpt_id: viommu,
        data_uptr: commands.as_ptr() as u64,
        // `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`.
        data_type: 1,
        entry_len: size_of::<[u64; 2]>() as u32,
        entry_num: commands.len() as u32,
        ..Default::default()
    };
    let result = ioctl(fd, IOMMUFD_CMD_HWPT_INVALIDATE, &mut invalidate);
    (result, invalidate.entry_num)
}

/// The fields of an event record.
struct Event {
    /// Flags of the header.
    flags: u32,
    sequence: u32,
    id: u64,
    stream: u64,
    address: u64,
    /// The access was a read.
    read: bool,
}

/// The next event, if there is one within `milliseconds`.
fn event(fd: RawFd, milliseconds: i32) -> Option<Event> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // A header of two 32-bit words, and four 64-bit words.
    let mut record = [0u64; 5];
    // SAFETY: there is room for one event; the descriptor is the caller's.
    unsafe {
        if libc::poll(&mut poll, 1, milliseconds) != 1 {
            return None;
        }
        let size = size_of_val(&record);
        assert_eq!(libc::read(fd, record.as_mut_ptr().cast(), size), size as isize);
    }
    let [header, first, second, address, _] = record;
    Some(Event {
        flags: header as u32,
        sequence: (header >> 32) as u32,
        id: first & 0xff,
        stream: first >> 32,
        address,
        read: second >> 35 & 1 != 0,
    })
}

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
pub fn flow(path: &str) {
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

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A PCI Express device: memory that can be mapped, MSI-X, errors, and resets of its bus.
#![allow(unsafe_code)]

use crate::memory::close_from;
use crate::uapi::*;
use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Read, Result};
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// The register that adds causes of interrupts.
const RAISE: u64 = 0x60;
/// The BAR with memory.
const MEMORY_BAR: u32 = 2;
/// Indices of interrupts, flags of `VFIO_DEVICE_SET_IRQS`.
const MSIX: u32 = 2;
const ERROR: u32 = 3;
const REQUEST: u32 = 4;
const NONE: u32 = 1 | 1 << 5;
const EVENTFD: u32 = 1 << 2 | 1 << 5;

/// Memory of the device, and its length.
struct Page(*mut libc::c_void, usize);

impl Page {
    fn new(device: &Device, bar: u32, offset: u64, length: u64, flags: i32) -> Result<Self> {
        let (rights, from) = (libc::PROT_READ | libc::PROT_WRITE, device.region(bar) + offset);
        let (null, length, fd) = (std::ptr::null_mut(), length as usize, device.fd());
        // SAFETY: a new mapping touches nothing.
        let page = unsafe { libc::mmap(null, length, rights, flags, fd, from as libc::off_t) };
        (page != libc::MAP_FAILED).then_some(Self(page, length)).ok_or_else(Error::last_os_error)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < PAGE as usize);
        // SAFETY: it is within the mapping, aligned, and accessed by others as by another thread.
        unsafe { &*self.0.cast::<u8>().add(offset).cast() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: nothing refers to it any more.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

/// A non-blocking eventfd.
fn eventfd() -> File {
    // SAFETY: the descriptor is new.
    unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) }
}

/// How often it was written since the last call.
fn written(mut event: &File) -> u64 {
    let mut count = [0; 8];
    event.read(&mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// `VFIO_DEVICE_SET_IRQS` with data of words.
fn set_irqs(
    device: &Device,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    data: &[i32],
) -> String {
    let mut set = [0; 16];
    let head = [20 + 4 * data.len() as u32, flags, index, start, count];
    set.iter_mut().zip(head).for_each(|(to, from)| *to = from);
    set.iter_mut().skip(5).zip(data).for_each(|(to, from)| *to = from.cast_unsigned());
    outcome(ioctl(device.fd(), vfio(10), &mut set))
}

pub fn run(path: &str) {
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    let pages = |device: &Device, bar, offset, length, flags| {
        Page::new(device, bar, offset, length, flags).map(drop)
    };
    let mut info = [16, 0, 0, 0];
    println!("unbound: {}", outcome(ioctl(device.fd(), vfio(9), &mut info)));
    device.bind(iommufd).expect("bind");
    for index in [0, 1, 2, 3, 7] {
        let (flags, size) = device.region_info(index);
        println!("region {index}: flags {flags}, {size:#x}");
    }
    for index in 0..6 {
        info[2] = index;
        let got = outcome(ioctl(device.fd(), vfio(9), &mut info));
        println!("interrupts {index}: {got}, flags {}, {}", info[1], info[3]);
    }
    let shared = libc::MAP_SHARED;
    println!("map registers: {}", outcome(pages(&device, 0, 0, PAGE, shared)));
    println!("map the table: {}", outcome(pages(&device, 1, 0, PAGE, shared)));
    println!("map a copy: {}", outcome(pages(&device, MEMORY_BAR, 0, PAGE, libc::MAP_PRIVATE)));
    println!("map past the end: {}", outcome(pages(&device, MEMORY_BAR, 0x4000, PAGE, shared)));
    println!("map too much: {}", outcome(pages(&device, MEMORY_BAR, 0x3000, PAGE + 1, shared)));
    println!("map all: {}", outcome(pages(&device, MEMORY_BAR, 0, 0x4000, shared)));
    let page = Page::new(&device, MEMORY_BAR, 0x1000, PAGE, shared).expect("mmap");
    page.word(8).store(0x1234, Ordering::SeqCst);
    println!("written to the page: {:#x}", device.region_read(MEMORY_BAR, 0x1008));
    device.region_write(MEMORY_BAR, 0x1010, 0x5678);
    println!("the page has: {:#x}", page.word(0x10).load(Ordering::SeqCst));
    println!("the table: {:#x}", device.region_read(1, 0));

    let events = [eventfd(), eventfd(), eventfd()];
    let fds: Vec<RawFd> = events.iter().map(std::os::fd::AsRawFd::as_raw_fd).collect();
    let raised = |causes: u32| {
        device.write32(RAISE, causes);
        events.each_ref().map(written)
    };
    println!("more than there are: {}", set_irqs(&device, EVENTFD, MSIX, 3, 2, &fds[..2]));
    println!("MSI-X: {}", set_irqs(&device, EVENTFD, MSIX, 0, 3, &fds));
    println!("raised: {:?}, {:?}", raised(1), raised(0x3_0100));
    println!("by the program: {}", set_irqs(&device, NONE, MSIX, 1, 1, &[]));
    println!("MSI beside: {}", set_irqs(&device, EVENTFD, 1, 0, 1, &fds[..1]));
    println!("raised: {:?}", raised(4));
    println!("off: {}", set_irqs(&device, NONE, MSIX, 0, 0, &[]));
    println!("raised: {:?}", raised(1));
    for index in [ERROR, REQUEST] {
        let set = set_irqs(&device, EVENTFD, index, 0, 1, &fds[..1]);
        let triggered = set_irqs(&device, NONE, index, 0, 1, &[]);
        println!("index {index}: {set}, {triggered}, {}", written(&events[0]));
    }

    exported(iommufd, &device, &page);
    page.word(8).store(7, Ordering::SeqCst);
    println!("reset: {}, the page has {:#x}", reset(&device), page.word(8).load(Ordering::SeqCst));
    println!("hot reset: {}", outcome(ioctl(device.fd(), vfio(12), &mut [20u32, 0, 0, 0, 0])));
    drop(device);
    // As the mapping keeps the device open.
    println!("bind again: {}", outcome(Device::open(path).bind(iommufd)));
    drop(page);
    println!("unmapped: {}", outcome(Device::open(path).bind(iommufd)));
}

/// `VFIO_DEVICE_RESET`.
fn reset(device: &Device) -> i32 {
    // SAFETY: it takes no argument.
    unsafe { libc::ioctl(device.fd(), request(vfio(11))) }
}

/// Maps the device's second page, which is mapped as `page`, for the device itself.
fn exported(iommufd: RawFd, device: &Device, page: &Page) {
    const IOVA: u64 = 0x10_0000;
    // argsz, flags; region_index, open_flags, flags, nr_ranges; the range's offset and length
    let export = |flags: u32, region: u32, offset: u64, length: u64| {
        let words = |number: u64| [number as u32, (number >> 32) as u32];
        let ([from, from_high], [size, size_high]) = (words(offset), words(length));
        let mut feature = [40, flags, region, 0, 0, 1, from, from_high, size, size_high];
        // SAFETY: the ioctl takes a structure with its size, and this is that.
        let fd = unsafe { libc::ioctl(device.fd(), request(vfio(17)), feature.as_mut_ptr()) };
        (fd >= 0).then_some(fd).ok_or_else(Error::last_os_error)
    };
    const GET: u32 = 1 << 16 | 11;
    println!("no migration: {}", outcome(export(1 << 16 | 1, 2, 0, PAGE)));
    println!("is it there: {}", outcome(export(1 << 18 | GET, 2, 0, PAGE)));
    println!("of what is no memory: {}", outcome(export(GET, 0, 0, PAGE)));
    println!("of no BAR: {}", outcome(export(GET, 3, 0, PAGE)));
    println!("half a page of it: {}", outcome(export(GET, 3, 0, PAGE / 2)));
    println!("half a page: {}", outcome(export(GET, 2, 0, PAGE / 2)));
    println!("too much: {}", outcome(export(GET, 2, 0x3000, 2 * PAGE)));
    println!("past 2^64: {}", outcome(export(GET, 2, !(PAGE - 1), 2 * PAGE)));
    println!("neither read nor set: {}", outcome(export(11, 2, 0, PAGE)));
    let command = |command: u8| device.region_write8(7, 4, command);
    command(4);
    let buf = export(GET, 2, 0x1000, PAGE).expect("a dma-buf");
    let ioas = ioas_alloc(iommufd).expect("IOAS_ALLOC");
    println!("memory space is off: {}", outcome(ioas_map_file(iommufd, ioas, buf, PAGE, IOVA)));
    command(6);
    println!("on: {}", outcome(ioas_map_file(iommufd, ioas, buf, PAGE, IOVA)));
    // No number here is as high.
    let other = close_from(512);
    device.attach(ioas).expect("attach");
    page.word(0).store(7, Ordering::SeqCst);
    println!("fetch {}, store {}", device.fetch(IOVA, 8), device.store(IOVA + 8, 8));
    println!("moved: {}", page.word(8).load(Ordering::SeqCst));
    command(4);
    println!("off: read {}", outcome(device.region_try(MEMORY_BAR, 0)));
    command(6);
    println!("it stays lost: fetch {}", device.fetch(IOVA, 8));
    device.detach().expect("detach");
    println!("unmap: {}", outcome(ioas_unmap(iommufd, ioas, IOVA, PAGE)));
    println!("again: {}", outcome(ioas_map_file(iommufd, ioas, buf, PAGE, IOVA)));
    device.attach(ioas).expect("attach");
    // INTx disable.
    device.region_write8(7, 5, 4);
    let reached = || device.fetch(IOVA, 8);
    println!("fetch {}, reset {}, fetch {}", reached(), reset(device), reached());
    println!("command: {:#x}", device.region_read(7, 4) & 0xffff);
    println!("unmap: {}", outcome(ioas_unmap(iommufd, ioas, IOVA, PAGE)));
    let mapped = outcome(ioas_map_file(iommufd, ioas, buf, PAGE, IOVA));
    println!("after the reset: {mapped}, fetch {}", reached());
    device.region_write8(7, 5, 0);
    device.detach().expect("detach");
    // SAFETY: the descriptor is this function's.
    unsafe { libc::close(buf) };
    println!("unmap: {}", outcome(ioas_unmap(iommufd, ioas, IOVA, PAGE)));
    println!("another's descriptor: {}", other.metadata().is_ok());
}

/// Resets the bus of the device at `path`, which is `name` in the group at `group`.
pub fn hot_reset(path: &str, group: &str, name: &str) {
    // argsz, flags, count; an object or group, the address
    let info = |device: &Device, length| {
        let mut info = [length, 7, 7, 0, 0];
        let got = outcome(ioctl(device.fd(), vfio(12), &mut info));
        println!("info: {got}, flags {}, {} devices, at {:#x}", info[1], info[2], info[4]);
        info[3]
    };
    let reset = |device: &Device, groups: &[i32]| {
        let mut reset = [12 + 4 * groups.len() as u32, 0, groups.len() as u32, 0, 0];
        let words = reset.iter_mut().skip(3).zip(groups);
        words.for_each(|(to, from)| *to = from.cast_unsigned());
        outcome(ioctl(device.fd(), vfio(13), &mut reset))
    };
    let iommufd = open("/dev/iommu");
    let mut device = Device::open(path);
    let dev = device.bind(iommufd).expect("bind");
    info(&device, 8);
    info(&device, 12);
    println!("its own: {}", info(&device, 20) == dev);
    device.region_write(MEMORY_BAR, 0, 0x1234);
    println!("by a group: {}", reset(&device, &[0]));
    println!("reset: {}, {:#x}", reset(&device, &[]), device.region_read(MEMORY_BAR, 0));
    drop(device);

    let (container, group_file) = (open("/dev/vfio/vfio"), open(group));
    let name = CString::new(name).expect("no zero");
    // SAFETY: these take the address of a number, a number, and a string.
    let fd = unsafe {
        libc::ioctl(group_file, request(vfio(4)), &raw const container);
        libc::ioctl(container, request(vfio(2)), 3u64);
        libc::ioctl(group_file, request(vfio(6)), name.as_ptr())
    };
    // SAFETY: the descriptor is new.
    let device = Device::from(unsafe { File::from_raw_fd(fd) });
    println!("in group {}", info(&device, 20));
    for groups in [[].as_slice(), &[-1], &[container], &[group_file, group_file]] {
        println!("by {} others: {}", groups.len(), reset(&device, groups));
    }
    let command = || println!("command: {:#x}", device.region_read(7, 4) & 0xffff);
    command();
    device.region_write(MEMORY_BAR, 0, 0x1234);
    println!("reset: {}, {:#x}", reset(&device, &[group_file]), device.region_read(MEMORY_BAR, 0));
    command();
}

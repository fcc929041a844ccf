// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The driver's side of a device, for tests: on guest memory, or on the emulated host with
//! first-stage tables in guest memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::pci::NoDoorbells;
use super::{Backend, DeviceMemory, Doorbells, VirtioPci};
use crate::pci::{InterruptVector, Location, MsiMessage, PciFunction};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, HostIommu, HwptAlloc, HwptData, HwptFlags,
    InvalidateData, MapTarget, ObjectId, Protection, UserMemory,
};
use twostage::patience::wait_until;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::first_stage::index;
use twostage_emulated::{DeviceConfig, EmulatedHost, VtdUnit, VtdUnitConfig};

const PAGE: u64 = 0x1000;
/// Size of guest memory.
const MEMORY: u64 = 8 << 20;
/// Where first-stage tables are.
const TABLES: u64 = 0x1000;
/// GPA of the driver's memory; behind an IOMMU, also its IOVA.
const DATA: u64 = 0x40_0000;
const IOVA: u64 = 0x7654_0000_0000;
/// Its size in pages.
const PAGES: u64 = 256;
/// Bits of a leaf: present, writable, user, accessed, dirty.
const LEAF: u64 = 0x67;

/// How a device is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Without an IOMMU.
    Direct,
    /// Behind an emulated IOMMU.
    Behind,
}

pub const PLACES: [Place; 2] = [Place::Direct, Place::Behind];

/// An emulated host with one device, behind first-stage tables.
struct Host {
    host: Arc<EmulatedHost>,
    unit: Arc<VtdUnit>,
    hwpt: ObjectId,
}

/// Counts messages.
#[derive(Default)]
pub struct Vector(AtomicU64);

impl InterruptVector for Vector {
    fn update(&self, _message: Option<MsiMessage>) {}

    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A device, and the memory of its driver.
pub struct Rig {
    pub pci: VirtioPci,
    pub vectors: Vec<Arc<Vector>>,
    place: Place,
    memory: GuestMemoryMmap,
    host: Option<Host>,
}

/// Pages are scattered, so that code that takes an IOVA for a GPA, or does not translate again at a
/// page boundary, reads something else.
fn gpa_of_page(page: u64) -> u64 {
    DATA + (page ^ 0x55) * PAGE
}

impl Rig {
    pub fn new(place: Place, backend: Box<dyn Backend>) -> Self {
        Self::with_doorbells(place, backend, Arc::new(NoDoorbells))
    }

    pub fn with_doorbells(
        place: Place,
        backend: Box<dyn Backend>,
        doorbells: Arc<dyn Doorbells>,
    ) -> Self {
        let region = GuestRegionMmap::from_range(GuestAddress(0), MEMORY as usize, None).unwrap();
        let region = Arc::new(region);
        let memory = GuestMemoryMmap::from_arc_regions(vec![region.clone()]).unwrap();
        let (host, reach) = match place {
            Place::Direct => (None, DeviceMemory::direct(memory.clone())),
            Place::Behind => {
                let host = Host::new(&memory, region);
                let port = host.unit.port(0x18);
                (Some(host), DeviceMemory::behind_iommu(memory.clone(), port))
            }
        };
        let vectors = Mutex::new(Vec::new());
        let vector = || -> crate::Result<Arc<dyn InterruptVector>> {
            let vector = Arc::new(Vector::default());
            vectors.lock().push(vector.clone());
            Ok(vector)
        };
        let name = "test".to_owned();
        let location = Location { way: None, bar: 0xe000_0000 };
        let pci = VirtioPci::new(name, backend, reach, location, &vector, doorbells, None).unwrap();
        Self { pci, vectors: vectors.into_inner(), place, memory, host }
    }

    /// Device address of `offset` in the driver's memory.
    pub fn address(&self, offset: u64) -> u64 {
        assert!(offset < PAGES * PAGE);
        match self.place {
            Place::Direct => DATA + offset,
            Place::Behind => IOVA + offset,
        }
    }

    fn gpa(&self, offset: u64) -> GuestAddress {
        GuestAddress(match self.place {
            Place::Direct => DATA + offset,
            Place::Behind => gpa_of_page(offset / PAGE) + offset % PAGE,
        })
    }

    pub fn poke(&self, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            self.memory.write_obj(*byte, self.gpa(at)).unwrap();
        }
    }

    pub fn peek(&self, offset: u64, length: usize) -> Vec<u8> {
        (offset..).take(length).map(|at| self.memory.read_obj(self.gpa(at)).unwrap()).collect()
    }

    fn u16(&self, offset: u64) -> u16 {
        self.memory.load(self.gpa(offset), Ordering::Acquire).unwrap()
    }

    fn set_u16(&self, offset: u64, value: u16) {
        self.memory.store(value, self.gpa(offset), Ordering::Release).unwrap();
    }

    /// Unmaps the page at `offset` for the device. Behind an IOMMU only.
    pub fn unmap(&self, offset: u64) {
        let host = self.host.as_ref().expect("an IOMMU");
        host.unmap(&self.memory, IOVA + offset);
    }

    pub fn read_config(&self, offset: u16, length: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.config_reading(offset, length);
        self.pci.config().lock().read(offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    pub fn write_config(&self, offset: u16, data: &[u8]) {
        self.pci.config().lock().write(offset, data);
        self.pci.config_written(offset, data.len());
    }

    pub fn read(&self, offset: u64, length: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.read_bar(0, offset, &mut data[..length]);
        u64::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, length: usize, value: u64) {
        self.pci.write_bar(0, offset, &value.to_le_bytes()[..length]);
    }

    /// Resets the device as drivers do, waiting until the status is 0.
    pub fn reset(&self) {
        self.write(0x14, 1, 0);
        self.wait("a reset", || self.status() == 0);
    }

    /// Resets the function, whose device is reset after that or soon.
    pub fn reset_function(&self) {
        let control = self.capability(0x10).unwrap() + 8;
        self.pci.config().lock().write(control, &[0, 0x80]);
        assert!(self.pci.config_written(control, 2), "the bus learns of it");
        assert_eq!(self.read_config(control, 2), 0);
    }

    pub fn status(&self) -> u64 {
        self.read(0x14, 1)
    }

    /// Enables bus mastering, and MSI-X with every vector unmasked.
    pub fn enable_function(&self) {
        self.write_config(4, &[6, 0]);
        for vector in 0..self.vectors.len() as u64 {
            self.write(0x4000 + 16 * vector, 4, 0xfee0_0000);
            self.write(0x400c + 16 * vector, 4, 0);
        }
        let msix = self.capability(0x11).unwrap();
        self.write_config(msix + 2, &0x8000u16.to_le_bytes());
    }

    /// Offset of the first capability with this ID.
    pub fn capability(&self, id: u64) -> Option<u16> {
        let mut at = self.read_config(0x34, 1);
        while at != 0 {
            if self.read_config(at as u16, 1) == id {
                return Some(at as u16);
            }
            at = self.read_config(at as u16 + 1, 1);
        }
        None
    }

    /// The offered features.
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |features, select| {
            self.write(0, 4, select);
            features | self.read(4, 4) << (32 * select)
        })
    }

    /// Negotiates `features` and the mandatory ones, up to FEATURES_OK.
    pub fn negotiate(&self, features: u64) {
        self.reset();
        self.write(0x14, 1, 1);
        self.write(0x14, 1, 3);
        let features = features | self.offered() & (3 << 32);
        for select in 0..2 {
            self.write(8, 4, select);
            self.write(0xc, 4, features >> (32 * select) & 0xffff_ffff);
        }
        self.write(0x14, 1, 0xb);
        assert_eq!(self.status(), 0xb);
    }

    /// Initializes the device up to DRIVER_OK, with queues of 16 descriptors.
    pub fn start(&self, features: u64) -> Vec<TestQueue<'_>> {
        self.enable_function();
        self.negotiate(features);
        let queues = self.set_up_queues();
        self.write(0x14, 1, 0xf);
        queues
    }

    pub fn set_up_queues(&self) -> Vec<TestQueue<'_>> {
        self.write(0x10, 2, 0);
        let count = self.read(0x12, 2);
        (0..count)
            .map(|number| {
                let queue = TestQueue { rig: self, number, base: number * 3 * PAGE, free: 0 };
                self.poke(queue.base, &[0; 3 * PAGE as usize]);
                self.write(0x16, 2, number);
                self.write(0x18, 2, TestQueue::SIZE.into());
                self.write(0x1a, 2, number + 1);
                for (at, area) in [(0x20, 0), (0x28, PAGE), (0x30, 2 * PAGE)] {
                    let address = self.address(queue.base + area);
                    self.write(at, 4, address & 0xffff_ffff);
                    self.write(at + 4, 4, address >> 32);
                }
                self.write(0x1c, 2, 1);
                assert_eq!(self.read(0x1c, 2), 1);
                queue
            })
            .collect()
    }

    /// Waits until `over` is true; panics after the limit.
    pub fn wait(&self, what: &str, over: impl Fn() -> bool) {
        wait_until(what, over);
    }

    pub fn wait_for_needs_reset(&self) {
        self.wait("NEEDS_RESET", || self.status() & 0x40 != 0);
    }

    /// Waits for the interrupts of `vector`, which arrive later than what they signal; there must
    /// be `count` of them.
    pub fn wait_for_interrupts(&self, vector: usize, count: u64) {
        let sent = || self.vectors[vector].0.load(Ordering::SeqCst);
        self.wait("interrupts", || sent() >= count);
        assert_eq!(sent(), count, "vector {vector}");
    }
}

impl Host {
    fn new(memory: &GuestMemoryMmap, region: Arc<GuestRegionMmap>) -> Self {
        let unit = VtdUnit::new(VtdUnitConfig::default());
        let host = EmulatedHost::new();
        let id = host.add_unit(unit.clone());
        host.add_device("test", id, Bdf::from_raw(0x18), DeviceConfig::default()).unwrap();
        let dev = host.device_bind("test").unwrap();
        let ioas = host.ioas_alloc().unwrap();
        let (whole, all) = (UserMemory::whole(region), Protection::READ_WRITE);
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), all).unwrap();
        let flags = HwptFlags::new().with_nest_parent(true);
        let paging = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault: None };
        let parent = host.hwpt_alloc(&paging).unwrap();
        for page in 0..PAGES {
            let entry = entry(memory, IOVA + page * PAGE);
            memory.write_obj(gpa_of_page(page) | LEAF, GuestAddress(entry)).unwrap();
        }
        let tables = iommu_hwpt_vtd_s1 { pgtbl_addr: TABLES, addr_width: 48, ..Default::default() };
        let data = HwptData::VtdS1(tables);
        let flags = HwptFlags::default();
        let nested = HwptAlloc { flags, dev, pt: parent, data, fault: None };
        let hwpt = host.hwpt_alloc(&nested).unwrap();
        host.device_attach(dev, None, hwpt).unwrap();
        Self { host, unit, hwpt }
    }

    fn unmap(&self, memory: &GuestMemoryMmap, iova: u64) {
        memory.write_obj(0u64, GuestAddress(entry(memory, iova))).unwrap();
        let all = iommu_hwpt_vtd_s1_invalidate { npages: u64::MAX, ..Default::default() };
        self.host.hwpt_invalidate(self.hwpt, InvalidateData::VtdS1(&[all])).unwrap();
    }
}

/// GPA of the leaf for `iova`; missing tables are created: one per level suffices here.
fn entry(memory: &GuestMemoryMmap, iova: u64) -> u64 {
    let mut table = TABLES;
    for level in (2..=4).rev() {
        let next = TABLES + (5 - level) * PAGE;
        memory.write_obj(next | LEAF, GuestAddress(table + index(iova, level as u8) * 8)).unwrap();
        table = next;
    }
    table + index(iova, 1) * 8
}

/// One buffer of a chain: offset in the driver's memory, length, whether it is device-writable.
pub type TestBuffer = (u64, u32, bool);

/// The driver's side of a queue.
pub struct TestQueue<'a> {
    rig: &'a Rig,
    number: u64,
    base: u64,
    /// The next descriptor, wrapping around.
    free: u16,
}

impl TestQueue<'_> {
    pub const SIZE: u16 = 16;

    /// Writes descriptor `index`.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.rig.poke(self.base + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain starting at descriptor `head` available.
    pub fn make_available(&self, head: u16) {
        self.make_all_available(&[head]);
    }

    /// Makes chains available at once: the device sees all of them, or none.
    pub fn make_all_available(&self, heads: &[u16]) {
        let mut index = self.rig.u16(self.base + PAGE + 2);
        for head in heads {
            self.rig.set_u16(self.base + PAGE + 4 + 2 * u64::from(index % Self::SIZE), *head);
            index = index.wrapping_add(1);
        }
        self.set_available_index(index);
    }

    pub fn set_available_index(&self, index: u16) {
        self.rig.set_u16(self.base + PAGE + 2, index);
    }

    /// The first descriptor of the next chain.
    pub fn next_head(&self) -> u64 {
        self.free.into()
    }

    /// Requests an interrupt when the used index passes `index`, with event indices.
    pub fn set_used_event(&self, index: u16) {
        self.rig.set_u16(self.base + PAGE + 4 + 2 * u64::from(Self::SIZE), index);
    }

    pub fn notify(&self) {
        self.rig.write(0x3000 + 4 * self.number, 2, self.number);
    }

    /// Makes a chain of `buffers` available; returns its head.
    pub fn add(&mut self, buffers: &[TestBuffer]) -> u16 {
        let head = self.chain(buffers);
        self.make_available(head);
        head
    }

    /// Writes a chain of `buffers`, which is not available yet; returns its head.
    pub fn chain(&mut self, buffers: &[TestBuffer]) -> u16 {
        let head = self.free;
        for (at, (offset, length, writable)) in buffers.iter().enumerate() {
            let next = (self.free + 1) % Self::SIZE;
            let more = at + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(*writable) << 1;
            self.descriptor(self.free, self.rig.address(*offset), *length, flags, next);
            self.free = next;
        }
        head
    }

    pub fn used_index(&self) -> u16 {
        self.rig.u16(self.base + 2 * PAGE + 2)
    }

    /// Used element `index`: head and length.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let at = self.base + 2 * PAGE + 4 + 8 * u64::from(index % Self::SIZE);
        let bytes = self.rig.peek(at, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// Makes a chain available, notifies, and waits; returns the number of bytes written by the
    /// device.
    pub fn request(&mut self, buffers: &[TestBuffer]) -> u32 {
        let before = self.used_index();
        let head = self.add(buffers);
        self.notify();
        self.rig.wait("a request", || self.used_index() != before);
        let (id, length) = self.used(before);
        assert_eq!(id, u32::from(head));
        length
    }
}

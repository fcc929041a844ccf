// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Concurrent DMA and invalidations: after an invalidation, a replacement or an unmap has returned,
//! no byte may use the old translation.
//!
//! Devices on several threads read and write one page of IOVA continuously. A guest moves that page
//! back and forth between two pages of memory, each time in one of the ways to remove a
//! translation, and quarantines the old page when the verb has returned: a device that reads a byte
//! of the quarantine pattern, or a quarantined page that changes, is a stale use.
//!
//! [`at_once`] does all of it at once, together with other verbs. `make tsan` runs it, and the
//! tests of one way, under ThreadSanitizer: only the host orders a mover's accesses to a page
//! before or after devices use it with their DMA.
//!
//! The last two tests show that faults are found: a device that translates first and accesses
//! later, outside of the critical section, is caught, and so is a guest that forgets the
//! invalidation.

mod at_once;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, HostIommu, HwptAlloc, HwptData, HwptFlags,
    InvalidateData, MapTarget, ObjectId, Protection, UserMemory, VTD_INV_FLAGS_LEAF,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAccess, DmaAttributes, DmaError, DmaPort, EmulatedHost, VtdUnit, VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress};

const PAGE: u64 = 0x1000;
const ROUNDS: u32 = 2000;
/// Rounds within which an injected fault must be noticed, generously.
const ROUNDS_TO_NOTICE: u32 = 100_000;

/// The page of IOVA that is moved.
const IOVA: u64 = 0x7000_0000_0000;
/// GPAs of the tables of the two HWPT_NESTED.
const TABLES: [u64; 2] = [0x10_0000, 0x18_0000];
/// Offsets in memory of the two pages that IOVA moves between.
const PLACES: [u64; 2] = [0x20_0000, 0x20_1000];
/// GPA that the first-stage tables of [`Way::Stage2`] map to.
const WINDOW: u64 = 0x4000_0000;

/// What devices write.
const DEVICE_DATA: u8 = 0x22;
/// Pattern of a page in quarantine.
const QUARANTINE: u8 = 0xee;
/// Pattern of a page before devices may use it again.
const CLEAN: u8 = 0x11;

/// How the translation is removed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A leaf is changed, and the page invalidated, sparing the paging structures or not.
    Leaf { flags: u32 },
    /// A leaf is changed, and nothing is invalidated.
    LeafForgotten,
    /// The device is attached to another HWPT_NESTED.
    Replace,
    /// Stage 2 is unmapped, and mapped elsewhere.
    Stage2,
}

/// How devices do DMA.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manners {
    /// By the port.
    Proper,
    /// They translate, leave the critical section, and access what they found.
    Careless,
}

struct Machine {
    host: Arc<EmulatedHost>,
    unit: Arc<VtdUnit>,
    memory: Arc<GuestRegionMmap>,
    ioas: ObjectId,
    dev: ObjectId,
    /// One for each place.
    nested: [ObjectId; 2],
    rid: Bdf,
}

impl Machine {
    fn new(way: Way) -> Self {
        let host = EmulatedHost::new();
        let unit = VtdUnit::new(VtdUnitConfig::default());
        let unit_id = host.add_unit(Arc::clone(&unit));
        let rid = Bdf::new(0, 3, 0).unwrap();
        host.add_device("device", unit_id, rid, DeviceConfig::default()).unwrap();
        let dev = host.device_bind("device").unwrap();
        let memory = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x40_0000, None).unwrap();
        let memory = Arc::new(memory);
        let ioas = host.ioas_alloc().unwrap();
        let whole = UserMemory::whole(Arc::clone(&memory));
        host.ioas_map(ioas, &whole, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        let alloc = |flags, pt, data| {
            host.hwpt_alloc(&HwptAlloc { flags, dev, pt, data, fault: None }).unwrap()
        };
        let parent = alloc(HwptFlags::new().with_nest_parent(true), ioas, HwptData::None);
        let nested = TABLES.map(|pgtbl_addr| {
            let data = iommu_hwpt_vtd_s1 { pgtbl_addr, addr_width: 48, ..Default::default() };
            alloc(HwptFlags::new(), parent, HwptData::VtdS1(data))
        });
        let machine = Self { host, unit, memory, ioas, dev, nested, rid };
        for (tables, place) in TABLES.into_iter().zip(PLACES) {
            machine.build_tables(tables, if way == Way::Stage2 { WINDOW } else { place });
        }
        if way == Way::Stage2 {
            machine.map_window(PLACES[0]);
        }
        machine.host.device_attach(dev, None, nested[0]).unwrap();
        machine
    }

    /// Tables at `root` and the three pages after it, that map IOVA to `gpa`.
    fn build_tables(&self, root: u64, gpa: u64) {
        for level in 0..3 {
            let shift = 39 - 9 * level;
            let entry = root + level * PAGE + (IOVA >> shift & 0x1ff) * 8;
            self.memory.put(entry, (root + (level + 1) * PAGE) | 0x27);
        }
        self.memory.put(Self::leaf(root), gpa | 0x67);
    }

    fn leaf(root: u64) -> u64 {
        root + 3 * PAGE + (IOVA >> 12 & 0x1ff) * 8
    }

    fn map_window(&self, place: u64) {
        let memory = UserMemory::new(Arc::clone(&self.memory), place, PAGE).unwrap();
        let target = MapTarget::Fixed(WINDOW);
        self.host.ioas_map(self.ioas, &memory, target, Protection::READ_WRITE).unwrap();
    }

    /// Moves IOVA to the place `to`; when it returns, the other place must be unused.
    fn move_to(&self, way: Way, to: usize) {
        match way {
            Way::Leaf { flags } => {
                self.memory.put(Self::leaf(TABLES[0]), PLACES[to] | 0x67);
                let entry =
                    iommu_hwpt_vtd_s1_invalidate { addr: IOVA, npages: 1, flags, __reserved: 0 };
                let data = InvalidateData::VtdS1(&[entry]);
                self.host.hwpt_invalidate(self.nested[0], data).unwrap();
            }
            Way::LeafForgotten => self.memory.put(Self::leaf(TABLES[0]), PLACES[to] | 0x67),
            Way::Replace => {
                self.host.device_attach(self.dev, None, self.nested[to]).unwrap();
            }
            Way::Stage2 => {
                self.host.ioas_unmap(self.ioas, WINDOW, PAGE).unwrap();
                self.map_window(PLACES[to]);
            }
        }
    }
}

/// Guest memory from GPA 0 on, as tests change and read it.
trait Places {
    /// Writes the word of a table entry at `gpa`.
    fn put(&self, gpa: u64, word: u64);

    /// Fills the page at `place` with `byte`.
    fn fill(&self, place: u64, byte: u8);

    /// Whether every byte of the page at `place` is `byte`.
    fn holds(&self, place: u64, byte: u8) -> bool;
}

impl Places for GuestRegionMmap {
    fn put(&self, gpa: u64, word: u64) {
        self.store(word.to_le(), MemoryRegionAddress(gpa), Ordering::SeqCst).unwrap();
    }

    fn fill(&self, place: u64, byte: u8) {
        self.write_slice(&[byte; PAGE as usize], MemoryRegionAddress(place)).unwrap();
    }

    fn holds(&self, place: u64, byte: u8) -> bool {
        let mut bytes = [0; PAGE as usize];
        self.read_slice(&mut bytes, MemoryRegionAddress(place)).unwrap();
        bytes.iter().all(|&it| it == byte)
    }
}

/// One device's transfer of `bytes` at IOVA + `offset`. Fails when blocked.
fn transfer(
    machine: &Machine,
    port: &mut DmaPort,
    manners: Manners,
    access: DmaAccess,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), ()> {
    let plain = DmaAttributes::default();
    let iova = IOVA + offset;
    match (manners, access) {
        (Manners::Proper, DmaAccess::Read) => port.read(plain, iova, bytes).map_err(drop),
        (Manners::Proper, DmaAccess::Write) => port.write(plain, iova, bytes).map_err(drop),
        (Manners::Careless, access) => {
            let translated = port.translate(plain, iova, bytes.len(), access).map_err(drop)?;
            let found = translated.slice().ptr_guard().as_ptr() as u64;
            drop(translated);
            let at = MemoryRegionAddress(found - machine.memory.as_ptr() as u64);
            thread::yield_now();
            match access {
                DmaAccess::Read => machine.memory.read_slice(bytes, at).map_err(drop),
                DmaAccess::Write => machine.memory.write_slice(bytes, at).map_err(drop),
            }
        }
    }
}

/// Moves the page back and forth while devices use it, for `rounds` or, with `until_stale`, until a
/// stale use was seen. Returns the number of stale uses.
fn stale_uses(way: Way, manners: Manners, rounds: u32, until_stale: bool) -> u64 {
    // One at a time: devices that share processors with other tests cause no stress.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = Machine::new(way);
    for place in PLACES {
        machine.memory.fill(place, CLEAN);
    }
    let stale = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let accesses = [DmaAccess::Write, DmaAccess::Read];
    let transfers: [AtomicU64; 2] = Default::default();
    let first_port = machine.unit.port(machine.rid.raw());
    thread::scope(|scope| {
        for ((access, done), first) in accesses.into_iter().zip(&transfers).zip([0, 256]) {
            let mut port = first_port.clone();
            let (machine, stale, stop) = (&machine, &stale, &stop);
            scope.spawn(move || {
                // Disjoint pieces: concurrent writes of two devices to one byte would be their
                // race.
                let mut offset = first;
                while !stop.load(Ordering::Relaxed) {
                    let mut bytes = [DEVICE_DATA; 256];
                    let outcome = transfer(machine, &mut port, manners, access, offset, &mut bytes);
                    // Between unmap and map there is nothing; otherwise there always is. Not an
                    // assertion: a thread that ends would leave the others waiting.
                    let lost = outcome.is_err() && way != Way::Stage2;
                    if lost || outcome.is_ok() && bytes.contains(&QUARANTINE) {
                        stale.fetch_add(1, Ordering::Relaxed);
                    }
                    offset = (offset + 2 * 256) % PAGE;
                    if offset == first {
                        // There may be fewer processors than threads.
                        thread::yield_now();
                    }
                    done.fetch_add(1, Ordering::Release);
                }
            });
        }
        for round in 0..rounds {
            let (to, from) = if round % 2 == 0 { (1, 0) } else { (0, 1) };
            machine.move_to(way, to);
            machine.memory.fill(PLACES[from], QUARANTINE);
            // What was in progress when the verb returned has ended when every device has made two
            // more transfers.
            for done in &transfers {
                let start = done.load(Ordering::Acquire);
                while done.load(Ordering::Acquire) < start + 2 {
                    thread::yield_now();
                }
            }
            if !machine.memory.holds(PLACES[from], QUARANTINE) {
                stale.fetch_add(1, Ordering::Relaxed);
            }
            machine.memory.fill(PLACES[from], CLEAN);
            if until_stale && stale.load(Ordering::Relaxed) != 0 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    stale.into_inner()
}

#[test]
fn no_stale_use_after_a_page_is_invalidated() {
    for flags in [VTD_INV_FLAGS_LEAF, 0] {
        assert_eq!(stale_uses(Way::Leaf { flags }, Manners::Proper, ROUNDS, false), 0);
    }
}

#[test]
fn no_stale_use_after_a_replacement() {
    assert_eq!(stale_uses(Way::Replace, Manners::Proper, ROUNDS, false), 0);
}

#[test]
fn no_stale_use_after_an_unmap() {
    assert_eq!(stale_uses(Way::Stage2, Manners::Proper, ROUNDS, false), 0);
}

#[test]
fn a_device_that_accesses_outside_of_the_critical_section_is_caught() {
    let way = Way::Leaf { flags: VTD_INV_FLAGS_LEAF };
    assert_ne!(stale_uses(way, Manners::Careless, ROUNDS_TO_NOTICE, true), 0);
}

#[test]
fn a_forgotten_invalidation_is_caught() {
    assert_ne!(stale_uses(Way::LeafForgotten, Manners::Proper, ROUNDS_TO_NOTICE, true), 0);
}

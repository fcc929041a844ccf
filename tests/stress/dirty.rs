// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty tracking while devices write: a copy that follows the bitmap is complete.
//!
//! Devices on several threads write memory continuously while it is migrated: the dirty bitmap is
//! read and cleared and the pages in it are copied, repeatedly; and once more when the devices have
//! stopped. The copy must then equal the memory: a write is lost if it neither precedes the copy of
//! its page nor makes the page dirty again.
//!
//! The last test shows that lost writes are found: copying before clearing loses some.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;

use twostage::iommufd::{
    iommu_hwpt_vtd_s1, DirtyRange, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId,
    Protection, UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig, VtdUnit,
    VtdUnitConfig,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap};

const PAGE: u64 = 0x1000;
/// Pages of guest memory, starting with the tables.
const PAGES: u64 = 64;
const TABLES: u64 = 4;
const DEVICES: u16 = 2;
const ROUNDS: usize = 1000;
/// Rounds within which a lost write must be noticed, generously.
const ROUNDS_TO_NOTICE: usize = 100_000;

/// What the devices use.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Tables {
    /// A second stage of VT-d.
    Vtd,
    /// First-stage tables over it.
    VtdNested,
    /// A stage 1 of the host's, of an SMMUv3: the only one in which Linux tracks dirty pages.
    SmmuV3,
}

/// Guest memory, devices that write it, and the copy.
struct Migration {
    host: Arc<EmulatedHost>,
    tracked: ObjectId,
    memory: UserMemory,
    copy: Vec<u8>,
}

impl Migration {
    fn new(tables: Tables) -> Self {
        let host = EmulatedHost::new();
        let unit = match tables {
            Tables::SmmuV3 => host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default())),
            _ => host.add_unit(VtdUnit::new(VtdUnitConfig::default())),
        };
        let region =
            GuestRegionMmap::<()>::from_range(GuestAddress(0), (PAGES * PAGE) as usize, None)
                .unwrap();
        let memory = UserMemory::whole(Arc::new(region));
        let ioas = host.ioas_alloc().unwrap();
        host.ioas_map(ioas, &memory, MapTarget::Fixed(0), Protection::READ_WRITE).unwrap();
        let devices: Vec<ObjectId> = (0..DEVICES)
            .map(|number| {
                let (name, rid) = (format!("device {number}"), Bdf::from_raw(0x20 + number));
                host.add_device(&name, unit, rid, DeviceConfig::default()).unwrap();
                host.device_bind(&name).unwrap()
            })
            .collect();
        let alloc = |flags, pt, data| {
            host.hwpt_alloc(&HwptAlloc { flags, dev: devices[0], pt, data, fault: None }).unwrap()
        };
        let flags = HwptFlags::new().with_dirty_tracking(true);
        let flags = flags.with_nest_parent(tables != Tables::SmmuV3);
        let tracked = alloc(flags, ioas, HwptData::None);
        // One table per level, with an identity mapping.
        for level in 0..TABLES - 1 {
            write(&memory, level * PAGE, ((level + 1) * PAGE) | 7);
        }
        for page in 0..PAGES {
            write(&memory, (TABLES - 1) * PAGE + page * 8, (page * PAGE) | 7);
        }
        let first = HwptData::VtdS1(iommu_hwpt_vtd_s1 { addr_width: 48, ..Default::default() });
        let hwpt = match tables {
            Tables::VtdNested => alloc(HwptFlags::new(), tracked, first),
            _ => tracked,
        };
        for dev in devices {
            host.device_attach(dev, None, hwpt).unwrap();
        }
        host.hwpt_set_dirty_tracking(tracked, true).unwrap();
        let mut migration = Self { host, tracked, memory, copy: vec![0; (PAGES * PAGE) as usize] };
        (0..PAGES).for_each(|page| migration.copy_page(page));
        migration
    }

    fn port(&self, number: u16) -> DmaPort {
        self.host.dma_port(&format!("device {number}")).unwrap()
    }

    fn copy_page(&mut self, page: u64) {
        let place = (page * PAGE) as usize;
        let bytes = &mut self.copy[place..place + PAGE as usize];
        self.memory.slice().read_slice(bytes, place).unwrap();
    }

    /// The dirty pages; `clear` makes them clean.
    fn dirty(&self, clear: bool) -> Vec<u64> {
        let range = DirtyRange { iova: 0, length: PAGES * PAGE, page_size: PAGE };
        let mut bitmap = [0; (PAGES / 64) as usize];
        self.host.hwpt_get_dirty_bitmap(self.tracked, &range, clear, &mut bitmap).unwrap();
        (0..PAGES).filter(|page| bitmap[*page as usize / 64] >> (page % 64) & 1 != 0).collect()
    }

    /// One correct round.
    fn follow(&mut self) {
        let dirty = self.dirty(true);
        dirty.into_iter().for_each(|page| self.copy_page(page));
    }

    /// One round in the wrong order: what is written between the copy and the end is lost.
    fn copy_first(&mut self) {
        let dirty = self.dirty(false);
        dirty.into_iter().for_each(|page| self.copy_page(page));
        self.dirty(true);
    }

    /// Does `rounds` of `round` while the devices write; returns whether the copy then equals the
    /// memory.
    fn run(&mut self, rounds: usize, round: fn(&mut Self)) -> bool {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for number in 0..DEVICES {
                let (mut port, stop) = (self.port(number), &stop);
                scope.spawn(move || {
                    let mut value = 1u64;
                    while !stop.load(Ordering::Acquire) {
                        value = value.wrapping_mul(6364136223846793005).wrapping_add(1);
                        let page = TABLES + (value >> 33) % (PAGES - TABLES);
                        let place = page * PAGE + u64::from(number) * 8;
                        let bytes = value.to_le_bytes();
                        port.write(DmaAttributes::default(), place, &bytes).unwrap();
                        let mut read = [0; 8];
                        port.read(DmaAttributes::default(), place, &mut read).unwrap();
                        assert_eq!(read, bytes);
                    }
                });
            }
            (0..rounds).for_each(|_| round(self));
            stop.store(true, Ordering::Release);
        });
        self.follow();
        let mut now = vec![0; self.copy.len()];
        self.memory.slice().read_slice(&mut now, 0).unwrap();
        now == self.copy
    }
}

fn write(memory: &UserMemory, place: u64, word: u64) {
    memory.slice().write_obj(word.to_le(), place as usize).unwrap();
}

#[test]
fn nothing_is_lost_through_a_second_stage_alone() {
    assert!(Migration::new(Tables::Vtd).run(ROUNDS, Migration::follow));
}

#[test]
fn nothing_is_lost_through_stage_1_of_an_smmu() {
    assert!(Migration::new(Tables::SmmuV3).run(ROUNDS, Migration::follow));
}

#[test]
fn nothing_is_lost_through_nested_tables_whose_flags_are_set() {
    assert!(Migration::new(Tables::VtdNested).run(ROUNDS, Migration::follow));
}

#[test]
fn a_copy_before_the_pages_are_cleared_is_caught() {
    let mut migration = Migration::new(Tables::Vtd);
    let lost = (0..ROUNDS_TO_NOTICE / 100).any(|_| !migration.run(100, Migration::copy_first));
    assert!(lost, "a lost write was not noticed");
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty tracking: DMA writes are reported, once and exactly.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::fake::{memory, s1, Bench, Failure, Told, PARENT, PLAIN};
use crate::{
    DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, SmmuV3Unit, SmmuV3UnitConfig, UnitId,
    VtdUnit, VtdUnitConfig,
};
use twostage::iommufd::{
    DirtyRange, Errno, HostIommu, HwptAlloc, HwptData, HwptFlags, MapTarget, ObjectId, Protection,
    UserMemory,
};
use twostage::spec::pci::Bdf;
use twostage::spec::smmuv3::regs::Httu;

const DIRTY: HwptFlags = HwptFlags::new().with_dirty_tracking(true);
const RW: Protection = Protection::READ_WRITE;
const PAGE: u64 = 0x1000;
/// Where the memory is mapped, and its size.
const BASE: u64 = 0x4000_0000;
const PAGES: u64 = 0x600;
const NONE: [u64; 0] = [];
const ALL: DirtyRange = DirtyRange { iova: BASE, length: PAGES * PAGE, page_size: PAGE };

struct Rig {
    host: Arc<EmulatedHost>,
    port: DmaPort,
    dev: ObjectId,
    ioas: ObjectId,
    hwpt: ObjectId,
    memory: UserMemory,
}

/// Adds a unit of one architecture.
type AddUnit = fn(&EmulatedHost) -> UnitId;

const VTD: AddUnit = |host| host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
const SMMU_V3: AddUnit = |host| host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default()));

/// A device on a HWPT with `flags` and dirty tracking.
fn rig(unit: AddUnit, flags: HwptFlags) -> Rig {
    let host = EmulatedHost::new();
    let unit = unit(&host);
    host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
    let port = host.dma_port("edu").unwrap();
    let (dev, ioas) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
    let memory = memory(PAGES * PAGE);
    host.ioas_map(ioas, &memory, MapTarget::Fixed(BASE), RW).unwrap();
    let flags = flags.with_dirty_tracking(true);
    let args = HwptAlloc { flags, dev, pt: ioas, data: HwptData::None, fault: None };
    let hwpt = host.hwpt_alloc(&args).unwrap();
    host.device_attach(dev, None, hwpt).unwrap();
    Rig { host, port, dev, ioas, hwpt, memory }
}

impl Rig {
    fn track(&self, enable: bool) {
        self.host.hwpt_set_dirty_tracking(self.hwpt, enable).unwrap();
    }

    /// The dirty pages, numbered from `BASE`.
    fn dirty(&self, clear: bool) -> Vec<u64> {
        bits(&self.host, self.hwpt, &ALL, clear)
    }

    fn write(&mut self, iova: u64, length: usize) {
        self.port.write(DmaAttributes::default(), iova, &vec![7; length]).unwrap();
    }

    fn read(&mut self, iova: u64) {
        self.port.read(DmaAttributes::default(), iova, &mut [0; 8]).unwrap();
    }
}

fn bits(host: &EmulatedHost, hwpt: ObjectId, range: &DirtyRange, clear: bool) -> Vec<u64> {
    let mut words = vec![0; (range.length / range.page_size).div_ceil(64) as usize];
    host.hwpt_get_dirty_bitmap(hwpt, range, clear, &mut words).unwrap();
    (0..words.len() as u64 * 64)
        .filter(|bit| words[*bit as usize / 64] >> (bit % 64) & 1 != 0)
        .collect()
}

#[test]
fn what_is_written_is_dirty_until_it_is_cleared() {
    let mut rig = rig(VTD, PLAIN);
    rig.write(BASE, 8);
    assert_eq!(rig.dirty(true), NONE, "nothing is tracked yet");
    rig.track(true);
    rig.read(BASE + PAGE);
    assert_eq!(rig.dirty(true), NONE);
    rig.write(BASE + PAGE, 8);
    rig.write(BASE + 5 * PAGE - 1, 2);
    assert_eq!(rig.dirty(false), [1, 4, 5]);
    assert_eq!(rig.dirty(true), [1, 4, 5], "they were not cleared");
    assert_eq!(rig.dirty(true), NONE);
    rig.write(BASE + PAGE, 8);
    assert_eq!(rig.dirty(true), [1], "what was cached as dirty was dropped");
    rig.write(BASE + 2 * PAGE, 8);
    rig.track(false);
    rig.write(BASE + 3 * PAGE, 8);
    assert_eq!(rig.dirty(false), [2], "nothing gets dirty while tracking is off");
    rig.track(true);
    assert_eq!(rig.dirty(true), NONE, "a clean start");
}

/// As in Linux, whose driver has HA and HD in the context descriptor from the start
/// (`arm_smmu_set_dirty_tracking`).
#[test]
fn an_smmu_tracks_from_the_start_to_the_end() {
    let mut rig = rig(SMMU_V3, PLAIN);
    rig.write(BASE, 8);
    rig.read(BASE + PAGE);
    assert_eq!(rig.dirty(false), [0]);
    rig.track(true);
    assert_eq!(rig.dirty(true), NONE, "a clean start");
    rig.write(BASE, 8);
    rig.write(BASE + PAGE, 8);
    rig.write(BASE + 5 * PAGE - 1, 2);
    assert_eq!(rig.dirty(false), [0, 1, 4, 5], "what was cached as dirty was dropped");
    assert_eq!(rig.dirty(true), [0, 1, 4, 5], "they were not cleared");
    assert_eq!(rig.dirty(true), NONE);
    rig.write(BASE + 2 * PAGE, 8);
    rig.track(false);
    rig.write(BASE + 3 * PAGE, 8);
    assert_eq!(rig.dirty(true), [2, 3]);
    rig.track(true);
    assert_eq!(rig.dirty(true), NONE);
}

#[test]
fn an_smmu_tracks_with_updates_of_the_dirty_state_only() {
    for httu in [Httu::None, Httu::Access, Httu::Dirty] {
        let host = EmulatedHost::new();
        let unit = host.add_unit(SmmuV3Unit::new(SmmuV3UnitConfig::default().with_httu(httu)));
        host.add_device("edu", unit, Bdf::from_raw(0x20), DeviceConfig::default()).unwrap();
        let (dev, pt) = (host.device_bind("edu").unwrap(), host.ioas_alloc().unwrap());
        let can = host.get_hw_info(dev).unwrap().capabilities.dirty_tracking();
        let args = HwptAlloc { flags: DIRTY, dev, pt, data: HwptData::None, fault: None };
        let outcome = host.hwpt_alloc(&args);
        assert_eq!((can, outcome.is_ok()), (httu == Httu::Dirty, httu == Httu::Dirty), "{httu:?}");
        assert!(can || outcome.errno() == Errno::EOPNOTSUPP);
    }
}

#[test]
fn a_page_that_is_mapped_anew_is_clean() {
    for unit in [VTD, SMMU_V3] {
        let mut rig = rig(unit, PLAIN);
        rig.track(true);
        rig.write(BASE + 3 * PAGE, 8);
        rig.host.ioas_unmap(rig.ioas, BASE, PAGES * PAGE).unwrap();
        rig.host.ioas_map(rig.ioas, &rig.memory, MapTarget::Fixed(BASE), RW).unwrap();
        assert_eq!(rig.dirty(true), NONE);
    }
}

#[test]
fn writes_through_nested_tables_make_pages_of_the_parent_dirty() {
    let mut rig = rig(VTD, PARENT);
    // Tables of one page each, from the start of the memory on, that map IOVA 0 to page 8.
    let entry = |page: u64| (BASE + page * PAGE) | 7;
    for (table, next) in [(0, 1), (1, 2), (2, 3), (3, 8)] {
        rig.memory.slice().write_obj(entry(next), (table * PAGE) as usize).unwrap();
    }
    let data = HwptData::VtdS1(s1(BASE));
    let args = HwptAlloc { flags: PLAIN, dev: rig.dev, pt: rig.hwpt, data, fault: None };
    let nested = rig.host.hwpt_alloc(&args).unwrap();
    rig.host.device_attach(rig.dev, None, nested).unwrap();
    rig.track(true);
    rig.read(0x100);
    assert_eq!(rig.dirty(true), [0, 1, 2, 3], "accessed flags were set in the tables");
    rig.read(0x100);
    assert_eq!(rig.dirty(true), NONE);
    rig.write(0x100, 8);
    assert_eq!(rig.dirty(true), [3, 8], "and a dirty flag in the last one");
    rig.write(0x100, 8);
    assert_eq!(rig.dirty(true), [8]);
    assert_eq!(
        rig.host.hwpt_set_dirty_tracking(nested, true).errno(),
        Errno::ENOENT,
        "it is the parent's"
    );
}

#[test]
fn what_is_refused() {
    let bench = Bench::new();
    let (a, ioas) = (bench.bind("a"), bench.ioas());
    let plain = bench.paging(a, ioas, PLAIN).unwrap();
    let hwpt = bench.paging(a, ioas, DIRTY).unwrap();
    let get = |hwpt, iova, length, page_size| {
        let range = DirtyRange { iova, length, page_size };
        bench.host.hwpt_get_dirty_bitmap(hwpt, &range, true, &mut [0; 64])
    };
    for id in [a, ioas, ObjectId(99)] {
        assert_eq!(bench.host.hwpt_set_dirty_tracking(id, true).errno(), Errno::ENOENT);
        assert_eq!(get(id, 0, PAGE, PAGE).errno(), Errno::ENOENT);
    }
    assert_eq!(bench.host.hwpt_set_dirty_tracking(plain, true).errno(), Errno::EOPNOTSUPP);
    // Each row fixes what the one before it broke.
    for (hwpt, iova, length, page_size, errno) in [
        (plain, u64::MAX, 2, 0, Errno::EOVERFLOW),
        (plain, 0, 0, 0, Errno::EINVAL),
        (plain, PAGE, 0, PAGE, Errno::EINVAL),
        (plain, 0x800, PAGE, 0, Errno::EINVAL),
        (plain, 0, 0x800, 0, Errno::EINVAL),
        (plain, PAGE, PAGE, 0, Errno::EINVAL),
        (plain, PAGE, PAGE, 2 * PAGE, Errno::EINVAL),
        (plain, 0, 3 * PAGE, 3 * PAGE, Errno::EINVAL),
        (plain, 0, 2 * PAGE, 2 * PAGE, Errno::EOPNOTSUPP),
        (hwpt, 0, 65 * 64 * PAGE, PAGE, Errno::EFAULT),
    ] {
        assert_eq!(get(hwpt, iova, length, page_size).errno(), errno, "{iova:#x} {length:#x}");
    }
    get(hwpt, 0, 2 * PAGE, 2 * PAGE).unwrap();
    get(hwpt, 0, PAGE, 1 << 6).unwrap();
    bench.fake.told();
    bench.host.hwpt_set_dirty_tracking(hwpt, true).unwrap();
    assert_eq!(bench.fake.told(), [Told::Stage2Changed]);
    get(hwpt, 0, PAGE, PAGE).unwrap();
    bench.host.hwpt_set_dirty_tracking(hwpt, false).unwrap();
    assert_eq!(bench.fake.told(), [], "nothing was dirty, so nothing is cached as dirty");
}

#[test]
fn a_hole_ends_the_bitmap_and_a_large_page_is_dirty_by_any_of_it() {
    let mut rig = rig(VTD, PLAIN);
    rig.host.ioas_unmap(rig.ioas, BASE, PAGES * PAGE).unwrap();
    for first in [0, 4, 8] {
        let memory = rig.memory.part(0, 2 * PAGE).unwrap();
        let target = MapTarget::Fixed(BASE + first * PAGE);
        rig.host.ioas_map(rig.ioas, &memory, target, RW).unwrap();
    }
    rig.track(true);
    for page in [1, 5, 9] {
        rig.write(BASE + page * PAGE, 8);
    }
    assert_eq!(rig.dirty(true), [1], "no further than the first hole, as in Linux");
    let from = |page, pages, page_size| {
        let (iova, length) = (BASE + page * PAGE, pages * PAGE);
        bits(&rig.host, rig.hwpt, &DirtyRange { iova, length, page_size }, true)
    };
    assert_eq!(from(4, 4, 2 * PAGE), [0]);
    assert_eq!(from(8, 2, PAGE / 2), [2, 3]);
    assert_eq!(from(8, 2, PAGE), NONE);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn dirty_pages_are_as_in_a_set(
        unit in prop::sample::select(vec![VTD, SMMU_V3]),
        pieces in prop::collection::vec(1u64..0x200, 1..4),
        steps in prop::collection::vec(
            (0u64..PAGES * PAGE - 0x3000, 1usize..0x3000, 0u8..4, 0u64..3), 1..40,
        ),
    ) {
        let mut rig = rig(unit, PLAIN);
        // The same memory, in areas that a range may span.
        rig.host.ioas_unmap(rig.ioas, BASE, PAGES * PAGE).unwrap();
        let mut at = 0;
        for length in pieces.into_iter().chain([PAGES]) {
            let length = length.min(PAGES - at);
            if length > 0 {
                let (offset, length) = (at * PAGE, length * PAGE);
                let memory = rig.memory.part(offset, length).unwrap();
                let target = MapTarget::Fixed(BASE + offset);
                rig.host.ioas_map(rig.ioas, &memory, target, RW).unwrap();
            }
            at += length;
        }
        rig.track(true);
        let mut set = BTreeSet::new();
        for (offset, length, step, shift) in steps {
            match step {
                0 => rig.read(BASE + offset),
                1 | 2 => {
                    rig.write(BASE + offset, length);
                    set.extend(offset / PAGE..=(offset + length as u64 - 1) / PAGE);
                }
                _ => {
                    let (page_size, clear) = (PAGE << shift, length % 2 == 0);
                    let first = offset / page_size * page_size;
                    let length = (length as u64).next_multiple_of(page_size);
                    let range = DirtyRange { iova: BASE + first, length, page_size };
                    let found = bits(&rig.host, rig.hwpt, &range, clear);
                    let pages = first / PAGE..(first + length) / PAGE;
                    let naive: BTreeSet<u64> = set
                        .range(pages.clone())
                        .map(|page| (page * PAGE - first) / page_size)
                        .collect();
                    prop_assert_eq!(found, naive.into_iter().collect::<Vec<_>>());
                    if clear {
                        set.retain(|page| !pages.contains(page));
                    }
                }
            }
        }
        prop_assert_eq!(rig.dirty(true), set.into_iter().collect::<Vec<_>>());
    }
}

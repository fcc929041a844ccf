// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a VMM maps and unmaps guest memory, decoded from bytes, on a host whose verbs may fail.
//!
//! After each step, a device reads and writes where the mappings say, and nowhere else. What fails
//! leaves all as it was, or as the host keeps it; at the end nothing is left.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use twostage::iommufd::{Errno, FailNth, HostIommu, ObjectId, Protection, UserMemory};
use twostage::nesting::{GuestIoas, NestingError};
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DeviceConfig, DmaAttributes, DmaPort, EmulatedHost, ObjectGraph, VtdUnit, VtdUnitConfig,
};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::input::Input;

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 24;
/// Pages, by number, that are mapped or not.
const PAGES: u64 = 16;
const PAGE: u64 = 0x1000;
/// The most pages of a mapping.
const LONGEST: u64 = 4;

/// Memory of 1 to [`LONGEST`] pages.
fn memory(pages: u64) -> UserMemory {
    static ALL: OnceLock<Vec<Arc<GuestRegionMmap>>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let region = |pages: u64| {
            let size = (pages * PAGE) as usize;
            let region = GuestRegionMmap::from_range(GuestAddress(0), size, None);
            Arc::new(region.expect("memory"))
        };
        (1..=LONGEST).map(region).collect()
    });
    UserMemory::whole(all[pages as usize - 1].clone())
}

/// Two regions of guest memory, of which the second one is at `gpa`.
fn two_regions(gpa: u64) -> GuestMemoryMmap {
    let ranges = [(GuestAddress(0), PAGE as usize), (GuestAddress(gpa), 2 * PAGE as usize)];
    GuestMemoryMmap::from_ranges(&ranges).expect("memory")
}

struct World {
    host: Arc<EmulatedHost>,
    failing: Arc<FailNth<dyn HostIommu>>,
    dev: ObjectId,
    port: DmaPort,
    ioas: Arc<GuestIoas>,
    /// Pages and whether they may be written, of each mapping, by its first page.
    mapped: BTreeMap<u64, (u64, bool)>,
}

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut world = World::new();
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        world.step(&mut input);
        world.check();
    }
    world.end();
}

impl World {
    fn new() -> Self {
        let host = EmulatedHost::new();
        let unit = host.add_unit(VtdUnit::new(VtdUnitConfig::default()));
        let rid = Bdf::from_raw(8);
        host.add_device("device", unit, rid, DeviceConfig::default()).expect("a new device");
        let failing = Arc::new(FailNth::new(host.clone() as Arc<dyn HostIommu>));
        let dev = host.device_bind("device").expect("it is there");
        let ioas = GuestIoas::new(failing.clone()).expect("an IOAS");
        host.device_attach(dev, None, ioas.id()).expect("an attachment");
        let port = host.dma_port("device").expect("it is there");
        Self { host, failing, dev, port, ioas, mapped: BTreeMap::new() }
    }

    /// The mappings that are partly in `count` pages at `page`, by their first pages.
    fn touched(&self, page: u64, count: u64) -> Vec<u64> {
        let overlaps = |(start, (pages, _)): &(&u64, &(u64, bool))| {
            **start < page + count && page < **start + pages
        };
        self.mapped.iter().filter(overlaps).map(|(start, _)| *start).collect()
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let (page, count) = (input.below(PAGES as usize) as u64, input.byte());
        let pages = u64::from(count) % LONGEST + 1;
        let what = input.byte();
        let (fails, nth) = (what & 0xc0 == 0xc0, u64::from(what >> 4 & 3) + 1);
        let failing = if fails { nth } else { 0 };
        match what % 8 {
            kind @ 0..=5 => {
                self.failing.fail_next(failing, Errno::ENOMEM);
                match kind {
                    0..=2 => self.map(page, pages, what & 8 == 0, fails),
                    _ => self.unmap(page, u64::from(count) % PAGES + 1, fails),
                }
            }
            6 => {
                self.failing.fail_nth(failing, Errno::ENOMEM);
                self.map_all(page, fails.then_some(nth));
            }
            _ => self.adopt(),
        }
        self.failing.fail_next(0, Errno::ENOMEM);
    }

    fn map(&mut self, page: u64, pages: u64, write: bool, fails: bool) {
        let access = if write { Protection::READ_WRITE } else { Protection::READ_ONLY };
        let result = self.ioas.map(page * PAGE, &memory(pages), access);
        let free = self.touched(page, pages).is_empty();
        assert_eq!(result.is_ok(), free && !fails, "{result:?}");
        if result.is_ok() {
            self.mapped.insert(page, (pages, write));
        }
    }

    fn unmap(&mut self, page: u64, pages: u64, fails: bool) {
        let result = self.ioas.unmap(page * PAGE, pages * PAGE);
        let touched = self.touched(page, pages);
        let within = |start: &u64| {
            let (length, _) = self.mapped[start];
            *start >= page && start + length <= page + pages
        };
        if !touched.iter().all(within) {
            let part = matches!(result, Err(NestingError::PartOfMapping { .. }));
            return assert!(part, "{result:?}");
        }
        match result {
            Ok(()) => {
                assert!(!touched.is_empty(), "nothing is mapped there");
                self.mapped.retain(|start, _| !touched.contains(start));
            }
            Err(error) => {
                assert!(fails || touched.is_empty(), "{error}");
                // What the host keeps stays.
                for start in touched {
                    if !self.reads(start) {
                        self.mapped.remove(&start);
                    }
                }
            }
        }
    }

    /// Maps all or nothing; verb `nth` fails.
    fn map_all(&mut self, page: u64, nth: Option<u64>) {
        let gpa = (page % (PAGES - 3) + 1) * PAGE;
        let result = self.ioas.map_all(&two_regions(gpa));
        let regions = [(0, 1), (gpa / PAGE, 2)];
        let free = regions.iter().all(|(page, count)| self.touched(*page, *count).is_empty());
        // Each region is one.
        let maps = nth.is_none_or(|nth| nth > 2);
        assert_eq!(result.is_ok(), free && maps, "{result:?}");
        if result.is_ok() {
            self.mapped.extend(regions.map(|(page, count)| (page, (count, true))));
        }
    }

    /// A VMM gives the same memory to another owner, who splits no mapping and leaves all there.
    fn adopt(&self) {
        let access = |write| if write { Protection::READ_WRITE } else { Protection::READ_ONLY };
        let all = self.mapped.iter();
        let all = all.map(|(page, (count, write))| (page * PAGE, count * PAGE, access(*write)));
        let all: Vec<_> = all.collect();
        let (host, id) = (self.host.clone(), self.ioas.id());
        let adopted = GuestIoas::adopt_mapped(host.clone(), id, &all).expect("it is there");
        for (gpa, length, _) in all.into_iter().filter(|(_, length, _)| *length > PAGE) {
            let part = adopted.unmap(gpa + PAGE, length - PAGE);
            assert!(matches!(part, Err(NestingError::PartOfMapping { .. })), "{part:?}");
        }
        assert!(GuestIoas::adopt(host, ObjectId(u32::MAX), &[]).is_err());
    }

    fn reads(&self, page: u64) -> bool {
        let mut port = self.port.clone();
        port.read(DmaAttributes::default(), page * PAGE, &mut [0; 8]).is_ok()
    }

    fn check(&mut self) {
        for page in 0..PAGES + LONGEST {
            let of = self.mapped.range(..=page).next_back();
            let of = of.filter(|(start, (count, _))| page < *start + count).map(|(_, of)| of.1);
            let (at, attributes) = (page * PAGE + 8, DmaAttributes::default());
            let read = self.port.read(attributes, at, &mut [0; 8]);
            let written = self.port.write(attributes, at, &[0; 8]);
            assert_eq!((read.is_ok(), written.is_ok()), (of.is_some(), of == Some(true)), "{page}");
        }
    }

    fn end(self) {
        let Self { host, dev, ioas, .. } = self;
        host.device_unbind(dev).expect("it is bound");
        drop(ioas);
        assert_eq!(host.graph(), ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
    }
}

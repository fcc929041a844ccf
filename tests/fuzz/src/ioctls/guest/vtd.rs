// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's VT-d: first-stage tables, second-stage tables, and one over the other; or, in legacy
//! mode, second-stage tables alone.

use std::cell::Cell;
use std::sync::Arc;

use twostage::spec::pci::Pasid;
use twostage::spec::vtd::qi::{AddressMask, ContextScope, Descriptor, IotlbScope};
use twostage::spec::vtd::regs::{Gcmd, GCMD};
use twostage::unit::{Vtd, VtdBuilder};
use twostage::viommu::vtd::VtdConfig;
use twostage_emulated::kit::vtd::{Completion, Driver, Entry};
use twostage_emulated::kit::{Mmio, Pages};
use twostage_emulated::{VtdUnit, VtdUnitConfig};

use super::account::{Leaf, Way, TABLES};
use super::{rid, Change, Ground, Guest, FREE, NAMES, PASID};
use crate::models::threads::IdleThreads;
use crate::models::Quiet;

/// Width of PASIDs.
pub const PASID_BITS: u8 = 8;
/// Domain IDs: of a table, this and its number; of no table.
const DOMAIN: u16 = 7;
const UNTRANSLATED: u16 = 3;

/// What a table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    First,
    Second,
    Nested,
}

/// The host's unit.
pub fn unit() -> Arc<VtdUnit> {
    VtdUnit::new(VtdUnitConfig::default().with_guest_second_stage(true))
}

pub struct Driven {
    unit: Arc<Vtd>,
    driver: Driver<Arc<Vtd>>,
    tables: [u64; TABLES],
    /// What nested tables are over.
    second: u64,
    legacy: bool,
    /// The queue is there.
    started: Cell<bool>,
}

impl Driven {
    pub fn new(ground: &Ground, legacy: bool) -> Self {
        let config = VtdConfig::default().with_pasid_bits(Some(PASID_BITS));
        let config = config.with_second_stage(true).with_nest(true);
        let unit = builder(ground).config(&config).build();
        let unit = Arc::new(unit.expect("what the hosts have"));
        let driver = Driver::new(Pages::new(ground.memory.clone(), FREE), unit.clone());
        let (tables, second) = ([(); TABLES].map(|()| driver.page()), driver.page());
        Self { unit, driver, tables, second, legacy, started: Cell::new(false) }
    }

    fn kind(&self, table: usize) -> Kind {
        match table {
            2 => Kind::Second,
            _ if self.legacy => Kind::Second,
            3 => Kind::Nested,
            _ => Kind::First,
        }
    }
}

/// What makes the guest's unit, with the devices that are present.
fn builder(ground: &Ground) -> VtdBuilder {
    let interrupts = Arc::new(Quiet);
    let mut builder = VtdBuilder::new(ground.ioas[0].clone(), ground.memory.clone(), interrupts)
        .threads(Arc::new(IdleThreads))
        .without_devices();
    for (device, present) in ground.present.into_iter().enumerate() {
        if present {
            let (rid, name) = (rid(device), NAMES[device]);
            builder = builder.device_on(&ground.ioas[device], rid, ground.devices[device], name);
        }
    }
    builder
}

impl Guest for Driven {
    fn has(&self, table: usize) -> (bool, bool) {
        (!self.legacy, self.kind(table) == Kind::First)
    }

    fn map(&self, table: usize, iova: u64, leaf: Leaf) {
        let (kind, table) = (self.kind(table), self.tables[table]);
        let Leaf { gpa, writable, large } = leaf;
        match kind {
            Kind::First => self.driver.map(table, iova, gpa, 1 + u8::from(large), writable),
            Kind::Second => self.driver.map_second_stage(table, iova, gpa, writable),
            Kind::Nested => self.driver.map_nested(table, self.second, iova, gpa, writable),
        }
    }

    fn unmap(&self, table: usize, iova: u64, large: bool) {
        let table = self.tables[table];
        match large {
            true => self.driver.store(self.driver.entry_at(table, iova, 2), 0),
            false => self.driver.unmap(table, iova),
        }
    }

    fn give(&self, device: usize, pasid: Option<u32>, way: Way) {
        let entry = match way {
            Way::Nowhere => Entry::NotPresent,
            Way::Bypass => Entry::PassThrough { domain: UNTRANSLATED },
            Way::Table(number) => {
                let (domain, table) = (DOMAIN + number as u16, self.tables[number]);
                let (first, second, accessed_dirty) = (table, self.second, false);
                match self.kind(number) {
                    Kind::First => Entry::FirstStage { table, domain },
                    Kind::Second => Entry::SecondStage { table, domain },
                    Kind::Nested => Entry::Nested { first, second, domain, accessed_dirty },
                }
            }
        };
        match self.legacy {
            true => self.driver.set_legacy_entry(rid(device), entry),
            false => self.driver.set_entry(rid(device), pasid.unwrap_or(0), entry),
        }
    }

    fn forget(&self, change: Change, how: u8) {
        if !self.started.get() {
            return;
        }
        let iotlb = |scope| Descriptor::Iotlb { scope, drain_writes: true, drain_reads: true };
        let descriptors = match change {
            Change::Page { table, iova, large } => {
                let domain = DOMAIN + table as u16;
                let mask = if large { 9 } else { 0 };
                let range = AddressMask { address: iova, mask, leaf: true };
                match (self.kind(table), how % 3) {
                    (Kind::First, 0 | 1) => [0, PASID]
                        .map(|pasid| Descriptor::PasidIotlb {
                            domain,
                            pasid: Pasid::new(pasid).expect("a PASID"),
                            range: how.is_multiple_of(3).then_some(range),
                        })
                        .to_vec(),
                    (Kind::Second, 0) => vec![iotlb(IotlbScope::Pages { domain, range })],
                    (_, 0 | 1) => vec![iotlb(IotlbScope::Domain(domain))],
                    _ => vec![iotlb(IotlbScope::Global)],
                }
            }
            Change::Entries if self.legacy => {
                let context = Descriptor::ContextCache(ContextScope::Global);
                vec![context, iotlb(IotlbScope::Global)]
            }
            Change::Entries => {
                assert_eq!(self.driver.flush_pasid_cache(), Completion::Done);
                vec![iotlb(IotlbScope::Global)]
            }
        };
        assert_eq!(self.driver.submit(&descriptors), Completion::Done, "{descriptors:?}");
    }

    fn switch(&self, on: bool) {
        match (on, self.started.replace(true)) {
            (false, _) => self.driver.disable(),
            (true, true) => {
                let command = Gcmd::new().with_qie(true).with_te(true);
                self.unit.write32(GCMD, command.into_bits());
                assert!(self.driver.status().tes(), "translation is not on");
            }
            (true, false) if self.legacy => self.driver.enable_legacy(true),
            (true, false) => self.driver.enable(),
        }
    }

    fn told(&self) -> Option<(u16, u64)> {
        self.driver.take_fault().map(|(record, _)| (record.high.sid(), record.address()))
    }

    fn tells_of_blocked(&self) -> bool {
        true
    }

    fn plug(&self, ground: &Ground, device: usize, present: bool) {
        let (rid, dev, name) = (rid(device), ground.devices[device], NAMES[device]);
        match present {
            true => {
                self.unit.add_device_on(&ground.ioas[device], rid, dev, name).expect("as before")
            }
            false => self.unit.remove_device(rid).expect("it is there"),
        }
    }

    fn reset(&self) {
        self.unit.reset().expect("the hosts do it");
        self.started.set(false);
    }

    fn restore(&mut self, ground: &Ground) {
        let state = self.unit.snapshot().expect("it has not ended");
        self.unit.shutdown().expect("nothing is left");
        let builder = builder(ground);
        self.unit = Arc::new(builder.restore(&state).expect("what it was"));
        self.unit.drain_queue();
        self.driver = self.driver.moved(self.driver.pages.clone(), self.unit.clone());
    }

    fn end(self: Box<Self>) {
        self.unit.shutdown().expect("nothing is left");
    }
}

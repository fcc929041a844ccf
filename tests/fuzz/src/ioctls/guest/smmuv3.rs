// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's SMMUv3, with stage-1 tables.

use std::cell::Cell;
use std::sync::Arc;

use twostage::patience::wait_until;
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::unit::{Smmuv3, Smmuv3Builder};
use twostage_emulated::kit::smmuv3::{cfgi_cd, Completion, Driver, Entry};
use twostage_emulated::kit::Pages;
use twostage_emulated::{SmmuV3Unit, SmmuV3UnitConfig};

use super::account::{Leaf, Way, LARGE, TABLES};
use super::{rid, Change, Ground, Guest, FREE, NAMES};
use crate::models::threads::IdleThreads;
use crate::models::Quiet;

/// ASIDs: of a table, this and its number.
const ASID: u16 = 7;

/// The host's unit.
pub fn unit() -> Arc<SmmuV3Unit> {
    SmmuV3Unit::new(SmmuV3UnitConfig::default())
}

pub struct Driven {
    unit: Arc<Smmuv3>,
    driver: Driver<Arc<Smmuv3>>,
    tables: [u64; TABLES],
    /// The command queue is there.
    started: Cell<bool>,
}

impl Driven {
    pub fn new(ground: &Ground) -> Self {
        let unit = Arc::new(builder(ground).build().expect("what the hosts have"));
        let driver = Driver::new(Pages::new(ground.memory.clone(), FREE), unit.clone());
        let tables = [(); TABLES].map(|()| driver.page());
        Self { unit, driver, tables, started: Cell::new(false) }
    }
}

/// What makes the guest's unit, with the devices that are present.
fn builder(ground: &Ground) -> Smmuv3Builder {
    let interrupts = Arc::new(Quiet);
    let mut builder = Smmuv3Builder::new(ground.ioas[0].clone(), ground.memory.clone(), interrupts)
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
    fn has(&self, _: usize) -> (bool, bool) {
        (false, true)
    }

    fn map(&self, table: usize, iova: u64, leaf: Leaf) {
        let level = if leaf.large { 2 } else { 3 };
        self.driver.map(self.tables[table], iova, leaf.gpa, level, leaf.writable);
    }

    fn unmap(&self, table: usize, iova: u64, large: bool) {
        match large {
            true => self.driver.store(self.block(table, iova), 0),
            false => self.driver.unmap(self.tables[table], iova),
        }
    }

    fn give(&self, device: usize, _: Option<u32>, way: Way) {
        let entry = match way {
            Way::Nowhere => Entry::Abort,
            Way::Bypass => Entry::Bypass,
            Way::Table(number) => {
                let asid = ASID + number as u16;
                Entry::Stage1 { cd: self.driver.context(self.tables[number], asid) }
            }
        };
        self.driver.set_entry(rid(device).into(), entry);
    }

    fn forget(&self, change: Change, how: u8) {
        if !self.started.get() {
            return;
        }
        let commands = match change {
            // A block is one translation.
            Change::Page { table, iova, .. } => {
                let (vmid, asid, at) = (0, ASID + table as u16, AddressRange::at(iova));
                match how % 4 {
                    0 => vec![Command::TlbiNhVa { vmid, asid, range: at }],
                    1 => vec![Command::TlbiNhVaa { vmid, range: at }],
                    2 => vec![Command::TlbiNhAsid { vmid, asid }],
                    _ => vec![Command::TlbiNhAll { vmid }],
                }
            }
            Change::Entries => {
                let both = [rid(0), rid(1)];
                assert_eq!(self.driver.flush_entries(&both), Completion::Done);
                vec![cfgi_cd(both[0]), cfgi_cd(both[1]), Command::TlbiNsnhAll]
            }
        };
        assert_eq!(self.driver.submit(&commands), Completion::Done, "{commands:?}");
    }

    fn switch(&self, on: bool) {
        match on {
            true => self.driver.enable(),
            false => self.driver.disable(),
        }
        self.started.set(true);
    }

    fn told(&self) -> Option<(u16, u64)> {
        // Each host's thread brings events.
        for host in self.unit.nestings() {
            wait_until("events of a host", || host.quiesce().is_ok());
        }
        let event = self.driver.take_event()?;
        Some((event.stream().raw() as u16, event.input_address))
    }

    fn tells_of_blocked(&self) -> bool {
        // A stream table entry that aborts does so without an event (STE.Config).
        false
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

impl Driven {
    /// The descriptor of the block at `iova`.
    fn block(&self, table: usize, iova: u64) -> u64 {
        let mut at = self.tables[table];
        for shift in [39, 30] {
            at = self.driver.load(at + (iova >> shift & 0x1ff) * 8) & 0xffff_ffff_f000;
        }
        at + (iova / LARGE % 512) * 8
    }
}

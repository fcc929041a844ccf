// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest with a virtual IOMMU on an emulated host. Its driver is the test kit's, which makes
//! tables of every kind, and two devices do DMA by them, of one host or of two.
//!
//! The guest invalidates whatever it has changed, in one of the ways that are enough. So each DMA
//! gets where a naive account of the tables says, through each interface that devices use, or
//! nowhere, and the guest is told of it. The VMM takes devices away and gives them back, resets the
//! IOMMU, and restores it from a snapshot. At the end the hosts have no object.

mod account;
mod smmuv3;
mod vtd;

use std::sync::Arc;

use twostage::iommufd::{HostIommu, ObjectId};
use twostage::nesting::GuestIoas;
use twostage::spec::pci::Bdf;
use twostage_emulated::{
    DmaAttributes, DmaMemory, EmulatedHost, EmulatedUnit, ObjectGraph, UnitId,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, IommuMemory};

use super::graph;
use crate::input::Input;
use account::{Account, Leaf, Reach, Way, DATA, PAGES, PLACE, TABLES};

const MAX_STEPS: usize = 48;
/// Bytes of guest memory.
const MEMORY: usize = 4 << 20;
/// Where the driver has its tables.
const FREE: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;
/// The PASID that a device uses, beside none.
const PASID: u32 = 5;
const NAMES: [&str; 2] = ["near", "far"];

/// The guest's address of a device.
fn rid(device: usize) -> Bdf {
    Bdf::new(0, 3 + device as u8, 0).expect("a function")
}

type Memory = Arc<GuestMemoryMmap<()>>;

/// What the guest has changed.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// The entry for `iova` of a table.
    Page { table: usize, iova: u64, large: bool },
    /// Who uses which table.
    Entries,
}

/// The guest's driver of a model of IOMMU.
trait Guest {
    /// Whether devices may have PASIDs, and a table entries for large pages.
    fn has(&self, table: usize) -> (bool, bool);
    fn map(&self, table: usize, iova: u64, leaf: Leaf);
    fn unmap(&self, table: usize, iova: u64, large: bool);
    fn give(&self, device: usize, pasid: Option<u32>, way: Way);
    /// Invalidates what `change` needs, as `how` says.
    fn forget(&self, change: Change, how: u8);
    fn switch(&self, on: bool);
    /// The oldest fault that the guest was told of: requester and address.
    fn told(&self) -> Option<(u16, u64)>;
    /// Whether it is told of requests of devices without tables.
    fn tells_of_blocked(&self) -> bool;
    /// The VMM takes a device away, or gives it back.
    fn plug(&self, ground: &Ground, device: usize, present: bool);
    fn reset(&self);
    /// Another unit takes its place, restored from a snapshot.
    fn restore(&mut self, ground: &Ground);
    fn end(self: Box<Self>);
}

/// What the guest's unit is on.
struct Ground {
    /// Each device's host: one, or two.
    hosts: [Arc<EmulatedHost>; 2],
    memory: Memory,
    /// Guest memory on each device's host: on one host it is the same.
    ioas: [Arc<GuestIoas>; 2],
    devices: [ObjectId; 2],
    present: [bool; 2],
}

impl Ground {
    fn new<U: Into<EmulatedUnit>>(two: bool, unit: impl Fn() -> U, pasid_bits: u8) -> Self {
        let range = (GuestAddress(0), MEMORY);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[range]).expect("memory"));
        let host = || {
            let host = EmulatedHost::new();
            let unit: UnitId = host.add_unit(unit());
            (host, unit)
        };
        let first = host();
        let second = if two { host() } else { first.clone() };
        let bind = |(host, unit): &(Arc<EmulatedHost>, UnitId), number: u8| {
            let (name, place) = (NAMES[usize::from(number)], Bdf::new(0, 8 + number, 0));
            let config = twostage_emulated::DeviceConfig::default().with_pasid_bits(pasid_bits);
            let place = place.expect("a function");
            host.add_device(name, *unit, place, config).expect("a new device");
            host.device_bind(name).expect("nobody has it")
        };
        let devices = [bind(&first, 0), bind(&second, 1)];
        let hosts = [first.0, second.0];
        let ioas = memories(&hosts, &memory);
        Self { hosts, memory, ioas, devices, present: [true; 2] }
    }
}

/// `memory` on the host of each device.
fn memories([near, far]: &[Arc<EmulatedHost>; 2], memory: &Memory) -> [Arc<GuestIoas>; 2] {
    let ioas = |host: &Arc<EmulatedHost>| {
        let ioas = GuestIoas::new(host.clone()).expect("an IOAS");
        ioas.map_all(memory).expect("memory");
        ioas
    };
    let first = ioas(near);
    let second = if Arc::ptr_eq(near, far) { first.clone() } else { ioas(far) };
    [first, second]
}

struct World {
    ground: Ground,
    guest: Box<dyn Guest>,
    account: Account,
}

/// One execution.
pub fn run(input: &mut Input<'_>) {
    let choice = input.byte();
    let two = choice & 0x18 == 0x18;
    let (ground, guest): (_, Box<dyn Guest>) = match choice % 4 {
        0 | 1 => {
            let ground = Ground::new(two, vtd::unit, vtd::PASID_BITS);
            let guest = vtd::Driven::new(&ground, choice % 4 == 1);
            (ground, Box::new(guest))
        }
        _ => {
            let ground = Ground::new(two, smmuv3::unit, 0);
            let guest = smmuv3::Driven::new(&ground);
            (ground, Box::new(guest))
        }
    };
    let mut world = World { ground, guest, account: Account::default() };
    if choice & 4 == 0 {
        world.start(input);
    }
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        world.step(input);
    }
    world.end();
}

impl World {
    /// Both devices have a table with a page, and translation is on.
    fn start(&mut self, input: &mut Input<'_>) {
        for device in 0..NAMES.len() {
            let table = input.below(TABLES);
            self.map(table, account::small(device), Leaf::small(device as u64, true), 0);
            self.give(device, None, Way::Table(table), 0);
        }
        self.switch(true);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let (kind, how) = (input.byte(), input.byte());
        match kind % 16 {
            0..=7 => {
                let (device, pasid) = (usize::from(how & 1), (how & 0xe == 0xe).then_some(PASID));
                let iova = account::iova(input) + PLACE;
                let write = (how & 0x10 != 0).then(|| input.byte());
                self.dma(device, pasid, iova, write, how >> 5);
            }
            8..=10 => {
                let (table, large) = (input.below(TABLES), how & 0x10 != 0);
                let (slot, page) = (input.below(8), input.below(PAGES) as u64);
                let large = large && self.guest.has(table).1;
                match large {
                    true => self.map(table, account::large(slot), Leaf::large(how & 1 == 0), how),
                    false => {
                        self.map(table, account::small(slot), Leaf::small(page, how & 1 == 0), how);
                    }
                }
            }
            11 | 12 => {
                let table = input.below(TABLES);
                self.unmap(table, input.below(16), how);
            }
            13 => {
                let pasid = (how & 0xe == 0xe).then_some(PASID);
                let way = match input.byte() % 8 {
                    0 => Way::Nowhere,
                    1 | 2 => Way::Bypass,
                    table => Way::Table(usize::from(table) % TABLES),
                };
                self.give(usize::from(how & 1), pasid, way, how);
            }
            14 => self.switch(how & 7 != 0),
            _ => match how % 8 {
                0..=2 => self.look(),
                3 => self.reset(),
                4 | 5 => self.plug(usize::from(how >> 7)),
                _ => self.restore(),
            },
        }
    }

    fn map(&mut self, table: usize, iova: u64, leaf: Leaf, how: u8) {
        self.guest.map(table, iova, leaf);
        self.account.tables[table].insert(iova, leaf);
        self.guest.forget(Change::Page { table, iova, large: leaf.large }, how >> 5);
    }

    /// Unmaps one of what is mapped.
    fn unmap(&mut self, table: usize, number: usize, how: u8) {
        let mapped = &mut self.account.tables[table];
        let Some((iova, leaf)) = mapped.iter().nth(number % mapped.len().max(1)) else { return };
        let (iova, large) = (*iova, leaf.large);
        mapped.remove(&iova);
        self.guest.unmap(table, iova, large);
        self.guest.forget(Change::Page { table, iova, large }, how >> 5);
    }

    fn give(&mut self, device: usize, pasid: Option<u32>, way: Way, how: u8) {
        let pasid = pasid.filter(|_| self.guest.has(0).0);
        self.guest.give(device, pasid, way);
        self.account.ways.insert((device, pasid), way);
        self.guest.forget(Change::Entries, how >> 5);
    }

    fn switch(&mut self, on: bool) {
        if self.account.on != on {
            self.guest.switch(on);
            self.account.on = on;
            self.guest.forget(Change::Entries, 0);
        }
    }

    fn reset(&mut self) {
        self.guest.reset();
        self.account.on = false;
    }

    /// The guest moves, with its memory.
    fn restore(&mut self) {
        self.ground.ioas = memories(&self.ground.hosts, &self.ground.memory);
        self.guest.restore(&self.ground);
    }

    /// The VMM takes a device away, or gives it back.
    fn plug(&mut self, device: usize) {
        let present = !self.ground.present[device];
        self.guest.plug(&self.ground, device, present);
        self.ground.present[device] = present;
    }

    /// A device reads a byte, or writes one, through one of the interfaces.
    fn dma(
        &mut self,
        device: usize,
        pasid: Option<u32>,
        iova: u64,
        write: Option<u8>,
        interface: u8,
    ) {
        let pasid = pasid.filter(|_| self.guest.has(0).0 && self.account.on);
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        let mut port = self.ground.hosts[device].dma_port(NAMES[device]).expect("it is there");
        let memory = (*self.ground.memory).clone();
        let mut byte = [write.unwrap_or_default()];
        let done = match (interface % 4, write) {
            (0, Some(_)) => port.write(attributes, iova, &byte).is_ok(),
            (0, None) => port.read(attributes, iova, &mut byte).is_ok(),
            (1, _) => {
                let section = port.section(attributes);
                let behind = IommuMemory::new(memory, section, true, ());
                match write {
                    Some(_) => behind.write_slice(&byte, GuestAddress(iova)).is_ok(),
                    None => behind.read_slice(&mut byte, GuestAddress(iova)).is_ok(),
                }
            }
            _ => {
                let mut behind = DmaMemory::behind_iommu(memory, port).with_attributes(attributes);
                match write {
                    Some(_) => behind.write(iova, &byte).is_ok(),
                    None => behind.read(iova, &mut byte).is_ok(),
                }
            }
        };
        let reach = match self.ground.present[device] {
            true => self.account.reach((device, pasid), iova, write.is_some()),
            false => Reach::Gone,
        };
        assert_eq!(done, matches!(reach, Reach::Data(_)), "{device} at {iova:#x}: {reach:?}");
        if let Reach::Data(page) = reach {
            match write {
                Some(value) => self.account.data[page] = value,
                None => assert_eq!(byte[0], self.account.data[page], "{device} at {iova:#x}"),
            }
        }
        for (page, byte) in self.account.data.iter().enumerate() {
            let at = GuestAddress(DATA + page as u64 * PAGE + PLACE);
            let found: u8 = self.ground.memory.read_obj(at).expect("memory");
            assert_eq!(found, *byte, "page {page} after {device} at {iova:#x}");
        }
        let told = self.guest.told().map(|(rid, address)| (rid, address & !(PAGE - 1)));
        if self.account.on {
            let fault = (rid(device).raw(), iova & !(PAGE - 1));
            match reach {
                Reach::Data(_) => assert_eq!(told, None, "of a fault that was none"),
                Reach::Gone => assert_eq!(told, None, "of a device that is not there"),
                Reach::Blocked => {
                    let told_of = self.guest.tells_of_blocked().then_some(fault);
                    assert_eq!(told, told_of, "of a device that is blocked");
                }
                Reach::Refused => assert_eq!(told, Some(fault), "of what was refused"),
                // Where the host has no memory.
                Reach::Nothing => assert!(told.is_none_or(|told| told == fault)),
            }
        }
    }

    /// The hosts' objects as people see them.
    fn look(&self) {
        for host in &self.ground.hosts {
            graph::check_text(&graph::checked(host));
        }
    }

    fn end(self) {
        self.look();
        self.guest.end();
        let Ground { hosts, devices, ioas, .. } = self.ground;
        drop(ioas);
        for (host, device) in hosts.iter().zip(devices) {
            host.device_unbind(device).expect("it is bound");
        }
        for host in &hosts {
            assert_eq!(host.graph(), ObjectGraph { objects: Vec::new(), pinned_bytes: 0 });
        }
    }
}

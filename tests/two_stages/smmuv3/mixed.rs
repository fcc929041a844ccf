// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual SMMUv3 in front of devices of two hosts, each with a unit that caches.

use std::sync::Arc;

use twostage::patience::wait_for;
use twostage::spec::smmuv3::command::Command;
use twostage::spec::smmuv3::event::EventId;
use twostage::unit::{Smmuv3, Smmuv3Builder};
use twostage_emulated::{DmaPort, SmmuV3Unit};

use super::guest::{cfgi_cd, Completion, Driver, Entry};
use super::machine::{self, Messages};
use super::{page_of, IOVA, NAME};
use crate::common::{reads_are_fresh, word, TwoHosts, A, B};

struct Mixed {
    guest: Driver<Arc<Smmuv3>>,
    hosts: TwoHosts,
    units: [Arc<SmmuV3Unit>; 2],
}

fn ground() -> (TwoHosts, [Arc<SmmuV3Unit>; 2]) {
    let [(first, near), (second, far)] = [(); 2].map(|()| machine::host());
    (TwoHosts::new([first, second]), [near, far])
}

fn builder(hosts: &TwoHosts) -> Smmuv3Builder {
    let (memory, messages) = (hosts.memory.map.clone(), Arc::new(Messages::default()));
    Smmuv3Builder::new(hosts.ioases[0].clone(), memory, messages)
        .device(A, hosts.devices[0], "a")
        .device_on(&hosts.ioases[1], B, hosts.devices[1], "b")
}

impl Mixed {
    fn new() -> Self {
        let (hosts, units) = ground();
        let smmu = builder(&hosts).build().unwrap();
        let guest = Driver::new(hosts.memory.pages.clone(), Arc::new(smmu));
        Self { guest, hosts, units }
    }

    fn ports(&self) -> [DmaPort; 2] {
        let [near, far] = &self.units;
        [near.port(A.raw()), far.port(B.raw())]
    }

    /// What each device reads at `IOVA`.
    fn read(&self) -> [Option<u64>; 2] {
        self.ports().map(|mut port| word(&mut port, IOVA))
    }

    /// Both devices on one table, which is returned.
    fn attach(&self) -> u64 {
        let table = self.guest.page();
        let cd = self.guest.context(table, NAME);
        for rid in [A, B] {
            self.guest.set_entry(rid.into(), Entry::Stage1 { cd });
        }
        table
    }

    #[track_caller]
    fn end(self) {
        drop(self.guest);
        self.hosts.end();
    }
}

#[test]
fn what_either_reads_after_an_invalidation_is_fresh() {
    let mixed = Mixed::new();
    let table = mixed.attach();
    mixed.guest.enable();
    let (guest, memory) = (&mixed.guest, &mixed.hosts.memory);
    reads_are_fresh(memory, mixed.ports(), IOVA, |round, page| {
        guest.map(table, IOVA, page, 3, true);
        let commands = match round % 4 {
            0 => vec![page_of(IOVA)],
            1 => vec![Command::TlbiNhAsid { vmid: 0, asid: NAME }],
            2 => vec![cfgi_cd(A), cfgi_cd(B), Command::TlbiNhAll { vmid: 0 }],
            _ => vec![Command::TlbiNsnhAll],
        };
        assert_eq!(guest.submit(&commands), Completion::Done);
    });
    mixed.end();
}

#[test]
fn events_of_both_arrive_and_a_restored_machine_goes_on() {
    let mixed = Mixed::new();
    let table = mixed.attach();
    mixed.guest.enable();
    for (rid, mut port) in [A, B].into_iter().zip(mixed.ports()) {
        assert_eq!(word(&mut port, IOVA), None);
        let event = wait_for("an event", || mixed.guest.take_event());
        assert_eq!((event.id(), event.stream()), (Some(EventId::Translation), rid.into()));
    }
    let page = mixed.guest.page();
    mixed.guest.map(table, IOVA, page, 3, true);
    mixed.guest.store(page, 7);
    assert_eq!(mixed.read(), [Some(7); 2]);

    // On two other hosts, with the same contents of memory.
    let state = mixed.guest.registers.snapshot().unwrap();
    let (hosts, units) = ground();
    hosts.memory.fill(&mixed.hosts.memory.contents());
    let restored = Arc::new(builder(&hosts).restore(&state).unwrap());
    restored.drain_queue();
    let guest = mixed.guest.moved(hosts.memory.pages.clone(), restored);
    mixed.end();
    let mixed = Mixed { guest, hosts, units };
    assert_eq!(mixed.read(), [Some(7); 2]);
    mixed.guest.unmap(table, IOVA);
    assert_eq!(mixed.read(), [Some(7); 2], "cached");
    assert_eq!(mixed.guest.submit(&[page_of(IOVA)]), Completion::Done);
    assert_eq!(mixed.read(), [None, None]);
    mixed.end();
}

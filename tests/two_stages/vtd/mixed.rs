// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual VT-d in front of devices of two hosts, each with a unit that caches.

use std::sync::Arc;

use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::qi::IotlbScope;
use twostage::unit::{Vtd, VtdBuilder};
use twostage::viommu::vtd::{VtdConfig, VtdState};
use twostage_emulated::{DmaPort, VtdUnit, VtdUnitConfig};

use super::guest::{Completion, Driver, Entry};
use super::machine::{self, vtd_config, Interrupts};
use super::{iotlb, pages, pasid_pages, DOMAIN, IOVA};
use crate::common::{reads_are_fresh, word, TwoHosts, A, B, PAGE};

struct Mixed {
    guest: Driver<Arc<Vtd>>,
    hosts: TwoHosts,
    units: [Arc<VtdUnit>; 2],
}

/// Two hosts, and a builder for the virtual unit of both devices.
fn ground() -> (TwoHosts, [Arc<VtdUnit>; 2]) {
    let [(first, near), (second, far)] = [(); 2].map(|()| machine::host(VtdUnitConfig::default()));
    (TwoHosts::new([first, second]), [near, far])
}

fn builder(hosts: &TwoHosts) -> VtdBuilder {
    let (memory, interrupts) = (hosts.memory.map.clone(), Arc::new(Interrupts::default()));
    VtdBuilder::new(hosts.ioases[0].clone(), memory, interrupts)
        .device(A, hosts.devices[0], "a")
        .device_on(&hosts.ioases[1], B, hosts.devices[1], "b")
}

impl Mixed {
    fn new(config: &VtdConfig) -> Self {
        let (hosts, units) = ground();
        let vtd = builder(&hosts).config(config).build().unwrap();
        let guest = Driver::new(hosts.memory.pages.clone(), Arc::new(vtd));
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
        for rid in [A, B] {
            self.guest.set_entry(rid, 0, Entry::FirstStage { table, domain: DOMAIN });
        }
        table
    }

    fn snapshot(&self) -> VtdState {
        self.guest.registers.snapshot().unwrap()
    }

    #[track_caller]
    fn end(self) {
        drop(self.guest);
        self.hosts.end();
    }
}

#[test]
fn what_either_reads_after_an_invalidation_is_fresh() {
    let mixed = Mixed::new(&vtd_config());
    let table = mixed.attach();
    mixed.guest.enable();
    let (guest, memory) = (&mixed.guest, &mixed.hosts.memory);
    reads_are_fresh(memory, mixed.ports(), IOVA, |round, page| {
        guest.map(table, IOVA, page, 1, true);
        let invalidation = match round % 5 {
            0 => pasid_pages(DOMAIN, 0, Some(pages(IOVA, 0))),
            1 => pasid_pages(DOMAIN, 0, None),
            2 => iotlb(IotlbScope::Pages { domain: DOMAIN, range: pages(IOVA, 0) }),
            3 => iotlb(IotlbScope::Domain(DOMAIN)),
            _ => iotlb(IotlbScope::Global),
        };
        assert_eq!(guest.submit(&[invalidation]), Completion::Done);
    });
    mixed.end();
}

#[test]
fn faults_of_both_are_recorded_and_a_restored_machine_goes_on() {
    let mixed = Mixed::new(&vtd_config());
    let table = mixed.attach();
    mixed.guest.enable();
    assert_eq!(mixed.read(), [None, None]);
    for rid in [A, B] {
        let (record, reason) = mixed.guest.take_fault().unwrap();
        assert_eq!((Bdf::from_raw(record.high.sid()), record.address()), (rid, IOVA & !(PAGE - 1)));
        assert_eq!(reason, Some(FaultReason::FirstStageNotPresent));
    }
    let page = mixed.guest.page();
    mixed.guest.map(table, IOVA, page, 1, true);
    mixed.guest.store(page, 7);
    assert_eq!(mixed.read(), [Some(7); 2]);

    // On two other hosts, with the same contents of memory.
    let state = mixed.snapshot();
    let (hosts, units) = ground();
    let contents = mixed.hosts.memory.contents();
    hosts.memory.fill(&contents);
    let restored = Arc::new(builder(&hosts).restore(&state).unwrap());
    restored.drain_queue();
    let guest = mixed.guest.moved(hosts.memory.pages.clone(), restored);
    mixed.end();
    let mixed = Mixed { guest, hosts, units };
    assert_eq!(mixed.read(), [Some(7); 2]);
    mixed.guest.unmap(table, IOVA);
    assert_eq!(mixed.read(), [Some(7); 2], "cached");
    let all = iotlb(IotlbScope::Global);
    assert_eq!(mixed.guest.submit(&[all]), Completion::Done);
    assert_eq!(mixed.read(), [None, None]);
    mixed.end();
}

/// Both hosts report what they block, so that the tables are read again for each.
#[test]
fn without_caching_mode_either_is_served_late() {
    let mixed = Mixed::new(&vtd_config().with_caching_mode(false));
    mixed.guest.enable();
    assert_eq!(mixed.read(), [None, None]);
    let table = mixed.attach();
    let page = mixed.guest.page();
    mixed.guest.map(table, IOVA, page, 1, true);
    mixed.guest.store(page, 9);
    assert_eq!(mixed.read(), [Some(9); 2]);
    assert_eq!(mixed.guest.registers.model().counters().found_served, 2);
    mixed.end();
}

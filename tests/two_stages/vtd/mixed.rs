// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual VT-d in front of devices of two hosts, each with a unit that caches.

use std::sync::Arc;

use twostage::nesting::vtd::Nesting;
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

/// Two hosts with a unit each.
fn ground() -> (TwoHosts, [Arc<VtdUnit>; 2]) {
    ground_of([(); 2].map(|()| VtdUnitConfig::default()))
}

fn ground_of(units: [VtdUnitConfig; 2]) -> (TwoHosts, [Arc<VtdUnit>; 2]) {
    let [(first, near), (second, far)] = units.map(machine::host);
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

    /// The host of one device walks second-stage tables of the guest, that of the other does not.
    /// There are at most so many `pieces` of mirrors.
    fn half_mirrored(mirrored: usize, pieces: u64) -> Self {
        let walks = |number| VtdUnitConfig::default().with_guest_second_stage(number != mirrored);
        let (hosts, units) = ground_of([walks(0), walks(1)]);
        let config = vtd_config().with_second_stage(true).with_first_stage(Some(true));
        let builder = builder(&hosts).config(&config).nesting(Nesting::Auto { pieces });
        let vtd = builder.build().unwrap();
        for (number, side) in vtd.nestings().iter().enumerate() {
            assert_eq!(side.mirrors_because().is_some(), number == mirrored, "{number}");
        }
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

/// One host nests the guest's tables, and the other has mirrors of them.
#[test]
fn what_is_nested_and_what_is_mirrored_is_as_fresh() {
    for (mirrored, second_stage) in [(0, false), (1, false), (0, true), (1, true)] {
        let mixed = Mixed::half_mirrored(mirrored, 1000);
        let (guest, memory) = (&mixed.guest, &mixed.hosts.memory);
        let table = guest.page();
        for rid in [A, B] {
            let entry = match second_stage {
                true => Entry::SecondStage { table, domain: DOMAIN },
                false => Entry::FirstStage { table, domain: DOMAIN },
            };
            guest.set_entry(rid, 0, entry);
        }
        guest.enable();
        reads_are_fresh(memory, mixed.ports(), IOVA, |round, page| {
            match second_stage {
                true => guest.map_second_stage(table, IOVA, page, true),
                false => guest.map(table, IOVA, page, 1, true),
            }
            let invalidation = match round % 4 {
                0 => iotlb(IotlbScope::Pages { domain: DOMAIN, range: pages(IOVA, 0) }),
                1 if !second_stage => pasid_pages(DOMAIN, 0, Some(pages(IOVA, 0))),
                2 => iotlb(IotlbScope::Global),
                _ => iotlb(IotlbScope::Domain(DOMAIN)),
            };
            assert_eq!(guest.submit(&[invalidation]), Completion::Done);
        });
        mixed.guest.unmap(table, IOVA);
        assert_eq!(mixed.guest.submit(&[iotlb(IotlbScope::Domain(DOMAIN))]), Completion::Done);
        assert_eq!(mixed.read(), [None, None]);
        let mut blocked: Vec<_> = (0..2)
            .map(|_| Bdf::from_raw(mixed.guest.take_fault().expect("both are told").0.high.sid()))
            .collect();
        blocked.sort();
        assert_eq!(blocked, [A, B]);
        mixed.end();
    }
}

/// What is too much to be mirrored blocks the device that needs a mirror, and no other.
#[test]
fn a_table_that_is_not_mirrored_still_serves_who_nests_it() {
    let mixed = Mixed::half_mirrored(1, 2);
    let guest = &mixed.guest;
    let (table, page) = (guest.page(), guest.page());
    guest.store(page, 7);
    (0..3).for_each(|n| guest.map_second_stage(table, IOVA + 2 * n * PAGE, page, true));
    for rid in [A, B] {
        guest.set_entry(rid, 0, Entry::SecondStage { table, domain: DOMAIN });
    }
    guest.enable();
    let (record, reason) = guest.take_fault().expect("the guest is told");
    assert_eq!(Bdf::from_raw(record.high.sid()), B);
    assert_eq!((record.address(), reason), (IOVA + 4 * PAGE, Some(FaultReason::SecondStageDenied)));
    assert_eq!(mixed.read(), [Some(7), None]);
    guest.unmap(table, IOVA + 4 * PAGE);
    let all = iotlb(IotlbScope::Domain(DOMAIN));
    assert_eq!(guest.submit(&[all]), Completion::Done);
    assert_eq!(mixed.read(), [Some(7); 2]);
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

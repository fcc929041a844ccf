// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every host call fails in turn, across the whole stack: no panic, no leak; completed
//! invalidations are never stale; what does not work is blocked, and the guest gets an error.

use twostage::iommufd::Errno;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::qi::{Descriptor, IotlbScope, PasidCacheScope};
use twostage_emulated::{GraphObject, ObjectKind, VtdUnitConfig};

use super::guest::{Completion, Entry, BELOW};
use super::machine::{self, vtd_config, Machine};
use super::{iotlb, pages, pasid_pages, DOMAIN, IOVA};
use crate::common::{A, B, PAGE};

/// A requester, and what its DMA at `IOVA` finds according to the guest's tables; `None` if they
/// block it.
type Probe = (Bdf, Option<u32>, Option<u64>);

/// A guest's life, up to the end of the machine.
struct Life {
    machine: Machine,
    /// First-stage tables, and the page that each maps at `IOVA`.
    tables: [u64; 2],
    pages: [u64; 2],
}

impl Life {
    fn begin(machine: Machine) -> Self {
        let guest = &machine.guest;
        let tables = [guest.page(), guest.page()];
        let pages = [guest.page(), guest.page()];
        for (index, (table, page)) in tables.into_iter().zip(pages).enumerate() {
            guest.store(page, 1 + index as u64);
            guest.map(table, IOVA, page, 1, true);
        }
        Self { machine, tables, pages }
    }

    /// Submits, and resumes after a queue error, which also informs the guest.
    fn submit(&self, descriptors: &[Descriptor]) {
        if let Completion::Stopped(status) = self.machine.guest.submit(descriptors) {
            assert!(status.iqe(), "the queue stands, and the guest is not told");
            assert_eq!(self.machine.guest.resume(), Completion::Done);
        }
    }

    fn set(&self, rid: Bdf, pasid: u32, table: usize, domain: u16) {
        let entry = Entry::FirstStage { table: self.tables[table], domain };
        self.machine.guest.set_entry(rid, pasid, entry);
        assert_eq!(self.machine.guest.flush_pasid_cache(), Completion::Done);
    }

    /// Each probe finds what the guest's tables say; or, once a call failed, is blocked and
    /// reported.
    fn check(&self, step: &str, probes: &[Probe]) {
        let failed = !self.machine.host.is_armed();
        for &probe in probes {
            let (rid, pasid, finds) = probe;
            while self.machine.guest.take_fault().is_some() {}
            match self.machine.read(rid, pasid, IOVA) {
                Ok(value) => assert_eq!(Some(value), finds, "{step}: {probe:?}"),
                Err(error) => {
                    assert!(failed || finds.is_none(), "{step}: {probe:?}: {error}");
                    let record = self.machine.guest.take_fault();
                    let sid = record.map(|(record, _)| record.high.sid());
                    assert_eq!(sid, Some(rid.raw()), "{step}: {probe:?}: nobody told the guest");
                }
            }
        }
    }

    fn run(&self) {
        let Self { machine: Machine { guest, .. }, tables, pages } = self;
        guest.enable();
        self.check("enabled", &[(A, None, None), (B, None, None), (A, Some(1), None)]);

        self.set(A, 0, 0, DOMAIN);
        self.check("A nested", &[(A, None, Some(1)), (B, None, None)]);

        self.set(A, 1, 1, DOMAIN);
        self.set(B, 0, 0, DOMAIN + 1);
        self.check("shared", &[(A, None, Some(1)), (A, Some(1), Some(2)), (B, None, Some(1))]);

        guest.map(tables[0], IOVA, pages[1], 1, true);
        let flush = |domain| pasid_pages(domain, 0, None);
        self.submit(&[flush(DOMAIN), flush(DOMAIN + 1)]);
        self.check(
            "changed leaf",
            &[(A, None, Some(2)), (A, Some(1), Some(2)), (B, None, Some(2))],
        );

        guest.unmap(tables[1], IOVA);
        self.submit(&[pasid_pages(DOMAIN, 1, None)]);
        self.set(A, 0, 1, DOMAIN);
        self.check("changed table", &[(A, None, None), (A, Some(1), None), (B, None, Some(2))]);

        guest.map(tables[0], IOVA, pages[0], 1, true);
        self.set(B, 0, 0, DOMAIN);
        self.check("changed domain", &[(B, None, Some(1))]);

        guest.set_entry(A, 1, Entry::NotPresent);
        let gone = PasidCacheScope::Pasid { domain: DOMAIN, pasid: machine::pasid(1) };
        self.submit(&[Descriptor::PasidCache(gone)]);
        self.check("PASID gone", &[(A, Some(1), None), (B, None, Some(1))]);

        self.nest();

        // The failure is over by now: one more invalidation of the tables, and everything is as
        // they say.
        self.set(A, 0, 0, DOMAIN);
        if !self.machine.host.is_armed() {
            assert_eq!(guest.flush_pasid_cache(), Completion::Done);
            assert_eq!(self.machine.read(A, None, IOVA), Ok(1));
            assert_eq!(self.machine.read(B, None, IOVA), Ok(1));
        }

        guest.disable();
        let passes = self.machine.read(A, None, pages[0]);
        assert!(passes == Ok(1) || !self.machine.host.is_armed(), "{passes:?}");
        assert!(self.machine.read(A, None, IOVA & !(PAGE - 1)).is_err());
    }
}

impl Life {
    /// A requester on both stages of a guest that is a host: another second stage page, flags in
    /// the second stage, another first stage.
    fn nest(&self) {
        let guest = &self.machine.guest;
        let [first, other, second, page, moved] = [(); 5].map(|()| guest.page());
        guest.store(page, 3);
        guest.store(moved, 4);
        guest.map_nested(first, second, IOVA, page, true);
        let (domain, who) = (DOMAIN + 2, (B, Some(2)));
        let set = |first, accessed_dirty| {
            let entry = Entry::Nested { first, second, domain, accessed_dirty };
            guest.set_entry(B, 2, entry);
            assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        };
        let check = |step, finds| self.check(step, &[(who.0, who.1, finds)]);
        set(first, false);
        check("both stages", Some(3));

        guest.map_second_stage(second, BELOW + page, moved, true);
        let range = pages(BELOW + page, 0);
        self.submit(&[iotlb(IotlbScope::Pages { domain, range }), pasid_pages(domain, 2, None)]);
        check("changed second stage", Some(4));

        set(first, true);
        check("flags", Some(4));
        set(other, true);
        check("changed first stage", None);
        guest.set_entry(B, 2, Entry::NotPresent);
        self.submit(&[Descriptor::PasidCache(PasidCacheScope::Domain(domain))]);
        check("both stages gone", None);
    }
}

/// Runs a life with the `n`-th call failing; returns whether there was such a call.
fn live(n: u64) -> bool {
    let (host, unit) = machine::host(VtdUnitConfig::default());
    host.fail_nth(n, Errno::ENOMEM);
    let config = vtd_config().with_second_stage(true).with_nest(true);
    match Machine::on(host.clone(), unit, config) {
        Ok(machine) => {
            let life = Life::begin(machine);
            life.run();
            assert_eq!(life.machine.end(), 0, "call {n} failed, and objects leaked");
        }
        Err(error) => {
            assert!(error.contains("ENOMEM"), "call {n}: {error}");
            let graph = host.inner().inner().graph();
            let device = |object: &GraphObject| object.kind == ObjectKind::Device;
            assert!(graph.objects.iter().all(device), "call {n} failed, and left\n{graph}");
        }
    }
    !host.is_armed()
}

#[test]
fn every_host_call_fails_in_turn() {
    let calls = (1..1000).find(|n| !live(*n)).expect("a life ends");
    assert!(calls > 30, "only {calls} calls were made to fail");
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests: a device asks for a page that is not there, the guest brings it and responds, and
//! the device goes on (§7.4 to §7.6, §7.10).

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread::{self, ScopedJoinHandle};

use proptest::prelude::*;

use super::machine::{host_of, pasid, vtd_config, Machine, Served};
use crate::common::{Stops, A, B, PAGE};
use twostage::iommufd::Errno;
use twostage::patience::{wait_for, wait_until};
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::page_request::{PageRequest, PageResponse};
use twostage::spec::vtd::qi::{AddressMask, Descriptor, DeviceTlbRange};
use twostage::spec::vtd::regs::{self, Prs};
use twostage::viommu::vtd::VtdConfig;
use twostage_emulated::kit::vtd::{Completion, Entry};
use twostage_emulated::kit::Mmio;
use twostage_emulated::{DmaError, GraphObject, ObjectKind, VtdUnitConfig};

const PASID: u32 = 9;
const DOMAIN: u16 = 3;
const IOVA: u64 = 0x7f12_3456_7000;

/// A machine whose guest serves page requests of both devices; `PASID` of A is on the returned
/// table, which maps nothing.
fn machine() -> (Machine, u64) {
    let (host, unit) = host_of(unit(), [true, true]);
    serving(Machine::on(host, unit, config()).unwrap())
}

fn unit() -> VtdUnitConfig {
    VtdUnitConfig::default().with_device_tlb(true).with_page_requests(true)
}

fn config() -> VtdConfig {
    vtd_config().with_device_iotlb(true).with_page_requests(true)
}

fn serving(machine: Machine) -> (Machine, u64) {
    let guest = &machine.guest;
    let table = guest.page();
    guest.set_entry(A, PASID, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_entry(B, PASID, Entry::FirstStage { table, domain: DOMAIN });
    guest.set_page_requests(A, true);
    guest.set_page_requests(B, true);
    guest.start_page_queue();
    guest.enable();
    (machine, table)
}

type Reading<'a> = ScopedJoinHandle<'a, Result<u64, DmaError>>;

/// Has `rid` read at `iova` with PASID while `guest` serves it; returns what it has read.
fn while_reading(
    machine: &Machine,
    rid: Bdf,
    iova: u64,
    guest: impl FnOnce(&Reading<'_>),
) -> Result<u64, DmaError> {
    thread::scope(|scope| {
        let _served = Served(machine);
        let dma = scope.spawn(|| machine.read(rid, Some(PASID), iova));
        guest(&dma);
        dma.join().unwrap()
    })
}

/// Waits for a request in the queue.
fn asked(machine: &Machine) -> PageRequest {
    wait_for("a page request", || machine.guest.take_page_request())
}

#[test]
fn a_device_asks_for_a_page_and_reads_what_the_guest_brings() {
    let (machine, table) = machine();
    let guest = &machine.guest;
    let event = (0xfee0_2000, 0x55);
    guest.registers.write32(regs::PEDATA, event.1);
    guest.registers.write32(regs::PEADDR, event.0 as u32);
    guest.registers.write32(regs::PECTL, 0);
    let page = guest.page();
    guest.store(page + 8, 0x1234);
    let read = while_reading(&machine, A, IOVA + 8, |dma| {
        let request = asked(&machine);
        let group = request.group;
        assert_eq!(
            request,
            PageRequest {
                rid: A,
                pasid: Some(pasid(PASID)),
                group,
                last: true,
                address: IOVA,
                read: true,
                write: false,
                execute: false,
                privileged: false,
            }
        );
        // The tail moves before the message is sent.
        let sent = || Some(machine.interrupts.take()).filter(|sent| !sent.is_empty());
        assert_eq!(wait_for("the message of the event", sent), [event]);
        assert_eq!(guest.registers.read32(regs::PRS), Prs::new().with_ppr(true).into_bits());
        guest.registers.write32(regs::PRS, Prs::new().with_ppr(true).into_bits());
        assert_eq!(guest.registers.read32(regs::PRS), 0);
        // Nobody asked for these: another device, another PASID, another group.
        for other in [
            PageRequest { rid: B, ..request },
            PageRequest { pasid: None, ..request },
            PageRequest { pasid: Some(pasid(PASID + 1)), ..request },
            PageRequest { group: group + 1, ..request },
        ] {
            let none = guest.respond(&other, PageResponse::InvalidRequest);
            assert_eq!(none, Completion::Done);
        }
        guest.map(table, IOVA, page, 1, true);
        assert!(!dma.is_finished(), "it waits");
        assert_eq!(guest.respond(&request, PageResponse::Success), Completion::Done);
    });
    assert_eq!(read, Ok(0x1234));
    assert_eq!(machine.read(A, Some(PASID), IOVA), Ok(0));
    let counters = machine.iommu.counters();
    assert_eq!((counters.page_requests, counters.page_requests_refused), (1, 0));
    assert_eq!(guest.take_fault(), None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn an_access_fails_if_the_guest_has_no_page_for_it() {
    for response in [PageResponse::InvalidRequest, PageResponse::Failure] {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |_| {
            let request = asked(&machine);
            assert_eq!(machine.guest.respond(&request, response), Completion::Done);
        });
        assert!(read.is_err());
        // The device knows, and nothing else is a fault of the IOMMU's.
        assert_eq!(machine.guest.take_fault(), None);
        assert_eq!(machine.end(), 0);
    }
}

#[test]
fn a_device_without_page_requests_is_served_beside_one_with_them() {
    let (host, unit) = host_of(unit(), [true, false]);
    let (machine, table) = serving(Machine::on(host, unit, config()).unwrap());
    let guest = &machine.guest;
    // Tables that both are on.
    assert!(machine.read(B, Some(PASID), IOVA).is_err());
    super::expect_fault_of(&machine, B, FaultReason::FirstStageNotPresent, IOVA, Some(PASID));
    let page = guest.page();
    let read = while_reading(&machine, A, IOVA, |_| {
        let request = asked(&machine);
        guest.map(table, IOVA, page, 1, true);
        assert_eq!(guest.respond(&request, PageResponse::Success), Completion::Done);
    });
    assert_eq!((read, machine.read(B, Some(PASID), IOVA)), (Ok(0), Ok(0)));
    assert_eq!(machine.iommu.counters().page_requests, 1);
    assert_eq!(machine.end(), 0);
}

/// A wait with PD, after a requester has been blocked: from then on nothing of it comes.
fn drain(machine: &Machine) {
    let wait =
        Descriptor::Wait { status: None, interrupt: false, fence: true, drain_page_requests: true };
    assert_eq!(machine.guest.submit(&[wait]), Completion::Done);
}

#[test]
fn whoever_waits_is_answered_when_its_tables_go() {
    type Change = fn(&Machine);
    let changes: [Change; 5] = [
        |machine| machine.guest.set_entry(A, PASID, Entry::NotPresent),
        |machine| {
            let table = machine.guest.page();
            machine.guest.set_entry(A, PASID, Entry::FirstStage { table, domain: DOMAIN });
        },
        |machine| machine.iommu.remove_device(A),
        |machine| machine.guest.disable(),
        |machine| machine.iommu.halt(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let (machine, _) = machine();
        let read = while_reading(&machine, A, IOVA, |dma| {
            let request = asked(&machine);
            assert!(!dma.is_finished());
            change(&machine);
            machine.guest.flush_pasid_cache();
            // The DMA is over, or it asks again, on new tables: another request.
            let again = wait_for("the answer", || match machine.guest.take_page_request() {
                None => dma.is_finished().then_some(None),
                again => Some(again),
            });
            assert!(number == 1 || again.is_none(), "change {number}");
            if let Some(again) = again {
                assert_ne!(again.group, request.group);
                machine.guest.respond(&request, PageResponse::Success);
                assert!(!dma.is_finished(), "the response was to nobody");
                machine.guest.respond(&again, PageResponse::InvalidRequest);
            }
        });
        assert!(read.is_err(), "change {number}");
        assert_eq!(machine.end(), 0);
    }
}

/// Runs a life with the `n`-th host call failing; returns whether there was such a call.
fn live(n: u64) -> bool {
    let (host, unit) = host_of(unit(), [true, false]);
    host.fail_nth(n, Errno::ENOMEM);
    let machine = match Machine::on(host.clone(), unit, config()) {
        Ok(machine) => machine,
        Err(error) => {
            assert!(error.contains("ENOMEM"), "call {n}: {error}");
            let graph = host.inner().inner().graph();
            let device = |object: &GraphObject| object.kind == ObjectKind::Device;
            assert!(graph.objects.iter().all(device), "call {n} failed, and left\n{graph}");
            return !host.is_armed();
        }
    };
    let (machine, table) = serving(machine);
    let guest = &machine.guest;
    let page = guest.page();
    for rid in [A, B] {
        let read = while_reading(&machine, rid, IOVA, |dma| {
            wait_until("the end of the DMA", || {
                if let Some(request) = guest.take_page_request() {
                    guest.map(table, IOVA, page, 1, true);
                    guest.respond(&request, PageResponse::Success);
                }
                dma.is_finished()
            });
        });
        assert!(read.is_ok() || !host.is_armed(), "{rid}: {read:?}");
    }
    assert_eq!(machine.end(), 0, "call {n} failed, and objects leaked");
    !host.is_armed()
}

#[test]
fn every_host_call_fails_in_turn() {
    let calls = (1..200).find(|n| !live(*n)).expect("a life ends");
    assert!(calls > 12, "only {calls} calls were made to fail");
}

/// What a page contains once its invalidation was waited for.
const FREED: u64 = u64::MAX;
/// PASIDs, tables and pages of the random lives.
const PASIDS: [u32; 2] = [8, 9];
const TABLES: usize = 2;
const PAGES: u64 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Takes a request, brings the page, and responds; or responds later.
    Serve {
        later: bool,
    },
    Refuse,
    /// Responds to the `n`-th of those that were left for later.
    Late {
        n: usize,
        success: bool,
    },
    Unmap {
        table: usize,
        page: u64,
    },
    Attach {
        rid: usize,
        pasid: usize,
        table: usize,
    },
    Detach {
        rid: usize,
        pasid: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let requester = || (0..2usize, 0..PASIDS.len());
    prop_oneof![
        6 => any::<bool>().prop_map(|later| Step::Serve { later }),
        1 => Just(Step::Refuse),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(n, success)| Step::Late { n, success }),
        4 => (0..TABLES, 0..PAGES).prop_map(|(table, page)| Step::Unmap { table, page }),
        2 => (requester(), 0..TABLES)
            .prop_map(|((rid, pasid), table)| Step::Attach { rid, pasid, table }),
        1 => requester().prop_map(|(rid, pasid)| Step::Detach { rid, pasid }),
    ]
}

/// The tables that a requester was on, a set for each moment; the last one is now.
type On = Mutex<Vec<BTreeSet<usize>>>;

/// A guest whose devices do DMA all the time.
struct Life<'a> {
    machine: &'a Machine,
    tables: [u64; TABLES],
    /// The pages of each table.
    pages: [[Option<u64>; PAGES as usize]; TABLES],
    on: &'a [[On; 2]; 2],
    late: Vec<PageRequest>,
    /// How many requests it has taken.
    taken: Cell<u64>,
}

impl Life<'_> {
    /// The tables that the requester of `request` is on.
    fn now(&self, request: &PageRequest) -> BTreeSet<usize> {
        let of = |it: &u32| request.pasid == Some(pasid(*it));
        let pasid = PASIDS.iter().position(of).unwrap();
        self.on[usize::from(request.rid == B)][pasid].lock().unwrap().last().unwrap().clone()
    }

    /// Takes a request: never one of a requester that was drained.
    fn take(&self) -> Option<PageRequest> {
        let request = self.take_any()?;
        assert!(!self.now(&request).is_empty(), "drained before: {request:?}");
        Some(request)
    }

    fn take_any(&self) -> Option<PageRequest> {
        let request = self.machine.guest.take_page_request()?;
        self.taken.set(self.taken.get() + 1);
        Some(request)
    }

    /// Brings the page of a request to the tables that its requester is on by now.
    fn bring(&mut self, request: &PageRequest) {
        let guest = &self.machine.guest;
        let page = (request.address - IOVA) / PAGE;
        for table in self.now(request) {
            if self.pages[table][page as usize].is_none() {
                let gpa = guest.page();
                guest.store(gpa, (table as u64) << 8 | page);
                guest.map(self.tables[table], IOVA + page * PAGE, gpa, 1, true);
                self.pages[table][page as usize] = Some(gpa);
            }
        }
    }

    fn respond(&self, request: &PageRequest, success: bool) {
        let response = if success { PageResponse::Success } else { PageResponse::InvalidRequest };
        assert_eq!(self.machine.guest.respond(request, response), Completion::Done);
    }

    fn set(&self, rid: usize, pasid: usize, table: Option<usize>) {
        let guest = &self.machine.guest;
        let on = &self.on[rid][pasid];
        let mut either = on.lock().unwrap().last().unwrap().clone();
        either.extend(table);
        on.lock().unwrap().push(either);
        let entry = match table {
            // One domain for all: invalidations name them by their PASIDs.
            Some(table) => Entry::FirstStage { table: self.tables[table], domain: DOMAIN },
            None => Entry::NotPresent,
        };
        guest.set_entry([A, B][rid], PASIDS[pasid], entry);
        assert_eq!(guest.flush_pasid_cache(), Completion::Done);
        if table.is_none() {
            drain(self.machine);
            while let Some(request) = self.take_any() {
                self.respond(&request, false);
            }
        }
        on.lock().unwrap().push(table.into_iter().collect());
    }

    fn step(&mut self, step: &Step) {
        let guest = &self.machine.guest;
        match *step {
            Step::Serve { later } => {
                let Some(request) = self.take() else { return };
                self.bring(&request);
                match later {
                    true => self.late.push(request),
                    false => self.respond(&request, true),
                }
            }
            Step::Refuse => {
                let request = self.take();
                request.iter().for_each(|request| self.respond(request, false));
            }
            Step::Late { n, success } => {
                if let Some(n) = n.checked_rem(self.late.len()) {
                    let request = self.late.swap_remove(n);
                    self.respond(&request, success);
                }
            }
            Step::Unmap { table, page } => {
                let Some(gpa) = self.pages[table][page as usize].take() else { return };
                let address = IOVA + page * PAGE;
                guest.unmap(self.tables[table], address);
                let of = |it: u32| Descriptor::PasidIotlb {
                    domain: DOMAIN,
                    pasid: pasid(it),
                    range: Some(AddressMask { address, mask: 0, leaf: true }),
                };
                let devices = [A, B].into_iter().flat_map(|source| {
                    PASIDS.map(|it| Descriptor::PasidDeviceTlb {
                        source,
                        pasid: pasid(it),
                        global: false,
                        physical_function: 0,
                        max_pending: 0,
                        range: DeviceTlbRange { address, size: false },
                    })
                });
                let all: Vec<_> = PASIDS.map(of).into_iter().chain(devices).collect();
                assert_eq!(guest.submit(&all), Completion::Done);
                guest.store(gpa, FREED);
            }
            Step::Attach { rid, pasid, table } => self.set(rid, pasid, Some(table)),
            Step::Detach { rid, pasid } => self.set(rid, pasid, None),
        }
    }
}

/// DMA of a requester until told to stop: what it reads is a page of the tables that it was on, and
/// not one that was freed.
fn reads(machine: &Machine, (rid, pasid): (Bdf, u32), on: &On, stop: &AtomicBool) {
    for page in (0..PAGES).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        let from = on.lock().unwrap().len() - 1;
        if let Ok(value) = machine.read(rid, Some(pasid), IOVA + page * PAGE) {
            let on = on.lock().unwrap();
            let mut tables = on[from..].iter().flatten();
            let expected = |table: &usize| value == (*table as u64) << 8 | page;
            assert!(tables.any(expected), "{rid} {pasid} page {page}: {value:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Requests, responses, invalidations, detachments and replacements at random.
    #[test]
    fn nobody_waits_for_ever_and_nothing_is_used_after_its_end(
        steps in prop::collection::vec(step(), 100..400)
    ) {
        let (machine, _) = machine();
        [A, B].into_iter().for_each(|rid| machine.port(rid).control().set_device_tlb(true));
        let on = [(); 2].map(|()| [(); 2].map(|()| On::new(vec![BTreeSet::new()])));
        let tables = [(); TABLES].map(|()| machine.guest.page());
        let (pages, late) = ([[None; PAGES as usize]; TABLES], Vec::new());
        let taken = Cell::new(0);
        let mut life = Life { machine: &machine, tables, pages, on: &on, late, taken };
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (_served, stops) = (Served(&machine), Stops(&stop));
            let start = |(rid, pasid): (usize, usize)| {
                let (machine, on, stop) = (&machine, &on[rid][pasid], &stop);
                let who = ([A, B][rid], PASIDS[pasid]);
                scope.spawn(move || reads(machine, who, on, stop))
            };
            for rid in 0..2 {
                for pasid in 0..2 {
                    life.set(rid, pasid, Some(pasid));
                }
            }
            let dma = [(0, 0), (0, 1), (1, 0), (1, 1)].map(start);
            for step in &steps {
                life.step(step);
            }
            drop(stops);
            wait_until("the end of all DMA", || {
                life.step(&Step::Refuse);
                life.step(&Step::Late { n: 0, success: true });
                dma.iter().all(|dma| dma.is_finished())
            });
        });
        // Each was in the queue once, and nobody has one that is open.
        while life.take_any().is_some() {}
        let counters = machine.iommu.counters();
        prop_assert!(counters.page_requests > 0);
        prop_assert_eq!((counters.page_requests, counters.page_requests_lost), (life.taken.get(), 0));
        for rid in [A, B] {
            prop_assert_eq!(machine.port(rid).control().outstanding_page_requests(), 0);
        }
        prop_assert!(machine.unit.counters().device_tlb_misses > 0);
        prop_assert_eq!(machine.end(), 0);
    }
}

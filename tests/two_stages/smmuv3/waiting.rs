// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random lives of two devices that wait for their guest: one is stalled, the other asks for pages.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;

use proptest::prelude::*;

use super::guest::{Completion, Entry};
use super::machine::{Kind, Machine, Served};
use crate::common::{Stops, A, B, PAGE};
use twostage::patience::wait_until;
use twostage::spec::pci::{Bdf, PageResponse};
use twostage::spec::smmuv3::command::{AddressRange, Command};
use twostage::spec::smmuv3::event::EventRecord;
use twostage::spec::smmuv3::page_request::{PageRequest, Resume};
use twostage::viommu::smmuv3::SmmuConfig;
use twostage_emulated::{DeviceConfig, SmmuV3UnitConfig};

const IOVA: u64 = 0x12_3456_7000;

/// What a page contains once its invalidation was waited for.
const FREED: u64 = u64::MAX;
/// Tables and pages of the random lives.
const TABLES: usize = 2;
const PAGES: u64 = 3;

#[derive(Debug, Clone)]
enum Step {
    /// Takes a request, or a stalled transaction, brings the page, and responds; or later.
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
        table: usize,
    },
    Detach {
        rid: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<bool>().prop_map(|later| Step::Serve { later }),
        1 => Just(Step::Refuse),
        4 => (any::<usize>(), any::<bool>()).prop_map(|(n, success)| Step::Late { n, success }),
        4 => (0..TABLES, 0..PAGES).prop_map(|(table, page)| Step::Unmap { table, page }),
        2 => (0..2usize, 0..TABLES).prop_map(|(rid, table)| Step::Attach { rid, table }),
        1 => (0..2usize).prop_map(|rid| Step::Detach { rid }),
    ]
}

/// What waits for the guest.
#[derive(Debug, Clone)]
enum Waiting {
    Page(PageRequest),
    Stalled(EventRecord),
}

impl Waiting {
    /// The number of the device, and the address of the page.
    fn place(&self) -> (usize, u64) {
        let (stream, address) = match self {
            Self::Page(request) => (request.stream, request.address),
            Self::Stalled(event) => (event.stream(), event.input_address),
        };
        (usize::from(stream == B.into()), address & !(PAGE - 1))
    }
}

/// The tables that a device was on, a set for each moment; the last one is now.
type On = Mutex<Vec<BTreeSet<usize>>>;

/// A guest whose devices do DMA all the time: one is stalled, the other asks for pages.
struct Life<'a> {
    machine: &'a Machine,
    tables: [u64; TABLES],
    /// The pages of each table.
    pages: [[Option<u64>; PAGES as usize]; TABLES],
    on: &'a [On; 2],
    late: Vec<Waiting>,
}

/// The ASID of a table.
fn asid(table: usize) -> u16 {
    3 + table as u16
}

impl Life<'_> {
    /// The tables that a device is on.
    fn now(&self, rid: usize) -> BTreeSet<usize> {
        self.on[rid].lock().unwrap().last().unwrap().clone()
    }

    fn take(&self) -> Option<Waiting> {
        let guest = &self.machine.guest;
        guest.take_page_request().map(Waiting::Page).or_else(|| {
            // Nothing else is an event here.
            let event = guest.take_event()?;
            assert!(event.qw1.stall() && event.stream() == A.into(), "{event:?}");
            Some(Waiting::Stalled(event))
        })
    }

    /// Brings the page of a request to the tables that its device is on by now.
    fn bring(&mut self, waiting: &Waiting) {
        let guest = &self.machine.guest;
        let (rid, address) = waiting.place();
        let page = (address - IOVA) / PAGE;
        for table in self.now(rid) {
            if self.pages[table][page as usize].is_none() {
                let gpa = guest.page();
                guest.store(gpa, (table as u64) << 8 | page);
                guest.map(self.tables[table], IOVA + page * PAGE, gpa, 3, true);
                self.pages[table][page as usize] = Some(gpa);
            }
        }
    }

    fn respond(&self, waiting: &Waiting, success: bool) {
        let guest = &self.machine.guest;
        let done = match (waiting, success) {
            (Waiting::Page(request), true) => guest.respond(request, PageResponse::Success),
            (Waiting::Page(request), false) => guest.respond(request, PageResponse::InvalidRequest),
            (Waiting::Stalled(event), true) => guest.resume_stalled(event, Resume::Retry),
            (Waiting::Stalled(event), false) => guest.resume_stalled(event, Resume::Abort),
        };
        assert_eq!(done, Completion::Done);
    }

    fn set(&self, rid: usize, table: Option<usize>) {
        let guest = &self.machine.guest;
        let on = &self.on[rid];
        let mut either = on.lock().unwrap().last().unwrap().clone();
        either.extend(table);
        on.lock().unwrap().push(either);
        let who = [A, B][rid];
        match table {
            Some(table) => {
                let cd = guest.context(self.tables[table], asid(table));
                let eats = if rid == 1 { 1 << 28 } else { 0 };
                guest.set_raw_entry(who.into(), [1 | 5 << 1 | cd, eats]);
            }
            None => guest.set_entry(who.into(), Entry::Abort),
        }
        assert_eq!(guest.flush_entries(&[who]), Completion::Done);
        on.lock().unwrap().push(table.into_iter().collect());
    }

    fn step(&mut self, step: &Step) {
        let guest = &self.machine.guest;
        match *step {
            Step::Serve { later } => {
                let Some(waiting) = self.take() else { return };
                self.bring(&waiting);
                match later {
                    true => self.late.push(waiting),
                    false => self.respond(&waiting, true),
                }
            }
            Step::Refuse => {
                let waiting = self.take();
                waiting.iter().for_each(|waiting| self.respond(waiting, false));
            }
            Step::Late { n, success } => {
                if let Some(n) = n.checked_rem(self.late.len()) {
                    let waiting = self.late.swap_remove(n);
                    self.respond(&waiting, success);
                }
            }
            Step::Unmap { table, page } => {
                let Some(gpa) = self.pages[table][page as usize].take() else { return };
                let address = IOVA + page * PAGE;
                guest.unmap(self.tables[table], address);
                let range = AddressRange::at(address);
                let of_smmu = Command::TlbiNhVa { vmid: 0, asid: asid(table), range };
                let of_device = Command::AtcInv {
                    stream: B.into(),
                    substream: None,
                    global: false,
                    address,
                    size: 0,
                };
                assert_eq!(guest.submit(&[of_smmu, of_device]), Completion::Done);
                guest.store(gpa, FREED);
            }
            Step::Attach { rid, table } => self.set(rid, Some(table)),
            Step::Detach { rid } => self.set(rid, None),
        }
    }
}

/// DMA of a device until told to stop: what it reads is a page of the tables that it was on, and
/// not one that was freed.
fn reads(machine: &Machine, rid: Bdf, on: &On, stop: &AtomicBool) {
    for page in (0..PAGES).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
        let from = on.lock().unwrap().len() - 1;
        if let Ok(value) = machine.read(rid, IOVA + page * PAGE) {
            let on = on.lock().unwrap();
            let mut tables = on[from..].iter().flatten();
            let expected = |table: &usize| value == (*table as u64) << 8 | page;
            assert!(tables.any(expected), "{rid} page {page}: {value:#x}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    /// Requests, stalls, responses, invalidations, detachments and replacements at random.
    #[test]
    fn nobody_waits_for_ever_and_nothing_is_used_after_its_end(
        steps in prop::collection::vec(step(), 100..400)
    ) {
        let asking = DeviceConfig::default().with_ats(true).with_pri(true);
        let unit = SmmuV3UnitConfig::default().with_ats(true);
        let machine = Kind {
            unit: unit.with_page_requests(true).with_stalls(true),
            devices: [DeviceConfig::default().with_stalls(true), asking],
            offered: SmmuConfig::default().with_ats(true).with_page_requests(true).with_stalls(true),
        }
        .machine();
        let guest = &machine.guest;
        let tables = [(); TABLES].map(|()| guest.page());
        for (number, table) in tables.iter().enumerate() {
            guest.set_stalls(guest.context(*table, asid(number)), true);
        }
        machine.port(B).control().set_device_tlb(true);
        guest.start_page_queue();
        guest.enable();
        let on = [(); 2].map(|()| On::new(vec![BTreeSet::new()]));
        let (pages, late) = ([[None; PAGES as usize]; TABLES], Vec::new());
        let mut life = Life { machine: &machine, tables, pages, on: &on, late };
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (_served, stops) = (Served(&machine), Stops(&stop));
            (0..2).for_each(|rid| life.set(rid, Some(rid)));
            let start = |rid: usize| {
                let (machine, on, stop) = (&machine, &on[rid], &stop);
                scope.spawn(move || reads(machine, [A, B][rid], on, stop))
            };
            let dma = [0, 1].map(start);
            // Whatever the steps are, both have waited.
            wait_until("a stalled transaction and a page request", || {
                let counters = guest.registers.counters();
                counters.page_requests > 0 && counters.stalls > 0
            });
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
        prop_assert_eq!(machine.end(), 0);
    }
}

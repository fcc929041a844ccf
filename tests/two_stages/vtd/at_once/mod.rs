// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once over mirrors: devices read and write without a pause while the guest changes
//! pages and tables of all kinds, switches domains, invalidates in every way, and devices come and
//! go. Every DMA is compared with a naive account of what the guest has said: which bytes it found,
//! where its own went, and whether it was refused.
//!
//! `TWOSTAGE_STRESS_SECONDS` sets the duration of each test; default 2 seconds.

mod table;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use twostage::iommufd::ObjectId;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::qi::{ContextScope, Descriptor, IotlbScope, PasidCacheScope};
use twostage_emulated::{DmaAttributes, VtdUnitConfig};

use super::guest::{Completion, Entry};
use super::machine::{pasid, vtd_config, MachineOf};
use super::naive::{Choice, Model, Page, Said, View, Who, PAGES};
use super::{iotlb, pasid_pages};
use crate::common::{A, B, HIGH, PAGE};
use table::{Dice, Table};

/// The pages that devices use start here, which is guest memory, too; a large page starts here.
const IOVA: u64 = 0xc0_0000;
/// Pages of memory that tables lead to, besides those above [`HIGH`] and at [`IOVA`].
const POOL: u64 = 24;
/// The PASID of both devices that has an entry.
const PASID: u32 = 5;
/// Pages that each table has besides, each a mapping of its own: more than one slice of the work on
/// a mirror, so that mirrors are made, joined and replaced in several.
const SCATTERED: u64 = 100;
/// A domain for every table.
const COMMON: u16 = 9;
/// Every kind of outcome is to be seen so often, however slow the machine is.
const ENOUGH: u64 = 20;

struct World<const MIRRORED: bool> {
    machine: MachineOf<MIRRORED>,
    legacy: bool,
    requesters: Vec<Who>,
    views: Vec<View>,
    /// All pages of memory that a device may reach; the first word of each is its GPA.
    memory: Vec<u64>,
    model: Mutex<Model>,
    /// Held while the queue, or an entry, is written: of a guest with a lock for its unit.
    unit: Mutex<()>,
    over: AtomicBool,
    /// DMA that found something else than what the guest has said.
    wrong: AtomicU64,
    /// One invalidation in so many is forgotten, though the guest believes it made it.
    forgets: Option<u64>,
    /// Reads, writes, refused reads, refused writes; changes of pages, tables, entries; entries
    /// that went, or led to another table, while the unit was at work; changes of devices.
    seen: [AtomicU64; 10],
}

impl<const MIRRORED: bool> World<MIRRORED> {
    fn new(legacy: bool, threads: usize) -> (Self, Vec<Table>) {
        let unit = VtdUnitConfig::default().with_guest_second_stage(!MIRRORED);
        let machine = <MachineOf<MIRRORED>>::with(unit, vtd_config().with_second_stage(true));
        let guest = &machine.guest;
        let mut memory: Vec<_> = (0..POOL).map(|_| guest.page()).collect();
        memory.extend((0..PAGES).flat_map(|page| [IOVA + page * PAGE, HIGH + page * PAGE]));
        memory.iter().for_each(|page| guest.store(*page, *page));
        let kinds = if legacy { vec![false; 2] } else { vec![true, true, false] };
        let table = |first_stage: &bool| {
            let top = guest.page();
            let scattered = (0..SCATTERED).map(|number| IOVA + (512 + 2 * number) * PAGE);
            for iova in [IOVA].into_iter().chain(scattered) {
                match first_stage {
                    true => guest.map(top, iova, memory[0], 1, true),
                    false => guest.map_second_stage(top, iova, memory[0], true),
                }
            }
            guest.unmap(top, IOVA);
            let pointer = guest.load(guest.entry_at(top, IOVA, 2));
            let pages = [Page::default(); PAGES as usize];
            Table { top, first_stage: *first_stage, pages, large: false, pointer }
        };
        let tables: Vec<_> = kinds.iter().map(table).collect();
        let pasids = if legacy { vec![None] } else { vec![None, Some(PASID)] };
        let requesters: Vec<Who> =
            [A, B].into_iter().flat_map(|rid| pasids.iter().map(move |it| (rid, *it))).collect();
        let of_table = |table: usize| {
            let of_domain = move |domain| [0, PASID].map(|pasid| View { table, domain, pasid });
            [1 + table as u16, COMMON].into_iter().flat_map(of_domain)
        };
        let views: Vec<View> = (0..tables.len()).flat_map(of_table).collect();
        let bypass = std::array::from_fn(|page| Page {
            gpa: IOVA + page as u64 * PAGE,
            read: true,
            write: true,
        });
        let model = Mutex::new(Model::new(&requesters, &views, kinds, bypass, threads));
        match legacy {
            true => guest.enable_legacy(true),
            false => guest.enable(),
        }
        let (unit, over) = (Mutex::new(()), AtomicBool::new(false));
        let (wrong, seen, forgets) = Default::default();
        let world = Self {
            machine,
            legacy,
            requesters,
            views,
            memory,
            model,
            unit,
            over,
            wrong,
            forgets,
            seen,
        };
        (world, tables)
    }

    fn count(&self, what: usize) {
        self.seen[what].fetch_add(1, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn descriptor(&self, said: Said) -> Descriptor {
        let mask = |page: u64, mask: u8, hint| {
            // A large page is aligned to its size.
            let page = if mask == 9 { 0 } else { page };
            let address = IOVA + (page >> mask << mask) * PAGE;
            twostage::spec::vtd::qi::AddressMask { address, mask, leaf: hint }
        };
        match said {
            Said::Entries if self.legacy => Descriptor::ContextCache(ContextScope::Global),
            Said::Entries => Descriptor::PasidCache(PasidCacheScope::Global),
            Said::Everything => iotlb(IotlbScope::Global),
            Said::Domain(domain) => iotlb(IotlbScope::Domain(domain)),
            Said::Pages { domain, page, mask: bits, hint } => {
                iotlb(IotlbScope::Pages { domain, range: mask(page, bits, hint) })
            }
            Said::Pasid { domain, pasid: of, pages } => pasid_pages(
                domain,
                pasid(of).raw(),
                pages.map(|(page, bits, hint)| mask(page, bits, hint)),
            ),
        }
    }

    /// Says `said` in one batch.
    fn say(&self, said: &[Said], dice: &mut Dice) {
        let begun = self.model.lock().unwrap().begins();
        let descriptors: Vec<_> = said.iter().map(|said| self.descriptor(*said)).collect();
        // Entries are not: it is a stale page that is to be found.
        let may_forget = !said.contains(&Said::Entries);
        if !self.forgets.is_some_and(|count| may_forget && dice.one_in(count)) {
            let _unit = self.unit.lock().unwrap();
            assert_eq!(self.machine.guest.submit(&descriptors), Completion::Done);
        }
        self.model.lock().unwrap().is_complete(said, begun);
    }

    /// Something that a guest may say of pages.
    fn saying(&self, dice: &mut Dice) -> Said {
        let View { domain, pasid, .. } = self.views[dice.below(self.views.len() as u64) as usize];
        let (page, hint) = (dice.below(PAGES), dice.one_in(2));
        let mask = [0, 0, 1, 2, 4, 9][dice.below(6) as usize];
        match dice.below(16) {
            0 => Said::Everything,
            1..6 => Said::Domain(domain),
            6..10 if !self.legacy => {
                let pages = (!dice.one_in(4)).then_some((page, mask, hint));
                Said::Pasid { domain, pasid, pages }
            }
            _ => Said::Pages { domain, page, mask, hint },
        }
    }

    /// Changes some pages of a table, or exchanges its lowest one for a large page.
    fn change(&self, number: usize, table: &mut Table, dice: &mut Dice) {
        let guest = &self.machine.guest;
        if table.large || dice.one_in(8) {
            table.large = !table.large;
            let now: Vec<_> = (0..PAGES).map(|page| (page, table.now(page))).collect();
            self.model.lock().unwrap().pages_come(number, &now);
            let whole = Page { gpa: HIGH, read: true, write: true };
            let word = if table.large { table.word(whole, true) } else { table.pointer };
            guest.store(guest.entry_at(table.top, IOVA, 2), word);
            self.model.lock().unwrap().pages_have_come(number, true);
            return self.count(5);
        }
        let (from, count) = (dice.below(PAGES), 1 + dice.below(6));
        let (first, goes, alike) = (dice.below(POOL), dice.one_in(3), dice.one_in(3));
        let rights = [(true, true), (true, false), (false, !table.first_stage)];
        let (read, write) = rights[dice.below(3) as usize];
        let mut now = Vec::new();
        for page in from..(from + count).min(PAGES) {
            let next = if alike { first + page } else { dice.below(POOL) };
            let gpa = self.memory[(next % POOL) as usize];
            let to = Page { gpa, read, write };
            let to = if goes || !read && !write { Page::default() } else { to };
            table.pages[page as usize] = to;
            now.push((page, to));
        }
        self.model.lock().unwrap().pages_come(number, &now);
        for (page, to) in &now {
            let entry = guest.entry_at(table.top, IOVA + page * PAGE, 1);
            guest.store(entry, table.word(*to, false));
        }
        self.model.lock().unwrap().pages_have_come(number, false);
        self.count(4);
    }

    /// The processor that changes tables, and says it, mostly.
    fn map(&self, tables: &mut [Table]) {
        let mut dice = Dice(1);
        while !self.is_over() {
            let number = dice.below(tables.len() as u64) as usize;
            self.change(number, &mut tables[number], &mut dice);
            let said: Vec<_> = (0..dice.below(4)).map(|_| self.saying(&mut dice)).collect();
            if !said.is_empty() {
                self.say(&said, &mut dice);
            }
            if dice.one_in(4) {
                thread::sleep(Duration::from_millis(1));
            }
            if dice.one_in(16) {
                let _unit = self.unit.lock().unwrap();
                while self.machine.guest.take_fault().is_some() {}
            }
        }
    }

    fn write_entry(&self, who: Who, choice: Choice, tables: &[(u64, bool)]) {
        let (rid, pasid) = who;
        let entry = match choice {
            Choice::Nothing => Entry::NotPresent,
            Choice::Bypass => Entry::PassThrough { domain: COMMON },
            Choice::Tables(View { table, domain, .. }) => match tables[table] {
                (table, true) => Entry::FirstStage { table, domain },
                (table, false) => Entry::SecondStage { table, domain },
            },
        };
        match self.legacy {
            true => self.machine.guest.set_legacy_entry(rid, entry),
            false => self.machine.guest.set_entry(rid, pasid.unwrap_or(0), entry),
        }
    }

    fn set(&self, who: Who, choice: Choice, tables: &[(u64, bool)]) {
        self.model.lock().unwrap().entry_comes(who, choice);
        {
            // Not one store: no invalidation may be in the middle.
            let _unit = self.unit.lock().unwrap();
            self.write_entry(who, choice, tables);
        }
        self.model.lock().unwrap().entry_has_come(who);
    }

    /// What differs from `choice` in one word of the entry: another table of the same kind in the
    /// same domain, or nothing.
    fn one_store_away(&self, choice: Choice, tables: &[(u64, bool)]) -> Choice {
        let Choice::Tables(view) = choice else { return Choice::Nothing };
        let is_like = |other: &&View| {
            (other.domain, other.pasid) == (view.domain, view.pasid)
                && other.table != view.table
                && tables[other.table].1 == tables[view.table].1
        };
        self.views.iter().find(is_like).map_or(Choice::Nothing, |other| Choice::Tables(*other))
    }

    /// The entry of `who` becomes `choice`, which is one store: others may be at work on the queue.
    fn turn(&self, who: Who, choice: Choice, tables: &[(u64, bool)]) {
        self.model.lock().unwrap().entry_comes(who, choice);
        self.write_entry(who, choice, tables);
        self.model.lock().unwrap().entry_has_come(who);
        self.count(if choice == Choice::Nothing { 7 } else { 8 });
    }

    /// The processor that switches domains, and plugs a device.
    fn switch(&self, tables: &[(u64, bool)]) {
        let mut dice = Dice(2);
        let mut now: Vec<_> = self.requesters.iter().map(|_| Choice::Nothing).collect();
        while !self.is_over() {
            let number = dice.below(self.requesters.len() as u64) as usize;
            let who = self.requesters[number];
            let own = |view: &&View| view.pasid == who.1.unwrap_or(0);
            let views: Vec<_> = self.views.iter().filter(own).collect();
            let choice = match dice.below(8) {
                0 => Choice::Nothing,
                // A PASID that bypasses needs the host's consent.
                1 if who.1.is_none() => Choice::Bypass,
                _ => Choice::Tables(*views[dice.below(views.len() as u64) as usize]),
            };
            self.set(who, choice, tables);
            now[number] = choice;
            self.count(6);
            if matches!(choice, Choice::Tables(_)) && dice.one_in(4) {
                // By another processor, while the unit is at work on that.
                let next = self.one_store_away(choice, tables);
                thread::scope(|scope| {
                    let after = Duration::from_micros(dice.below(2000));
                    scope.spawn(move || {
                        thread::sleep(after);
                        self.turn(who, next, tables);
                    });
                    self.say(&[Said::Entries], &mut dice);
                });
                now[number] = next;
            }
            self.say(&[Said::Entries], &mut dice);
            if let Choice::Tables(View { domain, .. }) = choice {
                if dice.one_in(2) {
                    self.say(&[Said::Domain(domain)], &mut dice);
                }
            }
            if dice.one_in(8) {
                self.replug(&now);
            }
            thread::sleep(Duration::from_micros(dice.below(500)));
        }
    }

    /// Device B goes, and comes back.
    fn replug(&self, now: &[Choice]) {
        let of_b: Vec<_> =
            self.requesters.iter().zip(now).filter(|((rid, _), _)| *rid == B).collect();
        let all = |choice: Option<Choice>| {
            for (who, now) in &of_b {
                self.model.lock().unwrap().entry_comes(**who, choice.unwrap_or(**now));
            }
        };
        let counts = || {
            for (who, _) in &of_b {
                let mut model = self.model.lock().unwrap();
                model.entry_has_come(**who);
                let begun = model.begins();
                model.entry_counts(**who, begun);
            }
        };
        let machine = &self.machine;
        let dev: ObjectId = machine.device(B);
        all(Some(Choice::Nothing));
        machine.iommu.remove_device(B);
        machine.nesting.remove_device(B).unwrap();
        counts();
        thread::sleep(Duration::from_micros(200));
        machine.nesting.add_device(B, dev).unwrap();
        all(None);
        machine.iommu.add_device(B).unwrap();
        counts();
        self.count(9);
    }

    /// A device: one DMA after another.
    fn transfer(&self, thread: usize, who: Who) {
        let mut dice = Dice(100 + thread as u64);
        let (rid, pasid): (Bdf, _) = who;
        let mut port = self.machine.port(rid);
        let attributes = DmaAttributes { pasid, ..DmaAttributes::default() };
        let guest = &self.machine.guest;
        // A word of each page is this thread's alone.
        let own = 8 * (1 + thread as u64);
        for serial in 1u64.. {
            if self.is_over() {
                break;
            }
            let page = dice.below(PAGES);
            let at = IOVA + page * PAGE;
            let mut bytes = [0; 8];
            let is_write = dice.one_in(2);
            self.model.lock().unwrap().dma_begins(thread);
            let done = match is_write {
                true => port.write(attributes, at + own, &serial.to_le_bytes()),
                false => port.read(attributes, at, &mut bytes),
            };
            let may = self.model.lock().unwrap().dma_ends(thread, who, page);
            let landed: Vec<u64> = match is_write {
                true => {
                    let has = |place: &&u64| guest.load(**place + own) == serial;
                    self.memory.iter().filter(has).copied().collect()
                }
                false => vec![u64::from_le_bytes(bytes)],
            };
            let right = match (&done, is_write) {
                (Ok(()), true) => may.iter().any(|page| page.write && landed == [page.gpa]),
                (Ok(()), false) => may.iter().any(|page| page.read && landed == [page.gpa]),
                (Err(_), true) => landed.is_empty() && may.iter().any(|page| !page.write),
                (Err(_), false) => may.iter().any(|page| !page.read),
            };
            self.count(usize::from(is_write) + 2 * usize::from(done.is_err()));
            if !right {
                if self.forgets.is_none() {
                    println!(
                        "{who:?} at {at:#x}, write {is_write}: {done:?} {landed:x?}; {may:x?}"
                    );
                }
                self.wrong.fetch_add(1, Ordering::Relaxed);
                self.over.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// Runs everything for as long as was requested, or until something is wrong. Returns what devices
/// and guest did, and how many DMA were wrong.
fn run<const MIRRORED: bool>(legacy: bool, forgets: Option<u64>) -> ([u64; 10], u64) {
    const THREADS: usize = 5;
    let seconds = std::env::var("TWOSTAGE_STRESS_SECONDS").ok();
    let seconds = seconds.map_or(2, |text| text.parse().expect("a number of seconds"));
    let (mut world, mut tables) = World::<MIRRORED>::new(legacy, THREADS);
    world.forgets = forgets;
    let tops: Vec<_> = tables.iter().map(|table| (table.top, table.first_stage)).collect();
    let until = Instant::now() + Duration::from_secs(seconds);
    let seen = |world: &World<MIRRORED>| world.seen.each_ref().map(|it| it.load(Ordering::Relaxed));
    thread::scope(|scope| {
        let world = &world;
        for number in 0..THREADS {
            let who = world.requesters[number % world.requesters.len()];
            scope.spawn(move || world.transfer(number, who));
        }
        scope.spawn(|| world.map(&mut tables));
        scope.spawn(|| world.switch(&tops));
        let enough = || seen(world).iter().all(|count| *count >= ENOUGH);
        while !world.is_over() && (Instant::now() < until || !enough()) {
            thread::sleep(Duration::from_millis(10));
        }
        world.over.store(true, Ordering::Relaxed);
    });
    let (seen, wrong) = (seen(&world), world.wrong.load(Ordering::Relaxed));
    world.requesters.iter().for_each(|who| world.turn(*who, Choice::Nothing, &[]));
    world.say(&[Said::Entries], &mut Dice(3));
    let counters = world.machine.nesting.counters();
    assert_eq!(counters.mirror_pieces, 0, "nobody uses a table");
    let rebuilds = counters.mirror_rebuilds;
    println!("{seen:?}, {rebuilds} mirrors replaced");
    assert!(!MIRRORED || forgets.is_some() || rebuilds >= ENOUGH, "{rebuilds}");
    assert_eq!(world.machine.end(), 0);
    (seen, wrong)
}

#[test]
fn scalable_mode_over_mirrors() {
    let (seen, wrong) = run::<true>(false, None);
    assert_eq!(wrong, 0, "{seen:?}");
}

#[test]
fn legacy_mode_over_mirrors() {
    let (seen, wrong) = run::<true>(true, None);
    assert_eq!(wrong, 0, "{seen:?}");
}

/// The account holds for a host that walks the tables itself, too.
#[test]
fn scalable_mode_over_nested_tables() {
    let (seen, wrong) = run::<false>(false, None);
    assert_eq!(wrong, 0, "{seen:?}");
}

#[test]
fn an_invalidation_that_is_forgotten_is_found() {
    let (seen, wrong) = run::<true>(false, Some(3));
    assert_ne!(wrong, 0, "{seen:?}");
}

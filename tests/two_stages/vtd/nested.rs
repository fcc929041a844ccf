// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest that is a host: its first stage over its second stage over the host's. What each
//! invalidation drops of both, compared after every step with naive caches; faults and flags.

use std::cell::RefCell;

use proptest::prelude::*;
use twostage::spec::pci::Bdf;
use twostage::spec::vtd::fault::FaultReason;
use twostage::spec::vtd::first_stage::FirstStageEntry;
use twostage::spec::vtd::qi::{AddressMask, Descriptor, IotlbScope};
use twostage::spec::vtd::second_stage::SecondStageEntry;
use twostage_emulated::VtdUnitConfig;

use super::granularity::{by_queue, forget, Kind, SecondStage, Tag};
use super::guest::{Completion, Entry, BELOW};
use super::machine::{vtd_config, Machine};
use super::{expect_fault, iotlb, pages, pasid_pages, DOMAIN, IOVA};
use crate::caches::{self, write, Caches, Format, Next, Space, Tables, Write, BLOCKS, SLOTS};
use crate::common::{A, B, HIGH, HIGH_SIZE, PAGE};

/// A machine whose guest nests.
fn machine(caching_mode: bool) -> Machine {
    let config = vtd_config().with_second_stage(true).with_nest(true);
    let unit = VtdUnitConfig::default().with_guest_second_stage(true);
    Machine::with(unit, config.with_caching_mode(caching_mode))
}

/// First-stage tables whose addresses are the second stage's.
struct Above;

impl Format for Above {
    fn pointer(&self, gpa: u64) -> u64 {
        let user = FirstStageEntry::new().with_p(true).with_us(true).with_rw(true);
        user.with_frame((BELOW + gpa) / PAGE).into_bits()
    }

    fn leaf(&self, gpa: u64, height: u8, _: bool) -> u64 {
        self.pointer(gpa) | FirstStageEntry::new().with_ps(height > 1).into_bits()
    }

    fn decode(&self, word: u64, height: u8) -> Option<Next> {
        let entry = FirstStageEntry::from_bits(word);
        let gpa = entry.address(height);
        entry.p().then_some(Next { gpa, leaf: entry.is_leaf(height), global: false })
    }
}

/// Pages of each block that the second stages map.
const MAPPED: u64 = 8;

/// A second stage: the tables of first stages, and pages of each block, from [`BELOW`] on.
struct Second {
    top: u64,
    /// The GPA of the entry for each table, and those that it may be mapped to: of its height.
    tables: Vec<(u64, Vec<u64>)>,
    /// The GPAs of the entries for the pages of each block.
    pages: [[u64; MAPPED as usize]; BLOCKS.len()],
    /// The GPA of the entry above those, and its word.
    regions: [(u64, u64); BLOCKS.len()],
}

impl Second {
    fn new(machine: &Machine, firsts: &[Space]) -> Self {
        let guest = &machine.guest;
        let top = guest.page();
        let map = |page: u64| guest.map_second_stage(top, BELOW + page, page, true);
        let entry = |page: u64, level| guest.entry_at(top, BELOW + page, level);
        let mut tables = Vec::new();
        for height in 0..4 {
            let alike: Vec<_> = firsts.iter().flat_map(|space| space.pages()[height]).collect();
            for table in &alike {
                map(**table);
                tables.push((entry(**table, 1), alike.iter().map(|table| **table).collect()));
            }
        }
        let page = |block: u64, number: usize| block + number as u64 * PAGE;
        BLOCKS.iter().for_each(|block| (0..8).for_each(|number| map(page(*block, number))));
        let pages = BLOCKS.map(|block| std::array::from_fn(|at| entry(page(block, at), 1)));
        let regions = BLOCKS.map(|block| (entry(block, 2), guest.load(entry(block, 2))));
        Self { top, tables, pages, regions }
    }

    /// Changes an entry, without invalidation.
    fn write(&self, machine: &Machine, change: Change) {
        let (at, word) = match change {
            Change::Table { which, value } => {
                let (at, alike) = &self.tables[which % self.tables.len()];
                (*at, SecondStage.leaf(alike[value % alike.len()], 1, false))
            }
            Change::Page { block, number, value } => {
                let gpa = BLOCKS[value % BLOCKS.len()] + value as u64 * PAGE;
                let word = SecondStage.leaf(gpa, 1, false);
                (self.pages[block][number], if value < 8 { word } else { 0 })
            }
            Change::Region { block, value } => {
                let word = match value {
                    0..4 => self.regions[value].1,
                    _ => SecondStage.leaf(BLOCKS[value % 4], 2, false),
                };
                (self.regions[block].0, word)
            }
        };
        machine.guest.store(at, word);
    }
}

/// A change of a second stage.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// A table of a first stage is another one of its height.
    Table { which: usize, value: usize },
    /// A page is another one, or none.
    Page { block: usize, number: usize, value: usize },
    /// A block has the lowest table of another, or is one large page.
    Region { block: usize, value: usize },
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => (0..32usize, 0..8usize).prop_map(|(which, value)| Change::Table { which, value }),
        6 => (0..4usize, 0..8usize, 0..9usize)
            .prop_map(|(block, number, value)| Change::Page { block, number, value }),
        1 => (0..4usize, 0..8usize).prop_map(|(block, value)| Change::Region { block, value }),
    ]
}

/// Invalidations, by addresses of the first stage and of the second: pages of blocks, and those
/// that tables have.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        2 => (0..SLOTS).prop_map(caches::iova),
        2 => (0..4usize, 0..4u64).prop_map(|(block, page)| BELOW + BLOCKS[block] + page * PAGE),
        1 => (0..40u64).prop_map(|page| BELOW + 0x10_0000 + page * PAGE),
    ];
    let range = (address, prop::sample::select(vec![0u8, 1, 9, 18]))
        .prop_map(|(address, mask)| AddressMask { address, mask, leaf: false });
    let domain = || 5u16..8;
    prop_oneof![
        1 => Just(iotlb(IotlbScope::Global)),
        2 => domain().prop_map(|domain| iotlb(IotlbScope::Domain(domain))),
        6 => (domain(), range.clone())
            .prop_map(|(domain, range)| iotlb(IotlbScope::Pages { domain, range })),
        6 => (domain(), 0u32..5, prop::option::weighted(0.8, range))
            .prop_map(|(domain, pasid, range)| pasid_pages(domain, pasid, range)),
    ]
}

#[derive(Debug, Clone)]
enum Step {
    First(usize, Write),
    Second(usize, Change),
    Forget(Vec<Descriptor>),
}

fn step() -> impl Strategy<Value = Step> {
    let batch = (prop::collection::vec(descriptor(), 1..4), any::<bool>());
    prop_oneof![
        2 => (0..2usize, write()).prop_map(|(space, write)| Step::First(space, write)),
        3 => (0..2usize, change()).prop_map(|(second, change)| Step::Second(second, change)),
        // All with the hint or none: adjacent ranges of a batch lose it together.
        5 => batch.prop_map(|(mut batch, hint)| {
            for descriptor in &mut batch {
                if let Descriptor::Iotlb { scope: IotlbScope::Pages { range, .. }, .. }
                | Descriptor::PasidIotlb { range: Some(range), .. } = descriptor
                {
                    range.leaf = hint;
                }
            }
            Step::Forget(batch)
        }),
    ]
}

/// A requester, by the number of its first stage, if it has one, and of its second.
struct User {
    rid: Bdf,
    pasid: Option<u32>,
    domain: u16,
    first: Option<usize>,
    second: usize,
}

struct Bench {
    machine: Machine,
    firsts: Vec<Space>,
    seconds: Vec<Second>,
    users: Vec<User>,
    caches: RefCell<Caches<Tag>>,
}

impl Bench {
    /// Tables that two devices share; another first stage on the same second one; the same first
    /// stage on another second one, in another domain; and a second stage alone.
    fn new() -> Self {
        let machine = machine(true);
        let guest = &machine.guest;
        caches::number_pages(guest);
        let firsts = vec![Space::new(guest, &Above), Space::new(guest, &Above)];
        let seconds = vec![Second::new(&machine, &firsts), Second::new(&machine, &firsts)];
        let user = |rid, pasid, domain, first, second| User { rid, pasid, domain, first, second };
        let users = vec![
            user(A, None, 5, Some(0), 0),
            user(B, None, 5, Some(0), 0),
            user(A, Some(1), 5, Some(1), 0),
            user(B, Some(2), 6, Some(0), 1),
            user(A, Some(3), 5, None, 0),
        ];
        for User { rid, pasid, domain, first, second } in &users {
            let (second, domain) = (seconds[*second].top, *domain);
            let entry = match first {
                Some(first) => {
                    let first = firsts[*first].top;
                    Entry::Nested { first, second, domain, accessed_dirty: false }
                }
                None => Entry::SecondStage { table: second, domain },
            };
            guest.set_entry(*rid, pasid.unwrap_or(0), entry);
        }
        guest.enable();
        Self { machine, firsts, seconds, users, caches: RefCell::default() }
    }

    fn take(&self, step: &Step) {
        match step {
            Step::First(space, write) => self.firsts[*space].write(&self.machine.guest, *write),
            Step::Second(second, change) => self.seconds[*second].write(&self.machine, *change),
            Step::Forget(batch) => {
                by_queue(&self.machine, batch);
                batch.iter().for_each(|it| forget(&mut self.caches.borrow_mut(), it));
            }
        }
    }

    /// The devices' reads, and those of the model.
    fn compare(&self) -> Result<(), String> {
        for User { rid, pasid, domain, first, second } in &self.users {
            let tag = |kind| Tag { kind, domain: *domain, pasid: pasid.unwrap_or(0) };
            let second = Tables { top: self.seconds[*second].top, format: &SecondStage };
            let addresses: Vec<_> = match first {
                Some(_) => (0..SLOTS).map(caches::iova).collect(),
                None => BLOCKS.iter().map(|block| BELOW + block + PAGE).collect(),
            };
            for address in addresses {
                let (memory, mut caches) = (&self.machine.guest, self.caches.borrow_mut());
                let model = match first {
                    Some(first) => {
                        let first = &self.firsts[*first];
                        let first = Tables { top: BELOW + first.top, ..first.tables() };
                        let tags = (tag(Kind::FirstStage), None);
                        let below = Some((second, tag(Kind::Below)));
                        caches.translate(memory, first, tags, address, below)
                    }
                    None => {
                        let tags = (tag(Kind::SecondStage), None);
                        caches.translate(memory, second, tags, address, None)
                    }
                };
                let model = model.map(|(gpa, _)| gpa);
                let read = self.machine.read(*rid, *pasid, address).ok();
                if read != model {
                    let who = (rid, pasid);
                    return Err(format!("{who:?} at {address:#x}: {read:x?}, not {model:x?}"));
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whether and where a read is answered from: the IOTLB, tables of either stage, or neither.
    #[test]
    fn translations_of_both_stages_go_as_the_text_says(
        steps in prop::collection::vec(step(), 1..24),
    ) {
        let bench = Bench::new();
        bench.compare().map_err(TestCaseError::fail)?;
        for (number, step) in steps.iter().enumerate() {
            bench.take(step);
            bench
                .compare()
                .map_err(|error| TestCaseError::fail(format!("after {number}: {error}")))?;
        }
    }
}

/// What device A has after [`one_page`].
struct Page {
    machine: Machine,
    first: u64,
    second: u64,
    page: u64,
}

/// A machine with device A on nested tables that map `IOVA` to a page that starts with 1.
fn one_page(accessed_dirty: bool) -> Page {
    let machine = machine(true);
    let guest = &machine.guest;
    let [first, second, page] = [(); 3].map(|()| guest.page());
    guest.map_nested(first, second, IOVA, page, true);
    guest.store(page, 1);
    guest.set_entry(A, 0, Entry::Nested { first, second, domain: DOMAIN, accessed_dirty });
    guest.enable();
    Page { machine, first, second, page }
}

fn of_domain(address: u64) -> Descriptor {
    iotlb(IotlbScope::Pages { domain: DOMAIN, range: pages(address, 0) })
}

#[test]
fn a_page_goes_through_both_stages_of_the_guest() {
    let Page { machine, second, page, .. } = one_page(false);
    let guest = &machine.guest;
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    machine.write(A, None, IOVA, 2).unwrap();
    assert_eq!(guest.load(page), 2);
    // The second stage takes the page away: what the guest's own host does to reclaim it.
    guest.unmap(second, BELOW + page);
    assert_eq!(machine.read(A, None, IOVA), Ok(2), "hardware caches");
    let first = pasid_pages(DOMAIN, 0, Some(pages(IOVA, 0)));
    assert_eq!(guest.submit(&[first]), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2), "of the second stage, too");
    assert_eq!(guest.submit(&[of_domain(BELOW + page)]), Completion::Done);
    assert!(machine.read(A, None, IOVA).is_err());
    expect_fault(&machine, FaultReason::SecondStageDenied, IOVA, None);
    assert_eq!(machine.end(), 0);
}

#[test]
fn another_first_stage_on_the_same_second_stage_takes_its_place() {
    let Page { machine, second, .. } = one_page(false);
    let guest = &machine.guest;
    assert_eq!(machine.read(A, None, IOVA), Ok(1));
    let [first, page] = [(); 2].map(|()| guest.page());
    guest.map_nested(first, second, IOVA, page, true);
    guest.store(page, 2);
    let other = Entry::Nested { first, second, domain: DOMAIN, accessed_dirty: false };
    guest.set_entry(A, 0, other);
    let before = machine.nesting.counters();
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(2));
    let after = machine.nesting.counters();
    assert_eq!(
        (after.replaces - before.replaces, after.nested_allocs - before.nested_allocs),
        (1, 1)
    );
    // And another second stage below the same first one.
    let lower = guest.page();
    guest.map_nested(first, lower, IOVA, page, true);
    let moved = guest.page();
    guest.store(moved, 3);
    guest.map_second_stage(lower, BELOW + page, moved, true);
    let other = Entry::Nested { first, second: lower, domain: DOMAIN, accessed_dirty: false };
    guest.set_entry(A, 0, other);
    assert_eq!(guest.flush_pasid_cache(), Completion::Done);
    assert_eq!(machine.read(A, None, IOVA), Ok(3));
    assert_eq!(machine.end(), 0);
}

/// Without caching mode.
#[test]
fn a_nested_entry_that_becomes_present_is_found_by_the_next_request() {
    for pasid in [None, Some(6)] {
        let machine = machine(false);
        let guest = &machine.guest;
        guest.enable();
        guest.set_entry(A, pasid.unwrap_or(0), Entry::NotPresent);
        assert!(machine.read(A, pasid, IOVA).is_err());
        expect_fault(&machine, FaultReason::PasidEntryNotPresent, IOVA, pasid);
        let [first, second, page] = [(); 3].map(|()| guest.page());
        let entry = Entry::Nested { first, second, domain: DOMAIN, accessed_dirty: false };
        guest.set_entry(A, pasid.unwrap_or(0), entry);
        assert!(machine.read(A, pasid, IOVA).is_err());
        expect_fault(&machine, FaultReason::FirstStageTopSecondStageDenied, IOVA, pasid);
        // Neither are the pages of either stage announced.
        guest.map_nested(first, second, IOVA, page, true);
        guest.store(page, 1);
        assert_eq!(machine.read(A, pasid, IOVA), Ok(1));
        assert_eq!(guest.take_fault(), None);
        assert_eq!(machine.end(), 0);
    }
}

impl Page {
    /// The lowest table of the first stage.
    fn table(&self) -> u64 {
        self.machine.guest.entry_at(self.first, IOVA, 1) & !(PAGE - 1)
    }

    /// The second stage has `page` at `to`.
    fn move_below(&self, page: u64, to: u64) {
        self.machine.guest.map_second_stage(self.second, BELOW + page, to, true);
    }

    fn unmap_below(&self, page: u64) {
        self.machine.guest.unmap(self.second, BELOW + page);
    }

    /// The word of the second stage's entry of `level`.
    fn store_below(&self, level: u8, word: u64) {
        let guest = &self.machine.guest;
        guest.store(guest.entry_at(self.second, BELOW + self.page, level), word);
    }
}

#[test]
fn the_guest_is_told_which_of_its_stages_refused() {
    use FaultReason as R;
    const NOWHERE: u64 = HIGH + HIGH_SIZE;
    // A page of 512 GiB, which there is not; and a pointer to a table.
    let large = SecondStageEntry::new().with_r(true).with_w(true).with_ps(true).into_bits();
    let table = SecondStageEntry::new().with_r(true).with_frame(NOWHERE / PAGE).into_bits();
    type Spoil<'a> = &'a dyn Fn(&Page);
    let spoiled: [(Spoil, R); 9] = [
        (&|it| it.machine.guest.unmap(it.first, IOVA), R::FirstStageNotPresent),
        (&|it| it.unmap_below(it.page), R::SecondStageDenied),
        (&|it| it.unmap_below(it.table()), R::FirstStageSecondStageDenied),
        (&|it| it.unmap_below(it.first), R::FirstStageTopSecondStageDenied),
        (&|it| it.store_below(4, large), R::SecondStageReserved),
        // What the second stage leads to is not memory: a table of its own, those of the first
        // stage, the page.
        (&|it| it.store_below(3, table), R::SecondStageAccess),
        (&|it| it.move_below(it.first, NOWHERE), R::FirstStageTopAccess),
        (&|it| it.move_below(it.table(), NOWHERE), R::FirstStageAccess),
        (&|it| it.move_below(it.page, NOWHERE), R::SecondStageDenied),
    ];
    for (spoil, reason) in spoiled {
        let it = one_page(false);
        spoil(&it);
        assert!(it.machine.read(A, None, IOVA).is_err());
        expect_fault(&it.machine, reason, IOVA, None);
        assert_eq!(it.machine.end(), 0);
    }
}

/// What Linux reads as pages that were written.
#[test]
fn flags_of_the_second_stage_tell_what_was_written() {
    let flags = |machine: &Machine, entry| {
        let entry = SecondStageEntry::from_bits(machine.guest.load(entry));
        (entry.a(), entry.d())
    };
    for accessed_dirty in [false, true] {
        let Page { machine, first, second, page } = one_page(accessed_dirty);
        let guest = &machine.guest;
        let of_page = guest.entry_at(second, BELOW + page, 1);
        let of_table = guest.entry_at(second, BELOW + first, 1);
        assert_eq!(flags(&machine, of_page), (false, false));
        machine.read(A, None, IOVA).unwrap();
        assert_eq!(flags(&machine, of_page), (accessed_dirty, false));
        // The walk wrote the accessed flag of a first-stage entry.
        assert_eq!(flags(&machine, of_table), (accessed_dirty, accessed_dirty));
        machine.write(A, None, IOVA, 2).unwrap();
        assert_eq!(flags(&machine, of_page), (accessed_dirty, accessed_dirty));
        // Read and cleared, as by a guest that tracks: nothing is set before the invalidation.
        let clear = |entry| guest.store(entry, guest.load(entry) & !0x300);
        clear(of_page);
        machine.write(A, None, IOVA, 3).unwrap();
        assert_eq!(flags(&machine, of_page), (false, false));
        assert_eq!(guest.submit(&[of_domain(BELOW + page)]), Completion::Done);
        machine.write(A, None, IOVA, 4).unwrap();
        assert_eq!(flags(&machine, of_page), (accessed_dirty, accessed_dirty));
        assert_eq!(machine.end(), 0);
    }
}

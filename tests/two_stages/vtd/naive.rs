// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What devices may find while a guest changes its tables: a naive account of everything that was
//! said, without any of the tables, caches or mirrors.
//!
//! Each place that a unit may cache (a requester's entry; a page of a table under a domain and a
//! PASID) has values: the one that memory has, and those before it that no completed invalidation
//! covers. A DMA may find any combination that was possible at some moment between its start and
//! its end, and nothing else.

use std::collections::BTreeMap;

use twostage::spec::pci::Bdf;

/// Steps of guest and devices, in the order of the account.
pub type Moment = u64;
/// A function, or one of its PASIDs.
pub type Who = (Bdf, Option<u32>);

/// Pages of a table that are looked at.
pub const PAGES: u64 = 16;
const FOREVER: Moment = Moment::MAX;

/// Where a page leads, and what is allowed there; by default nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Page {
    pub gpa: u64,
    pub read: bool,
    pub write: bool,
}

/// How a unit names what it caches of a table: the table's number, a domain, a PASID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct View {
    pub table: usize,
    pub domain: u16,
    pub pasid: u32,
}

/// The entry of a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    Nothing,
    Bypass,
    Tables(View),
}

/// What a guest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// All entries of requesters.
    Entries,
    Everything,
    Domain(u16),
    /// `1 << mask` pages; `hint`: no table has changed, only pages.
    Pages {
        domain: u16,
        page: u64,
        mask: u8,
        hint: bool,
    },
    /// First-stage tables only; `None`: all pages.
    Pasid {
        domain: u16,
        pasid: u32,
        pages: Option<(u64, u8, bool)>,
    },
}

/// Whether everything of a page is forgotten, or only what changed by its own entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Covers {
    Nothing,
    Page,
    Everything,
}

impl Said {
    fn covers(self, view: &View, first_stage: bool, page: u64) -> Covers {
        let in_range = |from: u64, mask: u8, hint: bool| match mask {
            // All pages of a large one, so tables as well.
            9 if !hint => Covers::Everything,
            _ if from >> mask == page >> mask => Covers::Page,
            _ => Covers::Nothing,
        };
        match self {
            Self::Everything => Covers::Everything,
            Self::Domain(domain) if domain == view.domain => Covers::Everything,
            // Whatever the address (§6.5.2.3).
            Self::Pages { domain, .. } if domain == view.domain && first_stage => {
                Covers::Everything
            }
            Self::Pages { domain, page, mask, hint } if domain == view.domain => {
                in_range(page, mask, hint)
            }
            Self::Pasid { domain, pasid, pages }
                if first_stage && (domain, pasid) == (view.domain, view.pasid) =>
            {
                pages.map_or(Covers::Everything, |(page, mask, hint)| in_range(page, mask, hint))
            }
            _ => Covers::Nothing,
        }
    }
}

#[derive(Debug)]
struct Value<T> {
    value: T,
    since: Moment,
    /// When another one took its place in memory, and whether in another table.
    replaced: Option<(Moment, bool)>,
    until: Moment,
}

/// The values of one place; the last one is in memory, or about to be.
#[derive(Debug)]
struct Values<T>(Vec<Value<T>>);

impl<T: Copy + PartialEq> Values<T> {
    fn new(value: T) -> Self {
        Self(vec![Value { value, since: 0, replaced: None, until: FOREVER }])
    }

    fn comes(&mut self, value: T, now: Moment) {
        if self.0.last().unwrap().value != value {
            self.0.push(Value { value, since: now, replaced: None, until: FOREVER });
        }
    }

    fn has_come(&mut self, now: Moment, by_table: bool) {
        let (_, before) = self.0.split_last_mut().unwrap();
        for value in before {
            value.replaced.get_or_insert((now, by_table));
        }
    }

    fn forget(&mut self, begun: Moment, now: Moment, by_tables: bool) {
        for value in self.0.iter_mut().filter(|value| value.until == FOREVER) {
            let gone = |(at, by_table): (Moment, bool)| at < begun && (by_tables || !by_table);
            if value.replaced.is_some_and(gone) {
                value.until = now;
            }
        }
    }

    /// Nobody asks for what was before `oldest` any more.
    fn prune(&mut self, oldest: Moment) {
        self.0.retain(|value| value.until > oldest);
    }

    fn between(&self, start: Moment, end: Moment) -> impl Iterator<Item = T> + '_ {
        let possible = move |value: &&Value<T>| value.since < end && value.until > start;
        self.0.iter().filter(possible).map(|value| value.value)
    }
}

/// The account.
pub struct Model {
    clock: Moment,
    entries: BTreeMap<Who, Values<Choice>>,
    pages: BTreeMap<(View, u64), Values<Page>>,
    /// By table.
    first_stage: Vec<bool>,
    /// Where a page leads that bypasses tables.
    bypass: [Page; PAGES as usize],
    /// The start of the DMA that each thread has in progress.
    begun: Vec<Moment>,
}

impl Model {
    /// Everything is blocked and empty. `first_stage` has the tables.
    pub fn new(
        requesters: &[Who],
        views: &[View],
        first_stage: Vec<bool>,
        bypass: [Page; PAGES as usize],
        threads: usize,
    ) -> Self {
        let all = |view: &View| (0..PAGES).map(|page| (*view, page)).collect::<Vec<_>>();
        let places = views.iter().flat_map(all);
        Self {
            clock: 1,
            entries: requesters.iter().map(|who| (*who, Values::new(Choice::Nothing))).collect(),
            pages: places.map(|place| (place, Values::new(Page::default()))).collect(),
            first_stage,
            bypass,
            begun: vec![FOREVER; threads],
        }
    }

    fn tick(&mut self) -> Moment {
        self.clock += 1;
        self.clock
    }

    /// The table is about to have `now` at some pages.
    pub fn pages_come(&mut self, table: usize, now: &[(u64, Page)]) {
        let moment = self.tick();
        for ((view, page), values) in &mut self.pages {
            if let Some((_, value)) = now.iter().find(|(of, _)| view.table == table && of == page) {
                values.comes(*value, moment);
            }
        }
    }

    /// It has; `by_table`: because another table is on the way.
    pub fn pages_have_come(&mut self, table: usize, by_table: bool) {
        let moment = self.tick();
        let of_table = self.pages.iter_mut().filter(|((view, _), _)| view.table == table);
        of_table.for_each(|(_, values)| values.has_come(moment, by_table));
    }

    /// The entry of `who` is about to be `choice`.
    pub fn entry_comes(&mut self, who: Who, choice: Choice) {
        let moment = self.tick();
        self.entries.get_mut(&who).unwrap().comes(choice, moment);
    }

    /// It is.
    pub fn entry_has_come(&mut self, who: Who) {
        let moment = self.tick();
        self.entries.get_mut(&who).unwrap().has_come(moment, false);
    }

    /// Nothing else than the entry of `who` counts, as it was before `begun`.
    pub fn entry_counts(&mut self, who: Who, begun: Moment) {
        let moment = self.tick();
        self.entries.get_mut(&who).unwrap().forget(begun, moment, true);
    }

    /// The guest begins to say something.
    pub fn begins(&mut self) -> Moment {
        self.tick()
    }

    /// What it began to say at `begun` is complete.
    pub fn is_complete(&mut self, said: &[Said], begun: Moment) {
        let moment = self.tick();
        let oldest = self.begun.iter().copied().min().unwrap().min(moment);
        for said in said {
            if *said == Said::Entries {
                self.entries.values_mut().for_each(|it| it.forget(begun, moment, true));
            }
            for ((view, page), values) in &mut self.pages {
                match said.covers(view, self.first_stage[view.table], *page) {
                    Covers::Nothing => {}
                    covers => values.forget(begun, moment, covers == Covers::Everything),
                }
            }
        }
        self.pages.values_mut().for_each(|values| values.prune(oldest));
        self.entries.values_mut().for_each(|values| values.prune(oldest));
    }

    /// `thread` begins a DMA.
    pub fn dma_begins(&mut self, thread: usize) {
        self.begun[thread] = self.tick();
    }

    /// It has ended: what `who` may have found at `page`.
    pub fn dma_ends(&mut self, thread: usize, who: Who, page: u64) -> Vec<Page> {
        let end = self.tick();
        let start = std::mem::replace(&mut self.begun[thread], FOREVER);
        let mut found = Vec::new();
        for choice in self.entries[&who].between(start, end) {
            match choice {
                Choice::Nothing => found.push(Page::default()),
                Choice::Bypass => found.push(self.bypass[page as usize]),
                Choice::Tables(view) => found.extend(self.pages[&(view, page)].between(start, end)),
            }
        }
        found
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's memory: an image of prepared tables, and all that each word has been since.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use twostage::iommufd::UserMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MemoryRegionAddress};

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// Pages of the guest's memory, which starts at GPA 0.
pub const PAGES: u64 = 32;
/// Its size, in bytes.
pub const SIZE: u64 = PAGES * PAGE;
/// The pages from this one on are what devices reach, unless tables say otherwise.
pub const DATA: u64 = 24;

/// Whether this GPA is in one of these.
pub fn is_data(gpa: u64) -> bool {
    (DATA..PAGES).contains(&(gpa / PAGE))
}

/// A point in an execution: the number of steps that count before it.
pub type Moment = u32;

/// What a word was.
#[derive(Debug, Clone, Copy)]
struct Past {
    gpa: u64,
    value: u64,
    until: Moment,
    /// Where what the word was before that is; see [`History::last`].
    before: u32,
}

/// What all words were.
#[derive(Debug, Default)]
struct History {
    past: Vec<Past>,
    /// For each word, one more than where what it was last is in `past`; 0: nowhere.
    last: Vec<u32>,
}

impl History {
    fn push(&mut self, gpa: u64, value: u64, until: Moment) {
        let last = &mut self.last[gpa as usize / 8];
        self.past.push(Past { gpa, value, until, before: *last });
        *last = self.past.len() as u32;
    }

    /// What the word at `gpa` was, the latest first.
    fn of(&self, gpa: u64) -> impl Iterator<Item = &Past> {
        let at = |number: u32| self.past.get((number as usize).wrapping_sub(1));
        std::iter::successors(at(self.last[gpa as usize / 8]), move |past| at(past.before))
    }

    fn clear(&mut self) {
        for past in self.past.drain(..) {
            self.last[past.gpa as usize / 8] = 0;
        }
    }
}

/// See the [module's documentation](self).
#[derive(Debug)]
pub struct Memory {
    pub map: Arc<GuestMemoryMmap>,
    region: Arc<GuestRegionMmap>,
    history: RefCell<History>,
    /// Each word as it was last seen: walks set flags, in words of any use.
    seen: RefCell<Vec<u8>>,
    now: Moment,
}

/// What all executions of a thread reuse: to make it anew each time would take most of the time.
#[derive(Default)]
struct Reused {
    memory: Option<(Arc<GuestMemoryMmap>, Arc<GuestRegionMmap>)>,
    images: BTreeMap<(&'static str, u64), Rc<[u8]>>,
    seen: Vec<u8>,
    history: History,
}

thread_local! {
    static REUSED: RefCell<Reused> = RefCell::default();
}

impl Memory {
    /// Memory with the image of a target's tables that has this number, which `image` makes.
    pub fn new(number: (&'static str, u64), image: impl FnOnce() -> Vec<u8>) -> Self {
        let (map, region, image, mut seen, mut history) = REUSED.with(|reused| {
            let Reused { memory, images, seen, history } = &mut *reused.borrow_mut();
            let (map, region) = memory.get_or_insert_with(|| {
                let region = GuestRegionMmap::from_range(GuestAddress(0), SIZE as usize, None);
                let region = Arc::new(region.expect("little memory"));
                let map = GuestMemoryMmap::from_arc_regions(vec![region.clone()]);
                (Arc::new(map.expect("one region")), region)
            });
            let image = images.entry(number).or_insert_with(|| image().into());
            let (seen, history) = (std::mem::take(seen), std::mem::take(history));
            (map.clone(), region.clone(), image.clone(), seen, history)
        });
        assert_eq!(image.len() as u64, SIZE);
        history.last.resize(SIZE as usize / 8, 0);
        region.write_slice(&image, MemoryRegionAddress(0)).expect("the image fits");
        seen.clear();
        seen.extend_from_slice(&image);
        let (history, seen) = (RefCell::new(history), RefCell::new(seen));
        Self { map, region, history, seen, now: 1 }
    }

    /// The memory as a host maps it.
    pub fn user_memory(&self) -> UserMemory {
        UserMemory::whole(self.region.clone())
    }

    /// Something has happened that divides what was before from what comes after.
    pub fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// The word at `gpa`, a multiple of 8; `None` if it is not memory.
    pub fn load(&self, gpa: u64) -> Option<u64> {
        if !gpa.is_multiple_of(8) {
            return None;
        }
        self.region.load(MemoryRegionAddress(gpa), Ordering::Relaxed).ok()
    }

    /// One of the words at `places`, by `number`, with its address: the first three numbers are
    /// those from the end, which are words of the last table; `None` if it is not memory.
    pub fn one_of(&self, places: &[u64], number: u8) -> Option<(u64, u64)> {
        let place = match usize::from(number) {
            at @ 0..3 => places.iter().rev().nth(at),
            at => places.get(at % places.len().max(1)),
        };
        place.and_then(|place| Some((*place, self.load(*place)?)))
    }

    /// The guest, or a device, stores a word. What is not memory is left alone.
    pub fn store(&mut self, gpa: u64, value: u64) {
        if let Some(before) = self.load(gpa) {
            let stored = self.region.store(value, MemoryRegionAddress(gpa), Ordering::Relaxed);
            stored.expect("it could be loaded");
            self.note(gpa, before);
        }
    }

    /// The same for words whose past does not matter.
    pub fn put(&self, gpa: u64, value: u64) {
        let stored = self.region.store(value, MemoryRegionAddress(gpa), Ordering::Relaxed);
        stored.expect("it is memory");
    }

    /// The word at `gpa`, which is something else now, was `before` until now.
    pub fn note(&mut self, gpa: u64, before: u64) {
        let until = self.tick();
        let now = self.load(gpa).unwrap_or(before);
        let seen = self.set_seen(gpa, now);
        let history = self.history.get_mut();
        if seen != before {
            // Somebody else has changed it since it was looked at.
            history.push(gpa, seen, until);
        }
        history.push(gpa, before, until);
    }

    /// Has `now` as what the word at `gpa` was when it was last seen; returns what was there.
    fn set_seen(&self, gpa: u64, now: u64) -> u64 {
        let mut seen = self.seen.borrow_mut();
        let bytes = &mut seen[gpa as usize..gpa as usize + 8];
        let mut before = [0; 8];
        before.copy_from_slice(bytes);
        bytes.copy_from_slice(&now.to_le_bytes());
        u64::from_le_bytes(before)
    }

    /// Notes what the word at `gpa` was when it was last seen, if it is `now` something else.
    fn see(&self, gpa: u64, now: u64) {
        let before = self.set_seen(gpa, now);
        if before != now {
            // Until it was looked at, for all that is known.
            self.history.borrow_mut().push(gpa, before, self.now + 1);
        }
    }

    /// All that the word at `gpa` has been, the present first, each with the moment until which it
    /// was there; `None` if it is not memory.
    pub fn values(&self, gpa: u64) -> Option<Vec<(u64, Moment)>> {
        let mut all = vec![(self.look(gpa)?, Moment::MAX)];
        self.past(gpa, |value, until| all.push((value, until)));
        Some(all)
    }

    /// All that the words at `gpa` and after it have been together, the present first, but for what
    /// was there until `since` at most.
    pub fn pairs(&self, gpa: u64, since: Moment) -> Vec<[u64; 2]> {
        let both = [gpa, gpa + 8].map(|gpa| self.values(gpa).unwrap_or_default());
        let mut ends: Vec<_> = both.iter().flatten().map(|(_, until)| *until).collect();
        ends.retain(|until| *until > since);
        ends.sort_unstable_by(|one, other| other.cmp(one));
        ends.dedup();
        // The latest is the first.
        let at = |values: &Vec<(u64, Moment)>, end| {
            values.iter().rev().find(|(_, until)| *until >= end).map_or(0, |(value, _)| *value)
        };
        ends.into_iter().map(|end| [at(&both[0], end), at(&both[1], end)]).collect()
    }

    /// The word at `gpa` as it is; `None` if it is not memory.
    pub fn look(&self, gpa: u64) -> Option<u64> {
        let present = self.load(gpa)?;
        self.see(gpa, present);
        Some(present)
    }

    /// All that the word at `gpa`, which is memory, was when it was looked at last, the latest
    /// first, each with the moment until which it was there.
    pub fn past(&self, gpa: u64, mut each: impl FnMut(u64, Moment)) {
        self.history.borrow().of(gpa).for_each(|past| each(past.value, past.until));
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (seen, mut history) = (self.seen.take(), self.history.take());
        history.clear();
        REUSED.with(|reused| {
            let mut reused = reused.borrow_mut();
            (reused.seen, reused.history) = (seen, history);
        });
    }
}

/// Places of memory, and what was there before a DMA that may reach any of them.
#[derive(Debug)]
pub struct Places(Vec<(u64, u64)>);

impl Places {
    /// Those of `gpas` that are memory.
    pub fn new(memory: &Memory, gpas: impl Iterator<Item = u64>) -> Self {
        let mut places: Vec<_> = gpas.filter_map(|gpa| Some((gpa, memory.load(gpa)?))).collect();
        places.sort_unstable();
        places.dedup();
        Self(places)
    }

    /// A device has written `value`, which nothing else has: it is at exactly one of the places.
    /// `what` says what was done.
    pub fn written(&self, memory: &mut Memory, value: u64, what: impl Fn() -> String) {
        let landed = self.0.iter().filter(|(gpa, _)| memory.load(*gpa) == Some(value));
        let landed: Vec<_> = landed.copied().collect();
        assert!(landed.len() == 1, "it is at {landed:x?}; {}", what());
        let (gpa, was) = landed[0];
        memory.note(gpa, was);
    }

    /// A device has read `value`: it is, or was, at one of the places. Flags that a walk sets in
    /// tables may be set after it was read.
    pub fn read(&self, memory: &Memory, value: u64, what: impl Fn() -> String) {
        let is_there = |(gpa, was): &(u64, u64)| *was == value || memory.load(*gpa) == Some(value);
        assert!(self.0.iter().any(is_there), "it read {value:x}; {}", what());
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 2: the memory of each address of an IOAS, and which pages were written.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::MutexGuard;
use twostage::sync::{Mutex, RwLock};

use twostage::iommufd::{Protection, UserMemory};

/// One contiguous mapping: addresses `start..=last` (bytes) lead to `memory`.
#[derive(Debug, Clone)]
pub(crate) struct Mapping {
    /// First address.
    pub start: u64,
    /// Last address, included.
    pub last: u64,
    /// Its memory; as long as the mapping.
    pub memory: UserMemory,
    /// What devices may do with it.
    pub protection: Protection,
}

impl Mapping {
    /// Where in the memory's region `address` is, in bytes. It must be in the mapping.
    pub fn target(&self, address: u64) -> u64 {
        self.memory.offset() + (address - self.start)
    }
}

/// The mappings of one IOAS that has HWPTs, disjoint; an area of the IOAS is one or more of them.
/// Readers and writers may be on any thread; a removal is complete for DMA only after
/// [`crate::units::hardware::Hardware::stage2_changed`] of every unit.
#[derive(Debug, Default)]
pub(crate) struct Stage2 {
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

impl Stage2 {
    /// The mapping that contains `address`.
    pub fn lookup(&self, address: u64) -> Option<Mapping> {
        let mappings = self.mappings.read();
        let (_, mapping) = mappings.range(..=address).next_back()?;
        (address <= mapping.last).then(|| mapping.clone())
    }

    /// All mappings, if there are at most `few`; otherwise none.
    pub fn few(&self, few: usize) -> Vec<Mapping> {
        let mappings = self.mappings.read();
        if mappings.len() > few {
            return Vec::new();
        }
        mappings.values().cloned().collect()
    }

    /// Adds a mapping. The caller has checked that it overlaps none.
    pub fn insert(&self, mapping: Mapping) {
        self.mappings.write().insert(mapping.start, mapping);
    }

    /// Removes the mapping that starts at `start`.
    #[cfg(test)]
    pub(crate) fn remove(&self, start: u64) -> Option<Mapping> {
        self.mappings.write().remove(&start)
    }

    /// Splits the mapping that contains `last` after it, unless it ends there; nothing else
    /// changes.
    pub fn split(&self, last: u64) {
        let mut mappings = self.mappings.write();
        let found = mappings.range_mut(..=last).next_back().filter(|(_, found)| last < found.last);
        let Some((_, first)) = found else { return };
        let start = last + 1;
        let offset = start - first.start;
        // A mapping is as long as its memory.
        let (Ok(memory), Ok(rest)) =
            (first.memory.part(0, offset), first.memory.part(offset, first.last - last))
        else {
            return;
        };
        let second = Mapping { start, last: first.last, memory: rest, ..*first };
        (first.last, first.memory) = (last, memory);
        mappings.insert(start, second);
    }

    /// Removes the mappings that start in `range`; none of them may end outside.
    pub fn remove_in(&self, range: RangeInclusive<u64>) {
        let mut mappings = self.mappings.write();
        while let Some(start) = mappings.range(range.clone()).next().map(|(start, _)| *start) {
            mappings.remove(&start);
        }
    }
}

/// Words of one chunk.
const CHUNK_WORDS: usize = 64;
/// Pages of one chunk.
const CHUNK_PAGES: u64 = CHUNK_WORDS as u64 * 64;

/// The marks of adjacent pages, the first one in the lowest bit of the first word.
type Chunk = [u64; CHUNK_WORDS];

/// Which pages of one page table were written: its dirty flags.
///
/// The hardware half marks pages while tracking is on; the objects read and clear the marks. A
/// marked page may be written again without a mark until the mark is cleared and the hardware has
/// dropped what it cached: [`crate::drivers::Driver::stage2_changed`].
#[derive(Debug)]
pub(crate) struct DirtyLog {
    enabled: AtomicBool,
    /// Tracking cannot be off.
    always: bool,
    /// Size of a page, in bytes, as a power of two.
    shift: u32,
    /// Chunks by number; none is empty.
    chunks: Mutex<BTreeMap<u64, Box<Chunk>>>,
}

impl DirtyLog {
    /// For a page table whose smallest page is `page_size` bytes, a power of two. Tracking is off.
    pub fn new(page_size: u64) -> Self {
        let shift = page_size.trailing_zeros();
        let enabled = AtomicBool::new(false);
        Self { enabled, always: false, shift, chunks: Mutex::default() }
    }

    /// The same for a page table whose dirty flags are always set. Tracking is on, and stays on.
    pub fn always(page_size: u64) -> Self {
        Self { enabled: AtomicBool::new(true), always: true, ..Self::new(page_size) }
    }

    /// Whether pages are to be marked.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Starts or stops to track, unless it always does.
    pub fn enable(&self, enabled: bool) {
        self.enabled.store(enabled || self.always, Ordering::Release);
    }

    /// Marks the pages that `iovas` touches. Takes time proportional to their number.
    pub fn mark(&self, iovas: RangeInclusive<u64>) {
        let mut chunks = self.lock();
        for page in iovas.start() >> self.shift..=iovas.end() >> self.shift {
            let chunk =
                chunks.entry(page / CHUNK_PAGES).or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            let (word, bit) = place(page);
            // In bounds: the remainder of a division by the number of bits.
            chunk[word] |= bit;
        }
    }

    /// The runs of marked IOVAs in `iovas`, which starts and ends at page boundaries, ascending;
    /// `clear` clears the marks. Takes time proportional to the number of marks, not the size of
    /// the range.
    pub fn read(&self, iovas: &RangeInclusive<u64>, clear: bool) -> Vec<RangeInclusive<u64>> {
        let (first, last) = (iovas.start() >> self.shift, iovas.end() >> self.shift);
        let mut runs: Vec<RangeInclusive<u64>> = Vec::new();
        let mut chunks = self.lock();
        let mut empty = Vec::new();
        for (&number, chunk) in chunks.range_mut(first / CHUNK_PAGES..=last / CHUNK_PAGES) {
            for page in marked(number, chunk).filter(|page| (first..=last).contains(page)) {
                match runs.last_mut() {
                    Some(run) if run.end() + 1 == page => *run = *run.start()..=page,
                    _ => runs.push(page..=page),
                }
            }
            if clear {
                let pages = number * CHUNK_PAGES..=number * CHUNK_PAGES + (CHUNK_PAGES - 1);
                for page in first.max(*pages.start())..=last.min(*pages.end()) {
                    let (word, bit) = place(page);
                    // In bounds, as in `mark`.
                    chunk[word] &= !bit;
                }
                if chunk.iter().all(|word| *word == 0) {
                    empty.push(number);
                }
            }
        }
        for number in empty {
            chunks.remove(&number);
        }
        let iova = |page: u64| page << self.shift;
        // The last address of a page is below the first of the next, which may be 2^64.
        let iovas = |run: &RangeInclusive<u64>| {
            iova(*run.start())..=iova(*run.end()) + ((1 << self.shift) - 1)
        };
        runs.iter().map(iovas).collect()
    }

    /// Clears all marks.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Box<Chunk>>> {
        self.chunks.lock()
    }
}

/// Word and bit of the mark of `page` in its chunk.
fn place(page: u64) -> (usize, u64) {
    ((page % CHUNK_PAGES / 64) as usize, 1 << (page % 64))
}

/// The marked pages of a chunk, ascending.
fn marked(number: u64, chunk: &Chunk) -> impl Iterator<Item = u64> {
    let words = chunk.to_vec();
    (0u64..).zip(words).filter(|(_, word)| *word != 0).flat_map(move |(index, word)| {
        let first = number * CHUNK_PAGES + index * 64;
        (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| first + bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    #[test]
    fn an_address_leads_into_its_mapping_only() {
        let region =
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let stage2 = Stage2::default();
        stage2.insert(Mapping {
            start: 0x10000,
            last: 0x11fff,
            memory: UserMemory::new(region, 0x1000, 0x2000).unwrap(),
            protection: Protection::READ_WRITE,
        });
        assert!(stage2.lookup(0xffff).is_none());
        assert_eq!(stage2.lookup(0x10000).unwrap().target(0x10000), 0x1000);
        assert_eq!(stage2.lookup(0x11fff).unwrap().target(0x11fff), 0x2fff);
        assert!(stage2.lookup(0x12000).is_none());
        assert_eq!(stage2.remove(0x10000).unwrap().last, 0x11fff);
        assert!(stage2.lookup(0x10000).is_none());
    }

    #[test]
    fn a_split_mapping_leads_where_it_led() {
        let region =
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let (stage2, memory) = (Stage2::default(), UserMemory::whole(region));
        let protection = Protection::READ_WRITE;
        stage2.insert(Mapping { start: 0x1000, last: 0x4fff, memory, protection });
        for last in [0xfff, 0x2fff, 0x2fff, 0x4fff, 0x5000] {
            stage2.split(last);
        }
        assert_eq!(stage2.mappings.read().len(), 2);
        for (address, start, offset) in [(0x2fff, 0x1000, 0x1fff), (0x3000, 0x3000, 0x2000)] {
            let mapping = stage2.lookup(address).unwrap();
            assert_eq!((mapping.start, mapping.target(address)), (start, offset));
        }
        stage2.remove_in(0x1000..=0x2fff);
        assert!(stage2.lookup(0x2fff).is_none() && stage2.lookup(0x3000).is_some());
    }

    #[test]
    fn a_range_is_removed_with_all_that_is_in_it() {
        let region =
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None).unwrap());
        let stage2 = Stage2::default();
        for start in [0x1000, 0x2000, 0x3000] {
            let memory = UserMemory::whole(region.clone());
            let protection = Protection::READ_WRITE;
            stage2.insert(Mapping { start, last: start + 0xfff, memory, protection });
        }
        stage2.remove_in(0x1000..=0x2fff);
        assert!(stage2.lookup(0x1000).is_none() && stage2.lookup(0x2000).is_none());
        assert!(stage2.lookup(0x3000).is_some());
    }

    #[test]
    fn the_end_of_the_address_space_can_be_marked() {
        let log = DirtyLog::new(0x1000);
        log.mark(u64::MAX - 5..=u64::MAX);
        assert_eq!(log.read(&(0..=u64::MAX), true), [u64::MAX - 0xfff..=u64::MAX]);
        assert_eq!(log.read(&(0..=u64::MAX), true), []);
        assert!(log.lock().is_empty());
    }

    fn range() -> impl Strategy<Value = RangeInclusive<u64>> {
        // Across chunk boundaries.
        let page = prop_oneof![0u64..70, CHUNK_PAGES - 40..CHUNK_PAGES + 70];
        (page, 0u64..40).prop_map(|(first, more)| first..=first + more)
    }

    proptest! {
        #[test]
        fn marks_are_as_in_a_set(
            steps in prop::collection::vec((range(), prop::option::of(any::<bool>())), 1..30),
        ) {
            const PAGE: u64 = 0x800;
            let log = DirtyLog::new(PAGE);
            let mut set = BTreeSet::new();
            for (pages, step) in steps {
                let iovas = pages.start() * PAGE..=pages.end() * PAGE + (PAGE - 1);
                match step {
                    None => {
                        log.mark(iovas.start() + 5..=iovas.end() - 5);
                        set.extend(pages);
                    }
                    Some(clear) => {
                        let runs = log.read(&iovas, clear);
                        let found: Vec<u64> = runs
                            .iter()
                            .flat_map(|run| run.start() / PAGE..=run.end() / PAGE)
                            .collect();
                        let naive: Vec<u64> = set.range(pages.clone()).copied().collect();
                        prop_assert_eq!(found, naive);
                        let joined = runs.windows(2).all(|two| two[0].end() + 1 < *two[1].start());
                        prop_assert!(joined);
                        if clear {
                            set.retain(|page| !pages.contains(page));
                        }
                    }
                }
            }
        }
    }
}

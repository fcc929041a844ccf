// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A walk of the guest's tables by software: where no hardware walks them, what they translate is
//! mirrored, and the reason of a fault is found here.
//!
//! Requests are user requests, as nothing else is offered to a guest whose tables are mirrored, and
//! the lower half of a first stage's addresses is walked only: hosts map no others. Nor are those
//! beyond the width that is offered (CAP.MGAW), which tables may have but no request. A translation
//! that is mirrored may be used at any time, so its accessed flags, and the dirty flag of a
//! writable page, are set when it is found (§3.6.2), as a walk by hardware for a write would.

#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use super::host_side::Stage1;
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::first_stage::{index, page_size, FirstStageEntry, ENTRY_SIZE};
use crate::spec::vtd::second_stage::SecondStageEntry;
use crate::spec::vtd::{HOST_ADDRESS_WIDTH, PAGE_SIZE};
use crate::viommu::TableMemory;

/// The most levels that tables have.
const MAX_LEVELS: usize = 5;
/// A page that changes while its flags are set is read again this often, and is then as good as not
/// there: the guest will invalidate it.
const ATTEMPTS: u32 = 8;
/// Both large pages of second-stage tables (CAP.SSLPS).
const LARGE_PAGES: u8 = 0b11;

/// What entries allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allowed {
    pub read: bool,
    pub write: bool,
}

impl Allowed {
    const ALL: Self = Self { read: true, write: true };

    fn and(self, other: Self) -> Self {
        Self { read: self.read && other.read, write: self.write && other.write }
    }

    fn nothing(self) -> bool {
        !self.read && !self.write
    }
}

/// A translated page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Its first IOVA.
    pub iova: u64,
    /// In bytes: 4 KiB, 2 MiB or 1 GiB.
    pub length: u64,
    /// Where it leads, which need not be guest memory.
    pub gpa: u64,
    /// By all entries on the way; never nothing.
    pub allowed: Allowed,
}

/// An entry as its format has it.
enum Entry {
    NotPresent,
    Reserved,
    Present { leaf: bool, address: u64, allowed: Allowed },
}

/// Tables of one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tables {
    /// GPA of the top table.
    top: u64,
    levels: u8,
    /// They are second-stage tables.
    second: bool,
    /// A first stage may have pages of 1 GiB (CAP.FS1GP).
    huge: bool,
    /// Width of the IOVAs that are translated (CAP.MGAW).
    iova_bits: u8,
}

impl Tables {
    /// `stage1`, if it is one stage, of a unit that translates IOVAs of `iova_bits` bits; `huge`: a
    /// first stage may have pages of 1 GiB.
    pub fn new(stage1: &Stage1, huge: bool, iova_bits: u8) -> Option<Self> {
        match stage1 {
            Stage1::VtdFirstStage(first) => {
                let levels = (first.paging_mode.address_width() - 12) / 9;
                Some(Self { top: first.table, levels, second: false, huge, iova_bits })
            }
            Stage1::VtdSecondStage(second) => {
                let levels = (second.address_width.bits() - 12) / 9;
                Some(Self { top: second.table, levels, second: true, huge, iova_bits })
            }
            Stage1::VtdNested(_) => None,
        }
    }

    /// The first IOVA beyond those that are walked.
    pub fn end(&self) -> u64 {
        self.end_of_tables().min(1 << self.iova_bits.min(63))
    }

    /// The first IOVA beyond those that the tables have, or their lower half.
    fn end_of_tables(&self) -> u64 {
        let bits = 12 + 9 * u32::from(self.levels);
        // The upper half of a first stage's addresses is at the end of 64 bits.
        1 << if self.second { bits } else { bits - 1 }
    }

    fn decode(&self, word: u64, level: u8) -> Entry {
        let (leaf, address, allowed, reserved) = if self.second {
            let entry = SecondStageEntry::from_bits(word);
            if !entry.is_present() {
                return Entry::NotPresent;
            }
            let allowed = Allowed { read: entry.r(), write: entry.w() };
            let reserved = entry.reserved_bits(level, HOST_ADDRESS_WIDTH, LARGE_PAGES);
            (entry.is_leaf(level), entry.address(level), allowed, reserved)
        } else {
            let entry = FirstStageEntry::from_bits(word);
            if !entry.p() {
                return Entry::NotPresent;
            }
            let allowed = Allowed { read: entry.us(), write: entry.us() && entry.rw() };
            let reserved = entry.reserved_bits(level, HOST_ADDRESS_WIDTH, self.huge);
            (entry.is_leaf(level), entry.address(level), allowed, reserved)
        };
        match word & reserved {
            0 => Entry::Present { leaf, address, allowed },
            _ => Entry::Reserved,
        }
    }

    /// The flags to set in an entry.
    fn flags(&self, leaf: bool, allowed: Allowed) -> u64 {
        match (self.second, leaf && allowed.write) {
            // They have flags only where nested translation is offered (SSADS).
            (true, _) => 0,
            (false, false) => FirstStageEntry::A,
            (false, true) => FirstStageEntry::A | FirstStageEntry::D,
        }
    }

    /// Why a request for `iova` is not served, as scalable mode has it; `None` if the tables
    /// translate it.
    pub fn refusal(&self, memory: &dyn TableMemory, iova: u64, write: bool) -> Option<FaultReason> {
        use FaultReason as R;
        let end = self.end_of_tables();
        let upper = !self.second && iova >= end.wrapping_neg();
        match self.second {
            true if iova >= self.end() => return Some(R::AddressBeyondGuest),
            false if iova >= end && !upper => return Some(R::NotCanonical),
            _ => {}
        }
        let pick = |first, second| Some(if self.second { second } else { first });
        let (mut table, mut on_the_way) = (self.top, Allowed::ALL);
        for level in (1..=self.levels).rev() {
            let Ok(word) = memory.load_u64(table + index(iova, level) * ENTRY_SIZE) else {
                return match level == self.levels {
                    true => pick(R::FirstStageTopAccess, R::SecondStageTopAccess),
                    false => pick(R::FirstStageAccess, R::SecondStageAccess),
                };
            };
            match self.decode(word, level) {
                Entry::NotPresent => return pick(R::FirstStageNotPresent, R::SecondStageDenied),
                Entry::Reserved => return pick(R::FirstStageReserved, R::SecondStageReserved),
                Entry::Present { leaf, address, allowed } => {
                    (table, on_the_way) = (address, on_the_way.and(allowed));
                    if leaf {
                        break;
                    }
                }
            }
        }
        match (on_the_way, write) {
            (Allowed { write: true, .. }, true) | (Allowed { read: true, .. }, false) => None,
            (Allowed { read: false, .. }, _) => pick(R::UserDenied, R::SecondStageDenied),
            _ => pick(R::WriteDenied, R::SecondStageDenied),
        }
    }
}

/// More tables than may be read: they point to each other in circles, or to each other's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyTables;

/// A walk over ranges of IOVAs. The number of tables that it reads is bounded, whatever they hold.
pub(crate) struct Walk<'a> {
    memory: &'a dyn TableMemory,
    tables: Tables,
    /// Tables that may still be read.
    budget: u64,
    /// Tables that may still be read before a pause.
    until_pause: u64,
}

/// One table on the way.
#[derive(Clone, Copy)]
struct Place {
    table: u64,
    level: u8,
    /// The first IOVA that it translates.
    base: u64,
    /// By the entries above.
    allowed: Allowed,
}

/// Entries that were read on the way to a table, with their GPAs.
type Way = [(u64, u64); MAX_LEVELS];

impl<'a> Walk<'a> {
    /// A walk that reads at most `budget` tables.
    pub fn new(memory: &'a dyn TableMemory, tables: Tables, budget: u64) -> Self {
        Self { memory, tables, budget, until_pause: u64::MAX }
    }

    /// Tables that may still be read.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Calls `each` for the pages in `range`, in ascending order, those that are partly in it
    /// included. Stops after about `pause` tables: returns where to go on, or the end of the range.
    pub fn leaves(
        &mut self,
        range: Range<u64>,
        pause: u64,
        each: &mut dyn FnMut(Leaf),
    ) -> Result<u64, TooManyTables> {
        let range = range.start..range.end.min(self.tables.end());
        // Enough to get to a page.
        self.until_pause = pause.max(MAX_LEVELS as u64);
        let Tables { top, levels, .. } = self.tables;
        let place = Place { table: top, level: levels, base: 0, allowed: Allowed::ALL };
        if range.is_empty() {
            return Ok(range.end);
        }
        let mut way = Way::default();
        Ok(self.descend(place, &range, &mut way, each)?.unwrap_or(range.end))
    }

    /// The pages below one table; where the walk paused, if it did.
    fn descend(
        &mut self,
        place: Place,
        range: &Range<u64>,
        way: &mut Way,
        each: &mut dyn FnMut(Leaf),
    ) -> Result<Option<u64>, TooManyTables> {
        let Place { table, level, base, .. } = place;
        let size = page_size(level);
        let start = range.start.max(base);
        if self.until_pause == 0 {
            return Ok(Some(start));
        }
        self.until_pause -= 1;
        self.budget = self.budget.checked_sub(1).ok_or(TooManyTables)?;
        let first = (start - base) / size;
        // No more than 512: `range` ends where the top table does at the latest.
        let end = ((range.end - base).div_ceil(size)).min(PAGE_SIZE / ENTRY_SIZE);
        let mut bytes = [0; PAGE_SIZE as usize];
        let (from, to) = ((first * ENTRY_SIZE) as usize, (end * ENTRY_SIZE) as usize);
        let Some(bytes) = bytes.get_mut(from..to) else { return Ok(None) };
        if self.memory.read(table + first * ENTRY_SIZE, bytes).is_err() {
            return Ok(None);
        }
        // Most entries of most tables are 0; the others are read in one piece each.
        let (words, _) = bytes.as_chunks::<8>();
        for (number, _) in words.iter().enumerate().filter(|(_, word)| **word != [0; 8]) {
            let number = first + number as u64;
            let found = self.entry(place, number, way);
            let Some((leaf, address, allowed)) = found else { continue };
            let iova = base + number * size;
            if leaf {
                each(Leaf { iova, length: size, gpa: address, allowed });
                continue;
            }
            let below = Place { table: address, level: level - 1, base: iova, allowed };
            if let Some(paused) = self.descend(below, range, way, each)? {
                return Ok(Some(paused));
            }
        }
        Ok(None)
    }

    /// Reads an entry, and sets the flags if it is a page: whether it is one, its address, and what
    /// is allowed, if anything is.
    fn entry(&self, place: Place, number: u64, way: &mut Way) -> Option<(bool, u64, Allowed)> {
        let at = place.table + number * ENTRY_SIZE;
        for _ in 0..ATTEMPTS {
            let word = self.memory.load_u64(at).ok()?;
            let Entry::Present { leaf, address, allowed } = self.tables.decode(word, place.level)
            else {
                return None;
            };
            let allowed = place.allowed.and(allowed);
            if allowed.nothing() {
                return None;
            }
            *way.get_mut(usize::from(place.level) - 1)? = (at, word);
            let flagged = word | self.tables.flags(true, allowed);
            if !leaf || self.set(at, word, flagged) {
                if leaf {
                    self.set_on_the_way(way, place.level);
                }
                return Some((leaf, address, allowed));
            }
        }
        None
    }

    /// Sets the accessed flags in the entries above `level`. One that has changed meanwhile leads
    /// elsewhere now, or will not be read by the guest for its flag before it invalidates.
    fn set_on_the_way(&self, way: &mut Way, level: u8) {
        let above = way.iter_mut().take(self.tables.levels.into()).skip(level.into());
        for (at, word) in above {
            let flagged = *word | self.tables.flags(false, Allowed::ALL);
            if self.set(*at, *word, flagged) {
                *word = flagged;
            }
        }
    }

    /// Changes the word at `at`; whether it was as expected.
    fn set(&self, at: u64, old: u64, new: u64) -> bool {
        old == new || self.memory.compare_exchange_u64(at, old, new).unwrap_or(false)
    }
}

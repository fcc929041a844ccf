// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether the guest's tables may have more than is mirrored of them. They are looked at with every
//! value that their words ever had: if these are few, the tables are mirrored.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::naive::{Stage, Way, ADDRESS};
use super::world::World;
use crate::models::memory::Memory;

/// IOVAs that the host reserves: interrupts.
const RESERVED: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// What is in a table and those below it.
#[derive(Debug, Default, Clone, Copy)]
struct Size {
    pieces: u64,
    tables: u64,
}

impl Size {
    fn add(&mut self, other: Self) {
        self.pieces = self.pieces.saturating_add(other.pieces);
        self.tables = self.tables.saturating_add(other.tables);
    }
}

/// Tables of one stage.
struct Tables<'a> {
    memory: &'a Memory,
    second: bool,
    /// By level and address.
    sizes: BTreeMap<(u32, u64), Size>,
}

impl Tables<'_> {
    /// Every entry that the word at `at` ever was: its address, and whether it is a page.
    fn entries(&self, at: u64, level: u32) -> Vec<(u64, bool)> {
        let present = |word: &u64| word & if self.second { 3 } else { 1 } != 0;
        let is_leaf = |word: u64| level == 1 || word >> 7 & 1 != 0 && matches!(level, 2 | 3);
        let values = self.memory.values(at).unwrap_or_default();
        let words = values.into_iter().map(|(word, _)| word).filter(present);
        words.map(|word| (word & ADDRESS, is_leaf(word))).collect()
    }

    fn size(&mut self, table: u64, level: u32) -> Size {
        if let Some(size) = self.sizes.get(&(level, table)) {
            return *size;
        }
        let mut size = Size { pieces: 0, tables: 1 };
        for number in 0..512 {
            for (address, leaf) in self.entries(table + number * 8, level) {
                size.add(match leaf {
                    true => Size { pieces: 1, tables: 0 },
                    false => self.size(address, level - 1),
                });
            }
        }
        self.sizes.insert((level, table), size);
        size
    }

    /// Whether a page is at a reserved IOVA; `base` is the first IOVA of the table.
    fn has_reserved(&self, table: u64, level: u32, base: u64) -> bool {
        let shift = 12 + 9 * (level - 1);
        let span = |number: u64| (base + (number << shift), base + (((number + 1) << shift) - 1));
        let overlaps = |number: &u64| {
            let (first, last) = span(*number);
            first <= *RESERVED.end() && last >= *RESERVED.start()
        };
        (0..512).filter(overlaps).any(|number| {
            let entries = self.entries(table + number * 8, level);
            entries.into_iter().any(|(address, leaf)| {
                leaf || self.has_reserved(address, level - 1, span(number).0)
            })
        })
    }
}

impl World {
    /// Whether tables may be left out of the mirrors, so that their users are blocked.
    pub fn may_be_too_much(&self) -> bool {
        let mut stages: Vec<Stage> = Vec::new();
        for who in Self::everyone() {
            let Some(all) = self.decisions(&self.account, who, None) else { return true };
            for decision in all {
                match decision.way {
                    Way::One(stage) if !stages.contains(&stage) => stages.push(stage),
                    _ => {}
                }
            }
        }
        let mut all = Size::default();
        for Stage { top, levels, second, .. } in stages {
            let mut tables = Tables { memory: &self.memory, second, sizes: BTreeMap::new() };
            all.add(tables.size(top, levels));
            if tables.has_reserved(top, levels, 0) {
                return true;
            }
        }
        let pieces = self.header.pieces;
        // The most tables that are read to make one.
        let tables = 4 * pieces + 4096;
        // A mirror may be made anew while it is in use, and tables be read twice.
        all.pieces.saturating_mul(2) > pieces || all.tables.saturating_mul(2) > tables
    }
}

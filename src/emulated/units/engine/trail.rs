// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entries on the way to an IOVA, as they were read from memory.

use super::format::TableFormat;

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// The words of the entries on the way to one IOVA, by level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Trail([Option<u64>; MAX_LEVELS]);

impl Trail {
    /// The entry of `level` (from 1, the lowest), if it was read.
    pub fn word(&self, level: u8) -> Option<u64> {
        *self.0.get(usize::from(level).checked_sub(1)?)?
    }

    /// Records that the entry of `level` was read as `word`.
    pub fn set(&mut self, level: u8, word: u64) {
        if let Some(slot) = usize::from(level).checked_sub(1).and_then(|at| self.0.get_mut(at)) {
            *slot = Some(word);
        }
    }

    /// The highest level whose entry differs in `other`, ignoring accessed, dirty and ignored bits.
    pub fn difference<F: TableFormat>(&self, other: &Self, tables: &F) -> Option<u8> {
        (1..=tables.levels()).rev().find(|&level| {
            let says = |trail: &Self| trail.word(level).map(|word| tables.decode(word, level));
            says(self) != says(other)
        })
    }

    /// Whether the lowest entry on the way is that of `level`.
    pub fn ends_at(&self, level: u8) -> bool {
        self.word(level).is_some() && (1..level).all(|below| self.word(below).is_none())
    }
}

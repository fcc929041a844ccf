// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The entries on the way of an IOVA, as they were read from memory.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use crate::emulated::vtd::caches::{Caches, Table};
use crate::emulated::vtd::context::Context;
use crate::emulated::vtd::format::{Path, TableFormat};
use crate::spec::vtd::first_stage::{index, page_size};

/// Levels of the deepest tables.
const MAX_LEVELS: usize = 5;

/// The words of the entries on the way of one IOVA, by level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::emulated::vtd) struct Trail([Option<u64>; MAX_LEVELS]);

impl Trail {
    /// The entry of `level` (from 1, the lowest), if it was read.
    pub fn word(&self, level: u8) -> Option<u64> {
        *self.0.get(usize::from(level).checked_sub(1)?)?
    }

    /// Puts down that the entry of `level` was read as `word`.
    pub fn set(&mut self, level: u8, word: u64) {
        if let Some(slot) = usize::from(level).checked_sub(1).and_then(|at| self.0.get_mut(at)) {
            *slot = Some(word);
        }
    }

    /// The highest level whose entry says something else in `other`; accessed, dirty and ignored
    /// bits say nothing.
    pub fn difference<F: TableFormat>(&self, other: &Self, tables: &F) -> Option<u8> {
        (1..=tables.levels()).rev().find(|&level| {
            let says = |trail: &Self| trail.word(level).map(|word| tables.decode(word, level));
            says(self) != says(other)
        })
    }

    /// Whether the lowest entry of the way is the one of `level`.
    pub fn ends_at(&self, level: u8) -> bool {
        self.word(level).is_some() && (1..level).all(|below| self.word(below).is_none())
    }
}

/// Where the tables send an IOVA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// To `gpa`, in a page of `level`, with what the entries allow together.
    Page { gpa: u64, level: u8, path: Path },
    /// Nowhere: an entry is not present or malformed, or a table is no memory.
    Nowhere,
}

/// Reads what the tables of `context` say of `iova` now: from memory, past all caches, without
/// setting a flag.
pub(super) fn read_tables<F: TableFormat>(
    caches: &Caches,
    context: &Context,
    tables: &F,
    iova: u64,
) -> (Trail, End) {
    let (mut trail, mut path, mut gpa) = (Trail::default(), Path::UNLIMITED, tables.table());
    for level in (1..=tables.levels()).rev() {
        let Some(page) = caches.stage2_now(context, gpa).filter(|page| page.read) else { break };
        let table = Table { place: page.place, level, length: page.length, writable: page.write };
        let Some(entry) = caches.entry(&table, index(iova, level)) else { break };
        let word = u64::from_le(entry.load(Ordering::Acquire));
        trail.set(level, word);
        let Ok(decoded) = tables.decode(word, level) else { break };
        path = path & decoded.path;
        if decoded.leaf {
            let gpa = decoded.address | iova & (page_size(level) - 1);
            return (trail, End::Page { gpa, level, path });
        }
        gpa = decoded.address;
    }
    (trail, End::Nowhere)
}

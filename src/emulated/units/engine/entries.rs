// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What walks find, and caches hold: pages and tables, and where they are in memory.

use super::format::{RequestKind, Rights};
use super::memories::Place;

/// Where the requested byte is, and how many follow it in the same page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) place: Place,
    /// Bytes from it to the end of the page, at least 1.
    pub length: u64,
}

/// A page as translated by both stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CachedPage {
    /// Where the byte is.
    pub place: Place,
    /// Size of the piece around it that is contiguous in both stages, as a power of two.
    pub shift: u8,
    /// Size of the stage-1 page that contains the piece, as a power of two.
    pub whole: u8,
    /// The requests it serves.
    pub rights: Rights,
}

/// The translation of an address by the stage below some tables: stage 2's of a GPA, mostly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stage2Page {
    /// Where the byte is.
    pub place: Place,
    /// Bytes from it to the end of the contiguous range, as far as known.
    pub length: u64,
    /// Size of the page around it that is contiguous and can be cached, as a power of two; none if
    /// it is smaller than 4 KiB.
    pub shift: Option<u8>,
    /// It serves reads, without a further walk.
    pub read: bool,
    /// It serves writes, without a further walk.
    pub write: bool,
}

impl Stage2Page {
    /// Whether it serves requests of `kind`.
    pub fn allows(&self, kind: RequestKind) -> bool {
        if kind.write() {
            self.write
        } else {
            self.read
        }
    }
}

/// A user's table in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub place: Place,
    /// From 1, for the tables of the smallest pages.
    pub level: u8,
    /// Bytes of it before `place`, which are not contiguous with it.
    pub skipped: u64,
    /// Bytes of it that are contiguous, from `place` on.
    pub length: u64,
    /// Its entries may be written without asking the stage below once more.
    pub writable: bool,
}

impl Table {
    /// The place of the entry number `index`, if it is contiguous with the start.
    #[inline]
    pub fn entry(&self, index: u64) -> Option<Place> {
        let offset = (index * 8).checked_sub(self.skipped)?;
        let contiguous = offset + 8 <= self.length;
        contiguous.then_some(Place { offset: self.place.offset + offset, ..self.place })
    }
}

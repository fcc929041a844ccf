// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What walks find, and caches hold: pages and tables, and where they are in memory.

use super::format::{RequestKind, Rights};
use super::key::{size, Source};
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
    /// Bytes before it that are contiguous with it, as far as known.
    pub before: u64,
    /// Bytes from it to the end of the contiguous range, as far as known.
    pub length: u64,
    /// It serves reads, without a further walk.
    pub read: bool,
    /// It serves writes, without a further walk.
    pub write: bool,
}

impl Stage2Page {
    /// Whether it serves requests of `kind`.
    #[inline]
    pub fn allows(&self, kind: RequestKind) -> bool {
        if kind.write() {
            self.write
        } else {
            self.read
        }
    }

    /// The requests that it serves.
    #[inline]
    pub fn rights(&self) -> Rights {
        Rights::of_access(self.read, self.write)
    }

    /// Size of the page around `address`, which this translates, that is contiguous and can be
    /// cached, as a power of two, at most `limit`; none if it is smaller than 4 KiB. Stage 2 has
    /// pages of 4 KiB, 2 MiB and 1 GiB.
    #[inline(always)]
    pub fn shift(&self, address: u64, limit: u8) -> Option<u8> {
        // Entries hold places that start a 4 KiB page.
        if (self.place.offset ^ address) & (size(12) - 1) != 0 {
            return None;
        }
        let fits = |shift| {
            let within = address & (size(shift) - 1);
            within <= self.before && size(shift) - within <= self.length
        };
        if limit > 21 && fits(30) {
            Some(limit.min(30))
        } else if limit > 12 && fits(21) {
            Some(limit.min(21))
        } else {
            fits(12).then_some(12)
        }
    }
}

/// The translation of an IOVA by tables and the stage below.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    /// The lower stage's translation of the address that the tables lead to.
    pub page: Stage2Page,
    /// Bytes from the requested one to the end of what is contiguous in all stages.
    pub length: u64,
    /// Size of the page that is contiguous in all stages, as a power of two; none if it is smaller
    /// than 4 KiB.
    pub shift: Option<u8>,
    /// Size of the page of the tables, as a power of two.
    pub whole: u8,
    /// The requests that all stages allow, without a further walk.
    pub rights: Rights,
    /// Source of the page.
    pub source: Source,
}

impl Output {
    /// `page` is the lower stage's translation of `gpa`, which the tables have in a page of `shift`
    /// with `rights`.
    #[inline(always)]
    pub fn new(page: Stage2Page, gpa: u64, shift: u8, rights: Rights, source: Source) -> Self {
        let within = gpa & (size(shift) - 1);
        Self {
            page: Stage2Page { before: page.before.min(within), ..page },
            length: page.length.min(size(shift) - within),
            shift: page.shift(gpa, shift),
            whole: shift,
            rights: rights & page.rights(),
            source,
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

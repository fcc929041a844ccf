// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guest's tables as they are now, and how that differs from what was cached.

use std::fmt::Debug;
use std::sync::atomic::Ordering;

use super::super::{
    size, Caches, HostStage2, Path, RequestKind, Source, Stage2Page, TableFormat, Trail, Words,
    PAGE,
};
use super::report::TlbInvalidation;

/// The tables that a request used.
#[derive(Debug)]
pub(crate) struct Used<'a, F> {
    pub tables: &'a F,
    /// The tables of the guest's below them.
    pub lower: Option<Lower<'a>>,
    pub host: &'a HostStage2,
    /// The source of cached translations; others may also serve requests, such as global ones.
    pub source: Source,
    pub others: Option<Source>,
    /// Sizes of cached pages, as powers of two.
    pub shifts: &'a [u8],
    /// The invalidation that changes of the tables need.
    pub invalidation: TlbInvalidation,
}

/// Tables below those that a request used: a second stage of the guest's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lower<'a> {
    pub tables: &'a dyn AnyTables,
    /// The source of what is cached of them alone.
    pub source: Source,
    /// The invalidation that changes of them need.
    pub invalidation: TlbInvalidation,
}

/// Tables of any format.
pub(crate) trait AnyTables: Debug {
    /// Size of what an entry of `level` spans, as a power of two.
    fn span(&self, level: u8) -> u8;

    /// Where they lead `address` now, by the stage 2 of `host`.
    fn now(&self, caches: &Caches, host: &HostStage2, address: u64, kind: RequestKind) -> Now;

    /// [`Words::difference`] by their format.
    fn difference(&self, then: &Words, now: &Words) -> Option<u8>;
}

impl<F: TableFormat + Debug> AnyTables for F {
    fn span(&self, level: u8) -> u8 {
        self.shift(level)
    }

    fn now(&self, caches: &Caches, host: &HostStage2, address: u64, kind: RequestKind) -> Now {
        read(caches, self, &|at, _| (caches.stage2_now(host, at), None), address, kind)
    }

    fn difference(&self, then: &Words, now: &Words) -> Option<u8> {
        then.difference(now, self)
    }
}

/// Where tables send an address now.
#[derive(Debug)]
pub(crate) struct Now {
    pub trail: Trail,
    /// Level of the page, or 1.
    pub level: u8,
    /// Size of the page that all of the guest's tables have in one piece, as a power of two.
    pub shift: u8,
    /// The page that the request would access. None if an entry is not present, is malformed or
    /// does not allow it, or is not in memory.
    pub page: Option<Stage2Page>,
}

/// The highest entry on the way that is not as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Differs {
    /// That of this level.
    Tables(u8),
    /// That of `level` in the tables below, on the way to the table of level `at`, or to the page
    /// ([`PAGE`]).
    Below { at: u8, level: u8 },
}

impl Now {
    /// How the tables of `used` differ from `then`, ignoring flags and ignored bits.
    pub fn difference<F: TableFormat>(&self, then: &Trail, used: &Used<'_, F>) -> Option<Differs> {
        // If it is for another address, an entry above differs: that comes first. (Unless it is for
        // another piece of a page, to which the same entries led.)
        let below = |at| {
            let ((_, then), (_, now)) = (then.below(at)?, self.trail.below(at)?);
            let level = used.lower?.tables.difference(then, now)?;
            Some(Differs::Below { at, level })
        };
        (1..=used.tables.levels())
            .rev()
            .find_map(|level| {
                let differs = then.own.differs(&self.trail.own, used.tables, level);
                below(level).or_else(|| differs.then_some(Differs::Tables(level)))
            })
            .or_else(|| below(PAGE))
    }
}

/// Where the tables of `used` lead `iova` now, for a request of `kind`: from memory, bypassing all
/// caches, without setting flags.
pub(super) fn read_tables<F: TableFormat>(
    caches: &Caches,
    used: &Used<'_, F>,
    iova: u64,
    kind: RequestKind,
) -> Now {
    let Some(lower) = used.lower else {
        return read(
            caches,
            used.tables,
            &|at, _| (caches.stage2_now(used.host, at), None),
            iova,
            kind,
        );
    };
    read(
        caches,
        used.tables,
        &|at, write| {
            let kind = RequestKind::new(write, false, false);
            let Now { trail, shift, page, .. } = lower.tables.now(caches, used.host, at, kind);
            (page, Some((trail.own, shift)))
        },
        iova,
        kind,
    )
}

/// What the stage below has for an address, and how: its entries and their page's size.
type Below<'a> = &'a dyn Fn(u64, bool) -> (Option<Stage2Page>, Option<(Words, u8)>);

/// Where `tables` lead `iova`, over the stage that is `below`.
fn read<F: TableFormat>(
    caches: &Caches,
    tables: &F,
    below: Below<'_>,
    iova: u64,
    kind: RequestKind,
) -> Now {
    let (mut trail, mut path, mut table) = (Trail::default(), Path::UNLIMITED, tables.table());
    let nowhere = |trail| Now { trail, level: 1, shift: tables.shift(1), page: None };
    // Tables that are smaller than they were have no entry for it, though memory may.
    if tables.check_request(kind).and_then(|()| tables.check_address(iova)).is_err() {
        return nowhere(trail);
    }
    for level in (1..=tables.levels()).rev() {
        // Only the entry, as a table may be discontiguous.
        let at = table + tables.index(iova, level) * 8;
        let (page, way) = below(at, false);
        trail.set_below(level, way.map(|(words, _)| (at, words)));
        let page = page.filter(|page| page.read && page.length >= 8);
        let entry = page.and_then(|page| caches.word(page.place));
        let Some(entry) = entry else { return nowhere(trail) };
        let word = u64::from_le(entry.load(Ordering::Acquire));
        trail.own.set(level, word);
        let Ok(decoded) = tables.decode(word, level) else { return nowhere(trail) };
        path = path & decoded.path;
        table = decoded.address;
        if decoded.leaf {
            let address = decoded.address | iova & (size(tables.shift(level)) - 1);
            let (page, way) = below(address, kind.write());
            trail.set_below(PAGE, way.map(|(words, _)| (address, words)));
            let shift = way.map_or(u8::MAX, |(_, shift)| shift).min(tables.shift(level));
            let page = page.filter(|_| tables.check_path(path, kind).is_ok());
            return Now { trail, level, shift, page };
        }
    }
    nowhere(trail)
}

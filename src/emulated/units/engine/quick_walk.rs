// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walk as it mostly is: every entry allows the request and has its flags.
//!
//! It reads what [`Walk`] reads, in the same order, and writes nothing to the tables that it walks.
//! Where it finds anything else, such as a fault, it gives up, and the walk is made again with
//! everything recorded that setting flags, and saying what is wrong, take. So it needs neither. A
//! second stage of the guest's own, below them, is walked with all that: it sets its flags, as it
//! would for the walk that is made again.

use std::sync::atomic::Ordering;

use super::entries::{Output, Table};
use super::format::{Entry, Path, RequestKind, Rights, TableFormat};
use super::key::size;
use super::lower::{own, LowerStage};
use super::walk::{Walk, MAX_LEVELS};

impl<L> Walk<'_, L> {
    /// Where `tables` lead `iova` for a request of `kind`; none if that takes more than reading.
    /// Caches the tables on the way.
    #[inline(always)]
    pub(super) fn quick<F: TableFormat>(
        &self,
        tables: &F,
        iova: u64,
        kind: RequestKind,
    ) -> Option<Output>
    where
        L: LowerStage<F>,
    {
        if self.caches.records_origins() {
            return None;
        }
        // The tables to be cached, with what the entries above allow.
        let (mut new, mut count) = ([const { None }; MAX_LEVELS], 0);
        let cached = self.caches.cached_table(tables, self.source, iova);
        let (mut level, mut path, mut place) = match cached {
            Some((table, path)) => {
                (table.level, path, table.entry(tables.index(iova, table.level))?)
            }
            None => {
                let level = tables.levels();
                let at = tables.table() + tables.index(iova, level) * 8;
                (level, Path::UNLIMITED, self.lower.quick(at, own(false))?.place)
            }
        };
        for _ in 0..MAX_LEVELS {
            let word = u64::from_le(self.caches.word(place)?.load(Ordering::Acquire));
            let Entry { leaf, address, path: allowed, global } = tables.decode(word, level).ok()?;
            if tables.used(word, leaf, kind.write()) != word {
                return None;
            }
            path = path & allowed;
            if leaf {
                let shift = tables.shift(level);
                let gpa = address | iova & (size(shift) - 1);
                let rights = tables.rights(path);
                if !rights.allow(kind) {
                    return None;
                }
                let page = self.lower.quick(gpa, kind)?;
                match cached {
                    Some(_) => self.counters.paging_structure_hits.count(),
                    None => self.counters.paging_structure_misses.count(),
                }
                // Not earlier: an entry with a clear accessed flag must not be cached.
                for (table, path) in new.iter().take(count).flatten() {
                    self.caches.add_table(tables, (self.source, iova), table, *path, self.counters);
                }
                // A write without a flag to set may be followed by others.
                let rights = rights & Rights::of_access(true, tables.is_dirty(word));
                let source = if global { self.global } else { self.source };
                return Some(Output::new(page, gpa, shift, rights, source));
            }
            // Not below level 1: an entry of that level is a leaf.
            level -= 1;
            let in_table = tables.index(iova, level) * 8;
            let page = self.lower.quick(address + in_table, own(false))?;
            place = page.place;
            if self.caches.keeps_tables() {
                let (start, length) = (place.back(in_table), page.length + in_table);
                let start = start.filter(|_| in_table <= page.before);
                if let (Some(place), Some(slot)) = (start, new.get_mut(count)) {
                    let writable = page.write;
                    *slot = Some((Table { place, level, skipped: 0, length, writable }, path));
                    count += 1;
                }
            }
        }
        None
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reads the guest's tables as they are now.

use std::sync::atomic::Ordering;

use super::super::{size, Caches, HostStage2, Path, Table, TableFormat, Trail};

/// Where the tables send an IOVA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// To `gpa`, in a page of `level`, with what the entries allow together.
    Page { gpa: u64, level: u8, path: Path },
    /// Nowhere: an entry is not present or malformed, or a table is not in memory.
    Nowhere,
}

/// Translates `iova` by `tables` on `host` as they are now: from memory, bypassing all caches,
/// without setting flags.
pub(super) fn read_tables<F: TableFormat>(
    caches: &Caches,
    host: &HostStage2,
    tables: &F,
    iova: u64,
) -> (Trail, End) {
    let (mut trail, mut path, mut gpa) = (Trail::default(), Path::UNLIMITED, tables.table());
    for level in (1..=tables.levels()).rev() {
        // Only the entry, as a table may be discontiguous.
        let at = gpa + tables.index(iova, level) * 8;
        let Some(page) = caches.stage2_now(host, at).filter(|page| page.read) else { break };
        let (place, length, writable) = (page.place, page.length, page.write);
        let entry = Table { place, level, skipped: 0, length, writable };
        let Some(entry) = caches.entry(&entry, 0) else { break };
        let word = u64::from_le(entry.load(Ordering::Acquire));
        trail.set(level, word);
        let Ok(decoded) = tables.decode(word, level) else { break };
        path = path & decoded.path;
        if decoded.leaf {
            let gpa = decoded.address | iova & (size(tables.shift(level)) - 1);
            return (trail, End::Page { gpa, level, path });
        }
        gpa = decoded.address;
    }
    (trail, End::Nowhere)
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The stage below the tables that a walk goes through: where the addresses in them lead.
//!
//! That is the host's stage 2, or a second stage of the user's over it.

use super::caches::Caches;
use super::counters::LocalCounters;
use super::entries::Stage2Page;
use super::format::{At, RequestKind, Stage2Refusal, TableFormat};
use super::host_stage2::HostStage2;
use super::key::size;
use super::origins::Trail;
use super::stage2_cache::Whole;
use crate::units::stage2::DirtyLog;

/// Granularity of marking writes when dirty pages are tracked, as a power of two.
const DIRTY_SHIFT: u8 = 12;

/// The stage below tables of the format `F`. The pages that it gives out say which requests need
/// not ask it again: one that was asked for a read may have to set a flag before a write.
pub(crate) trait LowerStage<F: TableFormat> {
    /// The page with the table entry at `address`, for a read; `top` is whether of the top table.
    fn entry(&self, tables: &F, address: u64, top: bool) -> Result<Stage2Page, F::Fault>;

    /// The same, for a write of its flags.
    fn entry_flags(&self, tables: &F, address: u64, top: bool) -> Result<Stage2Page, F::Fault>;

    /// The page at `address`, for a request of `kind`.
    fn page(&self, tables: &F, address: u64, kind: RequestKind) -> Result<Stage2Page, F::Fault>;

    /// The page at `address` for a request of `kind` of whatever is there; none if it does not
    /// serve that, or if that takes more than reading.
    fn quick(&self, address: u64, kind: RequestKind) -> Option<Stage2Page>;

    /// For the sanitizer: what the page at `address`, as given out for a read or a write, was made
    /// from; none if it has no tables.
    fn origin(&self, _address: u64, _write: bool) -> Option<Trail> {
        None
    }
}

/// The host's stage 2 as the lower stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OverHost<'a> {
    caches: &'a Caches,
    host: &'a HostStage2,
    counters: &'a LocalCounters,
    /// What is cached of it as whole mappings.
    wholes: &'a [Whole],
    /// The log of written pages, if tracking is on.
    dirty: Option<&'a DirtyLog>,
}

impl<'a> OverHost<'a> {
    /// The stage 2 of `host`, cached in `caches`.
    pub fn new(caches: &'a Caches, host: &'a HostStage2, counters: &'a LocalCounters) -> Self {
        Self { caches, host, counters, wholes: caches.wholes(host), dirty: host.tracking() }
    }

    /// The page at `gpa`, for a request of `kind`. When dirty pages are tracked, it is one of 4
    /// KiB, which is marked by a write; after a read, the first write must ask again.
    pub fn access(&self, gpa: u64, kind: RequestKind) -> Result<Stage2Page, Stage2Refusal> {
        let page = self.caches.stage2(self.host, gpa, self.counters)?;
        if !page.allows(kind) {
            return Err(Stage2Refusal::Denied);
        }
        let Some(log) = self.dirty else { return Ok(page) };
        if kind.write() {
            log.mark(gpa..=gpa);
        }
        let within = gpa & (size(DIRTY_SHIFT) - 1);
        Ok(Stage2Page {
            before: page.before.min(within),
            length: page.length.min(size(DIRTY_SHIFT) - within),
            write: page.write && kind.write(),
            ..page
        })
    }
}

/// A read or write of the walk's own.
pub(crate) fn own(write: bool) -> RequestKind {
    RequestKind::new(write, false, false)
}

impl<F: TableFormat> LowerStage<F> for OverHost<'_> {
    fn entry(&self, tables: &F, address: u64, top: bool) -> Result<Stage2Page, F::Fault> {
        let refused = |why| tables.table_refused(At { gpa: Some(address), top }, why);
        self.access(address, own(false)).map_err(refused)
    }

    fn entry_flags(&self, tables: &F, address: u64, top: bool) -> Result<Stage2Page, F::Fault> {
        let refused = |_| tables.flags_refused(At { gpa: Some(address), top });
        self.access(address, own(true)).map_err(refused)
    }

    fn page(&self, tables: &F, address: u64, kind: RequestKind) -> Result<Stage2Page, F::Fault> {
        self.access(address, kind).map_err(|why| tables.page_refused(address, why))
    }

    // Inlined: it is asked for each table.
    #[inline(always)]
    fn quick(&self, address: u64, kind: RequestKind) -> Option<Stage2Page> {
        if self.dirty.is_some() {
            return None;
        }
        // A loop, as closures of iterators would be calls.
        for whole in self.wholes {
            if let Some(page) = whole.page(address) {
                self.counters.stage2_hits.count();
                return page.allows(kind).then_some(page);
            }
        }
        let page = self.caches.stage2(self.host, address, self.counters).ok()?;
        page.allows(kind).then_some(page)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a unit caches besides its configuration: IOTLB, paging structures and stage 2.
//!
//! Cached translations stay until they are invalidated or evicted, whatever happens to the tables.
//! Non-present entries and faults are never cached.

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use super::cache::Cache;
use super::counters::LocalCounters;
use super::device_tlb::{device_source, DeviceTlbs};
use super::entries::{CachedPage, Stage2Page, Table, Target};
use super::format::{Path, Request, RequestKind, Rights, Stage2Refusal, TableFormat};
use super::host_stage2::{Gone, HostStage2};
use super::key::{size, IovaRange, Key, Lookup, Scope, Source};
use super::memories::{CachedPlace, Memories, Memory, Place};
use super::origins::{CachesOfWalk, Origins, Trail};
use super::stage2_cache::{now, Stage2Cache, Whole};
use twostage::iommufd::{MemorySlice, MemoryWord};

/// Sizes of stage-1 pages that may be larger than the cached piece, as powers of two; an IOTLB
/// entry stores the index.
const WHOLE_SHIFTS: [u8; 9] = [12, 14, 16, 21, 25, 29, 30, 39, 42];

/// Cache sizes of a unit, in entries, each rounded up to a power of two; 0 for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheSizes {
    /// Of the IOTLB.
    pub iotlb: usize,
    /// Of the paging-structure cache.
    pub paging_structures: usize,
    /// Of the cache of stage-2 translations.
    pub stage2: usize,
    /// Of each device TLB.
    pub device_tlb: usize,
}

/// Flags of a cached table: eight bits of [`Path`], and this one.
const TABLE_WRITABLE: u16 = 1 << 8;
/// Position, above eight bits of [`Rights`], of an IOTLB entry's index of the stage-1 page size, if
/// that is larger.
const WHOLE_AT: u32 = 8;

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Caches {
    iotlb: Cache,
    paging_structures: Cache,
    stage2: Stage2Cache,
    /// Those of the devices behind the unit.
    pub device_tlbs: DeviceTlbs,
    memories: Memories,
    /// Some IOTLB entry is a piece of a larger stage-1 page.
    fragments: AtomicBool,
    /// Some IOTLB entry serves several address spaces.
    globals: AtomicBool,
    guest_address_width: u8,
    /// What entries were made from, if there is a sanitizer.
    origins: Option<Arc<Origins>>,
}

impl Caches {
    /// Empty caches, for guest addresses of so many bits; `origins` records what entries are made
    /// from.
    pub fn new(sizes: CacheSizes, guest_address_width: u8, origins: Option<Arc<Origins>>) -> Self {
        // No shift overflows: widths are below 64.
        let last = (1 << guest_address_width) - 1;
        Self {
            iotlb: Cache::new(sizes.iotlb),
            paging_structures: Cache::new(sizes.paging_structures),
            stage2: Stage2Cache::new(sizes.stage2, last),
            device_tlbs: DeviceTlbs::new(sizes.device_tlb),
            memories: Memories::new(),
            fragments: AtomicBool::new(false),
            globals: AtomicBool::new(false),
            guest_address_width,
            origins,
        }
    }

    /// The IOTLB's translation for requests of `kind` with the configuration of `at`.
    // Always inlined, so that a hit's `Target` stays in registers: storing it in pieces and copying
    // it doubles the cost of a hit.
    #[inline(always)]
    pub fn translation(&self, at: &Lookup, iova: u64, kind: RequestKind) -> Option<Target> {
        let (iova, shifts) = at.half(iova);
        let (value, shift) = match self.cached_page(shifts, at.source, iova, kind) {
            Some(found) => found,
            None if self.globals.load(Ordering::Relaxed) => {
                self.global_page(shifts, at.global, iova, kind)?
            }
            None => return None,
        };
        let offset = iova & (size(shift) - 1);
        let place = CachedPlace::from_bits(value.get()).place(offset);
        Some(Target { place, length: size(shift) - offset })
    }

    /// What the device of `request` has cached for it, with the configuration of `at`.
    pub fn device_translation(&self, at: &Lookup, request: &Request) -> Option<Target> {
        let tlb = self.device_tlbs.get(request.rid)?;
        let (source, (iova, shifts)) = device_key(at, request);
        let allows =
            |value| Rights::from_flags(CachedPlace::from_bits(value).flags()).allow(request.kind);
        shifts.iter().find_map(|&shift| {
            let value = tlb.get(Key::new(source, iova, shift), allows)?;
            let offset = iova & (size(shift) - 1);
            let place = CachedPlace::from_bits(value).place(offset);
            Some(Target { place, length: size(shift) - offset })
        })
    }

    /// The device of `request` caches what the IOTLB has for it, if that has something.
    pub fn fill_device_tlb(&self, at: &Lookup, request: &Request, counters: &LocalCounters) {
        let (source, (iova, shifts)) = device_key(at, request);
        let found = self
            .cached_page(shifts, at.source, iova, request.kind)
            .or_else(|| self.global_page(shifts, at.global, iova, request.kind));
        if let (Some(tlb), Some((value, shift))) = (self.device_tlbs.get(request.rid), found) {
            // It has just missed there.
            let turn = counters.device_tlb_misses.get();
            tlb.insert(Key::new(source, iova, shift), value.get(), turn);
        }
    }

    /// The IOTLB entry for such a request, and its page size as a power of two: no more than fits
    /// in two registers. It allows something, so it is not 0.
    #[inline(always)]
    fn cached_page(
        &self,
        shifts: &[u8],
        source: Source,
        iova: u64,
        kind: RequestKind,
    ) -> Option<(NonZeroU64, u8)> {
        let allows = |value| Rights::from_flags(CachedPlace::from_bits(value).flags()).allow(kind);
        // A loop, as closures of iterators would be calls.
        for &shift in shifts {
            if !self.iotlb.may_have(shift) {
                continue;
            }
            if let Some(value) = self.iotlb.get(Key::new(source, iova, shift), allows) {
                return Some((NonZeroU64::new(value)?, shift));
            }
        }
        None
    }

    /// The same for an entry that serves other address spaces, too.
    #[cold]
    fn global_page(
        &self,
        shifts: &[u8],
        source: Source,
        iova: u64,
        kind: RequestKind,
    ) -> Option<(NonZeroU64, u8)> {
        match self.globals.load(Ordering::Relaxed) {
            true => self.cached_page(shifts, source, iova, kind),
            false => None,
        }
    }

    /// The IOTLB's translation of `address` by tables that are the stage below others, for requests
    /// of `kind`.
    pub fn page(
        &self,
        source: Source,
        shifts: &[u8],
        address: u64,
        kind: RequestKind,
    ) -> Option<Stage2Page> {
        let (value, shift) = self.cached_page(shifts, source, address, kind)?;
        let (value, offset) = (CachedPlace::from_bits(value.get()), address & (size(shift) - 1));
        let rights = Rights::from_flags(value.flags());
        Some(Stage2Page {
            place: value.place(offset),
            before: offset,
            length: size(shift) - offset,
            read: rights.allow(RequestKind::new(false, false, false)),
            write: rights.allow(RequestKind::new(true, false, false)),
        })
    }

    /// Size of the page that [`Caches::translation`] finds, as a power of two.
    pub fn translation_shift(
        &self,
        shifts: &[u8],
        source: Source,
        iova: u64,
        kind: RequestKind,
    ) -> Option<u8> {
        shifts.iter().copied().find(|&shift| {
            let allows =
                |value| Rights::from_flags(CachedPlace::from_bits(value).flags()).allow(kind);
            self.iotlb.get(Key::new(source, iova, shift), allows).is_some()
        })
    }

    /// Records for the sanitizer, if there is one, what a walk's cache entries were made from:
    /// `record` does it.
    #[inline]
    pub fn record_origin(&self, record: impl FnOnce(&Origins, CachesOfWalk<'_>)) {
        if let Some(origins) = &self.origins {
            let Self { iotlb, paging_structures, .. } = self;
            record(origins, CachesOfWalk { iotlb, paging_structures });
        }
    }

    /// What the IOTLB's page of one of `shifts` for a request of `kind` at `address` was made from,
    /// if that is recorded.
    pub fn origin(
        &self,
        source: Source,
        shifts: &[u8],
        address: u64,
        kind: RequestKind,
    ) -> Option<Trail> {
        let shift = self.translation_shift(shifts, source, address, kind)?;
        self.origins.as_ref()?.page(source, address, shift)
    }

    /// Caches that `page` translates `iova`; `global` is whether in several address spaces.
    pub fn add_translation(
        &self,
        (source, global): (Source, bool),
        iova: u64,
        page: &CachedPage,
        counters: &LocalCounters,
    ) {
        // Not stored again: others read what is beside.
        if global && !self.globals.load(Ordering::Relaxed) {
            self.globals.store(true, Ordering::Relaxed);
        }
        let &CachedPage { place, shift, whole, rights } = page;
        let offset = iova & (size(shift) - 1);
        let mut flags = rights.flags();
        if whole > shift {
            if !self.fragments.load(Ordering::Relaxed) {
                self.fragments.store(true, Ordering::Relaxed);
            }
            // Sizes without an index are not page sizes.
            let number = WHOLE_SHIFTS.iter().position(|&known| known == whole).unwrap_or_default();
            flags |= (number as u16) << WHOLE_AT;
        }
        let value = place.back(offset).and_then(|start| CachedPlace::of(start, flags));
        let turn = counters.iotlb_evictions.get();
        let evicted = value.is_some_and(|value| {
            self.iotlb.insert(Key::new(source, iova, shift), value.into_bits(), turn)
        });
        counters.iotlb_evictions.add(evicted.into());
    }

    /// The lowest cached table on the way to `iova`, and the combined permissions of the entries
    /// above it.
    #[inline(always)]
    pub fn cached_table<F: TableFormat>(
        &self,
        tables: &F,
        source: Source,
        iova: u64,
    ) -> Option<(Table, Path)> {
        // A loop, as closures of iterators would be calls.
        for level in 2..=tables.levels() {
            let shift = tables.shift(level);
            if !self.paging_structures.may_have(shift) {
                continue;
            }
            let value = self.paging_structures.get(Key::new(source, iova, shift), |_| true);
            let Some(value) = value.map(CachedPlace::from_bits) else { continue };
            let table = Table {
                place: value.place(0),
                level: level - 1,
                skipped: 0,
                length: size(tables.shift(1)),
                writable: value.flags() & TABLE_WRITABLE != 0,
            };
            return Some((table, Path::from_bits((value.flags() & !TABLE_WRITABLE) as u8)));
        }
        None
    }

    /// Whether tables can be cached.
    #[inline]
    pub fn keeps_tables(&self) -> bool {
        self.paging_structures.entries() != 0
    }

    /// Whether what cache entries are made from is recorded.
    #[inline]
    pub fn records_origins(&self) -> bool {
        self.origins.is_some()
    }

    /// Caches `table` as the one on the way to `iova`, with the combined permissions of the entries
    /// above, `path`.
    pub fn add_table<F: TableFormat>(
        &self,
        tables: &F,
        (source, iova): (Source, u64),
        table: &Table,
        path: Path,
        counters: &LocalCounters,
    ) {
        if table.skipped != 0 || table.length < size(tables.shift(1)) {
            return;
        }
        let writable = if table.writable { TABLE_WRITABLE } else { 0 };
        let flags = u16::from(path.into_bits()) | writable;
        let turn = counters.paging_structure_evictions.get();
        let evicted = CachedPlace::of(table.place, flags).is_some_and(|value| {
            let key = Key::new(source, iova, tables.shift(table.level + 1));
            self.paging_structures.insert(key, value.into_bits(), turn)
        });
        counters.paging_structure_evictions.add(evicted.into());
    }

    /// What is cached as whole mappings of the stage 2 of `host`.
    #[inline]
    pub fn wholes(&self, host: &HostStage2) -> &[Whole] {
        self.stage2.wholes(host)
    }

    /// The translation of `gpa` by the stage 2 of `host`.
    pub fn stage2(
        &self,
        host: &HostStage2,
        gpa: u64,
        counters: &LocalCounters,
    ) -> Result<Stage2Page, Stage2Refusal> {
        // No shift overflows: widths are below 64.
        if gpa >> self.guest_address_width != 0 {
            return Err(Stage2Refusal::Beyond);
        }
        self.stage2.get(&self.memories, host, gpa, counters).ok_or(Stage2Refusal::Absent)
    }

    /// The translation of `gpa` by the stage 2 of `host`, bypassing the cache.
    pub fn stage2_now(&self, host: &HostStage2, gpa: u64) -> Option<Stage2Page> {
        now(&self.memories, &host.stage2, gpa)
    }

    /// The 8-byte word at `place`, which is aligned; none if no memory is there.
    #[inline]
    pub fn word(&self, place: Place) -> Option<MemoryWord<'_>> {
        self.memory(place)?.map.word(place.offset)
    }

    /// The memories that places are in.
    pub fn memories(&self) -> &Memories {
        &self.memories
    }

    /// `length` bytes from `place` on; none if they are not within one memory.
    #[inline]
    pub fn slice(&self, place: Place, length: usize) -> Option<MemorySlice<'_>> {
        self.memory(place)?.map.slice(place.offset, length)
    }

    /// The memory that `place` is in.
    #[inline]
    pub fn memory(&self, place: Place) -> Option<&Memory> {
        self.memories.get(place.memory)
    }

    /// Drops the pages of `scope` that are cached with one of `shifts` and have an address in one
    /// of `ranges`, as made by [`ascending`](super::ascending); returns the number of entries.
    pub fn drop_pages(&mut self, scope: Scope, ranges: &[IovaRange], shifts: &[u8]) -> u64 {
        self.iotlb.drop_ranges(scope, ranges, shifts)
    }

    /// Drops the pages of `scope` that have an address in such `ranges` and a stage-1 size of one
    /// of `shifts`, with every cached piece of them; returns the number of entries.
    pub fn drop_whole_pages(&mut self, scope: Scope, ranges: &[IovaRange], shifts: &[u8]) -> u64 {
        if !*self.fragments.get_mut() {
            return self.drop_pages(scope, ranges, shifts);
        }
        self.iotlb.drop_entries(|key, value| {
            let number = CachedPlace::from_bits(value).flags() >> WHOLE_AT;
            let whole = match WHOLE_SHIFTS.get(usize::from(number)) {
                Some(&whole) if number != 0 => whole,
                _ => key.shift(),
            };
            scope.has(key.source()) && shifts.contains(&whole) && key.overlaps_any(whole, ranges)
        })
    }

    /// Drops the tables of `scope` that are cached for a span of one of `shifts` that has an
    /// address in one of such `ranges`; returns the number of entries.
    pub fn drop_tables(&mut self, scope: Scope, ranges: &[IovaRange], shifts: &[u8]) -> u64 {
        self.paging_structures.drop_ranges(scope, ranges, shifts)
    }

    /// How many sets of the IOTLB and paging-structure cache were searched so far for entries to
    /// drop.
    #[cfg(test)]
    pub(crate) fn looks(&self) -> u64 {
        self.iotlb.looks + self.paging_structures.looks
    }

    /// Drops what is cached of `gone`, and releases memories that no entry refers to; returns the
    /// number of entries. Visits every entry once.
    pub fn drop_gone(&mut self, gone: &Gone) -> u64 {
        let mut wanted = BTreeSet::new();
        let mut drop_from = |cache: &mut Cache, is_gone: &dyn Fn(u32) -> bool| {
            cache.drop_entries(|key, value| {
                let dropped = is_gone(key.source().tag());
                if !dropped {
                    wanted.insert(CachedPlace::from_bits(value).place(0).memory);
                }
                dropped
            })
        };
        let is_gone = |tag: u32| gone.tags.contains(&tag);
        let dropped = drop_from(&mut self.iotlb, &is_gone)
            + drop_from(&mut self.paging_structures, &is_gone)
            + self.device_tlbs.drop_entries(|key, value| {
                let dropped = is_gone(key.source().tag());
                if !dropped {
                    wanted.insert(CachedPlace::from_bits(value).place(0).memory);
                }
                dropped
            })
            + self.stage2.drop_gone(gone.stage2_tag, &mut wanted);
        self.memories.retain(|number| wanted.contains(&number));
        dropped
    }
}

/// The source of what the device of `request` caches with the configuration of `at`, the address as
/// it is cached, and the page sizes.
fn device_key(at: &Lookup, request: &Request) -> (Source, (u64, &'static [u8])) {
    (device_source(at.source.tag(), request.pasid), at.half(request.address))
}

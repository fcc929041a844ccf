// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a unit caches beside the PASID table: IOTLB, paging structures and stage 2.
//!
//! What is cached stays until it is invalidated or evicted, whatever becomes of the tables that it
//! came from. What is not present or faults is never cached.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::Arc;

use vm_memory::{VolatileMemory, VolatileSlice};

use super::cache::{Cache, Key, Source};
use super::config::VtdUnitConfig;
use super::context::Context;
use super::counters::LocalCounters;
use super::format::Path;
use super::memories::{CachedPlace, Memories, Memory, Place};
use super::origins::{CachesOfWalk, Origins};
use super::rights::{RequestKind, Rights};
use super::sharing::Gone;
use crate::emulated::hardware::CacheRange;
use crate::emulated::stage2::Mapping;
use crate::spec::vtd::first_stage::page_size;

/// Sizes of pages: 4 KiB, 2 MiB, 1 GiB.
const PAGE_LEVELS: [u8; 3] = [1, 2, 3];
/// Sizes of what one paging-structure entry spans: 2 MiB to 256 TiB.
const STRUCTURE_LEVELS: [u8; 4] = [2, 3, 4, 5];

/// Where the byte that a request wants is, and how many follow it in the same page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(super) place: Place,
    /// Bytes from it to the end of the page, at least 1.
    pub length: u64,
}

/// What stage 2 makes of a GPA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stage2Page {
    /// Where the byte is.
    pub place: Place,
    /// Bytes from it to the end of what is contiguous, as far as it is known.
    pub length: u64,
    /// Level of the page around it that is contiguous and can be cached; none when not even 4 KiB
    /// are.
    pub level: Option<u8>,
    pub read: bool,
    pub write: bool,
}

impl Stage2Page {
    /// Whether stage 2 allows requests of `kind`.
    pub fn allows(&self, kind: RequestKind) -> bool {
        if kind.write() {
            self.write
        } else {
            self.read
        }
    }
}

/// Why stage 2 has nothing for a GPA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage2Miss {
    /// The GPA is wider than guest addresses are.
    Beyond,
    /// Nothing is mapped there.
    Absent,
}

/// A table of the user's, somewhere in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub place: Place,
    /// From 1 for the tables of 4 KiB pages.
    pub level: u8,
    /// Bytes of it that are contiguous.
    pub length: u64,
    /// Stage 2 lets its entries be written.
    pub writable: bool,
}

/// Flags of a cached table: four bits of [`Path`], and this.
const TABLE_WRITABLE: u16 = 1 << 4;
/// Flags of a cached stage-2 page.
const STAGE2_READ: u16 = 1;
const STAGE2_WRITE: u16 = 2;

/// See the [module's documentation](self).
#[derive(Debug)]
pub(super) struct Caches {
    iotlb: Cache,
    paging_structures: Cache,
    stage2: Cache,
    memories: Memories,
    guest_address_width: u8,
    /// What entries were made from, if the sanitizer wants to know.
    origins: Option<Arc<Origins>>,
}

impl Caches {
    /// Empty caches; what their entries are made from is put down in `origins`.
    pub fn new(config: &VtdUnitConfig, origins: Option<Arc<Origins>>) -> Self {
        Self {
            iotlb: Cache::new(config.iotlb_entries),
            paging_structures: Cache::new(config.paging_structure_entries),
            stage2: Cache::new(config.stage2_entries),
            memories: Memories::new(),
            guest_address_width: config.address_width.bits(),
            origins,
        }
    }

    /// What the IOTLB has for requests of `kind`.
    #[inline]
    pub fn translation(&self, source: Source, iova: u64, kind: RequestKind) -> Option<Target> {
        PAGE_LEVELS.into_iter().find_map(|level| {
            let value = self.iotlb.get(Key::new(source, iova, level), |value| {
                Rights::from_flags(CachedPlace::from_bits(value).flags()).allow(kind)
            })?;
            let offset = iova & (page_size(level) - 1);
            Some(Target {
                place: CachedPlace::from_bits(value).place(offset),
                length: page_size(level) - offset,
            })
        })
    }

    /// Level of the page that [`Caches::translation`] finds.
    pub fn translation_level(&self, source: Source, iova: u64, kind: RequestKind) -> Option<u8> {
        PAGE_LEVELS.into_iter().find(|&level| {
            let allows =
                |value| Rights::from_flags(CachedPlace::from_bits(value).flags()).allow(kind);
            self.iotlb.get(Key::new(source, iova, level), allows).is_some()
        })
    }

    /// Tells the sanitizer, if there is one, what a walk's entries in the caches were made from:
    /// see [`Origins::record`].
    pub fn record_origin(
        &self,
        way: (Source, u64),
        start: u8,
        words: impl Iterator<Item = u64>,
        page_level: Option<u8>,
    ) {
        if let Some(origins) = &self.origins {
            let Self { iotlb, paging_structures, .. } = self;
            let words: Vec<_> = words.collect();
            origins.record(
                CachesOfWalk { iotlb, paging_structures },
                way,
                start,
                &words,
                page_level,
            );
        }
    }

    /// Caches that the page of `level` around `iova` is where `target` says `iova` is.
    pub fn add_translation(
        &self,
        source: Source,
        iova: u64,
        level: u8,
        place: Place,
        rights: Rights,
        counters: &LocalCounters,
    ) {
        let offset = iova & (page_size(level) - 1);
        let evicted = place
            .back(offset)
            .and_then(|start| CachedPlace::of(start, rights.flags()))
            .is_some_and(|value| {
                self.iotlb.insert(Key::new(source, iova, level), value.into_bits())
            });
        counters.iotlb_evictions.add(evicted.into());
    }

    /// The lowest table on the way of `iova` that is cached, and what the entries above it allow.
    pub fn table(
        &self,
        source: Source,
        iova: u64,
        levels: u8,
        counters: &LocalCounters,
    ) -> Option<(Table, Path)> {
        let found = (2..=levels).find_map(|level| {
            let value = self.paging_structures.get(Key::new(source, iova, level), |_| true)?;
            let value = CachedPlace::from_bits(value);
            let table = Table {
                place: value.place(0),
                level: level - 1,
                length: page_size(1),
                writable: value.flags() & TABLE_WRITABLE != 0,
            };
            Some((table, Path::from_bits((value.flags() & !TABLE_WRITABLE) as u8)))
        });
        match found {
            Some(_) => counters.paging_structure_hits.count(),
            None => counters.paging_structure_misses.count(),
        }
        found
    }

    /// Caches that `table` is the one on the way of `iova`, and that the entries above allow `path`.
    pub fn add_table(
        &self,
        source: Source,
        iova: u64,
        table: &Table,
        path: Path,
        counters: &LocalCounters,
    ) {
        if table.length < page_size(1) {
            return;
        }
        let writable = if table.writable { TABLE_WRITABLE } else { 0 };
        let flags = u16::from(path.into_bits()) | writable;
        let evicted = CachedPlace::of(table.place, flags).is_some_and(|value| {
            let key = Key::new(source, iova, table.level + 1);
            self.paging_structures.insert(key, value.into_bits())
        });
        counters.paging_structure_evictions.add(evicted.into());
    }

    /// Where stage 2 has `gpa`.
    pub fn stage2(
        &self,
        context: &Context,
        gpa: u64,
        counters: &LocalCounters,
    ) -> Result<Stage2Page, Stage2Miss> {
        // No shift overflows: widths are 48 and 57.
        if gpa >> self.guest_address_width != 0 {
            return Err(Stage2Miss::Beyond);
        }
        if let Some(page) = self.cached_stage2(context.stage2_source, gpa) {
            counters.stage2_hits.count();
            return Ok(page);
        }
        counters.stage2_misses.count();
        let page = self.stage2_now(context, gpa).ok_or(Stage2Miss::Absent)?;
        self.add_stage2(context.stage2_source, gpa, &page, counters);
        Ok(page)
    }

    /// Where stage 2 has `gpa`, past the cache.
    pub fn stage2_now(&self, context: &Context, gpa: u64) -> Option<Stage2Page> {
        let mapping = context.stage2.lookup(gpa)?;
        self.page_in(&mapping, gpa)
    }

    fn cached_stage2(&self, source: Source, gpa: u64) -> Option<Stage2Page> {
        // Guest memory comes in large pieces: the largest page first.
        PAGE_LEVELS.into_iter().rev().find_map(|level| {
            let value = self.stage2.get(Key::new(source, gpa, level), |_| true)?;
            let value = CachedPlace::from_bits(value);
            let offset = gpa & (page_size(level) - 1);
            Some(Stage2Page {
                place: value.place(offset),
                length: page_size(level) - offset,
                level: Some(level),
                read: value.flags() & STAGE2_READ != 0,
                write: value.flags() & STAGE2_WRITE != 0,
            })
        })
    }

    /// The largest page around `gpa` that `mapping` has as a whole.
    fn page_in(&self, mapping: &Mapping, gpa: u64) -> Option<Stage2Page> {
        let (region, offset) = mapping.target(gpa);
        let place = Place { memory: self.memories.number(region)?, offset };
        let level = PAGE_LEVELS.into_iter().rev().find(|&level| {
            let first = gpa & !(page_size(level) - 1);
            let last = gpa | (page_size(level) - 1);
            let starts_page = place.back(gpa - first).and_then(|start| CachedPlace::of(start, 0));
            mapping.start <= first && last <= mapping.last && starts_page.is_some()
        });
        let last = level.map_or(mapping.last, |level| gpa | (page_size(level) - 1));
        Some(Stage2Page {
            place,
            // Does not overflow: addresses have fewer than 64 bits.
            length: last - gpa + 1,
            level,
            read: mapping.protection.read,
            write: mapping.protection.write,
        })
    }

    fn add_stage2(&self, source: Source, gpa: u64, page: &Stage2Page, counters: &LocalCounters) {
        let Some(level) = page.level else { return };
        let read = if page.read { STAGE2_READ } else { 0 };
        let write = if page.write { STAGE2_WRITE } else { 0 };
        let evicted = page
            .place
            .back(gpa & (page_size(level) - 1))
            .and_then(|start| CachedPlace::of(start, read | write))
            .is_some_and(|value| {
                self.stage2.insert(Key::new(source, gpa, level), value.into_bits())
            });
        counters.stage2_evictions.add(evicted.into());
    }

    /// The entry of `table` on the way of `iova`; none when it is not within reach.
    pub fn entry(&self, table: &Table, index: u64) -> Option<&AtomicU64> {
        let offset = index * 8;
        if offset + 8 > table.length {
            return None;
        }
        let offset = usize::try_from(table.place.offset + offset).ok()?;
        self.memories.get(table.place.memory)?.mapping.get_atomic_ref(offset).ok()
    }

    /// `length` bytes from `place` on; none when they are not within one memory.
    #[inline]
    pub fn slice(&self, place: Place, length: usize) -> Option<VolatileSlice<'_>> {
        let offset = usize::try_from(place.offset).ok()?;
        self.memory(place)?.mapping.get_slice(offset, length).ok()
    }

    /// The memory that `place` is in.
    #[inline]
    pub fn memory(&self, place: Place) -> Option<&Memory> {
        self.memories.get(place.memory)
    }

    /// Drops what is cached of `tag` in `range`; gives the number of entries.
    pub fn invalidate(&mut self, tag: u32, range: CacheRange) -> u64 {
        let (first, last, leaf) = match range {
            CacheRange::All => (0, u64::MAX, false),
            CacheRange::Pages { pages: 0, .. } => return 0,
            CacheRange::Pages { address, pages, leaf } => {
                let length = pages.saturating_mul(page_size(1));
                (address, address.saturating_add(length - 1), leaf)
            }
        };
        let pages = self.iotlb.drop_range(tag, first, last, &PAGE_LEVELS);
        let tables = if leaf {
            0
        } else {
            self.paging_structures.drop_range(tag, first, last, &STRUCTURE_LEVELS)
        };
        pages + tables
    }

    /// Drops what is cached of `gone`, and lets go of memories that no entry leads to any more;
    /// gives the number of entries. Looks at every entry once.
    pub fn drop_gone(&mut self, gone: &Gone) -> u64 {
        let mut wanted = BTreeSet::new();
        let mut drop_from = |cache: &mut Cache, is_gone: &dyn Fn(u32) -> bool| {
            cache.drop_where(|source, value| {
                let dropped = is_gone(source.tag());
                if !dropped {
                    wanted.insert(CachedPlace::from_bits(value).place(0).memory);
                }
                dropped
            })
        };
        let is_gone = |tag: u32| gone.tags.contains(&tag);
        let dropped = drop_from(&mut self.iotlb, &is_gone)
            + drop_from(&mut self.paging_structures, &is_gone)
            + drop_from(&mut self.stage2, &|tag| Some(tag) == gone.stage2_tag);
        self.memories.retain(|number| wanted.contains(&number));
        dropped
    }
}

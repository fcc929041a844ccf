// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that cached translations refer to, by number.
//!
//! A cache entry refers to a memory by a small number and holds no reference; this table does, so
//! that a hit needs no reference counting. Any thread may add a memory while others look up;
//! [`Memories::retain`] has exclusive access.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::OnceLock;

use bitfield_struct::bitfield;

use twostage::iommufd::{MemoryMap, UserMemory};

/// Maximum number of memories. Guest memory is a handful; requests to memories beyond this number
/// are blocked.
const CAPACITY: usize = 1024;

/// A byte of a memory in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Number of the memory.
    pub memory: u16,
    /// Offset in it, in bytes.
    pub offset: u64,
}

impl Place {
    /// The place `bytes` before this one; none when the memory starts in between.
    pub fn back(self, bytes: u64) -> Option<Self> {
        Some(Self { memory: self.memory, offset: self.offset.checked_sub(bytes)? })
    }
}

/// A place that starts a 4 KiB page of its memory, with some flags, as a cache entry's value.
#[bitfield(u64)]
pub(crate) struct CachedPlace {
    /// Their meaning depends on the cache.
    #[bits(12)]
    pub flags: u16,
    #[bits(40)]
    frame: u64,
    #[bits(12)]
    memory: u16,
}

impl CachedPlace {
    /// `place` with `flags`; none if the place is not page-aligned.
    pub fn of(place: Place, flags: u16) -> Option<Self> {
        let frame = place.offset >> 12;
        let fits = place.offset & 0xfff == 0 && frame < 1 << 40;
        fits.then(|| Self::new().with_flags(flags).with_frame(frame).with_memory(place.memory))
    }

    /// The place `offset` bytes after the start of the page.
    #[inline]
    pub fn place(self, offset: u64) -> Place {
        Place { memory: self.memory(), offset: (self.frame() << 12) + offset }
    }
}

/// One memory.
#[derive(Debug)]
pub(crate) struct Memory {
    /// The mapping in this process. Without the region: a memory stays here for longer than it is
    /// mapped in an IOAS, and who counts the users of the region must not wait for that.
    pub map: MemoryMap,
    /// The guest's address of the start of the mapping, if known. It wraps: the guest may have
    /// only a later part.
    base: Option<u64>,
}

impl Memory {
    fn of(memory: &UserMemory) -> Self {
        Self { map: memory.map().without_region(), base: base(memory) }
    }

    fn is(&self, memory: &UserMemory) -> bool {
        self.map.same(memory.map()) && self.base == base(memory)
    }

    /// The guest's address of the byte at `offset`, if known.
    pub fn gpa(&self, offset: u64) -> Option<u64> {
        Some(self.base?.wrapping_add(offset))
    }
}

/// The guest's address of the start of the mapping of `memory`, which wraps; if known.
fn base(memory: &UserMemory) -> Option<u64> {
    Some(memory.gpa()?.wrapping_sub(memory.offset()))
}

/// See the [module's documentation](self).
#[derive(Debug)]
pub(crate) struct Memories {
    slots: Box<[OnceLock<Memory>]>,
    /// No slot from here on was ever used.
    used: AtomicUsize,
    /// Writes to some memory are recorded, or were.
    tracked: AtomicBool,
}

impl Memories {
    /// An empty table.
    pub fn new() -> Self {
        let slots = (0..CAPACITY).map(|_| OnceLock::new()).collect();
        Self { slots, used: AtomicUsize::new(0), tracked: AtomicBool::new(false) }
    }

    /// The memory with `number`.
    #[inline]
    pub fn get(&self, number: u16) -> Option<&Memory> {
        self.slots.get(usize::from(number))?.get()
    }

    /// The number of the region of `memory`, added if necessary; none if the table is full.
    pub fn number(&self, memory: &UserMemory) -> Option<u16> {
        let used = self.used.load(Ordering::Acquire);
        let known =
            self.slots.iter().take(used).position(|slot| slot.get().is_some_and(|m| m.is(memory)));
        let number = known.or_else(|| self.add(memory))?;
        u16::try_from(number).ok()
    }

    fn add(&self, memory: &UserMemory) -> Option<usize> {
        // The loser of a race for a slot finds the winner's memory there, perhaps the same.
        let of = || Memory::of(memory);
        let number = self.slots.iter().position(|slot| slot.get_or_init(of).is(memory))?;
        self.tracked.fetch_or(memory.map().is_tracked(), Ordering::Relaxed);
        self.used.fetch_max(number + 1, Ordering::Release);
        Some(number)
    }

    /// Whether writes to a memory may have to be recorded.
    pub fn any_tracked(&self) -> bool {
        self.tracked.load(Ordering::Relaxed)
    }

    /// Records that the `length` bytes at the guest's `address` were written.
    pub fn mark_dirty(&self, address: u64, length: u64) {
        // Nothing follows the end of the address space, but what has a base may wrap.
        let length = length.min(u64::MAX - address);
        let used = self.used.load(Ordering::Acquire);
        for Memory { map, base } in self.slots.iter().take(used).filter_map(OnceLock::get) {
            let Some(base) = base else { continue };
            // What starts within the memory, or else before it.
            let offset = address.wrapping_sub(*base);
            let (start, length) = match offset < map.length() {
                true => (offset, length.min(map.length() - offset)),
                false => {
                    let before = base.wrapping_sub(address);
                    (0, length.saturating_sub(before).min(map.length()))
                }
            };
            if length > 0 {
                // Not more than the memory has.
                map.mark_dirty(start, length as usize);
            }
        }
    }

    /// Releases every memory for whose number `wanted` does not hold.
    pub fn retain(&mut self, wanted: impl Fn(u16) -> bool) {
        for (number, slot) in (0..).zip(self.slots.iter_mut()) {
            if !wanted(number) {
                slot.take();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    fn region(base: u64) -> Arc<GuestRegionMmap> {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(base), 0x1000, None).unwrap())
    }

    fn memory(base: u64) -> UserMemory {
        UserMemory::whole(region(base))
    }

    #[test]
    fn a_memory_keeps_its_number_until_it_is_let_go() {
        let mut memories = Memories::new();
        let three = [memory(0), memory(0), memory(0x10000)];
        for (number, memory) in (0..).zip(&three) {
            assert_eq!(memories.number(memory), Some(number));
        }
        assert_eq!(memories.number(&three[1].part(0x800, 1).unwrap()), Some(1));
        memories.retain(|number| number != 1);
        assert!(memories.get(1).is_none());
        assert_eq!(memories.get(2).unwrap().gpa(0x800), Some(0x10800));
        assert_eq!(memories.number(&three[2]), Some(2));
        assert_eq!(memories.number(&memory(0)), Some(1));
        assert!(memories.get(u16::MAX).is_none());
    }

    #[test]
    fn what_was_written_is_marked_in_each_memory_that_has_it() {
        let tracked = |base| {
            let region =
                GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(base), 0x4000, None);
            region.unwrap()
        };
        let memories = Memories::new();
        memories.number(&memory(0x1000)).unwrap();
        assert!(!memories.any_tracked());
        let regions = [tracked(0x8000), tracked(0xc000)];
        regions
            .iter()
            .for_each(|region| assert!(memories.number(&UserMemory::of(region)).is_some()));
        assert!(memories.any_tracked());
        let marked =
            || regions.each_ref().map(|region| MmapRegion::bitmap(region).get_and_reset()[0]);
        memories.mark_dirty(0, 0x8000);
        memories.mark_dirty(0x1_0000, u64::MAX);
        assert_eq!(marked(), [0, 0]);
        memories.mark_dirty(0xafff, 0x1002);
        assert_eq!(marked(), [0b1100, 1]);
        memories.mark_dirty(0x7fff, u64::MAX);
        assert_eq!(marked(), [0b1111, 0b1111]);
        // The guest has only the second half of a memory, at 0.
        let half = UserMemory::of(&regions[0]).part(0x2000, 0x2000).unwrap().at_gpa(0);
        let number = memories.number(&half).unwrap();
        assert_eq!(memories.get(number).unwrap().gpa(0x2010), Some(0x10));
        memories.mark_dirty(0x1000, 1);
        assert_eq!(marked(), [0b1000, 0]);
    }

    #[test]
    fn the_table_is_bounded_and_frees_what_it_lets_go() {
        let mut memories = Memories::new();
        let first = region(0);
        let mapping = first.get_mmap();
        assert_eq!(memories.number(&UserMemory::whole(first.clone())), Some(0));
        assert_eq!(Arc::strong_count(&first), 1, "the region itself is not kept");
        for number in 1..CAPACITY {
            assert_eq!(memories.number(&memory(0)), Some(number as u16));
        }
        assert_eq!(memories.number(&memory(0)), None);
        drop(first);
        assert_eq!(Arc::strong_count(&mapping), 2);
        memories.retain(|_| false);
        assert_eq!(Arc::strong_count(&mapping), 1);
    }

    #[test]
    fn only_page_starts_are_cached() {
        let place = Place { memory: 1023, offset: 0x7_ffff_f000 };
        let cached = CachedPlace::of(place, 0xabc).unwrap();
        assert_eq!(cached.place(5), Place { memory: 1023, offset: 0x7_ffff_f005 });
        assert_eq!(cached.flags(), 0xabc);
        assert!(CachedPlace::of(Place { memory: 0, offset: 0x801 }, 0).is_none());
        assert!(CachedPlace::of(Place { memory: 0, offset: 1 << 52 }, 0).is_none());
    }
}

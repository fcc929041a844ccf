// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapping of this process, of any type, and accesses to it that record writes.
//!
//! The bitmaps of vm-memory are a type parameter of its regions. Here they are behind one private
//! trait, so that neither the verbs nor the hosts have that parameter.
#![allow(unsafe_code)]

use std::any::{Any, TypeId};
use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{FileOffset, GuestRegionMmap, MmapRegion, VolatileSlice};

/// Linux's `MAP_SHARED`.
const MAP_SHARED: i32 = 1;

/// What keeps memory mapped.
trait Mapping: Send + Sync {
    /// The file that is mapped, if shared, from the first byte on.
    fn file(&self) -> Option<&FileOffset>;

    /// Where writes are recorded.
    fn marks(&self) -> &dyn Marks;

    /// The mapping without the region that gives it a guest's address.
    fn alone(self: Arc<Self>) -> Arc<dyn Mapping>;
}

/// A bitmap of any type.
trait Marks {
    fn mark(&self, offset: usize, length: usize);
    fn is_marked(&self, offset: usize) -> bool;
}

impl<B: Bitmap> Marks for B {
    fn mark(&self, offset: usize, length: usize) {
        self.mark_dirty(offset, length);
    }

    fn is_marked(&self, offset: usize) -> bool {
        self.dirty_at(offset)
    }
}

impl<B: Bitmap + Send + Sync + 'static> Mapping for MmapRegion<B> {
    fn file(&self) -> Option<&FileOffset> {
        self.file_offset().filter(|_| self.flags() & MAP_SHARED != 0)
    }

    fn marks(&self) -> &dyn Marks {
        self.bitmap()
    }

    fn alone(self: Arc<Self>) -> Arc<dyn Mapping> {
        self
    }
}

impl<B: Bitmap + Send + Sync + 'static> Mapping for GuestRegionMmap<B> {
    fn file(&self) -> Option<&FileOffset> {
        Mapping::file(&**self)
    }

    fn marks(&self) -> &dyn Marks {
        Mapping::marks(&**self)
    }

    fn alone(self: Arc<Self>) -> Arc<dyn Mapping> {
        self.get_mmap()
    }
}

/// Memory that is not vm-memory's.
struct Raw {
    _owner: Arc<dyn Any + Send + Sync>,
    file: Option<FileOffset>,
}

impl Mapping for Raw {
    fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }

    fn marks(&self) -> &dyn Marks {
        &()
    }

    fn alone(self: Arc<Self>) -> Arc<dyn Mapping> {
        self
    }
}

/// Memory of this process that stays mapped while the value exists, and is accessed as a guest's:
/// by volatile or atomic accesses, while anybody else may do the same.
#[derive(Clone)]
pub struct MemoryMap {
    start: *mut u8,
    length: usize,
    /// Writes are recorded: otherwise an access needs no call of `mapping`.
    tracked: bool,
    mapping: Arc<dyn Mapping>,
}

// SAFETY: the pointer is that of the mapping, which any thread may use, and is only used as the
// type's documentation says.
unsafe impl Send for MemoryMap {}
// SAFETY: as above.
unsafe impl Sync for MemoryMap {}

/// A slice of a [`MemoryMap`]. Writes by its methods are recorded in the memory's bitmap.
pub type MemorySlice<'a> = VolatileSlice<'a, DirtyMark<'a>>;

/// Where the writes to a [`MemorySlice`] are recorded, if anywhere: in the bitmap of the memory, of
/// whatever type.
#[derive(Debug, Clone, Copy)]
pub struct DirtyMark<'a>(Option<(&'a MemoryMap, usize)>);

impl WithBitmapSlice<'_> for DirtyMark<'_> {
    type S = Self;
}

impl BitmapSlice for DirtyMark<'_> {}

impl Bitmap for DirtyMark<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, length: usize) {
        if let Some((map, start)) = self.0 {
            map.mapping.marks().mark(start.wrapping_add(offset), length);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.is_some_and(|(map, start)| map.mapping.marks().is_marked(start.wrapping_add(offset)))
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> Self {
        Self(self.0.map(|(map, start)| (map, start.wrapping_add(offset))))
    }
}

/// The 8 bytes at an aligned address of a [`MemoryMap`]. Whoever writes them records it, too.
#[derive(Debug, Clone, Copy)]
pub struct MemoryWord<'a> {
    word: &'a AtomicU64,
    mark: DirtyMark<'a>,
}

impl MemoryWord<'_> {
    /// As [`AtomicU64::load`].
    #[inline]
    pub fn load(&self, order: Ordering) -> u64 {
        self.word.load(order)
    }

    /// As [`AtomicU64::compare_exchange`].
    ///
    /// # Errors
    /// It is not `current`: the value that it has.
    #[inline]
    pub fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        let before = self.word.compare_exchange(current, new, success, failure)?;
        self.mark.mark_dirty(0, size_of::<u64>());
        Ok(before)
    }
}

impl MemoryMap {
    /// The memory of `region`, whose `Arc` is kept.
    pub(super) fn of_region<B: Bitmap + Send + Sync + 'static>(
        region: Arc<GuestRegionMmap<B>>,
    ) -> Self {
        Self { mapping: region.clone(), ..Self::of(region.get_mmap()) }
    }

    /// The memory of `region`.
    pub(super) fn of<B: Bitmap + Send + Sync + 'static>(region: Arc<MmapRegion<B>>) -> Self {
        let tracked = TypeId::of::<B>() != TypeId::of::<()>();
        Self { start: region.as_ptr(), length: region.size(), tracked, mapping: region }
    }

    /// See [`UserMemory::from_raw`](super::UserMemory::from_raw); none if there can be no such
    /// memory.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn raw(
        start: *mut u8,
        length: usize,
        owner: Arc<dyn Any + Send + Sync>,
        file: Option<FileOffset>,
    ) -> Option<Self> {
        let fits = isize::try_from(length).is_ok() && start.addr().checked_add(length).is_some();
        let mapping = Arc::new(Raw { _owner: owner, file });
        (fits && length > 0 && !start.is_null()).then_some(Self {
            start,
            length,
            tracked: false,
            mapping,
        })
    }

    /// Its address in this process.
    pub(super) fn start(&self) -> u64 {
        self.start as u64
    }

    /// The file that is mapped, if shared, from the first byte on.
    pub(super) fn file(&self) -> Option<&FileOffset> {
        self.mapping.file()
    }

    /// Whether the same object keeps `other` mapped.
    pub(super) fn is_of_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// The `length` bytes at `offset`; none if they are not within the memory.
    #[inline]
    pub fn slice(&self, offset: u64, length: usize) -> Option<MemorySlice<'_>> {
        let start = self.within(offset, length)?;
        let mark = self.mark(start);
        // SAFETY: they are within the memory, which stays mapped while `self` is borrowed, and
        // which everybody accesses as the type's documentation says.
        Some(unsafe { VolatileSlice::with_bitmap(self.start.add(start), length, mark, None) })
    }

    /// The 8 bytes at `offset`; none if they are not within the memory or their address is not a
    /// multiple of 8.
    #[inline]
    pub fn word(&self, offset: u64) -> Option<MemoryWord<'_>> {
        let start = self.within(offset, size_of::<u64>())?;
        let word = self.start.wrapping_add(start).cast::<u64>();
        // SAFETY: as in `slice`; and it is aligned.
        let word = word.is_aligned().then(|| unsafe { AtomicU64::from_ptr(word) })?;
        Some(MemoryWord { word, mark: self.mark(start) })
    }

    #[inline]
    fn mark(&self, start: usize) -> DirtyMark<'_> {
        DirtyMark(self.tracked.then_some((self, start)))
    }

    /// Records that `length` bytes at `offset` were written.
    pub fn mark_dirty(&self, offset: u64, length: usize) {
        if let (true, Some(start)) = (self.tracked, self.within(offset, length)) {
            self.mapping.marks().mark(start, length);
        }
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Whether writes to it are recorded.
    pub fn is_tracked(&self) -> bool {
        self.tracked
    }

    /// Whether `other` is the same memory, with writes recorded in the same place.
    pub fn same(&self, other: &Self) -> bool {
        let tracked = self.tracked || other.tracked;
        (self.start, self.length) == (other.start, other.length)
            && (!tracked || std::ptr::addr_eq(self.mapping.marks(), other.mapping.marks()))
    }

    /// The same memory, kept mapped without the `Arc` of the region that was given for it: whoever
    /// counts that region's users does not count this one.
    #[must_use]
    pub fn without_region(&self) -> Self {
        Self { mapping: Arc::clone(&self.mapping).alone(), ..*self }
    }

    /// No bytes of any memory.
    pub fn empty_slice<'a>() -> MemorySlice<'a> {
        let nowhere = NonNull::dangling().as_ptr();
        // SAFETY: any pointer is valid for no bytes.
        unsafe { VolatileSlice::with_bitmap(nowhere, 0, DirtyMark(None), None) }
    }

    #[inline]
    fn within(&self, offset: u64, length: usize) -> Option<usize> {
        let start = usize::try_from(offset).ok()?;
        (start.checked_add(length)? <= self.length).then_some(start)
    }
}

impl fmt::Debug for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryMap({:p}+{:#x})", self.start, self.length)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::iommufd::UserMemory;

    fn region<B: NewBitmap>() -> Arc<GuestRegionMmap<B>> {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(0x8000), 0x4000, None).unwrap())
    }

    /// The pages of 4 KiB that `region`'s bitmap has.
    fn marked(region: &GuestRegionMmap<AtomicBitmap>) -> Vec<usize> {
        (0..4).filter(|page| MmapRegion::bitmap(region).is_addr_set(page * 0x1000)).collect()
    }

    #[test]
    fn writes_mark_the_written_pages_and_reads_none() {
        let region = region();
        let memory = UserMemory::new(region.clone(), 0x1000, 0x3000).unwrap();
        let slice = memory.slice();
        slice.read_slice(&mut [0; 0x3000], 0).unwrap();
        assert_eq!(marked(&region), [0; 0]);
        assert!(!slice.bitmap().dirty_at(0xfff));
        slice.offset(0x800).unwrap().write_slice(&[1; 8], 0x7ff).unwrap();
        assert_eq!(marked(&region), [1, 2]);
        assert!(slice.bitmap().dirty_at(0xfff) && !slice.bitmap().dirty_at(0x2000));
        let map = memory.map();
        let (word, order) = (map.word(0x3008).unwrap(), Ordering::Relaxed);
        assert_eq!(word.load(order), 0);
        assert_eq!(word.compare_exchange(1, 5, order, order), Err(0));
        assert_eq!(marked(&region), [1, 2]);
        assert_eq!(word.compare_exchange(0, 5, order, order), Ok(0));
        assert_eq!((word.load(order), marked(&region)), (5, vec![1, 2, 3]));
        map.mark_dirty(0xfff, 1);
        map.mark_dirty(0x3fff, 2);
        map.mark_dirty(u64::MAX, 8);
        assert_eq!(marked(&region), [0, 1, 2, 3]);
    }

    #[test]
    fn memory_without_a_bitmap_has_no_marks_to_set() {
        let memory = UserMemory::whole(region::<()>());
        assert!(memory.slice().bitmap().0.is_none());
        memory.map().mark_dirty(0, 8);
        assert!(!memory.slice().bitmap().dirty_at(0));
        assert!(MemoryMap::empty_slice().is_empty());
    }

    #[test]
    fn words_are_aligned_and_within_the_memory() {
        let memory = UserMemory::whole(region::<()>());
        memory.slice().write_obj(0x55u64, 0x3ff8).unwrap();
        assert_eq!(memory.map().word(0x3ff8).unwrap().load(Ordering::Relaxed), 0x55);
        for offset in [4, 0x4000, u64::MAX - 7] {
            assert!(memory.map().word(offset).is_none(), "{offset:#x}");
        }
        assert!(memory.map().slice(0x3fff, 2).is_none());
        assert!(memory.map().slice(u64::MAX, 1).is_none());
        assert!(memory.map().slice(1, usize::MAX).is_none());
    }

    #[test]
    fn the_same_bytes_with_another_bitmap_are_another_memory() {
        fn again<B: Bitmap>(region: &MmapRegion<()>, bitmap: B) -> GuestRegionMmap<B> {
            let builder = MmapRegionBuilder::new_with_bitmap(region.size(), bitmap);
            // SAFETY: `region` is kept by the caller for longer.
            let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
            GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap()
        }
        let region = region::<()>();
        let bitmap = || AtomicBitmap::new(0x4000, NonZeroUsize::new(0x1000).unwrap());
        let (plain, tracked) = (again(&region, ()), again(&region, bitmap()));
        let plain = UserMemory::of(&plain);
        let memory = UserMemory::whole(region.clone());
        assert!(plain.map().same(memory.map()));
        let of = |region| UserMemory::of::<AtomicBitmap>(region);
        assert!(of(&tracked).map().same(of(&tracked).map()));
        for other in [memory.map(), of(&again(&region, bitmap())).map()] {
            assert!(!of(&tracked).map().same(other) && !other.same(of(&tracked).map()));
        }
    }
}

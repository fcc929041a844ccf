// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of this process for mapping in an IOAS, whoever owns it and however writes to it are
//! recorded.
#![allow(unsafe_code)]

mod map;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

pub use map::{DirtyMark, MemoryMap, MemorySlice, MemoryWord};

/// A piece of this process's memory that stays mapped while the value exists.
///
/// The uAPI identifies memory by `user_va` only; here the owner of the mapping accompanies the
/// address, so that neither a host that pins pages nor one that reads them later can have a
/// dangling pointer. Cloning is cheap and refers to the same memory.
///
/// It is vm-memory's with any bitmap, which hosts in this process mark when devices write, or a
/// VMM's own ([`UserMemory::from_raw`]).
///
/// ```
/// use twostage::iommufd::UserMemory;
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ranges = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x10_0000), 0x2_0000)];
/// let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
/// let pieces: Vec<(u64, UserMemory)> = UserMemory::pieces(&memory).collect();
/// let (gpa, high) = &pieces[1];
/// assert_eq!((*gpa, high.length()), (0x10_0000, 0x2_0000));
/// // It is the same memory.
/// high.slice().write_obj(7u32, 0x10)?;
/// assert_eq!(memory.read_obj::<u32>(GuestAddress(0x10_0010))?, 7);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct UserMemory {
    map: MemoryMap,
    /// Of the first byte of the piece, if known.
    gpa: Option<u64>,
    offset: u64,
    length: u64,
}

/// There is no such piece of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UserMemoryError {
    /// It is not within the region.
    #[error("{length:#x} bytes at offset {offset:#x} do not lie in a region of {region:#x} bytes")]
    Outside {
        /// In bytes.
        offset: u64,
        /// In bytes.
        length: u64,
        /// Length of the region, in bytes.
        region: u64,
    },
    /// No memory can be there.
    #[error("no memory has {length:#x} bytes at address {address:#x}: pass those of a mapping")]
    Impossible {
        /// In this process.
        address: u64,
        /// In bytes.
        length: u64,
    },
}

impl UserMemory {
    /// `length` bytes of `region` from `offset` on; both in bytes.
    ///
    /// # Errors
    /// The piece is not within the region.
    pub fn new<B: Bitmap + Send + Sync + 'static>(
        region: Arc<GuestRegionMmap<B>>,
        offset: u64,
        length: u64,
    ) -> Result<Self, UserMemoryError> {
        Self::whole(region).part(offset, length)
    }

    /// All of `region`, whose `Arc` is kept.
    pub fn whole<B: Bitmap + Send + Sync + 'static>(region: Arc<GuestRegionMmap<B>>) -> Self {
        let base = region.start_addr();
        Self::all(MemoryMap::of_region(region), Some(base.0))
    }

    /// All of `region`, whose mapping is kept: for regions that belong to somebody, such as those
    /// of a [`GuestMemoryMmap`].
    pub fn of<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> Self {
        Self::all(MemoryMap::of(region.get_mmap()), Some(region.start_addr().0))
    }

    /// Every region of `memory`, with the guest's address of each.
    pub fn pieces<B: Bitmap + Send + Sync + 'static>(
        memory: &GuestMemoryMmap<B>,
    ) -> impl Iterator<Item = (u64, Self)> + '_ {
        memory.iter().map(|region| (region.start_addr().0, Self::of(region)))
    }

    /// The `length` bytes at `start`, which are the VMM's own business: `owner` keeps them mapped
    /// and is dropped when nothing here, and no cache of an emulated IOMMU, refers to them any
    /// more. `file` is what is mapped there with `MAP_SHARED`, from its
    /// [`start`](FileOffset::start) on, if that is so: a kernel's host then maps by file.
    ///
    /// Writes are not recorded anywhere: for that, make a [`GuestRegionMmap`] with a bitmap over
    /// the bytes. Nor has it a guest's address before
    /// [`GuestIoas::map`](crate::nesting::GuestIoas::map) or [`UserMemory::at_gpa`].
    ///
    /// # Safety
    /// Until `owner` is dropped, the bytes must be mapped for reading and writing, and must only be
    /// accessed as a guest's memory is: by volatile or atomic accesses or by the guest, and never
    /// by a Rust reference to something that is not atomic.
    ///
    /// # Errors
    /// There can be no such memory: `start` is null, `length` is 0, or they go past the end of the
    /// address space.
    pub unsafe fn from_raw(
        start: *mut u8,
        length: usize,
        owner: Arc<dyn Any + Send + Sync>,
        file: Option<FileOffset>,
    ) -> Result<Self, UserMemoryError> {
        let impossible =
            UserMemoryError::Impossible { address: start.addr() as u64, length: length as u64 };
        // SAFETY: guaranteed by the caller.
        let map = unsafe { MemoryMap::raw(start, length, owner, file) };
        Ok(Self::all(map.ok_or(impossible)?, None))
    }

    fn all(map: MemoryMap, gpa: Option<u64>) -> Self {
        let length = map.length();
        Self { map, gpa, offset: 0, length }
    }

    /// The same piece, of which the guest has the first byte at `gpa`, whatever its region says.
    ///
    /// [`GuestIoas::map`](crate::nesting::GuestIoas::map) does this. It is for who maps memory of
    /// [`UserMemory::from_raw`] by [`HostIommu::ioas_map`](super::HostIommu::ioas_map).
    #[must_use]
    pub fn at_gpa(self, gpa: u64) -> Self {
        Self { gpa: Some(gpa), ..self }
    }

    /// The `length` bytes at `offset` of this piece; both in bytes.
    ///
    /// # Errors
    /// They are not within this piece.
    pub fn part(&self, offset: u64, length: u64) -> Result<Self, UserMemoryError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => {
                let gpa = self.gpa.and_then(|gpa| gpa.checked_add(offset));
                Ok(Self { gpa, offset: self.offset + offset, length, ..self.clone() })
            }
            _ => Err(UserMemoryError::Outside { offset, length, region: self.length }),
        }
    }

    /// This piece and `next`, if `next` follows it in the same region. They have a guest's address
    /// if `next` follows there, too.
    pub fn join(&self, next: &Self) -> Option<Self> {
        let follows = self.map.is_of_same(&next.map) && self.offset + self.length == next.offset;
        let end = self.gpa.and_then(|gpa| gpa.checked_add(self.length));
        let gpa = self.gpa.filter(|_| end == next.gpa);
        follows.then(|| Self { gpa, length: self.length + next.length, ..self.clone() })
    }

    /// The memory of the whole region.
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The guest's address of the first byte of the piece, if known: what its region says, or
    /// [`UserMemory::at_gpa`].
    pub fn gpa(&self) -> Option<u64> {
        self.gpa
    }

    /// The bytes of the piece.
    pub fn slice(&self) -> MemorySlice<'_> {
        let length = usize::try_from(self.length).ok();
        // Every piece is within its region.
        let slice = length.and_then(|length| self.map.slice(self.offset, length));
        slice.unwrap_or_else(MemoryMap::empty_slice)
    }

    /// The file of the piece and the offset in it, if it is a shared mapping of a file.
    pub fn file(&self) -> Option<(&File, u64)> {
        let file = self.map.file()?;
        Some((file.file(), file.start().checked_add(self.offset)?))
    }

    /// Offset of the piece in the region, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the piece, in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The address of the piece in this process: the uAPI's `user_va`.
    pub fn user_va(&self) -> u64 {
        self.map.start() + self.offset
    }
}

impl fmt::Debug for UserMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UserMemory({:#x}+{:#x})", self.user_va(), self.length)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
    use vm_memory::{Bytes, GuestAddress, MmapRegion};

    use super::*;

    fn region<B: NewBitmap>() -> Arc<GuestRegionMmap<B>> {
        Arc::new(GuestRegionMmap::from_range(GuestAddress(0x8000), 0x4000, None).unwrap())
    }

    #[test]
    fn a_piece_lies_in_its_region() {
        let region = region::<()>();
        let piece = UserMemory::new(region.clone(), 0x1000, 0x3000).unwrap();
        assert_eq!(piece.user_va(), UserMemory::whole(region.clone()).user_va() + 0x1000);
        assert_eq!((piece.gpa(), piece.slice().len()), (Some(0x9000), 0x3000));
        assert!(UserMemory::new(region.clone(), 0x1000, 0x3001).is_err());
        assert!(UserMemory::new(region, u64::MAX, 2).is_err());
        let part = piece.part(0x1000, 0x2000).unwrap();
        assert_eq!((part.offset(), part.gpa()), (0x2000, Some(0xa000)));
        assert!(piece.part(0x1000, 0x2001).is_err());
        assert!(piece.part(u64::MAX, 2).is_err());
    }

    #[test]
    fn pieces_join_if_one_follows_the_other_in_one_region() {
        let (region, other) = (region::<()>(), region::<()>());
        let piece =
            |of: &Arc<GuestRegionMmap>, at| UserMemory::new(of.clone(), at, 0x1000).unwrap();
        let joined = piece(&region, 0x1000).join(&piece(&region, 0x2000)).unwrap();
        assert_eq!(
            (joined.offset(), joined.length(), joined.gpa()),
            (0x1000, 0x2000, Some(0x9000))
        );
        for next in [piece(&region, 0x1000), piece(&region, 0x3000), piece(&other, 0x2000)] {
            assert!(piece(&region, 0x1000).join(&next).is_none());
        }
        // They follow in the region, but not in the guest.
        let elsewhere = piece(&region, 0x2000).at_gpa(0x2000);
        let joined = piece(&region, 0x1000).join(&elsewhere).unwrap();
        assert_eq!((joined.length(), joined.gpa()), (0x2000, None));
    }

    #[test]
    fn the_callers_arc_is_counted_until_the_region_is_left_out() {
        let region = region::<AtomicBitmap>();
        let memory = UserMemory::whole(region.clone());
        let part = memory.part(0, 1).unwrap();
        assert_eq!(Arc::strong_count(&region), 3);
        let map = part.map().without_region();
        drop((memory, part));
        assert_eq!(Arc::strong_count(&region), 1);
        // The region, the map, and this one.
        assert_eq!(Arc::strong_count(&region.get_mmap()), 3);
        assert!(map.same(UserMemory::of(&region).map()));
    }

    #[test]
    fn shared_files_are_known_and_private_ones_are_not() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(0x8000).unwrap();
        let map = |flags| {
            let file = Some(FileOffset::from_arc(file.clone(), 0x2000));
            let region = MmapRegion::<()>::build(file, 0x4000, 3, flags).unwrap();
            UserMemory::of(&GuestRegionMmap::new(region, GuestAddress(0)).unwrap())
        };
        let offset_of = |memory: &UserMemory| memory.file().map(|(_, offset)| offset);
        let shared = map(1);
        assert_eq!(offset_of(&shared), Some(0x2000));
        assert_eq!(offset_of(&shared.part(0x1000, 0x1000).unwrap()), Some(0x3000));
        assert_eq!(offset_of(&map(2)), None, "MAP_PRIVATE, not MAP_SHARED");
    }

    /// Says when it is dropped.
    struct Owner(Arc<AtomicBool>, Vec<AtomicU64>);

    impl Drop for Owner {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn raw_memory_is_kept_by_its_owner_until_nobody_refers_to_it() {
        let gone = Arc::new(AtomicBool::new(false));
        let owner = Owner(gone.clone(), (0..512).map(AtomicU64::new).collect());
        let start = owner.1.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: the words are atomic, and the owner's.
        let memory = unsafe { UserMemory::from_raw(start, 4096, Arc::new(owner), None) }.unwrap();
        assert_eq!((memory.gpa(), memory.length(), memory.file().is_none()), (None, 4096, true));
        let (part, map) = (memory.part(8, 8).unwrap(), memory.map().without_region());
        assert_eq!((part.gpa(), part.clone().at_gpa(0x1000).gpa()), (None, Some(0x1000)));
        drop(memory);
        assert_eq!(part.slice().read_obj::<u64>(0).unwrap(), 1);
        drop(part);
        assert!(!gone.load(Ordering::Relaxed));
        assert_eq!(map.word(16).unwrap().load(Ordering::Relaxed), 2);
        drop(map);
        assert!(gone.load(Ordering::Relaxed));
    }

    #[test]
    fn raw_memory_that_cannot_be_is_refused() {
        let end = usize::MAX & !0xfff;
        for (address, length) in [(0, 0x1000), (0x1000, 0), (end, 0x1000), (0x1000, usize::MAX)] {
            let start = std::ptr::without_provenance_mut(address);
            // SAFETY: nothing is there, and nothing is accessed: it is refused.
            let memory = unsafe { UserMemory::from_raw(start, length, Arc::new(()), None) };
            let error = memory.unwrap_err();
            let (address, length) = (address as u64, length as u64);
            assert_eq!(error, UserMemoryError::Impossible { address, length });
        }
    }
}

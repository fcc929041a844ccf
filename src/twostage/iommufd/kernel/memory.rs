// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory that IOASes map: kept for as long as the kernel may look up its pages.
//!
//! The kernel pins a mapping's pages only when the IOAS gets its first HWPT; if this process had
//! unmapped the memory by then, the addresses could belong to something else.

use std::collections::{BTreeMap, HashMap};

use crate::iommufd::{ObjectId, UserMemory};

/// The memory of every IOAS, by the first IOVA of its mappings.
#[derive(Debug, Default)]
pub(super) struct MappedMemory {
    ioases: HashMap<ObjectId, BTreeMap<u64, UserMemory>>,
}

impl MappedMemory {
    /// `ioas` maps `memory` at `iova`.
    pub fn mapped(&mut self, ioas: ObjectId, iova: u64, memory: UserMemory) {
        self.ioases.entry(ioas).or_default().insert(iova, memory);
    }

    /// `dst` maps at `iova` what `src` maps in the `length` bytes from `src_iova` on.
    pub fn copied(&mut self, dst: ObjectId, iova: u64, src: ObjectId, src_iova: u64, length: u64) {
        for (at, memory) in self.in_range(src, src_iova, length) {
            let from = at.max(src_iova);
            let last = (at + (memory.length() - 1)).min(src_iova.saturating_add(length - 1));
            // The part is within the memory, as the range overlaps the mapping.
            if let Ok(part) = memory.part(from - at, last - from + 1) {
                self.mapped(dst, iova + (from - src_iova), part);
            }
        }
    }

    /// `ioas` no longer maps anything in the `length` bytes from `iova` on.
    pub fn unmapped(&mut self, ioas: ObjectId, iova: u64, length: u64) {
        let gone = self.in_range(ioas, iova, length);
        if let Some(mappings) = self.ioases.get_mut(&ioas) {
            gone.iter().for_each(|(iova, _)| drop(mappings.remove(iova)));
        }
    }

    /// The object was destroyed; it may have been an IOAS.
    pub fn destroyed(&mut self, id: ObjectId) {
        self.ioases.remove(&id);
    }

    /// The mappings of `ioas` that overlap the `length` bytes from `iova` on.
    fn in_range(&self, ioas: ObjectId, iova: u64, length: u64) -> Vec<(u64, UserMemory)> {
        let Some(mappings) = self.ioases.get(&ioas) else { return Vec::new() };
        let Some(last) = length.checked_sub(1).map(|more| iova.saturating_add(more)) else {
            return Vec::new();
        };
        mappings
            .range(..=last)
            // No mapping is empty, and none wraps: the kernel accepted them.
            .filter(|(at, memory)| *at + (memory.length() - 1) >= iova)
            .map(|(at, memory)| (*at, memory.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vm_memory::{GuestAddress, GuestRegionMmap};

    const A: ObjectId = ObjectId(1);
    const B: ObjectId = ObjectId(2);

    fn memory() -> (Arc<GuestRegionMmap>, UserMemory) {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        (region.clone(), UserMemory::whole(region))
    }

    fn places(mapped: &MappedMemory, ioas: ObjectId) -> Vec<(u64, u64, u64)> {
        let all = mapped.in_range(ioas, 0, u64::MAX);
        all.iter().map(|(iova, memory)| (*iova, memory.offset(), memory.length())).collect()
    }

    #[test]
    fn memory_is_kept_until_nothing_maps_it() {
        let (region, memory) = memory();
        let mut mapped = MappedMemory::default();
        mapped.mapped(A, 0x1_0000, memory);
        mapped.copied(B, 0x8000, A, 0x1_1000, 0x2000);
        assert_eq!(places(&mapped, B), [(0x8000, 0x1000, 0x2000)]);
        mapped.unmapped(A, 0, 0x1_0000);
        assert_eq!(places(&mapped, A), [(0x1_0000, 0, 0x4000)]);
        mapped.unmapped(A, 0, u64::MAX);
        assert_eq!(places(&mapped, A), []);
        assert_eq!(Arc::strong_count(&region), 2, "the copy");
        mapped.destroyed(B);
        assert_eq!(Arc::strong_count(&region), 1);
    }

    #[test]
    fn a_copy_of_two_mappings_keeps_both() {
        let ((first, one), (second, two)) = (memory(), memory());
        let mut mapped = MappedMemory::default();
        mapped.mapped(A, 0, one);
        mapped.mapped(A, 0x4000, two);
        mapped.copied(A, 0x10_0000, A, 0x3000, 0x2000);
        mapped.unmapped(A, 0, 0x8000);
        assert_eq!(places(&mapped, A), [(0x10_0000, 0x3000, 0x1000), (0x10_1000, 0, 0x1000)]);
        assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (2, 2));
    }
}

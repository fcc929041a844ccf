// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 2: the memory of each address of an IOAS.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;
use twostage::sync::RwLock;

use vm_memory::GuestRegionMmap;

use twostage::iommufd::{Protection, UserMemory};

/// One contiguous mapping: addresses `start..=last` (bytes) lead to `memory`.
#[derive(Debug, Clone)]
pub(crate) struct Mapping {
    /// First address.
    pub start: u64,
    /// Last address, included.
    pub last: u64,
    /// Its memory; as long as the mapping.
    pub memory: UserMemory,
    /// What devices may do with it.
    pub protection: Protection,
}

impl Mapping {
    /// The region of `address` and the offset in it, in bytes. `address` must be in the mapping.
    pub fn target(&self, address: u64) -> (&Arc<GuestRegionMmap>, u64) {
        (self.memory.region(), self.memory.offset() + (address - self.start))
    }
}

/// The mappings of one IOAS that has HWPTs, disjoint; an area of the IOAS is one or more of them.
/// Readers and writers may be on any thread; a removal is complete for DMA only after
/// [`crate::units::hardware::Hardware::stage2_changed`] of every unit.
#[derive(Debug, Default)]
pub(crate) struct Stage2 {
    mappings: RwLock<BTreeMap<u64, Mapping>>,
}

impl Stage2 {
    /// The mapping that contains `address`.
    pub fn lookup(&self, address: u64) -> Option<Mapping> {
        let mappings = self.mappings.read();
        let (_, mapping) = mappings.range(..=address).next_back()?;
        (address <= mapping.last).then(|| mapping.clone())
    }

    /// Adds a mapping. The caller has checked that it overlaps none.
    pub fn insert(&self, mapping: Mapping) {
        self.mappings.write().insert(mapping.start, mapping);
    }

    /// Removes the mapping that starts at `start`.
    #[cfg(test)]
    pub fn remove(&self, start: u64) -> Option<Mapping> {
        self.mappings.write().remove(&start)
    }

    /// Splits the mapping that contains `last` after it, unless it ends there; nothing else
    /// changes.
    pub fn split(&self, last: u64) {
        let mut mappings = self.mappings.write();
        let found = mappings.range_mut(..=last).next_back().filter(|(_, found)| last < found.last);
        let Some((_, first)) = found else { return };
        let start = last + 1;
        let offset = start - first.start;
        // A mapping is as long as its memory.
        let (Ok(memory), Ok(rest)) =
            (first.memory.part(0, offset), first.memory.part(offset, first.last - last))
        else {
            return;
        };
        let second = Mapping { start, last: first.last, memory: rest, ..*first };
        (first.last, first.memory) = (last, memory);
        mappings.insert(start, second);
    }

    /// Removes the mappings that start in `range`; none of them may end outside.
    pub fn remove_in(&self, range: RangeInclusive<u64>) {
        let mut mappings = self.mappings.write();
        while let Some(start) = mappings.range(range.clone()).next().map(|(start, _)| *start) {
            mappings.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    #[test]
    fn an_address_leads_into_its_mapping_only() {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let stage2 = Stage2::default();
        stage2.insert(Mapping {
            start: 0x10000,
            last: 0x11fff,
            memory: UserMemory::new(region, 0x1000, 0x2000).unwrap(),
            protection: Protection::READ_WRITE,
        });
        assert!(stage2.lookup(0xffff).is_none());
        assert_eq!(stage2.lookup(0x10000).unwrap().target(0x10000).1, 0x1000);
        assert_eq!(stage2.lookup(0x11fff).unwrap().target(0x11fff).1, 0x2fff);
        assert!(stage2.lookup(0x12000).is_none());
        assert_eq!(stage2.remove(0x10000).unwrap().last, 0x11fff);
        assert!(stage2.lookup(0x10000).is_none());
    }

    #[test]
    fn a_split_mapping_leads_where_it_led() {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x4000, None).unwrap());
        let (stage2, memory) = (Stage2::default(), UserMemory::whole(region));
        let protection = Protection::READ_WRITE;
        stage2.insert(Mapping { start: 0x1000, last: 0x4fff, memory, protection });
        for last in [0xfff, 0x2fff, 0x2fff, 0x4fff, 0x5000] {
            stage2.split(last);
        }
        assert_eq!(stage2.mappings.read().len(), 2);
        for (address, start, offset) in [(0x2fff, 0x1000, 0x1fff), (0x3000, 0x3000, 0x2000)] {
            let mapping = stage2.lookup(address).unwrap();
            assert_eq!((mapping.start, mapping.target(address).1), (start, offset));
        }
        stage2.remove_in(0x1000..=0x2fff);
        assert!(stage2.lookup(0x2fff).is_none() && stage2.lookup(0x3000).is_some());
    }

    #[test]
    fn a_range_is_removed_with_all_that_is_in_it() {
        let region = Arc::new(GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None).unwrap());
        let stage2 = Stage2::default();
        for start in [0x1000, 0x2000, 0x3000] {
            let memory = UserMemory::whole(region.clone());
            let protection = Protection::READ_WRITE;
            stage2.insert(Mapping { start, last: start + 0xfff, memory, protection });
        }
        stage2.remove_in(0x1000..=0x2fff);
        assert!(stage2.lookup(0x1000).is_none() && stage2.lookup(0x2000).is_none());
        assert!(stage2.lookup(0x3000).is_some());
    }
}

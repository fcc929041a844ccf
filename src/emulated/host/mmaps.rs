// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What drivers offer for mmap: pages of an IOMMU, at offsets of the iommufd.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{Errno, ObjectId};

/// The mmap offers of one iommufd. Its lock is the innermost.
#[derive(Debug, Default)]
pub(crate) struct Mmaps(Mutex<BTreeMap<u64, Mmap>>);

/// Pages of a file that represent pages of an IOMMU.
#[derive(Debug, Clone)]
pub(crate) struct Mmap {
    /// The object that cannot be destroyed while they are mapped.
    pub owner: ObjectId,
    /// In bytes.
    pub length: u64,
    /// Contains the pages, from its start.
    pub file: Arc<File>,
}

impl Mmaps {
    /// Offers `mmap`; returns its mmap offset, in bytes.
    ///
    /// # Errors
    /// `EINVAL` not a whole number of pages, or empty; `ENOSPC` there is no space.
    pub fn add(&self, mmap: Mmap) -> Outcome<u64> {
        if mmap.length == 0 || !mmap.length.is_multiple_of(PAGE_SIZE) {
            return refuse(Errno::EINVAL, format!("{:#x} bytes are not whole pages", mmap.length));
        }
        let mut mmaps = self.lock();
        // The first page is not used, so that an offset is never 0.
        let mut offset = PAGE_SIZE;
        for (start, other) in mmaps.iter() {
            if start - offset >= mmap.length {
                break;
            }
            offset = start.saturating_add(other.length);
        }
        if offset.checked_add(mmap.length).is_none() {
            return refuse(Errno::ENOSPC, "no offset is left");
        }
        mmaps.insert(offset, mmap);
        Ok(offset)
    }

    /// Removes all offers of `owner`.
    pub fn remove(&self, owner: ObjectId) {
        self.lock().retain(|_, mmap| mmap.owner != owner);
    }

    /// The offer at exactly `offset` with exactly `length` bytes.
    pub fn get(&self, offset: u64, length: u64) -> Option<Mmap> {
        self.lock().get(&offset).filter(|mmap| mmap.length == length).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mmap>> {
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mmap(owner: u32, length: u64) -> Mmap {
        let file = Arc::new(tempfile::tempfile().unwrap());
        Mmap { owner: ObjectId(owner), length, file }
    }

    #[test]
    fn the_lowest_room_is_taken_but_never_the_first_page() {
        let mmaps = Mmaps::default();
        assert_eq!(mmaps.add(mmap(1, 0x2000)).unwrap(), 0x1000);
        assert_eq!(mmaps.add(mmap(2, 0x1000)).unwrap(), 0x3000);
        assert_eq!(mmaps.add(mmap(1, 0x1000)).unwrap(), 0x4000);
        mmaps.remove(ObjectId(1));
        assert_eq!(mmaps.add(mmap(3, 0x3000)).unwrap(), 0x4000, "the gap is too small");
        assert_eq!(mmaps.add(mmap(3, 0x2000)).unwrap(), 0x1000);
        for length in [0, 0x1001] {
            assert_eq!(mmaps.add(mmap(1, length)).unwrap_err().errno, Errno::EINVAL);
        }
    }

    #[test]
    fn only_exactly_what_is_offered_is_mapped() {
        let mmaps = Mmaps::default();
        mmaps.add(mmap(1, 0x2000)).unwrap();
        assert_eq!(mmaps.get(0x1000, 0x2000).unwrap().owner, ObjectId(1));
        for (offset, length) in [(0x2000, 0x2000), (0x1000, 0x1000), (0x1000, 0x4000), (0, 0x2000)]
        {
            assert!(mmaps.get(offset, length).is_none(), "{offset:#x} {length:#x}");
        }
    }
}

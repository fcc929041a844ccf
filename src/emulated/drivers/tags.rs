// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tags of what is cached of drivers' page tables.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use crate::units::hardware::CacheTag;

/// The tags of all page tables of a machine.
#[derive(Debug, Default)]
pub(crate) struct CacheTags(Mutex<Tags>);

#[derive(Debug, Default)]
struct Tags {
    /// The last one assigned.
    last: u32,
    living: BTreeSet<u32>,
}

/// A tag that no other existing page table has.
#[derive(Debug)]
pub(super) struct OwnedTag {
    tag: CacheTag,
    tags: Arc<CacheTags>,
}

impl OwnedTag {
    /// The tag.
    pub fn tag(&self) -> CacheTag {
        self.tag
    }
}

impl CacheTags {
    fn lock(&self) -> MutexGuard<'_, Tags> {
        self.0.lock()
    }

    /// A tag for one more page table.
    pub(super) fn next(self: &Arc<Self>) -> OwnedTag {
        let mut tags = self.lock();
        // After 2^32 page tables tags wrap around; those still in use are skipped.
        loop {
            let tag = tags.last.wrapping_add(1);
            tags.last = tag;
            if tags.living.insert(tag) {
                return OwnedTag { tag: CacheTag(tag), tags: self.clone() };
            }
        }
    }
}

impl Drop for OwnedTag {
    fn drop(&mut self) {
        self.tags.lock().living.remove(&self.tag.0);
    }
}

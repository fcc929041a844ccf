// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The domain IDs of a unit: Linux assigns one to each page table attached behind it, up to their
//! number (CAP.ND).

use std::collections::BTreeMap;

use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use twostage::iommufd::Errno;

/// The domain IDs of a unit.
#[derive(Debug, Default)]
pub(super) struct DomainIds {
    /// Number of attachments of each page table, by its tag; no count is 0.
    attached: BTreeMap<u32, u32>,
}

impl DomainIds {
    /// 0 is reserved with caching mode, and 1 is for the kernel's first-stage tables.
    const RESERVED: usize = 2;

    /// `count` more attachments of the page table `tag`, with `all` IDs.
    pub fn take(&mut self, tag: CacheTag, count: u32, all: usize) -> Outcome<()> {
        let taken = self.attached.len() + Self::RESERVED;
        match self.attached.get_mut(&tag.0) {
            Some(attachments) => *attachments += count,
            None if taken < all => {
                self.attached.insert(tag.0, count);
            }
            None => return refuse(Errno::ENOSPC, format!("all {all} domain ids are in use")),
        }
        Ok(())
    }

    /// `count` fewer attachments.
    pub fn give_back(&mut self, tag: CacheTag, count: u32) {
        if let Some(left) = self.attached.get_mut(&tag.0) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.attached.remove(&tag.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_page_tables_as_ids() {
        let mut ids = DomainIds::default();
        for tag in 0..14 {
            ids.take(CacheTag(tag), 1, 16).unwrap();
        }
        assert_eq!(ids.take(CacheTag(14), 1, 16).unwrap_err().errno, Errno::ENOSPC);
        // One that is already attached needs no other ID.
        ids.take(CacheTag(3), 2, 16).unwrap();
        ids.give_back(CacheTag(3), 2);
        assert_eq!(ids.take(CacheTag(14), 1, 16).unwrap_err().errno, Errno::ENOSPC);
        ids.give_back(CacheTag(3), 1);
        ids.take(CacheTag(14), 1, 16).unwrap();
    }
}

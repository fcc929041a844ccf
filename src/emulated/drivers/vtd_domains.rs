// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The domain ids of a unit: Linux gives one to each page table that is attached behind it, and
//! attaches no more of them than there are (CAP.ND).

use std::collections::BTreeMap;

use crate::host::refusal::{refuse, Outcome};
use crate::units::hardware::CacheTag;
use twostage::iommufd::Errno;

/// The domain ids of a unit.
#[derive(Debug, Default)]
pub(super) struct DomainIds {
    /// How often each page table is attached, by its tag; no count is 0.
    attached: BTreeMap<u32, u32>,
}

impl DomainIds {
    /// 0 is reserved where caching mode is, and 1 is for first-stage tables of the kernel's own.
    const RESERVED: usize = 2;

    /// `count` attachments more of the page table `tag`, of `all` ids.
    pub fn take(&mut self, tag: CacheTag, count: u32, all: usize) -> Outcome<()> {
        let taken = self.attached.len() + Self::RESERVED;
        match self.attached.get_mut(&tag.0) {
            Some(attachments) => *attachments += count,
            None if taken < all => {
                self.attached.insert(tag.0, count);
            }
            None => return refuse(Errno::ENOSPC, format!("all of {all} domain ids are taken")),
        }
        Ok(())
    }

    /// `count` attachments less.
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
        // One that is attached already needs no other.
        ids.take(CacheTag(3), 2, 16).unwrap();
        ids.give_back(CacheTag(3), 2);
        assert_eq!(ids.take(CacheTag(14), 1, 16).unwrap_err().errno, Errno::ENOSPC);
        ids.give_back(CacheTag(3), 1);
        ids.take(CacheTag(14), 1, 16).unwrap();
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Automatic placement: the lowest IOVA that fits, as in Linux.

use std::ops::RangeInclusive;

use super::{range_of, IovaSpace, PAGE_SIZE};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::Errno;

/// Maximum alignment that placement uses: that of a huge page, in bytes.
const MAX_ALIGNMENT: u64 = 2 << 20;
/// Placement uses neither the first page (so that 0 stays an invalid IOVA) nor the last one.
const SEARCHED: RangeInclusive<u64> = PAGE_SIZE..=u64::MAX - PAGE_SIZE;

impl IovaSpace {
    /// Finds space for `length` bytes of memory at `user_va`, whose alignment the IOVA preserves as
    /// far as huge pages benefit. Takes time linear in the number of areas below the result.
    ///
    /// # Errors
    /// `EOVERFLOW` an impossible length; `EINVAL` `user_va` is less aligned than `alignment`;
    /// `ENOSPC` no space.
    pub fn place(&self, length: u64, user_va: u64, alignment: u64) -> Outcome<u64> {
        if length == 0 || length >= u64::MAX / 2 {
            return refuse(Errno::EOVERFLOW, format!("length {length:#x}"));
        }
        // At most 2^63, since the length is below that.
        let natural = length.next_power_of_two();
        let of_memory = if user_va == 0 { natural } else { 1 << user_va.trailing_zeros() };
        let wanted = natural.min(of_memory).min(MAX_ALIGNMENT);
        if wanted < alignment {
            return refuse(
                Errno::EINVAL,
                format!("memory at {user_va:#x} is not aligned to {alignment:#x}"),
            );
        }
        let fit = Fit { length, alignment: wanted, page_offset: user_va % PAGE_SIZE };
        let everything = [SEARCHED];
        let allowed = if self.allowed().is_empty() { &everything[..] } else { self.allowed() };
        let found = allowed.iter().find_map(|range| {
            let start = *range.start().max(SEARCHED.start());
            let last = *range.end().min(SEARCHED.end());
            self.place_in(start, last, &fit)
        });
        match found {
            Some(iova) => Ok(iova),
            None => refuse(Errno::ENOSPC, format!("no room for {length:#x} bytes")),
        }
    }

    /// The lowest fit in `start..=last`.
    fn place_in(&self, mut start: u64, last: u64, fit: &Fit) -> Option<u64> {
        loop {
            let iova = fit.at_or_after(start)?;
            let room = range_of(iova, fit.length)?;
            if *room.end() > last {
                return None;
            }
            let taken_up_to = match self.reservation_in(&room) {
                Some(reserved) => *reserved.end(),
                None => match self.first_area_in(&room) {
                    Some((_, area)) => area.last,
                    None => return Some(iova),
                },
            };
            // Beyond `iova`, so the search advances.
            start = taken_up_to.checked_add(1)?;
        }
    }
}

/// The constraints.
struct Fit {
    length: u64,
    /// A power of two.
    alignment: u64,
    /// Offset in its page of the first byte.
    page_offset: u64,
}

impl Fit {
    /// The first suitable IOVA from `start` on.
    fn at_or_after(&self, start: u64) -> Option<u64> {
        Some(start.checked_next_multiple_of(self.alignment)? | self.page_offset)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Area, Pages, RlimitMode, Source};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use twostage::iommufd::{ObjectId, Protection, UserMemory};
    use vm_memory::{GuestAddress, GuestRegionMmap};

    const VA: u64 = 0x7f00_0000_0000;

    fn space(areas: &[RangeInclusive<u64>]) -> IovaSpace {
        let region =
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x1000, None).unwrap());
        let source = Source::Memory(UserMemory::whole(region));
        let pages = Pages::new(source, 0x1000, true, RlimitMode::User, Arc::default());
        let pages = Arc::new(pages);
        let mut space = IovaSpace::default();
        for range in areas {
            let area = Area::new(*range.end(), pages.clone(), 0, Protection::READ_WRITE);
            space.insert(*range.start(), area);
        }
        space
    }

    #[test]
    fn the_lowest_room_is_taken_but_never_zero() {
        assert_eq!(space(&[]).place(0x1000, VA, 0x1000).unwrap(), 0x1000);
        let space = space(&[0x1000..=0x1fff, 0x3000..=0x3fff]);
        assert_eq!(space.place(0x1000, VA, 0x1000).unwrap(), 0x2000);
        assert_eq!(space.place(0x2000, VA, 0x1000).unwrap(), 0x4000);
    }

    #[test]
    fn the_alignment_of_the_memory_is_kept_up_to_a_huge_page() {
        let space = space(&[]);
        assert_eq!(space.place(0x20_0000, VA, 0x1000).unwrap(), 0x20_0000);
        assert_eq!(space.place(1 << 30, VA, 0x1000).unwrap(), 0x20_0000);
        assert_eq!(space.place(0x20_0000, VA + 0x3000, 0x1000).unwrap(), 0x1000);
        assert_eq!(space.place(0x20_0000, VA + 0x234, 1).unwrap(), 0x1234);
    }

    #[test]
    fn placement_stays_out_of_reserved_and_inside_allowed_ranges() {
        let mut space = space(&[]);
        space.reserve(ObjectId(1), &[0..=0xffff, 0x12000..=0x12fff]);
        assert_eq!(space.place(0x1000, VA, 0x1000).unwrap(), 0x10000);
        space.set_allowed([0x11000..=0x11fff, 0x20000..=0x21fff].map(Ok)).unwrap();
        assert_eq!(space.place(0x2000, VA, 0x1000).unwrap(), 0x20000);
        assert_eq!(space.place(0x4000, VA, 0x1000).unwrap_err().errno, Errno::ENOSPC);
    }

    #[test]
    fn lengths_and_addresses_that_cannot_be_placed_are_refused() {
        let space = space(&[]);
        assert_eq!(space.place(0, VA, 1).unwrap_err().errno, Errno::EOVERFLOW);
        assert_eq!(space.place(u64::MAX / 2, VA, 1).unwrap_err().errno, Errno::EOVERFLOW);
        assert_eq!(space.place(0x1000, VA + 8, 0x1000).unwrap_err().errno, Errno::EINVAL);
    }

    proptest! {
        #[test]
        fn placement_finds_the_lowest_free_pages(
            taken in prop::collection::btree_set(1u64..24, 0..16),
            pages in 1u64..6,
        ) {
            let areas: Vec<_> =
                taken.iter().map(|page| page * PAGE_SIZE..=page * PAGE_SIZE + 0xfff).collect();
            let align = pages.next_power_of_two();
            let naive = (1u64..)
                .find(|page| {
                    page % align == 0 && (*page..page + pages).all(|page| !taken.contains(&page))
                })
                .unwrap();
            let placed = space(&areas).place(pages * PAGE_SIZE, VA, PAGE_SIZE).unwrap();
            prop_assert_eq!(placed, naive * PAGE_SIZE);
        }
    }
}

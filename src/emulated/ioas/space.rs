// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The IOVAs of one IOAS: mapped, reserved, and allowed for automatic placement.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::ranges::{complement, merged, overlap, range_of};
use super::{Area, Part, Piece, Taken};
use crate::host::refusal::{allocate, refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// The use of one IOAS's IOVAs. Finding, adding and removing an area takes time logarithmic in the
/// number of areas, and independent of their size.
#[derive(Debug, Default)]
pub(crate) struct IovaSpace {
    /// By first IOVA; disjoint.
    areas: BTreeMap<u64, Area>,
    /// With the object that each is reserved for. They may overlap each other, but not an area.
    reserved: Vec<(ObjectId, RangeInclusive<u64>)>,
    /// Merged and ascending; empty for "everything".
    allowed: Vec<RangeInclusive<u64>>,
}

impl IovaSpace {
    /// The areas, ascending, each with its first IOVA.
    pub fn areas(&self) -> impl Iterator<Item = (u64, &Area)> {
        self.areas.iter().map(|(start, area)| (*start, area))
    }

    /// How many areas there are.
    pub fn area_count(&self) -> usize {
        self.areas.len()
    }

    /// The IOVAs without reservations.
    pub fn usable(&self) -> Vec<RangeInclusive<u64>> {
        complement(self.reserved.iter().map(|(_, range)| range.clone()).collect())
    }

    /// Number of reservations of `owner`.
    #[cfg(test)]
    pub(crate) fn reservations_of(&self, owner: ObjectId) -> usize {
        self.reserved.iter().filter(|(of, _)| *of == owner).count()
    }

    /// The ranges automatic placement is limited to; empty for no limit.
    pub(super) fn allowed(&self) -> &[RangeInclusive<u64>] {
        &self.allowed
    }

    /// Whether `ranges` can be reserved.
    ///
    /// # Errors
    /// `EADDRINUSE`: something is mapped there, or the user requested the addresses; `ENOMEM`.
    pub fn check_reservable(&self, ranges: &[RangeInclusive<u64>]) -> Outcome<()> {
        for range in ranges {
            allocate("a reserved range")?;
            if let Some((start, area)) = self.first_area_in(range) {
                let (first, end) = (range.start(), range.end());
                let last = area.last;
                return refuse(
                    Errno::EADDRINUSE,
                    format!("{start:#x}..={last:#x} is mapped, {first:#x}..={end:#x} is reserved"),
                );
            }
            if let Some(allowed) = self.allowed.iter().find(|allowed| overlap(allowed, range)) {
                return refuse(
                    Errno::EADDRINUSE,
                    format!("{range:#x?} is reserved, and {allowed:#x?} must be allowed"),
                );
            }
        }
        Ok(())
    }

    /// Reserves `ranges`, which [`Self::check_reservable`] accepted, until [`Self::unreserve`].
    pub fn reserve(&mut self, owner: ObjectId, ranges: &[RangeInclusive<u64>]) {
        self.reserved.extend(ranges.iter().map(|range| (owner, range.clone())));
    }

    /// Drops all reservations of `owner`.
    pub fn unreserve(&mut self, owner: ObjectId) {
        self.reserved.retain(|(of, _)| *of != owner);
    }

    /// Limits automatic placement to `ranges`, replacing an earlier limit.
    ///
    /// # Errors
    /// `EINVAL` a range has fewer than two addresses, or two overlap; `EADDRINUSE` one is reserved.
    /// The earlier limit stays in effect then.
    pub fn set_allowed(
        &mut self,
        ranges: impl IntoIterator<Item = Outcome<RangeInclusive<u64>>>,
    ) -> Outcome<()> {
        let mut allowed: BTreeMap<u64, u64> = BTreeMap::new();
        for range in ranges {
            let range = range?;
            allocate("an allowed range")?;
            let (start, last) = (*range.start(), *range.end());
            if start >= last {
                return refuse(Errno::EINVAL, format!("{range:#x?} is empty or one byte"));
            }
            let below = allowed.range(..=last).next_back();
            if below.is_some_and(|(_, below_last)| *below_last >= start) {
                return refuse(Errno::EINVAL, format!("{range:#x?} overlaps an earlier range"));
            }
            allowed.insert(start, last);
        }
        let allowed: Vec<_> = allowed.into_iter().map(|(start, last)| start..=last).collect();
        if let Some(range) = allowed.iter().find(|range| self.reservation_in(range).is_some()) {
            return refuse(Errno::EADDRINUSE, format!("{range:#x?} is reserved in part"));
        }
        self.allowed = merged(allowed);
        Ok(())
    }

    /// Whether `length` bytes can be mapped at `iova`.
    ///
    /// # Errors
    /// `EINVAL` unaligned or reserved; `EOVERFLOW` past the end; `EEXIST` partly mapped.
    pub fn check_free(&self, iova: u64, length: u64, alignment: u64) -> Outcome<()> {
        if !iova.is_multiple_of(alignment) {
            return refuse(
                Errno::EINVAL,
                format!("IOVA {iova:#x} is not a multiple of {alignment:#x}"),
            );
        }
        let Some(range) = range_of(iova, length) else {
            return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
        };
        if let Some(reserved) = self.reservation_in(&range) {
            return refuse(Errno::EINVAL, format!("{reserved:#x?} is reserved"));
        }
        if let Some((start, area)) = self.first_area_in(&range) {
            let last = area.last;
            return refuse(Errno::EEXIST, format!("{start:#x}..={last:#x} is mapped already"));
        }
        Ok(())
    }

    /// Whether every area is aligned for an IOMMU whose smallest page is `alignment` bytes.
    ///
    /// # Errors
    /// `EADDRINUSE`.
    pub fn check_alignment(&self, alignment: u64) -> Outcome<()> {
        let misfit = self.areas().find(|(start, area)| {
            let page_offset = area.pages.page_offset(area.offset);
            !(start | area.length(*start) | page_offset).is_multiple_of(alignment)
        });
        match misfit {
            None => Ok(()),
            Some((start, _)) => refuse(
                Errno::EADDRINUSE,
                format!("the mapping at {start:#x} is not aligned to {alignment:#x}"),
            ),
        }
    }

    /// Adds an area where [`Self::check_free`] succeeded.
    pub fn insert(&mut self, start: u64, area: Area) {
        self.areas.insert(start, area);
    }

    /// What is mapped at `length` bytes from `iova` on, without gaps; the first and last piece may
    /// be parts of their areas.
    ///
    /// # Errors
    /// `EINVAL` empty; `EOVERFLOW` past the end; `ENOENT` a gap.
    pub fn pieces(&self, iova: u64, length: u64) -> Outcome<Vec<Piece>> {
        if length == 0 {
            return refuse(Errno::EINVAL, "length 0");
        }
        let Some(range) = range_of(iova, length) else {
            return refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64"));
        };
        let (parts, whole) = self.parts(&range);
        if !whole {
            return refuse(Errno::ENOENT, format!("{range:#x?} is not completely mapped"));
        }
        Ok(parts.into_iter().map(|part| part.piece).collect())
    }

    /// What is mapped contiguously from the start of `range` on, and whether that is all of it; the
    /// first and last may be parts of their areas.
    pub fn parts(&self, range: &RangeInclusive<u64>) -> (Vec<Part>, bool) {
        let mut parts = Vec::new();
        let mut at = *range.start();
        loop {
            let found = self.areas.range(..=at).next_back().filter(|(_, area)| at <= area.last);
            let Some((&start, area)) = found else { return (parts, false) };
            let last = area.last.min(*range.end());
            let piece = Piece {
                pages: area.pages.clone(),
                offset: area.offset + (at - start),
                // Less than the length of a mapping, which fits in 64 bits.
                length: last - at + 1,
            };
            parts.push(Part { area: start, iova: at, piece });
            if last == *range.end() {
                return (parts, true);
            }
            at = last + 1;
        }
    }

    /// Splits the area that contains `last` after it; returns whether it did: not if nothing is
    /// mapped there, nor at the ends of an area. `huge_pages`: a HWPT may have one there.
    ///
    /// # Errors
    /// `EBUSY` it is being unmapped; `EOPNOTSUPP` device memory; `EINVAL` the second part would be
    /// unaligned, it is pinned, or there may be huge pages.
    pub fn split(&mut self, last: u64, alignment: u64, huge_pages: bool) -> Outcome<bool> {
        let found = self.areas.range_mut(..=last).next_back().filter(|(_, area)| last <= area.last);
        let Some((&start, area)) = found else { return Ok(false) };
        // As in Linux: an area is not split after its first IOVA either.
        if last == start || last == area.last {
            return Ok(false);
        }
        if area.leaving {
            return refuse(Errno::EBUSY, format!("the mapping at {start:#x} is being unmapped"));
        }
        if area.pages.dma_buf().is_some() {
            return refuse(Errno::EOPNOTSUPP, "memory of a device cannot be split");
        }
        let (next, offset) = (last + 1, area.offset + (last + 1 - start));
        if !(next | area.pages.page_offset(offset)).is_multiple_of(alignment) {
            return refuse(Errno::EINVAL, format!("{next:#x} is not aligned to {alignment:#x}"));
        }
        if area.pins > 0 || huge_pages {
            return refuse(Errno::EINVAL, format!("the mapping at {start:#x} cannot be split"));
        }
        let second = Area::new(area.last, area.pages.clone(), offset, area.protection);
        area.last = last;
        self.areas.insert(next, second);
        Ok(true)
    }

    /// The area that starts at `start`.
    pub fn area(&self, start: u64) -> Option<&Area> {
        self.areas.get(&start)
    }

    /// The area that starts at `start`, to change its pins.
    pub fn area_mut(&mut self, start: u64) -> Option<&mut Area> {
        self.areas.get_mut(&start)
    }

    /// Removes the lowest area in `range`.
    ///
    /// # Errors
    /// `EBUSY` it is locked; `ENOENT` only a part of it is in the range.
    pub fn take_next(&mut self, range: &RangeInclusive<u64>) -> Outcome<Taken> {
        let Some((start, area)) = self.first_area_in(range) else { return Ok(Taken::Nothing) };
        let last = area.last;
        if area.locks > 0 {
            return refuse(Errno::EBUSY, format!("{start:#x}..={last:#x} is locked by a queue"));
        }
        if start < *range.start() || last > *range.end() {
            return refuse(
                Errno::ENOENT,
                format!("{range:#x?} would split the mapping {start:#x}..={last:#x}"),
            );
        }
        let pinned = area.pins > 0;
        if pinned {
            if let Some(area) = self.areas.get_mut(&start) {
                area.leaving = true;
            }
            return Ok(Taken::Pinned(start, last - start + 1));
        }
        Ok(self.areas.remove(&start).map_or(Taken::Nothing, |area| Taken::Area(start, area)))
    }

    /// The lowest area that overlaps `range`.
    pub fn first_area_in(&self, range: &RangeInclusive<u64>) -> Option<(u64, &Area)> {
        let before = self.areas.range(..*range.start()).next_back();
        let before = before.filter(|(_, area)| area.last >= *range.start());
        let found = before.or_else(|| self.areas.range(range.clone()).next());
        found.map(|(start, area)| (*start, area))
    }

    /// A reservation that overlaps `range`.
    pub(super) fn reservation_in(
        &self,
        range: &RangeInclusive<u64>,
    ) -> Option<RangeInclusive<u64>> {
        self.reserved.iter().map(|(_, reserved)| reserved).find(|r| overlap(r, range)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Pages, RlimitMode, Source};
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use twostage::iommufd::{Protection, UserMemory};
    use vm_memory::{GuestAddress, GuestRegionMmap};

    fn pages() -> Arc<Pages> {
        let region =
            Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x10000, None).unwrap());
        let source = Source::Memory(UserMemory::whole(region));
        Arc::new(Pages::new(source, 0x10000, true, RlimitMode::User, Arc::default()))
    }

    fn area(start: u64, length: u64) -> (u64, Area) {
        let last = start + (length - 1);
        (start, Area::new(last, pages(), 0, Protection::READ_WRITE))
    }

    fn space(areas: &[(u64, u64)]) -> IovaSpace {
        let mut space = IovaSpace::default();
        for (start, length) in areas {
            let (start, area) = area(*start, *length);
            space.insert(start, area);
        }
        space
    }

    fn allow(space: &mut IovaSpace, ranges: &[RangeInclusive<u64>]) -> Outcome<()> {
        space.set_allowed(ranges.iter().cloned().map(Ok))
    }

    fn errno<T: std::fmt::Debug>(outcome: Outcome<T>) -> Errno {
        outcome.unwrap_err().errno
    }

    #[test]
    fn a_fixed_iova_is_aligned_in_range_unreserved_and_free() {
        let mut space = space(&[(0x4000, 0x1000)]);
        space.reserve(ObjectId(1), &[0x8000..=0x8fff]);
        assert_eq!(errno(space.check_free(0x1001, 0x1000, 0x1000)), Errno::EINVAL);
        assert_eq!(errno(space.check_free(u64::MAX - 0xfff, 0x2000, 0x1000)), Errno::EOVERFLOW);
        assert_eq!(errno(space.check_free(0x7000, 0x2000, 0x1000)), Errno::EINVAL);
        assert_eq!(errno(space.check_free(0x3000, 0x2000, 0x1000)), Errno::EEXIST);
        assert_eq!(errno(space.check_free(0x4000, 0x1000, 0x1000)), Errno::EEXIST);
        space.check_free(0x3000, 0x1000, 0x1000).unwrap();
        space.check_free(u64::MAX - 0xfff, 0x1000, 0x1000).unwrap();
    }

    #[test]
    fn a_reservation_meets_no_mapping_and_no_allowed_range() {
        let mut space = space(&[(0x4000, 0x1000)]);
        allow(&mut space, &[0x10000..=0x1ffff]).unwrap();
        assert_eq!(errno(space.check_reservable(&[0..=0, 0x4fff..=0x5000])), Errno::EADDRINUSE);
        assert_eq!(errno(space.check_reservable(&[0x1ffff..=0x1ffff])), Errno::EADDRINUSE);
        space.check_reservable(&[0x5000..=0xffff]).unwrap();
    }

    #[test]
    fn the_allowed_list_is_replaced_whole_or_not_at_all() {
        let mut space = IovaSpace::default();
        space.reserve(ObjectId(1), &[0x8000..=0x8fff]);
        allow(&mut space, &[0x1000..=0x1fff, 0x2000..=0x2fff]).unwrap();
        assert_eq!(space.allowed(), [0x1000..=0x2fff]);
        let one_byte = 0x3000..=0x3000;
        assert_eq!(errno(allow(&mut space, &[0x6000..=0x6fff, one_byte])), Errno::EINVAL);
        assert_eq!(errno(allow(&mut space, &[0..=9, 9..=11])), Errno::EINVAL);
        assert_eq!(errno(allow(&mut space, &[0x8fff..=0x9000])), Errno::EADDRINUSE);
        assert_eq!(space.allowed(), [0x1000..=0x2fff]);
        allow(&mut space, &[]).unwrap();
        assert!(space.allowed().is_empty());
    }

    /// Unmaps `range`: what was removed, and whether it stopped at an area that would be split.
    fn unmap(space: &mut IovaSpace, range: RangeInclusive<u64>) -> (Vec<u64>, bool) {
        let mut taken = Vec::new();
        loop {
            match space.take_next(&range) {
                Ok(Taken::Area(start, _)) => taken.push(start),
                Ok(_) => return (taken, false),
                Err(refusal) => {
                    assert_eq!(refusal.errno, Errno::ENOENT);
                    return (taken, true);
                }
            }
        }
    }

    #[test]
    fn areas_are_taken_whole_up_to_one_that_would_be_cut() {
        let mut space = space(&[(0x1000, 0x1000), (0x3000, 0x2000), (0x8000, 0x1000)]);
        assert_eq!(unmap(&mut space, 0x5000..=0x5fff), (vec![], false));
        assert_eq!(unmap(&mut space, 0x1001..=0x4fff), (vec![], true));
        assert_eq!(unmap(&mut space, 0x1000..=0x3fff), (vec![0x1000], true));
        assert_eq!(unmap(&mut space, 0..=0x8fff), (vec![0x3000, 0x8000], false));
        assert_eq!(space.area_count(), 0);
    }

    #[test]
    fn an_area_is_split_where_it_may_be() {
        let mut space = space(&[(0x1000, 0x4000)]);
        for (last, huge_pages) in [(0x2800, false), (0x1fff, true)] {
            assert_eq!(errno(space.split(last, 0x1000, huge_pages)), Errno::EINVAL, "{last:#x}");
        }
        for nothing in [0xfff, 0x1000, 0x4fff, 0x5000] {
            assert!(!space.split(nothing, 0x1000, true).unwrap());
        }
        assert!(space.split(0x2fff, 0x1000, false).unwrap());
        let areas: Vec<_> =
            space.areas().map(|(start, area)| (start, area.last, area.offset)).collect();
        assert_eq!(areas, [(0x1000, 0x2fff, 0), (0x3000, 0x4fff, 0x2000)]);
        space.area_mut(0x1000).unwrap().pins = 1;
        assert_eq!(errno(space.split(0x1fff, 0x1000, false)), Errno::EINVAL, "pinned");
        space.area_mut(0x1000).unwrap().leaving = true;
        assert_eq!(errno(space.split(0x1fff, 0x1000, false)), Errno::EBUSY);
    }

    #[test]
    fn a_pinned_area_waits_and_a_locked_one_stays() {
        let mut space = space(&[(0x1000, 0x1000)]);
        space.areas.get_mut(&0x1000).unwrap().pins = 1;
        assert!(matches!(space.take_next(&(0..=0x1fff)), Ok(Taken::Pinned(0x1000, 0x1000))));
        assert!(space.areas[&0x1000].leaving);
        space.areas.get_mut(&0x1000).unwrap().locks = 1;
        assert_eq!(errno(space.take_next(&(0..=0xfff + 1))), Errno::EBUSY, "before it is cut");
    }

    #[test]
    fn pieces_span_areas_without_a_gap() {
        let space = space(&[(0x1000, 0x1000), (0x2000, 0x2000)]);
        let pieces = space.pieces(0x1800, 0x1000).unwrap();
        let parts: Vec<_> = pieces.iter().map(|piece| (piece.offset, piece.length)).collect();
        assert_eq!(parts, [(0x800, 0x800), (0, 0x800)]);
        assert_eq!(errno(space.pieces(0x3000, 0x1001)), Errno::ENOENT);
        assert_eq!(errno(space.pieces(0x3000, 0)), Errno::EINVAL);
        assert_eq!(errno(space.pieces(0x3000, u64::MAX)), Errno::EOVERFLOW);
    }

    proptest! {
        #[test]
        fn areas_are_found_as_a_scan_finds_them(
            slots in prop::collection::btree_set(0u64..16, 0..8),
            from in 0u64..70,
            length in 1u64..40,
        ) {
            // Areas of 3 addresses with a gap of 1 between neighbours.
            let areas: Vec<_> = slots.iter().map(|slot| (slot * 4, 3)).collect();
            let mut space = space(&areas);
            let range = from..=from + length - 1;
            let touching: Vec<_> = areas
                .iter()
                .filter(|(start, length)| overlap(&(*start..=start + length - 1), &range))
                .collect();
            let found = space.first_area_in(&range).map(|(start, _)| start);
            prop_assert_eq!(found, touching.first().map(|(start, _)| *start));
            let cut = touching
                .iter()
                .any(|(start, length)| *start < from || start + length - 1 > *range.end());
            let whole: Vec<u64> = touching
                .iter()
                .map(|(start, length)| (*start, start + length - 1))
                .take_while(|(start, last)| *start >= from && last <= range.end())
                .map(|(start, _)| start)
                .collect();
            prop_assert_eq!(unmap(&mut space, range), (whole, cut));
        }
    }
}

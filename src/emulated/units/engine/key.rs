// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Keys of cached translations, ranges of addresses, and the scope of invalidations.

use std::fmt;

/// The key of an entry: the span that it translates, and its source.
///
/// The size of a span is a power of two, at least 4 KiB, and given as its exponent: its shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// First address of the span with the shift in the bits below, never zero.
    pub(super) span: u64,
    /// The source.
    pub(super) source: Source,
}

/// The source of an entry: a tag (VT-d: domain ID; SMMU: VMID), and within it an address space
/// (VT-d: the PASID of the requests that it serves; SMMU: ASID).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Source(pub(super) u64);

impl Source {
    /// Entries of `tag` for `space`.
    pub fn new(tag: u32, space: u32) -> Self {
        Self(u64::from(tag) << 32 | u64::from(space))
    }

    /// The tag.
    pub fn tag(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The address space.
    pub fn space(self) -> u32 {
        self.0 as u32
    }
}

/// The bytes in a span of `shift`, at most 63.
#[inline]
pub(crate) const fn size(shift: u8) -> u64 {
    1 << shift
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({}, {:#x})", self.tag(), self.space())
    }
}

/// The bit of an address that selects the half of its address space, whatever the bits above.
const HALF: u32 = 55;

/// Where the IOTLB has what serves the requests of one configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lookup {
    /// The source of their translations.
    pub source: Source,
    /// The source of those that serve other address spaces, too; the same if there are none.
    pub global: Source,
    /// The lower and the upper half of the addresses.
    pub halves: [Half; 2],
}

/// One half of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Half {
    /// Sizes of pages, as powers of two; none without translations.
    pub shifts: &'static [u8],
    /// The upper byte of an address does not matter.
    pub top_byte_ignored: bool,
}

impl Lookup {
    /// One source, and the same page sizes (`shifts`) for all addresses.
    pub fn plain(source: Source, shifts: &'static [u8]) -> Self {
        let halves = [Half { shifts, top_byte_ignored: false }; 2];
        Self { source, global: source, halves }
    }

    /// `address` as it is cached, and the page sizes of its half.
    #[inline]
    pub fn half(&self, address: u64) -> (u64, &'static [u8]) {
        // In bounds: an index of 0 or 1 into two.
        let half = &self.halves[half(address)];
        let address = if half.top_byte_ignored { without_top_byte(address) } else { address };
        (address, half.shifts)
    }
}

/// The number of the half that `address` is in: 0 or 1.
#[inline]
pub(crate) fn half(address: u64) -> usize {
    (address >> HALF & 1) as usize
}

/// `address` with an upper byte that repeats the bit below, as tables take it.
#[inline]
pub(crate) fn without_top_byte(address: u64) -> u64 {
    ((address << 8).cast_signed() >> 8).cast_unsigned()
}

/// A set of entries: those of a tag, in some of its address spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scope {
    /// The tag.
    pub tag: u32,
    /// The address spaces.
    pub spaces: Spaces,
}

/// Address spaces of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spaces {
    /// Up to this one.
    UpTo(u32),
    /// This one.
    One(u32),
    /// These two.
    Two(u32, u32),
}

impl Scope {
    /// Whether `source` is in scope.
    pub fn has(self, source: Source) -> bool {
        let space = source.space();
        source.tag() == self.tag
            && match self.spaces {
                Spaces::UpTo(last) => space <= last,
                Spaces::One(one) => space == one,
                Spaces::Two(one, other) => space == one || space == other,
            }
    }
}

impl Key {
    /// The span of `shift` (12 to 63) that contains `address`.
    #[inline]
    pub fn new(source: Source, address: u64, shift: u8) -> Self {
        Self { span: address & !(size(shift) - 1) | u64::from(shift), source }
    }

    /// Its source.
    pub fn source(self) -> Source {
        self.source
    }

    /// Size of the span, as a power of two.
    pub fn shift(self) -> u8 {
        (self.span & SHIFT) as u8
    }

    /// First address of the span.
    pub fn first(self) -> u64 {
        self.span & !SHIFT
    }

    /// Whether the span, or the one of `shift` around it if that is larger, has an address in one
    /// of `ranges`, as made by [`ascending`].
    pub fn overlaps_any(self, shift: u8, ranges: &[IovaRange]) -> bool {
        let last_of_span = size(self.shift().max(shift)) - 1;
        any_overlaps(ranges, self.first() & !last_of_span, self.first() | last_of_span)
    }
}

/// Bits of [`Key::span`] that hold the shift.
const SHIFT: u64 = 63;

/// Addresses `first..=last`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IovaRange {
    pub first: u64,
    pub last: u64,
}

impl IovaRange {
    /// Every address.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// How many spans of `shift` (1 to 63) overlap it.
    pub fn spans(self, shift: u8) -> u64 {
        (self.last >> shift) - (self.first >> shift) + 1
    }
}

/// `ranges` in ascending order, with overlapping ones merged.
pub(crate) fn ascending(ranges: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
    ascending_in(Vec::new(), ranges)
}

/// The same, in the memory of `list`, whose contents are lost.
pub(crate) fn ascending_in(
    list: Vec<IovaRange>,
    ranges: impl Iterator<Item = IovaRange>,
) -> Vec<IovaRange> {
    let mut list = list;
    list.clear();
    list.extend(ranges);
    let mut ranges = list;
    ranges.sort_unstable_by_key(|range| range.first);
    ranges.dedup_by(|next, range| {
        let overlaps = next.first <= range.last;
        if overlaps {
            range.last = range.last.max(next.last);
        }
        overlaps
    });
    ranges
}

/// Whether one of `ranges`, as made by [`ascending`], has an address in `first..=last`.
fn any_overlaps(ranges: &[IovaRange], first: u64, last: u64) -> bool {
    let next = ranges.partition_point(|range| range.last < first);
    ranges.get(next).is_some_and(|range| range.first <= last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn they_are_what_each_of_them_is(
            ranges in prop::collection::vec((0u64..200, 0u64..20), 0..20),
            first in 0u64..200,
            length in 0u64..20,
        ) {
            let of = |&(first, length): &(u64, u64)| IovaRange { first, last: first + length };
            let last = first + length;
            let expected = ranges.iter().map(of).any(|it| it.first <= last && it.last >= first);
            let together = ascending(ranges.iter().map(of));
            prop_assert!(together.is_sorted_by(|one, next| one.last < next.first));
            prop_assert_eq!(any_overlaps(&together, first, last), expected);
        }
    }
}

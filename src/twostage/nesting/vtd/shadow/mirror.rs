// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is mirrored of one guest table, as pieces, and what has to change for it to be as the table
//! is. Pure: nothing here calls the host.
//!
//! A piece is one mapping of the host, which can only be unmapped whole. So a piece of which
//! something is still translated, but not all as it was, cannot change in place: its IOAS is
//! replaced by a new one. What is left of it is cut there, so that the next change is in place.

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};

use crate::iommufd::Protection;
use crate::spec::vtd::PAGE_SIZE;

/// No piece crosses a multiple of this, the largest page of any host: so the look at one piece is
/// short.
const WINDOW: u64 = 1 << 30;
/// What is left of a piece is cut into parts of at most one in so many.
const PARTS: u64 = 64;

/// IOVAs that lead to guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first one, in bytes.
    pub iova: u64,
    /// In bytes.
    pub length: u64,
    /// Where that leads to, in bytes.
    pub gpa: u64,
    /// What is allowed.
    pub access: Protection,
}

impl Piece {
    /// The IOVA past the last one.
    pub fn end(&self) -> u64 {
        self.iova + self.length
    }

    /// The part up to `end`, which is in the piece, and the rest.
    fn split(self, end: u64) -> (Self, Self) {
        let length = end - self.iova;
        let rest = Self { iova: end, length: self.length - length, gpa: self.gpa + length, ..self };
        (Self { length, ..self }, rest)
    }

    /// Its parts outside of `hole`.
    pub fn without(self, hole: &RangeInclusive<u64>) -> impl Iterator<Item = Self> {
        let (start, end) = (*hole.start(), hole.end() + 1);
        let cut = |at: u64| at.clamp(self.iova, self.end());
        let (before, rest) = self.split(cut(start));
        let (_, after) = rest.split(cut(end));
        [before, after].into_iter().filter(|piece| piece.length > 0)
    }

    /// Whether it and `next` can be one piece.
    pub fn grows_by(&self, next: &Self) -> bool {
        self.end() == next.iova
            && !next.iova.is_multiple_of(WINDOW)
            && self.gpa + self.length == next.gpa
            && self.access == next.access
    }

    /// It and `next`, by which it grows.
    pub fn with(self, next: &Self) -> Self {
        Self { length: self.length + next.length, ..self }
    }

    /// Its parts, which end at multiples of `grain`.
    fn cut(self, grain: u64) -> impl Iterator<Item = Self> {
        let mut left = Some(self);
        std::iter::from_fn(move || {
            let piece = left?;
            let end = (piece.iova / grain + 1) * grain;
            let (part, rest) = match end < piece.end() {
                true => piece.split(end),
                false => (piece, Self { length: 0, ..piece }),
            };
            left = (rest.length > 0).then_some(rest);
            Some(part)
        })
    }
}

/// What a table translates, as few pieces as possible.
#[derive(Debug, Default)]
pub(super) struct Wanted(Vec<Piece>);

impl Wanted {
    /// Adds what comes after everything added so far.
    pub fn add(&mut self, piece: Piece) {
        for piece in piece.cut(WINDOW) {
            match self.0.last_mut() {
                Some(last) if last.grows_by(&piece) => *last = last.with(&piece),
                _ => self.0.push(piece),
            }
        }
    }

    /// Leaves the last piece, which may still grow. Returns how many it drops.
    pub fn drop_all_but_the_last(&mut self) -> usize {
        let dropped = self.0.len().saturating_sub(1);
        self.0.drain(..dropped);
        dropped
    }

    /// All of it.
    pub fn pieces(&self) -> &[Piece] {
        &self.0
    }
}

/// Pieces in ascending order, of which the first are taken.
struct Rest<'a> {
    first: Option<Piece>,
    others: std::slice::Iter<'a, Piece>,
}

impl<'a> Rest<'a> {
    fn new(pieces: &'a [Piece]) -> Self {
        let mut others = pieces.iter();
        Self { first: others.next().copied(), others }
    }

    /// Takes what there is before `end`.
    fn take_to(&mut self, end: u64) -> Vec<Piece> {
        let mut taken = Vec::new();
        while let Some(piece) = self.first.filter(|piece| piece.iova < end) {
            if piece.end() > end {
                let (part, rest) = piece.split(end);
                taken.push(part);
                self.first = Some(rest);
                break;
            }
            taken.push(piece);
            self.first = self.others.next().copied();
        }
        taken
    }
}

/// How a mirror becomes what its table is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// By unmapping, and then mapping, while it is in use.
    InPlace(Steps),
    /// By a new one, made by [`Mirror::remade`].
    Replace,
}

/// Changes that leave alone what is still translated as before.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Steps {
    /// What goes.
    pub unmap: Vec<Piece>,
    /// What comes.
    pub map: Vec<Piece>,
}

impl Steps {
    /// Leaves the first `count` steps. Returns the IOVA of the first one that it drops.
    pub fn limit(&mut self, count: usize) -> Option<u64> {
        let all = self.unmap.iter().chain(&self.map);
        let mut starts: Vec<u64> = all.map(|piece| piece.iova).collect();
        starts.sort_unstable();
        let end = *starts.get(count)?;
        self.unmap.retain(|piece| piece.iova < end);
        self.map.retain(|piece| piece.iova < end);
        Some(end)
    }

    /// What goes, adjacent pieces as one: IOVA and length.
    pub fn unmapped(&self) -> Vec<(u64, u64)> {
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for piece in &self.unmap {
            match joined.last_mut() {
                Some((iova, length)) if *iova + *length == piece.iova => *length += piece.length,
                _ => joined.push((piece.iova, piece.length)),
            }
        }
        joined
    }
}

/// A mirror and its table, side by side.
struct Compared {
    steps: Steps,
    /// As they were.
    kept: Vec<Piece>,
    /// Parts of those that cannot stay as they were.
    left: Vec<Piece>,
}

/// The pieces that the host maps, by their first IOVA.
#[derive(Debug, Default)]
pub(super) struct Mirror(BTreeMap<u64, Piece>);

impl Mirror {
    /// The number of pieces.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Every piece, in ascending order.
    #[cfg(test)]
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.0.values()
    }

    /// The host maps `piece`.
    pub fn mapped(&mut self, piece: Piece) {
        self.0.insert(piece.iova, piece);
    }

    /// The host does not map `piece` any more.
    pub fn unmapped(&mut self, piece: &Piece) {
        self.0.remove(&piece.iova);
    }

    /// Whether no piece is in `range`.
    pub fn is_free(&self, range: Range<u64>) -> bool {
        let before = self.0.range(..range.end).next_back().map(|(_, piece)| piece.end());
        before.is_none_or(|end| end <= range.start)
    }

    /// `range`, and the rest of the pieces that are partly in it.
    pub fn whole(&self, range: Range<u64>) -> Range<u64> {
        let before = self.0.range(..range.start).next_back().map(|(_, piece)| piece);
        let start = before.filter(|piece| piece.end() > range.start);
        let last = self.0.range(..range.end).next_back().map(|(_, piece)| piece.end());
        start.map_or(range.start, |piece| piece.iova)..range.end.max(last.unwrap_or(0))
    }

    /// What changes in `range`, which has whole pieces only ([`Mirror::whole`]), where the table
    /// now translates `wanted`, which is in the range.
    pub fn compare(&self, range: &Range<u64>, wanted: &[Piece]) -> Change {
        let Compared { steps, left, .. } = self.compare_all(range, wanted);
        if left.is_empty() {
            Change::InPlace(steps)
        } else {
            Change::Replace
        }
    }

    /// What a new mirror in place of this one has in `range` from `start` on, ascending. Pieces
    /// stay as they are; what is left of others is cut, so that the next change is in place.
    pub fn remade(&self, range: &Range<u64>, wanted: &[Piece], start: u64) -> Vec<Piece> {
        let Compared { steps, mut left, kept } = self.compare_all(range, wanted);
        left.extend(kept);
        left.extend(steps.map);
        left.retain(|piece| piece.end() > start);
        left.sort_unstable_by_key(|piece| piece.iova);
        if let Some(first) = left.first_mut().filter(|first| first.iova < start) {
            (_, *first) = first.split(start);
        }
        left
    }

    fn compare_all(&self, range: &Range<u64>, wanted: &[Piece]) -> Compared {
        let mut wanted = Rest::new(wanted);
        let mut steps = Steps::default();
        let (mut kept, mut left) = (Vec::new(), Vec::new());
        for piece in self.0.range(range.clone()).map(|(_, piece)| piece) {
            steps.map.extend(wanted.take_to(piece.iova));
            let now = wanted.take_to(piece.end());
            if now.is_empty() {
                steps.unmap.push(*piece);
            } else if now == [*piece] {
                kept.push(*piece);
            } else {
                let grain = (piece.length / PARTS / PAGE_SIZE).max(1) * PAGE_SIZE;
                left.extend(now.into_iter().flat_map(|part| part.cut(grain)));
            }
        }
        steps.map.extend(wanted.take_to(range.end));
        Compared { steps, kept, left }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RW: Protection = Protection::READ_WRITE;
    const R: Protection = Protection::READ_ONLY;

    fn piece(page: u64, pages: u64, to: u64, access: Protection) -> Piece {
        Piece { iova: page << 12, length: pages << 12, gpa: to << 12, access }
    }

    fn wanted(pieces: &[Piece]) -> Wanted {
        let mut wanted = Wanted::default();
        pieces.iter().for_each(|piece| wanted.add(*piece));
        wanted
    }

    fn mirror(pieces: &[Piece]) -> Mirror {
        Mirror(pieces.iter().map(|piece| (piece.iova, *piece)).collect())
    }

    #[test]
    fn what_is_adjacent_and_alike_is_one_piece_up_to_a_gigabyte() {
        let joined = wanted(&[
            piece(1, 1, 11, RW),
            piece(2, 1, 12, RW),
            piece(3, 1, 13, R),
            piece(4, 1, 15, R),
            piece(6, 1, 17, R),
        ]);
        let expected =
            [piece(1, 2, 11, RW), piece(3, 1, 13, R), piece(4, 1, 15, R), piece(6, 1, 17, R)];
        assert_eq!(joined.pieces(), expected);
        let window = WINDOW >> 12;
        let long = wanted(&[piece(1, 2 * window, 3, RW)]);
        let cut = [
            piece(1, window - 1, 3, RW),
            piece(window, window, window + 2, RW),
            piece(2 * window, 1, 2 * window + 2, RW),
        ];
        assert_eq!(long.pieces(), cut);
    }

    #[test]
    fn a_hole_is_left_out() {
        let left = |page, pages| {
            let hole = 0x4000..=0x6fff;
            piece(page, pages, page + 100, RW).without(&hole).collect::<Vec<_>>()
        };
        assert_eq!(left(1, 8), [piece(1, 3, 101, RW), piece(7, 2, 107, RW)]);
        assert_eq!(left(1, 3), [piece(1, 3, 101, RW)]);
        assert_eq!(left(1, 4), [piece(1, 3, 101, RW)]);
        assert_eq!(left(5, 1), []);
        assert_eq!(left(6, 2), [piece(7, 1, 107, RW)]);
        assert_eq!(left(7, 2), [piece(7, 2, 107, RW)]);
    }

    #[test]
    fn what_goes_and_comes_does_so_in_place() {
        let mirror = mirror(&[piece(1, 2, 11, RW), piece(3, 1, 20, R), piece(8, 1, 30, R)]);
        let wanted = [piece(5, 2, 40, RW), piece(8, 1, 30, R)];
        let Change::InPlace(mut steps) = mirror.compare(&(0..16 << 12), &wanted) else {
            panic!("nothing is torn");
        };
        assert_eq!(steps.unmapped(), [(0x1000, 0x3000)]);
        assert_eq!(steps.map, [piece(5, 2, 40, RW)]);
        assert_eq!(steps.limit(3), None);
        assert_eq!(steps.limit(2), Some(0x5000));
        assert_eq!((steps.unmap.len(), steps.map.len()), (2, 0));
    }

    #[test]
    fn what_is_torn_is_cut_so_that_the_next_change_is_in_place() {
        let whole = mirror(&[piece(0, 256, 1000, RW), piece(300, 1, 7, R)]);
        let range = 0..1024 << 12;
        let with_hole = |at: u64| {
            let parts = [piece(0, at, 1000, RW), piece(at + 1, 255 - at, 1001 + at, RW)];
            wanted(&[&parts[..], &[piece(300, 1, 7, R)]].concat())
        };
        assert_eq!(whole.compare(&range, with_hole(9).pieces()), Change::Replace);
        let pieces = whole.remade(&range, with_hole(9).pieces(), 0);
        // In parts of 4 pages; the hole is the second page of the third part.
        assert_eq!(pieces.len(), 63 + 2 + 1);
        assert_eq!(
            pieces[1..4],
            [piece(4, 4, 1004, RW), piece(8, 1, 1008, RW), piece(10, 2, 1010, RW)]
        );
        // From the middle of a part on.
        let rest = whole.remade(&range, with_hole(9).pieces(), 0x5000);
        assert_eq!((rest[0], &rest[1..]), (piece(5, 3, 1005, RW), &pieces[2..]));
        let cut = mirror(&pieces);
        assert!(cut.is_free(9 << 12..10 << 12) && !cut.is_free(9 << 12..11 << 12));
        let rest: Vec<_> = pieces.iter().copied().filter(|piece| piece.iova >= 0xc000).collect();
        let all_but_three = wanted(&rest);
        let change = cut.compare(&range, all_but_three.pieces());
        assert!(matches!(&change, Change::InPlace(steps) if steps.unmap.len() == 4), "{change:?}");
        // Other rights, and other memory, for a page that stays.
        for now in [piece(300, 1, 7, RW), piece(300, 1, 8, R)] {
            let wanted = [piece(0, 256, 1000, RW), now];
            assert_eq!(whole.compare(&range, &wanted), Change::Replace);
            assert_eq!(whole.remade(&range, &wanted, 0), wanted);
        }
    }

    #[test]
    fn a_range_grows_to_whole_pieces() {
        let mirror = mirror(&[piece(1, 3, 11, RW), piece(6, 4, 20, R)]);
        assert_eq!(mirror.whole(0x2000..0x3000), 0x1000..0x4000);
        assert_eq!(mirror.whole(0x3000..0x7000), 0x1000..0xa000);
        assert_eq!(mirror.whole(0x4000..0x6000), 0x4000..0x6000);
        assert_eq!(mirror.whole(0..0x1000), 0..0x1000);
    }

    /// Page number to page number and rights.
    type Pages = BTreeMap<u64, (u64, bool)>;

    fn pages(pieces: &[Piece]) -> Pages {
        let of = |piece: &Piece| {
            let (first, to, write) = (piece.iova >> 12, piece.gpa >> 12, piece.access.write);
            (0..piece.length >> 12).map(move |page| (first + page, (to + page, write)))
        };
        let all: Vec<_> = pieces.iter().flat_map(of).collect();
        let pages: Pages = all.iter().copied().collect();
        assert_eq!(pages.len(), all.len(), "no two pieces overlap");
        pages
    }

    fn of_pages(pages: &Pages, range: &Range<u64>) -> Wanted {
        let mut wanted = Wanted::default();
        for (page, (to, write)) in pages.range(range.start >> 12..range.end >> 12) {
            wanted.add(piece(*page, 1, *to, if *write { RW } else { R }));
        }
        wanted
    }

    proptest! {
        /// A table that changes at random, compared in part after each change, against the same
        /// page by page. What is translated as before stays mapped all the time.
        #[test]
        fn a_mirror_is_what_the_table_was_when_it_was_compared(
            edits in prop::collection::vec(
                (0..128u64, 1..40u64, prop::option::of((0..4u64, any::<bool>())), 0..128u64, 1..64u64),
                1..40,
            ),
        ) {
            let (mut table, mut seen, mut mirror) = (Pages::new(), Pages::new(), Mirror::default());
            for (at, count, to, from, length) in edits {
                for page in at..at + count {
                    match to {
                        Some((to, write)) => table.insert(page, ((to << 8) + page, write)),
                        None => table.remove(&page),
                    };
                }
                let range = mirror.whole(from << 12..(from + length) << 12);
                let in_range = |page: &u64| range.contains(&(page << 12));
                seen.retain(|page, _| !in_range(page));
                seen.extend(table.iter().filter(|(page, _)| in_range(page)));
                match mirror.compare(&range, of_pages(&table, &range).pieces()) {
                    Change::InPlace(steps) => {
                        for piece in &steps.unmap {
                            mirror.unmapped(piece);
                            prop_assert!(pages(&[*piece]).keys().all(|page| !seen.contains_key(page)));
                        }
                        steps.map.iter().for_each(|piece| mirror.mapped(*piece));
                    }
                    Change::Replace => {
                        let all = 0..1 << 30;
                        seen.clone_from(&table);
                        let pieces = mirror.remade(&all, of_pages(&table, &all).pieces(), 0);
                        mirror = self::mirror(&pieces);
                    }
                }
                let now: Vec<_> = mirror.pieces().copied().collect();
                prop_assert_eq!(&pages(&now), &seen);
            }
        }
    }
}

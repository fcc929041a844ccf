// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One mapping of an IOAS, and what becomes of it.

use std::sync::Arc;

use super::Pages;
use twostage::iommufd::Protection;

/// One mapping: never merged, and split only where VFIO's first version asks for it.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    /// Last IOVA, included.
    pub last: u64,
    /// What it leads to.
    pub pages: Arc<Pages>,
    /// Where in the pages it starts, in bytes.
    pub offset: u64,
    /// What devices may do with it.
    pub protection: Protection,
    /// Access objects that have pages of it pinned, once for each time.
    pub pins: u32,
    /// How many of those pins keep it from being unmapped.
    pub locks: u32,
    /// It is being unmapped: access objects can pin no more of it.
    pub leaving: bool,
}

impl Area {
    /// A mapping of `pages` from `offset` on, which nothing has pinned.
    pub fn new(last: u64, pages: Arc<Pages>, offset: u64, protection: Protection) -> Self {
        Self { last, pages, offset, protection, pins: 0, locks: 0, leaving: false }
    }

    /// Its size in bytes, when `start` is its first IOVA.
    pub fn length(&self, start: u64) -> u64 {
        // No area is as large as the address space.
        self.last - start + 1
    }
}

/// The next step of an unmap.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Nothing is left to unmap.
    Nothing,
    /// This area was, with its first IOVA, and is no longer mapped.
    Area(u64, Area),
    /// The area with this first IOVA and length is to be, but access objects have pages of it
    /// pinned, and now must let go of them.
    Pinned(u64, u64),
}

/// A part of some pages, about to be mapped.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// The pages.
    pub pages: Arc<Pages>,
    /// Where in them the part starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// A part of an area.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// First IOVA of the area.
    pub area: u64,
    /// First IOVA of the part.
    pub iova: u64,
    /// What it leads to.
    pub piece: Piece,
}

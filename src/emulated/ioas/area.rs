// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapping of an IOAS.

use std::sync::Arc;

use super::Pages;
use twostage::iommufd::Protection;

/// A mapping: never merged, and split only for VFIO's first version.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    /// Last IOVA, included.
    pub last: u64,
    /// Its pages.
    pub pages: Arc<Pages>,
    /// Its offset in the pages, in bytes.
    pub offset: u64,
    /// What devices may do with it.
    pub protection: Protection,
    /// Number of pins by access objects.
    pub pins: u32,
    /// Number of those that prevent unmapping.
    pub locks: u32,
    /// It is being unmapped: access objects can no longer pin it.
    pub leaving: bool,
}

impl Area {
    /// A mapping of `pages` from `offset` on, not pinned.
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
    /// This area, with its first IOVA, is no longer mapped.
    Area(u64, Area),
    /// The area with this first IOVA and length is to be unmapped, but access objects have pages of
    /// it pinned and must unpin them now.
    Pinned(u64, u64),
}

/// A part of some pages, to be mapped.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// The pages.
    pub pages: Arc<Pages>,
    /// Its offset in them, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// A part of an area.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// First IOVA of the area.
    pub area: u64,
    /// First IOVA of the part.
    pub iova: u64,
    /// Its pages.
    pub piece: Piece,
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A mapping of an IOAS, and CPU access to its pages.

use std::sync::Arc;

use vm_memory::Bytes;

use super::{Pages, Source};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, Protection, UserMemory};

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

/// A copy, from the memory's point of view.
#[derive(Debug)]
pub(crate) enum Transfer<'a> {
    /// Memory is read into this.
    Read(&'a mut [u8]),
    /// This is written to memory.
    Write(&'a [u8]),
}

impl<'a> Transfer<'a> {
    /// Its size in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Read(bytes) => bytes.len(),
            Self::Write(bytes) => bytes.len(),
        }
    }

    /// The bytes from `start` on, at most `length`.
    pub fn part(&mut self, start: usize, length: usize) -> Transfer<'_> {
        let end = start.saturating_add(length).min(self.len());
        match self {
            Self::Read(bytes) => Transfer::Read(bytes.get_mut(start..end).unwrap_or_default()),
            Self::Write(bytes) => Transfer::Write(bytes.get(start..end).unwrap_or_default()),
        }
    }
}

impl Pages {
    /// Copies to or from the pages at `offset` (bytes).
    ///
    /// As in Linux, without pinning while the process that they come from has them; if it has not,
    /// the pages that are pinned are used.
    ///
    /// # Errors
    /// As [`Pages::pin`]; a part may have been copied.
    pub fn transfer(&self, offset: u64, mut transfer: Transfer<'_>) -> Outcome<()> {
        if let Source::User(user, start) = self.source() {
            // Does not overflow: the end of the source was checked to be below 2^64.
            let address = start + offset;
            let direct = match &mut transfer {
                Transfer::Read(bytes) => user.read(address, bytes),
                Transfer::Write(bytes) => user.write(address, bytes),
            };
            if direct.is_ok() {
                return Ok(());
            }
        }
        let length = transfer.len() as u64;
        let places = self.pin(offset, length)?;
        let mut done = 0;
        let copied = places.iter().try_for_each(|place| {
            // No larger than the buffer.
            let length = place.length() as usize;
            let outcome = copy(place, transfer.part(done, length));
            done += length;
            outcome
        });
        self.unpin(offset, length);
        copied
    }
}

fn copy(place: &UserMemory, transfer: Transfer<'_>) -> Outcome<()> {
    let slice = place.slice();
    let outcome = match transfer {
        Transfer::Read(bytes) => slice.read_slice(bytes, 0),
        Transfer::Write(bytes) => slice.write_slice(bytes, 0),
    };
    outcome.or_else(|error| refuse(Errno::EFAULT, error.to_string()))
}

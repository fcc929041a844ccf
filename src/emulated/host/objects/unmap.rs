// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unmapping: whole areas in ascending order, up to one that would be split.

use std::ops::RangeInclusive;

use super::Objects;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::{range_of, Taken};
use twostage::iommufd::{Errno, ObjectId};

/// An unmap in progress. It may have to stop and wait for access objects to unpin pages.
#[derive(Debug)]
pub(crate) struct Unmap {
    /// The IOAS.
    pub ioas: ObjectId,
    range: RangeInclusive<u64>,
    /// Number of bytes unmapped so far.
    pub bytes: u64,
}

/// Why an unmap has stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// All is unmapped.
    Done,
    /// An access object has pinned pages of the area with this first IOVA and length in bytes.
    Pinned(u64, u64),
}

impl Unmap {
    /// The arguments of `IOMMU_IOAS_UNMAP`.
    ///
    /// # Errors
    /// `EOVERFLOW` the largest number, or past the end of the address space; `EINVAL` empty.
    pub fn of_ioctl(ioas: ObjectId, iova: u64, length: u64) -> Outcome<Self> {
        if (iova, length) == (0, u64::MAX) {
            return Ok(Self::all(ioas));
        }
        // The largest number means "all" in some verbs and is invalid in the others.
        if iova == u64::MAX || length == u64::MAX {
            return refuse(Errno::EOVERFLOW, "the IOVA or the length is 2^64-1");
        }
        Self::of_range(ioas, iova, length)
    }

    /// `length` bytes from `iova` on.
    ///
    /// # Errors
    /// As [`Self::of_ioctl`].
    pub fn of_range(ioas: ObjectId, iova: u64, length: u64) -> Outcome<Self> {
        if length == 0 {
            return refuse(Errno::EINVAL, "length 0");
        }
        match range_of(iova, length) {
            Some(range) => Ok(Self { ioas, range, bytes: 0 }),
            None => refuse(Errno::EOVERFLOW, format!("{iova:#x} + {length:#x} is past 2^64")),
        }
    }

    /// Everything.
    pub fn all(ioas: ObjectId) -> Self {
        Self { ioas, range: 0..=u64::MAX, bytes: 0 }
    }
}

impl Objects {
    /// Continues an unmap until it has to stop.
    ///
    /// # Errors
    /// `ENOENT` there is no such IOAS, or an area would be split; `EBUSY` an area is locked. Whole
    /// areas below it are unmapped nevertheless, as in Linux.
    pub fn unmap(&mut self, unmap: &mut Unmap) -> Outcome<Stop> {
        let space = &mut self.table.ioas_mut(unmap.ioas)?.space;
        let mut areas = Vec::new();
        let stop = loop {
            match space.take_next(&unmap.range) {
                Ok(Taken::Area(start, area)) => {
                    // Only the whole address space does not fit, which no IOAS maps.
                    unmap.bytes = unmap.bytes.saturating_add(area.length(start));
                    areas.push((start, area));
                }
                Ok(Taken::Pinned(start, length)) => break Ok(Stop::Pinned(start, length)),
                Ok(Taken::Nothing) => break Ok(Stop::Done),
                Err(refusal) => break Err(refusal),
            }
        };
        if let Ok(Stop::Pinned(start, _)) = stop {
            // What another thread maps below before the unmap continues is not affected.
            unmap.range = start..=*unmap.range.end();
        }
        self.drop_areas(unmap.ioas, &areas)?;
        stop
    }
}

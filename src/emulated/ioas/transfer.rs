// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! CPU access to pages.

use vm_memory::{Bytes, MemoryRegionAddress};

use super::{Pages, Source};
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, UserMemory};

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
    let (region, address) = (place.region(), MemoryRegionAddress(place.offset()));
    let outcome = match transfer {
        Transfer::Read(bytes) => region.read_slice(bytes, address),
        Transfer::Write(bytes) => region.write_slice(bytes, address),
    };
    outcome.or_else(|error| refuse(Errno::EFAULT, error.to_string()))
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Identifies pages regardless of their mappings.
//!
//! The kernel compares page frames. Here a page of a file, or of shared memory, is identified by
//! the file; private memory by its address. `/proc/self/maps` (see `proc_pid_maps(5)`)
//! distinguishes them.

use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use crate::ioas::PAGE_SIZE;
use crate::maps::{self, FileKey, Mapping};
use twostage::iommufd::{Errno, UserMemory};

/// The start of some memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, by device and inode; none for private memory.
    file: Option<FileKey>,
    /// The offset in the file, or the address, in bytes.
    at: u64,
}

impl Place {
    /// Whether it is in one of the whole pages around `length` bytes at `start`.
    pub fn is_in_pages(&self, start: &Self, length: u64) -> bool {
        let first = start.at - start.at % PAGE_SIZE;
        let end = start.at.saturating_add(length).next_multiple_of(PAGE_SIZE);
        self.file == start.file && (first..end).contains(&self.at)
    }

    /// The start of the memory at `offset` bytes.
    pub fn plus(&self, offset: u64) -> Self {
        Self { file: self.file.clone(), at: self.at.wrapping_add(offset) }
    }
}

/// A snapshot of this process's mappings.
#[derive(Debug)]
pub struct Places(Vec<Mapping>);

impl Places {
    /// The mappings as they are now.
    ///
    /// # Errors
    /// `EIO` when `/proc` cannot be read.
    pub fn now() -> Outcome<Self> {
        match maps::list(std::process::id().cast_signed()) {
            Ok(list) => Ok(Self(list)),
            Err(error) => refuse(Errno::EIO, format!("/proc/self/maps: {error}")),
        }
    }

    /// The start of `memory`; none if it is not mapped (any more).
    pub fn of(&self, memory: &UserMemory) -> Option<Place> {
        let address = memory.user_va();
        let mapping = self.0.iter().find(|mapping| mapping.has(address))?;
        let offset = mapping.offset + (address - mapping.start);
        Some(match mapping.shared {
            true => Place { file: Some(mapping.file.clone()), at: offset },
            false => Place { file: None, at: address },
        })
    }
}

/// Pages of the user that stay mapped while they are inspected.
pub struct Held {
    first: u64,
    memory: Vec<UserMemory>,
    /// Why there are no more.
    pub fault: Outcome<()>,
}

impl Held {
    /// The pages from `start` up to `end`.
    pub fn new(user: &dyn UserSpace, start: u64, end: u64) -> Self {
        let first = start - start % PAGE_SIZE;
        let mut held = Self { first, memory: Vec::new(), fault: Ok(()) };
        let mut at = first;
        while at < end {
            match user.memory(at, end - at, false) {
                Ok(memory) => {
                    at += memory.length();
                    held.memory.push(memory);
                }
                Err(fault) => {
                    held.fault = Err(fault.into());
                    break;
                }
            }
        }
        held
    }

    /// Each page: the user's address, and its identity.
    pub fn pages<'a>(&'a self, places: &'a Places) -> impl Iterator<Item = (u64, Place)> + 'a {
        let mut next = self.first;
        let pages = move |memory: &UserMemory| {
            let first = next;
            next += memory.length();
            let place = places.of(memory);
            let offsets = (0..memory.length()).step_by(PAGE_SIZE as usize);
            offsets.filter_map(move |offset| Some((first + offset, place.as_ref()?.plus(offset))))
        };
        self.memory.iter().flat_map(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    fn memory(file: Option<FileOffset>) -> UserMemory {
        let region = GuestRegionMmap::from_range(GuestAddress(0), 0x2000, file).unwrap();
        UserMemory::whole(Arc::new(region))
    }

    #[test]
    fn a_page_of_a_file_is_the_same_in_every_mapping() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let map = |offset| memory(Some(FileOffset::new(file.try_clone().unwrap(), offset)));
        let (first, second) = (map(0), map(0x1000));
        let places = Places::now().unwrap();
        let (first, second) = (places.of(&first).unwrap(), places.of(&second).unwrap());
        assert_ne!(first, second);
        assert_eq!(first.plus(0x1000), second);
        assert!(second.is_in_pages(&first, 0x1001) && !second.is_in_pages(&first, 0x1000));
    }

    #[test]
    fn private_memory_is_where_its_address_says() {
        let (one, other) = (memory(None), memory(None));
        let places = Places::now().unwrap();
        assert_eq!(places.of(&one), places.of(&one.clone()));
        assert_ne!(places.of(&one), places.of(&other));
        assert!(!places.of(&one).unwrap().is_in_pages(&places.of(&other).unwrap(), 0x2000));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inspecting the mock IOMMU's mappings, and pin counts.
//!
//! The kernel compares page frames. Here a page of a file, or of shared memory, is identified by
//! the file; private memory by its address. `/proc/self/maps` (see `proc_pid_maps(5)`)
//! distinguishes them.

use super::abi::{CheckCache, CheckMap, CheckRefs};
use super::devices::MockDevice;
use super::driver::{mock_nested, mock_paging, with_driver};
use crate::host::objects::Object;
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use crate::ioas::PAGE_SIZE;
use crate::maps::{self, FileKey, Mapping};
use crate::units::stage2::Stage2;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

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

/// `MD_CHECK_MAP`: whether the HWPT maps the IOVAs to exactly the memory at `uptr`.
pub fn check_map(
    host: &EmulatedHost,
    hwpt: ObjectId,
    check: &CheckMap,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let &CheckMap { iova, length, uptr } = check;
    let (page_size, stage2) = {
        let objects = host.objects();
        let paging = objects.table().hwpt_paging(hwpt)?;
        if mock_paging(&*paging.domain).is_none() {
            return refuse(Errno::EINVAL, format!("HWPT_PAGING {hwpt} is not a mock domain"));
        }
        (paging.domain.page_size(), objects.table().ioas(paging.ioas)?.stage2.clone())
    };
    let aligned = (iova | length | uptr).is_multiple_of(page_size);
    let Some(end) = uptr.checked_add(length).filter(|_| aligned) else {
        return refuse(Errno::EINVAL, format!("{length:#x} bytes at {iova:#x} and {uptr:#x}"));
    };
    let held = Held::new(user, uptr, end);
    let places = Places::now()?;
    for (page, place) in held.pages(&places) {
        let parts = (page..page + PAGE_SIZE).step_by(page_size as usize);
        for address in parts.filter(|address| (uptr..end).contains(address)) {
            let iova = iova.wrapping_add(address - uptr);
            let found = mapped_place(&places, &stage2, iova);
            let wanted = place.plus(address - page);
            if found.as_ref() != Some(&wanted) {
                return refuse(Errno::EINVAL, format!("{iova:#x}: {found:?}, not {wanted:?}"));
            }
        }
    }
    held.fault
}

/// `MD_CHECK_REFS`: whether every page of the memory at `uptr` has this pin count, over all
/// iommufds of the machine.
pub fn check_refs(host: &EmulatedHost, check: &CheckRefs, user: &dyn UserSpace) -> Outcome<()> {
    let &CheckRefs { length, uptr, refs, .. } = check;
    let aligned = (length | uptr).is_multiple_of(PAGE_SIZE);
    let Some(end) = uptr.checked_add(length).filter(|_| aligned) else {
        return refuse(Errno::EINVAL, format!("{length:#x} bytes at {uptr:#x}"));
    };
    let held = Held::new(user, uptr, end);
    let pinned: Vec<UserMemory> =
        host.machine().pages().iter().flat_map(|pages| pages.places()).collect();
    let places = Places::now()?;
    let pinned: Vec<(Place, u64)> =
        pinned.iter().filter_map(|memory| Some((places.of(memory)?, memory.length()))).collect();
    for (page, place) in held.pages(&places) {
        let here = |(start, length): &&(Place, u64)| place.is_in_pages(start, *length);
        let pins = pinned.iter().filter(here).count();
        if pins != refs as usize {
            return refuse(
                Errno::EIO,
                format!("the page at {page:#x} has {pins} pins, not {refs}"),
            );
        }
    }
    held.fault
}

/// `MD_CHECK_IOTLB`: whether an entry of the HWPT's IOTLB has the value.
pub fn check_iotlb(host: &EmulatedHost, hwpt: ObjectId, check: &CheckCache) -> Outcome<()> {
    let objects = host.objects();
    let domain = match objects.table().get(hwpt) {
        Some(Object::HwptNested(nested)) => &nested.domain,
        _ => return refuse(Errno::ENOENT, format!("there is no HWPT_NESTED {hwpt}")),
    };
    let entry = mock_nested(&**domain).and_then(|domain| domain.iotlb_entry(check.id));
    check_value(entry, check)
}

/// `DEV_CHECK_CACHE`: whether an entry of the device's cache has the value.
pub fn check_device_cache(host: &EmulatedHost, dev: ObjectId, check: &CheckCache) -> Outcome<()> {
    with_driver(host, dev, |driver, part| {
        let cached = |device: &mut MockDevice| Ok(device.cache.get(check.id as usize).copied());
        check_value(driver.devices().change(part.requester.rid, cached)?, check)
    })
}

fn check_value(entry: Option<u32>, check: &CheckCache) -> Outcome<()> {
    match entry {
        Some(value) if value == check.value => Ok(()),
        found => refuse(
            Errno::EINVAL,
            format!("entry {} is {found:#x?}, not {:#x}", check.id, check.value),
        ),
    }
}

/// The memory that the IOVA maps to.
fn mapped_place(places: &Places, stage2: &Stage2, iova: u64) -> Option<Place> {
    let mapping = stage2.lookup(iova)?;
    Some(places.of(&mapping.memory)?.plus(iova - mapping.start))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

    fn memory(file: Option<FileOffset>) -> UserMemory {
        let region = GuestRegionMmap::<()>::from_range(GuestAddress(0), 0x2000, file).unwrap();
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

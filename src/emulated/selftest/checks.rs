// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Inspecting the mock IOMMU's mappings, and pin counts.

use super::abi::{CheckCache, CheckMap, CheckRefs};
use super::devices::MockDevice;
use super::driver::{mock_nested, mock_paging};
use super::events::with_driver;
use super::places::{Held, Place, Places};
use crate::host::objects::Object;
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use crate::ioas::PAGE_SIZE;
use crate::units::stage2::Stage2;
use crate::EmulatedHost;
use twostage::iommufd::{Errno, ObjectId, UserMemory};

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

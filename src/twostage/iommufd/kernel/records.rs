// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Parsing of what is read from fault queues and vEVENTQs.

use std::mem::{offset_of, size_of};

use iommufd_bindings::*;

use crate::iommufd::{
    ObjectId, PageRequest, PageRequestFlags, PageRequestGroup, PageRequestPermissions, Vevent,
};

/// Bytes of a page request.
pub(super) const PAGE_REQUEST: usize = size_of::<iommu_hwpt_pgfault>();
/// Bytes before an event's data.
const VEVENT_HEADER: usize = size_of::<iommufd_vevent_header>();

/// Parses what was read from a queue; `None` if it is invalid.
pub(super) type Parse<T> = fn(&[u8]) -> Option<Vec<T>>;

fn u32_at(record: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*record.get(offset..)?.first_chunk()?))
}

fn u64_at(record: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*record.get(offset..)?.first_chunk()?))
}

/// Whole groups of `struct iommu_hwpt_pgfault`: adjacent ones with the same cookie.
pub(super) fn page_requests(bytes: &[u8]) -> Option<Vec<PageRequestGroup>> {
    let mut groups: Vec<PageRequestGroup> = Vec::new();
    for record in bytes.chunks(PAGE_REQUEST) {
        let cookie = u32_at(record, offset_of!(iommu_hwpt_pgfault, cookie))?;
        let dev = ObjectId(u32_at(record, offset_of!(iommu_hwpt_pgfault, dev_id))?);
        let request = PageRequest {
            flags: PageRequestFlags::from(u32_at(record, offset_of!(iommu_hwpt_pgfault, flags))?),
            pasid: u32_at(record, offset_of!(iommu_hwpt_pgfault, pasid))?,
            group: u32_at(record, offset_of!(iommu_hwpt_pgfault, grpid))?,
            permissions: PageRequestPermissions::from(u32_at(
                record,
                offset_of!(iommu_hwpt_pgfault, perm),
            )?),
            address: u64_at(record, offset_of!(iommu_hwpt_pgfault, addr))?,
        };
        match groups.last_mut() {
            Some(group) if group.cookie == cookie => group.requests.push(request),
            _ => groups.push(PageRequestGroup { cookie, dev, requests: vec![request] }),
        }
    }
    Some(groups)
}

/// Events whose data is a `T`.
pub(super) fn vevents<T>(mut bytes: &[u8]) -> Option<Vec<Vevent>> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let flags = u32_at(bytes, offset_of!(iommufd_vevent_header, flags))?;
        let sequence = u32_at(bytes, offset_of!(iommufd_vevent_header, sequence))?;
        let after = bytes.get(VEVENT_HEADER..)?;
        if flags & iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS != 0 {
            events.push(Vevent::Lost { sequence });
            bytes = after;
        } else {
            let (data, rest) = after.split_at_checked(size_of::<T>())?;
            events.push(Vevent::Event { sequence, data: data.to_vec() });
            bytes = rest;
        }
    }
    Some(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn requests_of_one_cookie_are_one_group() {
        // flags, dev_id, pasid, grpid, perm, reserved, addr (two words), length, cookie
        let record = |flags, addr, cookie| words(&[flags, 7, 5, 9, 3, 0, addr, 0, 0, cookie]);
        let bytes = [record(1, 0x1000, 1), record(3, 0x2000, 1), record(3, 0x3000, 2)].concat();
        let groups = page_requests(&bytes).unwrap();
        assert_eq!(groups.len(), 2);
        assert_eq!((groups[0].cookie, groups[0].dev), (1, ObjectId(7)));
        let addresses: Vec<u64> = groups[0].requests.iter().map(|each| each.address).collect();
        assert_eq!(addresses, [0x1000, 0x2000]);
        let last = groups[1].requests[0];
        assert!(last.flags.last_page() && last.flags.pasid_valid());
        assert!(last.permissions.read() && last.permissions.write());
        assert_eq!((last.pasid, last.group), (5, 9));
        assert_eq!(page_requests(&[]), Some(vec![]));
        assert_eq!(page_requests(&bytes[..60]), None);
    }

    #[test]
    fn events_and_lost_ones() {
        let data = |byte: u8| [byte; size_of::<iommu_vevent_arm_smmuv3>()].to_vec();
        let bytes = [words(&[0, 4]), data(1), words(&[0, 5]), data(2), words(&[1, 9])].concat();
        let events = vevents::<iommu_vevent_arm_smmuv3>(&bytes).unwrap();
        assert_eq!(
            events,
            [
                Vevent::Event { sequence: 4, data: data(1) },
                Vevent::Event { sequence: 5, data: data(2) },
                Vevent::Lost { sequence: 9 }
            ]
        );
        assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..20]), None);
        assert_eq!(vevents::<iommu_vevent_arm_smmuv3>(&bytes[..4]), None);
    }
}

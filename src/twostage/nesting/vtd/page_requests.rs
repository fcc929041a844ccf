// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Page requests as VT-d has them. The way to the virtual IOMMU and back is in
//! [`crate::nesting::page_route`].

use std::time::Duration;

use crate::iommufd::PageRequestGroup;
use crate::nesting::page_route::PageRoute;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::page_request::PageRequest;
use crate::viommu::vtd::Progress;

/// Indices of groups have 9 bits.
const GROUPS: u32 = 1 << 9;

/// See [`VtdHostSide::drain_page_requests`].
///
/// [`VtdHostSide::drain_page_requests`]: crate::viommu::vtd::VtdHostSide::drain_page_requests
pub(super) fn drain(route: &PageRoute, progress: &mut Progress, time: Duration) {
    let pass = route.drain(progress.next(), time);
    progress.go_on_at(pass);
}

/// The requests of a group of the guest's `rid`, as the architecture has them; `None` if that has
/// no such.
pub(super) fn requests(rid: Bdf, group: &PageRequestGroup) -> Option<Vec<PageRequest>> {
    let last = group.requests.len().checked_sub(1)?;
    let request = |(number, of): (usize, &crate::iommufd::PageRequest)| {
        let pasid = if of.flags.pasid_valid() { Some(Pasid::new(of.pasid)?) } else { None };
        Some(PageRequest {
            rid,
            pasid,
            group: u16::try_from(of.group).ok().filter(|_| of.group < GROUPS)?,
            last: number == last,
            address: of.address,
            read: of.permissions.read(),
            write: of.permissions.write(),
            execute: of.permissions.execute(),
            privileged: of.permissions.privileged(),
        })
    };
    group.requests.iter().enumerate().map(request).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iommufd::{
        ObjectId, PageRequest as HostRequest, PageRequestFlags, PageRequestPermissions,
    };

    const RID: Bdf = Bdf::from_raw(0x20);

    fn group(cookie: u32, addresses: &[u64]) -> PageRequestGroup {
        let request = |address: &u64| HostRequest {
            flags: PageRequestFlags::new().with_pasid_valid(true),
            pasid: 5,
            group: 0x1ff,
            permissions: PageRequestPermissions::new().with_write(true),
            address: *address,
        };
        let requests = addresses.iter().map(request).collect();
        PageRequestGroup { cookie, dev: ObjectId(2), requests }
    }

    #[test]
    fn a_group_has_the_architectures_form_or_none() {
        let three = group(1, &[0x1000, 0x2000, 0x3000]);
        let of_guest = requests(RID, &three).unwrap();
        let places: Vec<_> = of_guest.iter().map(|it| (it.address, it.last)).collect();
        assert_eq!(places, [(0x1000, false), (0x2000, false), (0x3000, true)]);
        let PageRequest { rid, pasid, group: index, read, write, .. } = of_guest[0];
        assert_eq!((rid, pasid, index, read, write), (RID, Pasid::new(5), 0x1ff, false, true));
        let mut wrong = three.clone();
        wrong.requests[1].group = 0x200;
        assert_eq!(requests(RID, &wrong), None);
        wrong.requests[1] = HostRequest { pasid: 1 << 20, ..three.requests[0] };
        assert_eq!(requests(RID, &wrong), None);
        wrong.requests.clear();
        assert_eq!(requests(RID, &wrong), None);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Dirty tracking, if the IOMMU supports it.

use twostage::iommufd::{DirtyRange, Errno, HwptData, HwptFlags};

use super::memory::Memory;
use super::{destroy, ioas_of, refused, Bound, Subject, BASE, PAGE};

pub fn check(subject: &Subject) {
    let mut bound = Bound::new(subject);
    let host = bound.host();
    let memory = Memory::new(8);
    let ioas = ioas_of(host, &memory, BASE);
    let plain = bound.hwpt(ioas, HwptFlags::new(), HwptData::None).expect("HWPT_ALLOC");
    let range = DirtyRange { iova: BASE, length: 8 * PAGE, page_size: PAGE };
    refused(host.hwpt_set_dirty_tracking(plain, true), Errno::EOPNOTSUPP);
    refused(host.hwpt_get_dirty_bitmap(plain, &range, true, &mut [0]), Errno::EOPNOTSUPP);
    refused(host.hwpt_set_dirty_tracking(ioas, true), Errno::ENOENT);
    destroy(host, &[plain]);
    let tracked = bound.hwpt(ioas, HwptFlags::new().with_dirty_tracking(true), HwptData::None);
    let can = host.get_hw_info(bound.dev).expect("GET_HW_INFO").capabilities.dirty_tracking();
    if !can {
        println!("  this IOMMU has none");
        refused(tracked, Errno::EOPNOTSUPP);
        destroy(host, &[ioas]);
        return;
    }
    let hwpt = tracked.expect("HWPT_ALLOC");
    bound.attach(hwpt);
    host.hwpt_set_dirty_tracking(hwpt, true).expect("HWPT_SET_DIRTY_TRACKING");
    let dirty = |clear| {
        let mut bitmap = [0];
        host.hwpt_get_dirty_bitmap(hwpt, &range, clear, &mut bitmap).expect("the bitmap");
        bitmap[0]
    };
    assert_eq!(dirty(true), 0, "nothing is dirty when it starts");
    assert!(bound.moves(&memory, (0, BASE), (3 * PAGE, BASE + 3 * PAGE)));
    assert_eq!((dirty(false), dirty(true), dirty(true)), (1 << 3, 1 << 3, 0));
    let get = |range: DirtyRange, bitmap: &mut [u64]| {
        host.hwpt_get_dirty_bitmap(hwpt, &range, true, bitmap)
    };
    refused(get(DirtyRange { iova: BASE + 1, ..range }, &mut [0]), Errno::EINVAL);
    refused(get(DirtyRange { length: PAGE / 2, ..range }, &mut [0]), Errno::EINVAL);
    refused(get(range, &mut []), Errno::EFAULT);
    host.hwpt_set_dirty_tracking(hwpt, false).expect("HWPT_SET_DIRTY_TRACKING");
    bound.detach();
    destroy(host, &[hwpt, ioas]);
}

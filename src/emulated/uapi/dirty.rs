// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of dirty tracking.

use std::mem::offset_of;

use iommufd_bindings::*;

use super::argument::Argument;
use super::UserSpace;
use crate::host::bitmap;
use crate::host::refusal::Outcome;
use crate::EmulatedHost;
use twostage::iommufd::DirtyRange;

const ENABLE: u32 = iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
const NO_CLEAR: u32 = iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;

/// Linux ignores the reserved field.
pub(super) fn set_tracking(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let flags = argument.flags(offset_of!(iommu_hwpt_set_dirty_tracking, flags), ENABLE)?;
    let hwpt = argument.id(offset_of!(iommu_hwpt_set_dirty_tracking, hwpt_id));
    host.objects().hwpt_set_dirty_tracking(hwpt, flags & ENABLE != 0)
}

pub(super) fn get_bitmap(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    let flags = argument.flags(offset_of!(iommu_hwpt_get_dirty_bitmap, flags), NO_CLEAR)?;
    argument.reserved(offset_of!(iommu_hwpt_get_dirty_bitmap, __reserved))?;
    let hwpt = argument.id(offset_of!(iommu_hwpt_get_dirty_bitmap, hwpt_id));
    let range = DirtyRange {
        iova: argument.u64(offset_of!(iommu_hwpt_get_dirty_bitmap, iova)),
        length: argument.u64(offset_of!(iommu_hwpt_get_dirty_bitmap, length)),
        page_size: argument.u64(offset_of!(iommu_hwpt_get_dirty_bitmap, page_size)),
    };
    let data = argument.u64(offset_of!(iommu_hwpt_get_dirty_bitmap, data));
    let pages = host.objects().hwpt_dirty(hwpt, &range)?;
    // Linux 7.2 neither reports a bitmap that it cannot write nor keeps the marks then.
    for run in &pages.runs {
        bitmap::set_user(user, data, range.bits(run))?;
    }
    if flags & NO_CLEAR == 0 {
        host.objects().hwpt_clean(&pages);
    }
    Ok(())
}

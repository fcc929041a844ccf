// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of HWPTs, including dirty tracking, and `IOMMU_GET_HW_INFO`.

use std::mem::{offset_of, size_of};

use iommufd_bindings::*;

use super::argument::{Argument, PointedArray, PointedData};
use super::{UserFault, UserSpace};
use crate::drivers::{DriverInfo, Partial};
use crate::host::bitmap;
use crate::host::objects::{HwptRequest, MAX_INVALIDATE_ENTRIES};
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use crate::EmulatedHost;
use twostage::iommufd::{DirtyRange, Errno, HwptFlags};

const NONE: u32 = iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE;
const ENABLE: u32 = iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
const NO_CLEAR: u32 = iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;

pub(super) fn alloc(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    argument.reserved(offset_of!(iommu_hwpt_alloc, __reserved))?;
    let data_type = argument.u32(offset_of!(iommu_hwpt_alloc, data_type));
    let data_len = argument.u32(offset_of!(iommu_hwpt_alloc, data_len));
    let data_uptr = argument.u64(offset_of!(iommu_hwpt_alloc, data_uptr));
    if (data_type == NONE) != (data_len == 0) {
        return refuse(Errno::EINVAL, format!("{data_len} bytes of data of type {data_type}"));
    }
    let data = PointedData { user, data_type, length: data_len, address: data_uptr };
    let request = HwptRequest {
        flags: HwptFlags::from_bits(argument.u32(offset_of!(iommu_hwpt_alloc, flags))),
        dev: argument.id(offset_of!(iommu_hwpt_alloc, dev_id)),
        pt: argument.id(offset_of!(iommu_hwpt_alloc, pt_id)),
        fault: Some(argument.id(offset_of!(iommu_hwpt_alloc, fault_id))),
        data: if data_len == 0 { None } else { Some(&data) },
    };
    let id = host.objects().hwpt_alloc(&request)?;
    argument.set_u32(offset_of!(iommu_hwpt_alloc, out_hwpt_id), id.0);
    Ok(())
}

pub(super) fn hw_info(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    const TYPE: usize = offset_of!(iommu_hw_info, __bindgen_anon_1);
    let input_type = iommufd_hw_info_flags_IOMMU_HW_INFO_FLAG_INPUT_TYPE;
    let flags = argument.flags(offset_of!(iommu_hw_info, flags), input_type)?;
    if argument.bytes::<3>(offset_of!(iommu_hw_info, __reserved)) != [0; 3] {
        return refuse(Errno::EOPNOTSUPP, "a reserved field is not 0");
    }
    let wanted = if flags & input_type != 0 {
        argument.u32(TYPE)
    } else {
        iommu_hw_info_type_IOMMU_HW_INFO_TYPE_DEFAULT
    };
    let info = host.objects().get_hw_info(argument.id(offset_of!(iommu_hw_info, dev_id)))?;
    let (data_type, data) = match info.data {
        DriverInfo::Vtd(info) => {
            (iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD, vtd_info_bytes(&info))
        }
        DriverInfo::ArmSmmuV3(info) => {
            (iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3, smmu_info_bytes(&info))
        }
        DriverInfo::Other { data_type, bytes } => (data_type, bytes),
    };
    if wanted != iommu_hw_info_type_IOMMU_HW_INFO_TYPE_DEFAULT && wanted != data_type {
        return refuse(Errno::EOPNOTSUPP, format!("no information of type {wanted}"));
    }
    let room = u64::from(argument.u32(offset_of!(iommu_hw_info, data_len)));
    write_and_clear(user, argument.u64(offset_of!(iommu_hw_info, data_uptr)), room, &data)?;
    argument.set_u32(TYPE, data_type);
    // The full length, even if not all was copied. The data are a few words.
    argument.set_u32(offset_of!(iommu_hw_info, data_len), data.len() as u32);
    let capabilities = info.capabilities.into_bits();
    argument.set_u64(offset_of!(iommu_hw_info, out_capabilities), capabilities);
    argument.set(offset_of!(iommu_hw_info, out_max_pasid_log2), [info.pasid_bits]);
    Ok(())
}

pub(super) fn invalidate(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    const COUNT: usize = offset_of!(iommu_hwpt_invalidate, entry_num);
    let count = argument.u32(COUNT);
    // The number of completed entries is always written back.
    argument.answer_anyhow();
    argument.set_u32(COUNT, 0);
    argument.reserved(offset_of!(iommu_hwpt_invalidate, __reserved))?;
    let list = argument.u64(offset_of!(iommu_hwpt_invalidate, data_uptr));
    let entry_len = argument.u32(offset_of!(iommu_hwpt_invalidate, entry_len));
    let too_much = u64::from(entry_len) > PAGE_SIZE || count as usize > MAX_INVALIDATE_ENTRIES;
    if count != 0 && (list == 0 || entry_len == 0 || too_much) {
        return refuse(Errno::EINVAL, format!("{count} entries of {entry_len} bytes at {list:#x}"));
    }
    let entries = PointedArray {
        user,
        data_type: argument.u32(offset_of!(iommu_hwpt_invalidate, data_type)),
        entry_length: entry_len,
        count,
        address: list,
    };
    let hwpt = argument.id(offset_of!(iommu_hwpt_invalidate, hwpt_id));
    let (done, outcome) = match host.objects().hwpt_invalidate(hwpt, &entries) {
        Ok(()) => (count, Ok(())),
        // At most `count`.
        Err(Partial { done, refusal }) => (done as u32, Err(refusal)),
    };
    argument.set_u32(COUNT, done);
    outcome
}

/// Linux ignores the reserved field.
pub(super) fn set_dirty_tracking(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let flags = argument.flags(offset_of!(iommu_hwpt_set_dirty_tracking, flags), ENABLE)?;
    let hwpt = argument.id(offset_of!(iommu_hwpt_set_dirty_tracking, hwpt_id));
    host.objects().hwpt_set_dirty_tracking(hwpt, flags & ENABLE != 0)
}

pub(super) fn get_dirty_bitmap(
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

/// Writes as much of `data` as fits in `room`, and zeroes to the rest.
fn write_and_clear(
    user: &dyn UserSpace,
    address: u64,
    room: u64,
    data: &[u8],
) -> Result<(), UserFault> {
    const ZEROES: [u8; 256] = [0; 256];
    let fitting = data.len().min(usize::try_from(room).unwrap_or(usize::MAX));
    let mut written = fitting as u64;
    if fitting > 0 {
        // At most the length of the data.
        user.write(address, data.get(..fitting).unwrap_or(data))?;
    }
    while written < room {
        let length = (room - written).min(ZEROES.len() as u64);
        let at = address.checked_add(written).ok_or(UserFault { address, length: room })?;
        user.write(at, ZEROES.get(..length as usize).unwrap_or(&ZEROES))?;
        written += length;
    }
    Ok(())
}

fn smmu_info_bytes(info: &iommu_hw_info_arm_smmuv3) -> Vec<u8> {
    let iommu_hw_info_arm_smmuv3 { flags, __reserved, idr, iidr, aidr } = *info;
    let words = [flags, __reserved].into_iter().chain(idr).chain([iidr, aidr]);
    words.flat_map(u32::to_ne_bytes).collect()
}

fn vtd_info_bytes(info: &iommu_hw_info_vtd) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<iommu_hw_info_vtd>());
    bytes.extend(info.flags.to_ne_bytes());
    bytes.extend(info.__reserved.to_ne_bytes());
    bytes.extend(info.cap_reg.to_ne_bytes());
    bytes.extend(info.ecap_reg.to_ne_bytes());
    bytes
}

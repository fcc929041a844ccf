// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of HWPTs, vIOMMUs and vDEVICEs, and `IOMMU_GET_HW_INFO`.

use std::mem::{offset_of, size_of};

use iommufd_bindings::*;

use super::argument::Argument;
use super::{UserFault, UserSpace};
use crate::emulated::ioas::PAGE_SIZE;
use crate::emulated::objects::{Entries, HwptRequest, InvalidateFormat, MAX_INVALIDATE_ENTRIES};
use crate::emulated::refusal::{refuse, Outcome};
use crate::emulated::EmulatedHost;
use crate::iommufd::{Errno, HwInfoData, HwptData, HwptFlags, ViommuKind};

const NONE: u32 = iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE;
const VTD_S1: u32 = iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1;
const VIOMMU_DEFAULT: u32 = iommu_viommu_type_IOMMU_VIOMMU_TYPE_DEFAULT;
const VIOMMU_ARM_SMMUV3: u32 = iommu_viommu_type_IOMMU_VIOMMU_TYPE_ARM_SMMUV3;

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
    let read = || {
        if data_type != VTD_S1 {
            return refuse(Errno::EOPNOTSUPP, format!("data of type {data_type}"));
        }
        if data_len as usize != size_of::<iommu_hwpt_vtd_s1>() {
            return refuse(Errno::EINVAL, format!("{data_len} bytes of VTD_S1 data"));
        }
        Ok(HwptData::VtdS1(read_vtd_s1(user, data_uptr)?))
    };
    let request = HwptRequest {
        flags: HwptFlags::from_bits(argument.u32(offset_of!(iommu_hwpt_alloc, flags))),
        dev: argument.id(offset_of!(iommu_hwpt_alloc, dev_id)),
        pt: argument.id(offset_of!(iommu_hwpt_alloc, pt_id)),
        fault: Some(argument.id(offset_of!(iommu_hwpt_alloc, fault_id))),
        data: if data_len == 0 { None } else { Some(&read) },
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
        HwInfoData::None => (iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE, Vec::new()),
        HwInfoData::Vtd(info) => {
            (iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD, vtd_info_bytes(&info))
        }
    };
    if wanted != iommu_hw_info_type_IOMMU_HW_INFO_TYPE_DEFAULT && wanted != data_type {
        return refuse(Errno::EOPNOTSUPP, format!("no information of type {wanted}"));
    }
    let room = u64::from(argument.u32(offset_of!(iommu_hw_info, data_len)));
    write_and_clear(user, argument.u64(offset_of!(iommu_hw_info, data_uptr)), room, &data)?;
    argument.set_u32(TYPE, data_type);
    // What the host knows, not what fitted. The data are a few words.
    argument.set_u32(offset_of!(iommu_hw_info, data_len), data.len() as u32);
    let capabilities = info.capabilities.into_bits();
    argument.set_u64(offset_of!(iommu_hw_info, out_capabilities), capabilities);
    argument.set(offset_of!(iommu_hw_info, out_max_pasid_log2), [info.max_pasid_log2]);
    Ok(())
}

pub(super) fn invalidate(
    host: &EmulatedHost,
    argument: &mut Argument,
    user: &dyn UserSpace,
) -> Outcome<()> {
    const COUNT: usize = offset_of!(iommu_hwpt_invalidate, entry_num);
    let count = argument.u32(COUNT);
    // How many entries are done is told in every case.
    argument.answer_anyhow();
    argument.set_u32(COUNT, 0);
    argument.reserved(offset_of!(iommu_hwpt_invalidate, __reserved))?;
    let list = argument.u64(offset_of!(iommu_hwpt_invalidate, data_uptr));
    let entry_len = argument.u32(offset_of!(iommu_hwpt_invalidate, entry_len));
    let too_much = u64::from(entry_len) > PAGE_SIZE || count as usize > MAX_INVALIDATE_ENTRIES;
    if count != 0 && (list == 0 || entry_len == 0 || too_much) {
        return refuse(Errno::EINVAL, format!("{count} entries of {entry_len} bytes at {list:#x}"));
    }
    let vtd_s1 = iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1;
    let data_type = argument.u32(offset_of!(iommu_hwpt_invalidate, data_type));
    let format =
        if data_type == vtd_s1 { InvalidateFormat::VtdS1 } else { InvalidateFormat::Other };
    let read = |number: usize| {
        if entry_len as usize != size_of::<iommu_hwpt_vtd_s1_invalidate>() {
            return refuse(Errno::EINVAL, format!("{entry_len} bytes of VTD_S1 entry"));
        }
        // An address that wraps leads nowhere.
        let offset = (number as u64).wrapping_mul(u64::from(entry_len));
        Ok(read_invalidation(user, list.wrapping_add(offset))?)
    };
    let hwpt = argument.id(offset_of!(iommu_hwpt_invalidate, hwpt_id));
    let entries = Entries { count: count as usize, read: &read };
    let (done, outcome) = match host.objects().hwpt_invalidate(hwpt, format, &entries) {
        Ok(()) => (count, Ok(())),
        // At most `count`.
        Err((done, refusal)) => (done as u32, Err(refusal)),
    };
    argument.set_u32(COUNT, done);
    outcome
}

pub(super) fn viommu(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    // Linux does not look at the reserved field.
    argument.flags(offset_of!(iommu_viommu_alloc, flags), 0)?;
    let kind = match argument.u32(offset_of!(iommu_viommu_alloc, type_)) {
        VIOMMU_DEFAULT => Some(ViommuKind::Default),
        VIOMMU_ARM_SMMUV3 => Some(ViommuKind::ArmSmmuV3),
        _ => None,
    };
    let dev = argument.id(offset_of!(iommu_viommu_alloc, dev_id));
    let hwpt = argument.id(offset_of!(iommu_viommu_alloc, hwpt_id));
    let mut objects = host.objects();
    let Some(kind) = kind else {
        objects.table().device(dev)?;
        return refuse(Errno::EOPNOTSUPP, "the IOMMU has no vIOMMU of this kind");
    };
    let id = objects.viommu_alloc(kind, dev, hwpt)?;
    argument.set_u32(offset_of!(iommu_viommu_alloc, out_viommu_id), id.0);
    Ok(())
}

pub(super) fn vdevice(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let viommu = argument.id(offset_of!(iommu_vdevice_alloc, viommu_id));
    let dev = argument.id(offset_of!(iommu_vdevice_alloc, dev_id));
    let virt_id = argument.u64(offset_of!(iommu_vdevice_alloc, virt_id));
    let id = host.objects().vdevice_alloc(viommu, dev, virt_id)?;
    argument.set_u32(offset_of!(iommu_vdevice_alloc, out_vdevice_id), id.0);
    Ok(())
}

/// Writes as much of `data` as there is `room` for, and zeroes into the rest of the room.
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

fn read_vtd_s1(user: &dyn UserSpace, address: u64) -> Result<iommu_hwpt_vtd_s1, UserFault> {
    let mut words = [[0; 8]; 3];
    user.read(address, words.as_flattened_mut())?;
    let [flags, pgtbl_addr, last] = words;
    let (addr_width, __reserved) = halves(last);
    Ok(iommu_hwpt_vtd_s1 {
        flags: u64::from_ne_bytes(flags),
        pgtbl_addr: u64::from_ne_bytes(pgtbl_addr),
        addr_width,
        __reserved,
    })
}

fn read_invalidation(
    user: &dyn UserSpace,
    address: u64,
) -> Result<iommu_hwpt_vtd_s1_invalidate, UserFault> {
    let mut words = [[0; 8]; 3];
    user.read(address, words.as_flattened_mut())?;
    let [addr, npages, last] = words;
    let (flags, __reserved) = halves(last);
    let (addr, npages) = (u64::from_ne_bytes(addr), u64::from_ne_bytes(npages));
    Ok(iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved })
}

fn vtd_info_bytes(info: &iommu_hw_info_vtd) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of::<iommu_hw_info_vtd>());
    bytes.extend(info.flags.to_ne_bytes());
    bytes.extend(info.__reserved.to_ne_bytes());
    bytes.extend(info.cap_reg.to_ne_bytes());
    bytes.extend(info.ecap_reg.to_ne_bytes());
    bytes
}

/// The two 32-bit fields that 8 bytes hold.
fn halves([a, b, c, d, e, f, g, h]: [u8; 8]) -> (u32, u32) {
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

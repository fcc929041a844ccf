// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls, with what is needed to fill in their structures.

use std::mem::{offset_of, size_of};

use arbitrary::{Result, Unstructured};
use iommufd_bindings::*;
use twostage_emulated::uapi::vfio_request as vfio;
use twostage_emulated::uapi::{ATTACH_IOMMUFD_PT, BIND_IOMMUFD, DETACH_IOMMUFD_PT};

use super::value::{value, Kind};

/// One ioctl.
#[derive(Debug)]
pub struct Ioctl {
    pub request: u32,
    size: usize,
    fields: &'static [Field],
}

/// A field of its structure. Other fields are zero.
#[derive(Debug)]
struct Field {
    offset: usize,
    size: usize,
    kind: Kind,
}

const fn size_of_field<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! ioctl {
    ($request:expr, $type:ident { $($field:ident: $kind:expr),* $(,)? }) => {
        Ioctl {
            request: $request,
            size: size_of::<$type>(),
            fields: &[$(Field {
                offset: offset_of!($type, $field),
                size: size_of_field(|structure: &$type| &structure.$field),
                kind: $kind,
            }),*],
        }
    };
}

/// `_IO(IOMMUFD_TYPE, number)`.
pub const fn iommufd(number: u32) -> u32 {
    (IOMMUFD_TYPE as u32) << 8 | number
}

use Kind::{Choice, Count, Fd, Flags, Id, Iova, Length, Pasid, Pointer, Word};

/// The ioctls of an iommufd.
pub const IOCTLS: &[Ioctl] = &[
    ioctl!(iommufd(IOMMUFD_CMD_DESTROY), iommu_destroy { id: Id }),
    ioctl!(iommufd(IOMMUFD_CMD_IOAS_ALLOC), iommu_ioas_alloc { flags: Flags(0) }),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_ALLOW_IOVAS),
        iommu_ioas_allow_iovas { ioas_id: Id, num_iovas: Count, allowed_iovas: Pointer }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_COPY),
        iommu_ioas_copy {
            flags: Flags(7),
            dst_ioas_id: Id,
            src_ioas_id: Id,
            length: Length,
            dst_iova: Iova,
            src_iova: Iova,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_IOVA_RANGES),
        iommu_ioas_iova_ranges { ioas_id: Id, num_iovas: Count, allowed_iovas: Pointer }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_MAP),
        iommu_ioas_map {
            flags: Flags(7),
            ioas_id: Id,
            user_va: Pointer,
            length: Length,
            iova: Iova,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_UNMAP),
        iommu_ioas_unmap { ioas_id: Id, iova: Iova, length: Length }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_OPTION),
        iommu_option { option_id: Choice(2), op: Choice(2), object_id: Id, val64: Choice(2) }
    ),
    ioctl!(iommufd(IOMMUFD_CMD_VFIO_IOAS), iommu_vfio_ioas { ioas_id: Id, op: Choice(3) }),
    ioctl!(
        iommufd(IOMMUFD_CMD_HWPT_ALLOC),
        iommu_hwpt_alloc {
            flags: Flags(0x1f),
            dev_id: Id,
            pt_id: Id,
            data_type: Choice(3),
            data_len: Count,
            data_uptr: Pointer,
            fault_id: Id,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_GET_HW_INFO),
        iommu_hw_info {
            flags: Flags(1),
            dev_id: Id,
            data_len: Count,
            data_uptr: Pointer,
            __bindgen_anon_1: Choice(3),
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING),
        iommu_hwpt_set_dirty_tracking { flags: Flags(1), hwpt_id: Id }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP),
        iommu_hwpt_get_dirty_bitmap {
            hwpt_id: Id,
            flags: Flags(1),
            iova: Iova,
            length: Length,
            page_size: Length,
            data: Pointer,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_HWPT_INVALIDATE),
        iommu_hwpt_invalidate {
            hwpt_id: Id,
            data_uptr: Pointer,
            data_type: Choice(2),
            entry_len: Count,
            entry_num: Count,
        }
    ),
    ioctl!(iommufd(IOMMUFD_CMD_FAULT_QUEUE_ALLOC), iommu_fault_alloc { flags: Flags(0) }),
    ioctl!(
        iommufd(IOMMUFD_CMD_IOAS_MAP_FILE),
        iommu_ioas_map_file {
            flags: Flags(7),
            ioas_id: Id,
            fd: Fd,
            start: Iova,
            length: Length,
            iova: Iova,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_VIOMMU_ALLOC),
        iommu_viommu_alloc {
            flags: Flags(0),
            type_: Choice(2),
            dev_id: Id,
            hwpt_id: Id,
            data_len: Count,
            data_uptr: Pointer,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_VDEVICE_ALLOC),
        iommu_vdevice_alloc { viommu_id: Id, dev_id: Id, virt_id: Word }
    ),
    ioctl!(iommufd(IOMMUFD_CMD_IOAS_CHANGE_PROCESS), iommu_ioas_change_process {}),
    ioctl!(
        iommufd(IOMMUFD_CMD_VEVENTQ_ALLOC),
        iommu_veventq_alloc {
            flags: Flags(0),
            viommu_id: Id,
            type_: Choice(2),
            veventq_depth: Count,
        }
    ),
    ioctl!(
        iommufd(IOMMUFD_CMD_HW_QUEUE_ALLOC),
        iommu_hw_queue_alloc {
            flags: Flags(0),
            viommu_id: Id,
            type_: Choice(2),
            index: Count,
            nesting_parent_iova: Iova,
            length: Length,
        }
    ),
];

/// `struct vfio_device_bind_iommufd`.
#[repr(C)]
struct Bind {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
    token_uuid_ptr: u64,
}

/// `struct vfio_device_attach_iommufd_pt`.
#[repr(C)]
struct Attach {
    argsz: u32,
    flags: u32,
    pt_id: u32,
    pasid: u32,
}

/// `struct vfio_device_detach_iommufd_pt`.
#[repr(C)]
struct Detach {
    argsz: u32,
    flags: u32,
    pasid: u32,
}

/// The ioctls of a device.
pub const DEVICE_IOCTLS: &[Ioctl] = &[
    ioctl!(BIND_IOMMUFD, Bind { flags: Flags(0), iommufd: Fd, token_uuid_ptr: Pointer }),
    ioctl!(ATTACH_IOMMUFD_PT, Attach { flags: Flags(1), pt_id: Id, pasid: Pasid }),
    ioctl!(DETACH_IOMMUFD_PT, Detach { flags: Flags(1), pasid: Pasid }),
];

/// `struct vfio_iommu_type1_info`.
#[repr(C)]
struct Info {
    argsz: u32,
    flags: u32,
    iova_pgsizes: u64,
    cap_offset: u32,
    pad: u32,
}

/// `struct vfio_iommu_type1_dma_map`.
#[repr(C)]
struct MapDma {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`.
#[repr(C)]
struct UnmapDma {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// The ioctls of a VFIO container that take a structure.
pub const CONTAINER_IOCTLS: &[Ioctl] = &[
    ioctl!(vfio(12), Info { flags: Flags(3), cap_offset: Count }),
    ioctl!(vfio(13), MapDma { flags: Flags(3), vaddr: Pointer, iova: Iova, size: Length }),
    ioctl!(vfio(14), UnmapDma { flags: Flags(3), iova: Iova, size: Length }),
];

/// Those that take a number: which, and the largest valid number.
pub const CONTAINER_NUMBERS: [(u32, u64); 3] = [(vfio(0), 0), (vfio(1), 10), (vfio(2), 8)];

impl Ioctl {
    /// A structure, its size first.
    pub fn argument(&self, input: &mut Unstructured) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.size];
        for Field { offset, size, kind } in self.fields {
            let word = value(input, *kind)?.to_le_bytes();
            bytes[*offset..offset + size].copy_from_slice(&word[..*size]);
        }
        let mut declared = self.size as u32;
        // Mostly valid; otherwise other sizes, and nonzero reserved fields.
        match input.arbitrary::<u8>()? {
            0..=0xdf => {}
            0xe0..=0xe7 => declared = input.arbitrary::<u8>()?.into(),
            0xe8..=0xef => bytes.resize(usize::from(input.arbitrary::<u8>()?).max(4), 0),
            0xf0..=0xf7 => {
                bytes.resize(self.size + 8, input.arbitrary()?);
                declared = bytes.len() as u32;
            }
            _ => {
                let at = usize::from(input.arbitrary::<u8>()?) % bytes.len();
                bytes[at] = input.arbitrary()?;
            }
        }
        bytes[..4].copy_from_slice(&declared.to_le_bytes());
        Ok(bytes)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The numbers and structures of `drivers/iommu/iommufd/iommufd_test.h`, with its names.

// Structures are complete, whether their fields are used or not.
#![allow(dead_code)]

use std::mem::{offset_of, size_of};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `struct iommu_test_cmd`, before the operation-specific part.
#[repr(C)]
pub struct Header {
    pub size: u32,
    pub op: u32,
    /// The object or descriptor of the operation.
    pub id: u32,
    pub reserved: u32,
}

/// Offset of the operation's part in `struct iommu_test_cmd`, in bytes.
pub const BODY: usize = size_of::<Header>();
/// Size of the union of all operations' parts, in bytes.
const BODY_SIZE: usize = size_of::<Dirty>() + size_of::<u32>() + size_of::<u32>();
/// Offset of its last field, in bytes.
const LAST: usize = BODY + size_of::<Dirty>();
/// `sizeof(struct iommu_test_cmd)`.
pub const SIZE: usize = BODY + BODY_SIZE;
/// Size of its first version, in bytes.
pub const MIN_SIZE: usize = LAST + size_of::<u32>();
/// `struct iommu_test_cmd`, the field `op`.
pub const OP: usize = offset_of!(Header, op);
/// `struct iommu_test_cmd`, the field `id`.
pub const ID: usize = offset_of!(Header, id);
/// The command number of `IOMMU_TEST_CMD`, relative to `IOMMUFD_CMD_BASE`.
pub const COMMAND: u32 = 32;

/// `enum`: the operations.
pub mod op {
    pub const ADD_RESERVED: u32 = 1;
    pub const MOCK_DOMAIN: u32 = 2;
    pub const MD_CHECK_MAP: u32 = 3;
    pub const MD_CHECK_REFS: u32 = 4;
    pub const CREATE_ACCESS: u32 = 5;
    pub const DESTROY_ACCESS_PAGES: u32 = 6;
    pub const ACCESS_PAGES: u32 = 7;
    pub const ACCESS_RW: u32 = 8;
    pub const SET_TEMP_MEMORY_LIMIT: u32 = 9;
    pub const MOCK_DOMAIN_REPLACE: u32 = 10;
    pub const ACCESS_REPLACE_IOAS: u32 = 11;
    pub const MOCK_DOMAIN_FLAGS: u32 = 12;
    pub const DIRTY: u32 = 13;
    pub const MD_CHECK_IOTLB: u32 = 14;
    pub const TRIGGER_IOPF: u32 = 15;
    pub const DEV_CHECK_CACHE: u32 = 16;
    pub const TRIGGER_VEVENT: u32 = 17;
    pub const PASID_ATTACH: u32 = 18;
    pub const PASID_REPLACE: u32 = 19;
    pub const PASID_DETACH: u32 = 20;
    pub const PASID_CHECK_HWPT: u32 = 21;
    pub const DMABUF_GET: u32 = 22;
    pub const DMABUF_REVOKE: u32 = 23;
}

/// `ADD_RESERVED`: bytes.
#[derive(FromBytes)]
#[repr(C)]
pub struct AddReserved {
    pub start: u64,
    pub length: u64,
}

/// `MOCK_DOMAIN` and `MOCK_DOMAIN_FLAGS`.
#[derive(FromBytes)]
#[repr(C)]
pub struct MockDomain {
    pub out_stdev_id: u32,
    pub out_hwpt_id: u32,
    pub out_idev_id: u32,
    /// `MOCK_DOMAIN_FLAGS` alone: `MOCK_FLAGS_DEVICE_*`.
    pub dev_flags: u32,
}

/// `SET_TEMP_MEMORY_LIMIT`: bytes.
#[derive(FromBytes)]
#[repr(C)]
pub struct MemoryLimit {
    pub limit: u32,
}

/// `MOCK_DOMAIN_REPLACE`.
#[derive(FromBytes)]
#[repr(C)]
pub struct MockDomainReplace {
    pub pt_id: u32,
}

/// `MD_CHECK_MAP`.
#[derive(FromBytes)]
#[repr(C)]
pub struct CheckMap {
    pub iova: u64,
    pub length: u64,
    pub uptr: u64,
}

/// `MD_CHECK_REFS`.
#[derive(FromBytes)]
#[repr(C)]
pub struct CheckRefs {
    pub length: u64,
    pub uptr: u64,
    pub refs: u32,
    pub padding: u32,
}

/// `CREATE_ACCESS`.
#[derive(FromBytes)]
#[repr(C)]
pub struct CreateAccess {
    pub out_access_fd: u32,
    pub flags: u32,
}

/// `DESTROY_ACCESS_PAGES`.
#[derive(FromBytes)]
#[repr(C)]
pub struct DestroyAccessPages {
    pub access_pages_id: u32,
}

/// `ACCESS_REPLACE_IOAS`.
#[derive(FromBytes)]
#[repr(C)]
pub struct AccessReplaceIoas {
    pub ioas_id: u32,
}

/// `ACCESS_PAGES`.
#[derive(FromBytes)]
#[repr(C)]
pub struct AccessPages {
    pub flags: u32,
    pub out_access_pages_id: u32,
    pub iova: u64,
    pub length: u64,
    pub uptr: u64,
}

/// `ACCESS_RW`.
#[derive(FromBytes)]
#[repr(C)]
pub struct AccessRw {
    pub iova: u64,
    pub length: u64,
    pub uptr: u64,
    pub flags: u32,
    pub padding: u32,
}

/// `DIRTY`: the largest of all.
#[derive(FromBytes)]
#[repr(C)]
pub struct Dirty {
    pub flags: u32,
    pub padding: u32,
    pub iova: u64,
    pub length: u64,
    pub page_size: u64,
    pub uptr: u64,
    pub out_nr_dirty: u64,
}

/// Operations on one cached entry: `MD_CHECK_IOTLB` and `DEV_CHECK_CACHE`.
#[derive(FromBytes)]
#[repr(C)]
pub struct CheckCache {
    pub id: u32,
    pub value: u32,
}

/// `TRIGGER_IOPF`.
#[derive(FromBytes)]
#[repr(C)]
pub struct TriggerIopf {
    pub dev_id: u32,
    pub pasid: u32,
    pub grpid: u32,
    pub perm: u32,
    pub addr: u64,
}

/// `TRIGGER_VEVENT`.
#[derive(FromBytes)]
#[repr(C)]
pub struct TriggerVevent {
    pub dev_id: u32,
}

/// `PASID_ATTACH`, `PASID_REPLACE`, `PASID_DETACH` and `PASID_CHECK_HWPT`.
#[derive(FromBytes)]
#[repr(C)]
pub struct PasidChange {
    pub pasid: u32,
    /// The IOAS or HWPT; not in `PASID_DETACH`.
    pub pt_id: u32,
}

/// `DMABUF_GET`.
#[derive(FromBytes)]
#[repr(C)]
pub struct DmabufGet {
    pub length: u32,
    pub open_flags: u32,
}

/// `DMABUF_REVOKE`.
#[derive(FromBytes)]
#[repr(C)]
pub struct DmabufRevoke {
    pub dmabuf_fd: i32,
    pub revoked: u32,
}

/// First and last IOVA of a mock domain of the default type.
pub const MOCK_APERTURE_START: u64 = 1 << 24;
/// See [`MOCK_APERTURE_START`].
pub const MOCK_APERTURE_LAST: u64 = (1 << 31) - 1;
/// The smallest page of a mock domain, in bytes: half of the host's.
pub const MOCK_PAGE_SIZE: u64 = 2048;
/// The page sizes of a mock domain of the huge type, in bytes, besides the host's.
pub const MOCK_HUGE_PAGE_SIZE: u64 = 512 * MOCK_PAGE_SIZE;

/// `struct iommu_hwpt_selftest`, `pagetable_type`.
pub const MOCK_IOMMUPT_DEFAULT: u32 = 0;
/// As [`MOCK_IOMMUPT_DEFAULT`].
pub const MOCK_IOMMUPT_HUGE: u32 = 1;

/// `ACCESS_PAGES`, flags: the pages are written.
pub const MOCK_FLAGS_ACCESS_WRITE: u32 = 1 << 0;
/// `ACCESS_RW`, flags: writes.
pub const MOCK_ACCESS_RW_WRITE: u32 = 1 << 0;
/// `ACCESS_RW`, flags: not by the kernel's fast path for its own memory.
pub const MOCK_ACCESS_RW_SLOW_PATH: u32 = 1 << 2;
/// `ACCESS_PAGES`, `ACCESS_RW`, `IOAS_COPY`, flags: the IOVA is the index of an area, and an
/// offset.
pub const MOCK_FLAGS_ACCESS_SYZ: u32 = 1 << 16;
/// `CREATE_ACCESS`, flags: it pins pages.
pub const MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES: u32 = 1 << 0;

/// `MOCK_DOMAIN_FLAGS`, flags: no dirty tracking.
pub const MOCK_FLAGS_DEVICE_NO_DIRTY: u32 = 1 << 0;
/// `MOCK_DOMAIN_FLAGS`, flags: has PASIDs.
pub const MOCK_FLAGS_DEVICE_PASID: u32 = 1 << 2;
/// Width of the PASIDs of a mock device that has them, in bits.
pub const MOCK_PASID_WIDTH: u8 = 20;
/// The PASID whose replacement fails once.
pub const IOMMU_TEST_PASID_RESERVED: u32 = 1024;

/// Entries of the IOTLB of a nested mock domain.
pub const MOCK_NESTED_DOMAIN_IOTLB_NUM: usize = 4;
/// Entries of the cache of a mock device.
pub const MOCK_DEV_CACHE_NUM: usize = 4;
/// Initial value of every entry of a mock device's cache.
pub const IOMMU_TEST_DEV_CACHE_DEFAULT: u32 = 0xbaddad;

/// `GET_HW_INFO`: the type of [`HwInfo`].
pub const IOMMU_HW_INFO_TYPE_SELFTEST: u32 = 0xfeed_beef;
/// `GET_HW_INFO`: the value of [`HwInfo::test_reg`].
pub const IOMMU_HW_INFO_SELFTEST_REGVAL: u32 = 0xdead_beef;

/// `struct iommu_test_hw_info`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub struct HwInfo {
    pub flags: u32,
    pub test_reg: u32,
}

/// `HWPT_ALLOC`: the type of [`HwptData`].
pub const IOMMU_HWPT_DATA_SELFTEST: u32 = 0xdead;

/// `struct iommu_hwpt_selftest`.
#[derive(FromBytes, Default)]
#[repr(C)]
pub struct HwptData {
    /// Initial value of every entry of the IOTLB.
    pub iotlb: u32,
    pub pagetable_type: u32,
}

impl HwptData {
    /// Size of its first version, in bytes.
    pub const MIN_SIZE: usize = offset_of!(Self, pagetable_type);
}

/// `HWPT_INVALIDATE` on a nested HWPT: the type of [`HwptInvalidate`].
pub const IOMMU_HWPT_INVALIDATE_DATA_SELFTEST: u32 = 0xdead_beef;
/// `HWPT_INVALIDATE` on a vIOMMU: the type of [`ViommuInvalidate`].
pub const IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST: u32 = 0xdead_beef;
/// Flag of both: every entry, whatever index is given.
pub const IOMMU_TEST_INVALIDATE_FLAG_ALL: u32 = 1 << 0;

/// `struct iommu_hwpt_invalidate_selftest`.
#[derive(FromBytes)]
#[repr(C)]
pub struct HwptInvalidate {
    pub flags: u32,
    pub iotlb_id: u32,
}

/// `struct iommu_viommu_invalidate_selftest`.
#[derive(FromBytes)]
#[repr(C)]
pub struct ViommuInvalidate {
    pub flags: u32,
    pub vdev_id: u32,
    pub cache_id: u32,
}

/// `VIOMMU_ALLOC`: the type of a mock vIOMMU, and of its [`ViommuData`].
pub const IOMMU_VIOMMU_TYPE_SELFTEST: u32 = 0xdead_beef;

/// `struct iommu_viommu_selftest`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Clone, Copy)]
#[repr(C)]
pub struct ViommuData {
    pub in_data: u32,
    pub out_data: u32,
    pub out_mmap_offset: u64,
    pub out_mmap_length: u64,
}

impl ViommuData {
    /// Size of its first version, in bytes.
    pub const MIN_SIZE: usize = offset_of!(Self, out_mmap_offset);
}

/// `VEVENTQ_ALLOC`: the type of a mock vIOMMU's event queue.
pub const IOMMU_VEVENTQ_TYPE_SELFTEST: u32 = 0xbeef_beef;
/// `HW_QUEUE_ALLOC`: the type of a mock vIOMMU's queue.
pub const IOMMU_HW_QUEUE_TYPE_SELFTEST: u32 = 0xdead_beef;
/// Number of queues of a mock vIOMMU.
pub const IOMMU_TEST_HW_QUEUE_MAX: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_as_long_as_its_largest_operation() {
        assert_eq!((BODY, size_of::<Dirty>()), (16, 48));
        assert_eq!((SIZE, MIN_SIZE), (72, 68));
    }
}

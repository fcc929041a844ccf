// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls that `iommufd-ioctls` and `vfio-ioctls` lack, or have in an unusable form; the only
//! file of the kernel host with `unsafe`.
//!
//! [`IommuFd`] of `iommufd-ioctls` is used as it is: [`IommuFdExt`] adds, in its style, what could
//! be added there. `IOMMU_IOAS_MAP` and `MAP_FILE` are here because that crate passes the kernel,
//! which writes the IOVA, a shared reference. Binding and attaching are here because `vfio-ioctls`
//! does both inside its own device type, which allocates an IOAS, needs KVM, hides the ID of the
//! attached page table, and panics if a device cannot be detached. All of it is in
//! `docs/upstream.md`.
#![allow(unsafe_code)]

use std::fs::File;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
#[cfg(feature = "vfio-ioctls")]
use std::os::fd::{BorrowedFd, OwnedFd};

use iommufd_bindings::*;
use iommufd_ioctls::{IommuFd, IommufdError};
use vfio_bindings::bindings::vfio::*;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;

use crate::iommufd::{Errno, UserMemory};

// vmm-sys-util's macro makes C-style functions.
#[allow(non_snake_case, missing_docs)]
mod numbers {
    use super::*;

    ioctl_io_nr!(IOMMU_IOAS_ALLOW_IOVAS, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_ALLOW_IOVAS);
    ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_IOVA_RANGES);
    ioctl_io_nr!(IOMMU_IOAS_MAP, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_MAP);
    ioctl_io_nr!(IOMMU_IOAS_MAP_FILE, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_MAP_FILE);
    ioctl_io_nr!(IOMMU_IOAS_COPY, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_COPY);
    ioctl_io_nr!(
        IOMMU_HWPT_SET_DIRTY_TRACKING,
        IOMMUFD_TYPE as u32,
        IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING
    );
    ioctl_io_nr!(
        IOMMU_HWPT_GET_DIRTY_BITMAP,
        IOMMUFD_TYPE as u32,
        IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP
    );
    ioctl_io_nr!(IOMMU_FAULT_QUEUE_ALLOC, IOMMUFD_TYPE as u32, IOMMUFD_CMD_FAULT_QUEUE_ALLOC);
    ioctl_io_nr!(VFIO_DEVICE_BIND_IOMMUFD, VFIO_TYPE as u32, VFIO_BASE + 18);
    ioctl_io_nr!(VFIO_DEVICE_ATTACH_IOMMUFD_PT, VFIO_TYPE as u32, VFIO_BASE + 19);
    ioctl_io_nr!(VFIO_DEVICE_DETACH_IOMMUFD_PT, VFIO_TYPE as u32, VFIO_BASE + 20);
}
use numbers::*;

/// The result of an ioctl.
type Result<T> = std::result::Result<T, Errno>;

/// The size of a structure, as a field of it.
pub(super) const fn size<T>() -> u32 {
    // Every structure and entry of the uAPI is shorter than a page.
    size_of::<T>() as u32
}

/// The error of this thread's last system call.
fn last_errno() -> Errno {
    Errno::from_raw(vmm_sys_util::errno::Error::last().errno())
}

/// The errno of a failed ioctl of `iommufd-ioctls`.
pub(super) fn errno_of(error: IommufdError) -> Errno {
    let source = std::error::Error::source(&error);
    let errno = source.and_then(|source| source.downcast_ref::<vmm_sys_util::errno::Error>());
    errno.map_or(Errno::EIO, |error| Errno::from_raw(error.errno()))
}

/// Room for the information of an IOMMU of any type.
#[repr(C)]
pub(super) union HwInfoRoom {
    vtd: iommu_hw_info_vtd,
    smmuv3: iommu_hw_info_arm_smmuv3,
}

impl HwInfoRoom {
    /// Zeroed.
    pub fn new() -> Self {
        // SAFETY: all zeros are a valid value of each of these structures of numbers.
        unsafe { std::mem::zeroed() }
    }

    /// The contents as those of a VT-d.
    pub fn vtd(&self) -> iommu_hw_info_vtd {
        // SAFETY: a structure of numbers, for which all bit patterns are valid, fully initialized.
        unsafe { self.vtd }
    }

    /// The contents as those of an SMMUv3.
    pub fn smmuv3(&self) -> iommu_hw_info_arm_smmuv3 {
        // SAFETY: as above.
        unsafe { self.smmuv3 }
    }
}

/// One ioctl with a structure that the kernel reads and writes.
///
/// # Safety
/// `argument` must be the structure of `request`, and its pointers must be valid for what the
/// request does with them, as long as the kernel uses them.
unsafe fn call<T>(fd: &impl AsRawFd, request: libc::c_ulong, argument: &mut T) -> Result<()> {
    // SAFETY: guaranteed by the caller; the reference is valid for the call.
    match unsafe { ioctl_with_mut_ref(fd, request, argument) } {
        ..0 => Err(last_errno()),
        _ => Ok(()),
    }
}

/// Wraps a descriptor that the kernel has just returned.
fn new_file(fd: u32) -> Result<File> {
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: it is open, and nobody else knows it yet.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What [`IommuFd`] lacks. Pointers are slices and references here, so that callers cannot pass
/// invalid memory.
pub(super) trait IommuFdExt {
    /// `IOMMU_GET_HW_INFO`, with the data.
    fn hw_info_of(&self, dev: u32, data: &mut HwInfoRoom) -> Result<iommu_hw_info>;

    /// `IOMMU_IOAS_ALLOW_IOVAS`.
    fn allow_iommu_ioas_iovas(&self, ioas: u32, ranges: &[iommu_iova_range]) -> Result<()>;

    /// `IOMMU_IOAS_IOVA_RANGES`: fills `ranges` as far as possible, and returns the total number
    /// and the alignment.
    fn iommu_ioas_iova_ranges(
        &self,
        ioas: u32,
        ranges: &mut [iommu_iova_range],
    ) -> Result<(usize, u64)>;

    /// `IOMMU_IOAS_MAP`; returns the IOVA. The memory must stay mapped until it is unmapped from
    /// the IOAS: the kernel may look up its pages at any time.
    fn map_user_memory(&self, ioas: u32, flags: u32, memory: &UserMemory, iova: u64)
        -> Result<u64>;

    /// `IOMMU_IOAS_MAP_FILE`: `length` bytes of `file` from `start` on; returns the IOVA.
    fn map_memory_file(
        &self,
        ioas: u32,
        flags: u32,
        file: &File,
        start: u64,
        length: u64,
        iova: u64,
    ) -> Result<u64>;

    /// `IOMMU_IOAS_COPY`; `copy.dst_iova` is the IOVA when it returns.
    fn copy_iommu_ioas(&self, copy: &mut iommu_ioas_copy) -> Result<()>;

    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`.
    fn set_hwpt_dirty_tracking(&self, hwpt: u32, enable: bool) -> Result<()>;

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`. `bitmap` must have a bit for each `page_size` of `length`:
    /// otherwise `EFAULT`, as if the kernel ran off its end.
    fn get_hwpt_dirty_bitmap(
        &self,
        range: iommu_hwpt_get_dirty_bitmap,
        bitmap: &mut [u64],
    ) -> Result<()>;

    /// `IOMMU_FAULT_QUEUE_ALLOC`: its id and its file.
    fn alloc_fault_queue(&self) -> Result<(u32, File)>;
}

impl IommuFdExt for IommuFd {
    fn hw_info_of(&self, dev: u32, data: &mut HwInfoRoom) -> Result<iommu_hw_info> {
        let mut info = iommu_hw_info {
            size: size::<iommu_hw_info>(),
            dev_id: dev,
            data_len: size::<HwInfoRoom>(),
            data_uptr: std::ptr::from_mut(data) as u64,
            ..Default::default()
        };
        self.get_hw_info(&mut info).map_err(errno_of)?;
        Ok(info)
    }

    fn allow_iommu_ioas_iovas(&self, ioas: u32, ranges: &[iommu_iova_range]) -> Result<()> {
        let mut allow = iommu_ioas_allow_iovas {
            size: size::<iommu_ioas_allow_iovas>(),
            ioas_id: ioas,
            num_iovas: ranges.len().try_into().map_err(|_| Errno::E2BIG)?,
            allowed_iovas: ranges.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel reads `num_iovas` ranges.
        unsafe { call(self, IOMMU_IOAS_ALLOW_IOVAS(), &mut allow) }
    }

    fn iommu_ioas_iova_ranges(
        &self,
        ioas: u32,
        ranges: &mut [iommu_iova_range],
    ) -> Result<(usize, u64)> {
        let mut query = iommu_ioas_iova_ranges {
            size: size::<iommu_ioas_iova_ranges>(),
            ioas_id: ioas,
            num_iovas: ranges.len().try_into().map_err(|_| Errno::E2BIG)?,
            allowed_iovas: ranges.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel writes at most `num_iovas` ranges, for which any bits are values.
        match unsafe { call(self, IOMMU_IOAS_IOVA_RANGES(), &mut query) } {
            Ok(()) | Err(Errno::EMSGSIZE) => {
                Ok((query.num_iovas as usize, query.out_iova_alignment))
            }
            Err(errno) => Err(errno),
        }
    }

    fn map_user_memory(
        &self,
        ioas: u32,
        flags: u32,
        memory: &UserMemory,
        iova: u64,
    ) -> Result<u64> {
        let mut map = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags,
            ioas_id: ioas,
            user_va: memory.user_va(),
            length: memory.length(),
            iova,
            ..Default::default()
        };
        // SAFETY: a `UserMemory` is accessed as a guest's, without Rust references to it: devices
        // may write to it as guests do. The caller guarantees that it stays; soundness does not
        // depend on that, as the kernel pins pages or refuses.
        unsafe { call(self, IOMMU_IOAS_MAP(), &mut map) }?;
        Ok(map.iova)
    }

    fn map_memory_file(
        &self,
        ioas: u32,
        flags: u32,
        file: &File,
        start: u64,
        length: u64,
        iova: u64,
    ) -> Result<u64> {
        let mut map = iommu_ioas_map_file {
            size: size::<iommu_ioas_map_file>(),
            flags,
            ioas_id: ioas,
            fd: file.as_raw_fd(),
            start,
            length,
            iova,
        };
        // SAFETY: it contains no pointers; the kernel holds its own reference to the file.
        unsafe { call(self, IOMMU_IOAS_MAP_FILE(), &mut map) }?;
        Ok(map.iova)
    }

    fn copy_iommu_ioas(&self, copy: &mut iommu_ioas_copy) -> Result<()> {
        // SAFETY: it contains no pointers.
        unsafe { call(self, IOMMU_IOAS_COPY(), copy) }
    }

    fn set_hwpt_dirty_tracking(&self, hwpt: u32, enable: bool) -> Result<()> {
        let mut set = iommu_hwpt_set_dirty_tracking {
            size: size::<iommu_hwpt_set_dirty_tracking>(),
            flags: if enable {
                iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE
            } else {
                0
            },
            hwpt_id: hwpt,
            ..Default::default()
        };
        // SAFETY: it contains no pointers.
        unsafe { call(self, IOMMU_HWPT_SET_DIRTY_TRACKING(), &mut set) }
    }

    fn get_hwpt_dirty_bitmap(
        &self,
        mut range: iommu_hwpt_get_dirty_bitmap,
        bitmap: &mut [u64],
    ) -> Result<()> {
        range.size = size::<iommu_hwpt_get_dirty_bitmap>();
        range.data = bitmap.as_mut_ptr() as u64;
        // Linux 7.2 accepts both, and then sets bits beyond the range.
        if range.length == 0 || !range.page_size.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        if range.length.div_ceil(range.page_size).div_ceil(64) > bitmap.len() as u64 {
            return Err(Errno::EFAULT);
        }
        // SAFETY: the kernel only sets bits of the range, and the bitmap was checked to have them.
        unsafe { call(self, IOMMU_HWPT_GET_DIRTY_BITMAP(), &mut range) }
    }

    fn alloc_fault_queue(&self) -> Result<(u32, File)> {
        let mut alloc =
            iommu_fault_alloc { size: size::<iommu_fault_alloc>(), ..Default::default() };
        // SAFETY: it contains no pointers.
        unsafe { call(self, IOMMU_FAULT_QUEUE_ALLOC(), &mut alloc) }?;
        Ok((alloc.out_fault_id, new_file(alloc.out_fault_fd)?))
    }
}

/// The operations of a VFIO character device for iommufd (`linux/vfio.h`).
pub(super) trait VfioCdev {
    /// `VFIO_DEVICE_BIND_IOMMUFD`: the id of the device's object.
    fn bind_iommufd(&self, iommufd: &IommuFd) -> Result<u32>;

    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`, of the device or of one of its PASIDs; returns the ID of
    /// the HWPT used.
    fn attach_iommufd_pt(&self, pasid: Option<u32>, pt: u32) -> Result<u32>;

    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    fn detach_iommufd_pt(&self, pasid: Option<u32>) -> Result<()>;
}

impl VfioCdev for File {
    fn bind_iommufd(&self, iommufd: &IommuFd) -> Result<u32> {
        // The version before tokens: any kernel with character devices accepts it.
        let mut bind = vfio_device_bind_iommufd {
            argsz: std::mem::offset_of!(vfio_device_bind_iommufd, token_uuid_ptr) as u32,
            iommufd: iommufd.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: no flag says that the pointer is valid, so the kernel does not use it.
        unsafe { call(self, VFIO_DEVICE_BIND_IOMMUFD(), &mut bind) }?;
        Ok(bind.out_devid)
    }

    fn attach_iommufd_pt(&self, pasid: Option<u32>, pt: u32) -> Result<u32> {
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size::<vfio_device_attach_iommufd_pt>(),
            flags: pasid.map_or(0, |_| VFIO_DEVICE_ATTACH_PASID),
            pt_id: pt,
            pasid: pasid.unwrap_or(0),
        };
        // SAFETY: it contains no pointers.
        unsafe { call(self, VFIO_DEVICE_ATTACH_IOMMUFD_PT(), &mut attach) }?;
        Ok(attach.pt_id)
    }

    fn detach_iommufd_pt(&self, pasid: Option<u32>) -> Result<()> {
        let detach = vfio_device_detach_iommufd_pt {
            argsz: size::<vfio_device_detach_iommufd_pt>(),
            flags: pasid.map_or(0, |_| VFIO_DEVICE_DETACH_PASID),
            pasid: pasid.unwrap_or(0),
        };
        // SAFETY: the kernel reads the structure, which contains no pointers.
        match unsafe { ioctl_with_ref(self, VFIO_DEVICE_DETACH_IOMMUFD_PT(), &detach) } {
            ..0 => Err(last_errno()),
            _ => Ok(()),
        }
    }
}

/// A duplicate of the descriptor of `device`.
#[cfg(feature = "vfio-ioctls")]
pub(super) fn duplicate(device: &vfio_ioctls::VfioDevice) -> Result<OwnedFd> {
    // SAFETY: the device, which is borrowed for longer, owns it.
    let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    fd.try_clone_to_owned().map_err(errno)
}

/// The type returned by `IOMMU_GET_HW_INFO`.
pub(super) fn hw_info_type(info: &iommu_hw_info) -> u32 {
    // SAFETY: both union fields are numbers of the same size.
    unsafe { info.__bindgen_anon_1.out_data_type }
}

/// Whether `IOMMU_IOAS_MAP_FILE` supports `file`: memory of tmpfs (memfd, /dev/shm) or hugetlbfs.
pub(super) fn is_memory_file(file: &File) -> bool {
    // SAFETY: all zeros are a valid value of this structure of numbers.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the structure may be written.
    let result = unsafe { libc::fstatfs(file.as_raw_fd(), &mut status) };
    result == 0 && matches!(status.f_type, libc::TMPFS_MAGIC | libc::HUGETLBFS_MAGIC)
}

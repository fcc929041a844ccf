// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The byte-level uAPI of `linux/iommufd.h` and `linux/vfio.h` over the emulated host.
//!
//! The arguments of `ioctl(2)` are decoded as in Linux: sizes, excess bytes, reserved fields, flags
//! and user pointers are checked in the same order, with the same errno, and the same bytes are
//! written back. The rules of the objects are those of [`EmulatedHost`].

mod argument;
mod hwpt;
mod ioas;
mod process;
#[cfg(test)]
mod tests;
mod vfio;
mod vfio_compat;
mod viommu;

pub use crate::host::user_space::{
    Credentials, LockedMemory, RegionSpace, TestFile, UserFault, UserSpace,
};
pub use process::Process;
pub use vfio::{vfio_request, DeviceFile, ATTACH_IOMMUFD_PT, BIND_IOMMUFD, DETACH_IOMMUFD_PT};

pub(crate) use argument::Argument;

use std::mem::{offset_of, size_of};

use iommufd_bindings::*;

use crate::host::refusal::Outcome;
use crate::{EmulatedHost, TEST_OPERATIONS};
use twostage::iommufd::Errno;

/// One ioctl of `/dev/iommu`.
pub(crate) struct Operation {
    pub number: u32,
    /// Size of the structure in this version of the uAPI, in bytes.
    pub size: usize,
    /// Size of its first version, in bytes.
    pub min_size: usize,
    pub run: fn(&EmulatedHost, &mut Argument, &dyn Process) -> Outcome<()>,
}

/// The test ioctl of Linux's selftests.
pub(crate) struct TestOperations {
    /// `IOMMU_TEST_CMD`: one ioctl, many operations.
    pub command: Operation,
    /// Converts the arguments of an ordinary ioctl, with this number, from a form used by tests.
    pub convert: fn(&EmulatedHost, u32, &mut Argument),
}

/// The operation `number` on the structure `$type`, whose first version ended after `$last`.
macro_rules! operation {
    ($number:ident, $type:ident, $last:ident: $field:ty, $run:expr) => {
        Operation {
            number: $number,
            size: size_of::<$type>(),
            min_size: offset_of!($type, $last) + size_of::<$field>(),
            run: |host, argument, process| $run(host, argument, process),
        }
    };
}

/// Every ioctl of Linux 7.2, in the order of their numbers.
static OPERATIONS: [Operation; 21] = [
    operation!(IOMMUFD_CMD_DESTROY, iommu_destroy, id: u32, ioas::destroy),
    operation!(IOMMUFD_CMD_IOAS_ALLOC, iommu_ioas_alloc, out_ioas_id: u32, ioas::alloc),
    operation!(
        IOMMUFD_CMD_IOAS_ALLOW_IOVAS,
        iommu_ioas_allow_iovas,
        allowed_iovas: u64,
        ioas::allow_iovas
    ),
    operation!(IOMMUFD_CMD_IOAS_COPY, iommu_ioas_copy, src_iova: u64, ioas::copy),
    operation!(
        IOMMUFD_CMD_IOAS_IOVA_RANGES,
        iommu_ioas_iova_ranges,
        out_iova_alignment: u64,
        ioas::iova_ranges
    ),
    operation!(IOMMUFD_CMD_IOAS_MAP, iommu_ioas_map, iova: u64, ioas::map),
    operation!(IOMMUFD_CMD_IOAS_UNMAP, iommu_ioas_unmap, length: u64, ioas::unmap),
    operation!(IOMMUFD_CMD_OPTION, iommu_option, val64: u64, ioas::option),
    operation!(IOMMUFD_CMD_VFIO_IOAS, iommu_vfio_ioas, __reserved: u16, vfio_compat::vfio_ioas),
    operation!(IOMMUFD_CMD_HWPT_ALLOC, iommu_hwpt_alloc, __reserved: u32, hwpt::alloc),
    operation!(IOMMUFD_CMD_GET_HW_INFO, iommu_hw_info, __reserved: [u8; 3], hwpt::hw_info),
    operation!(
        IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
        iommu_hwpt_set_dirty_tracking,
        __reserved: u32,
        hwpt::set_dirty_tracking
    ),
    operation!(
        IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP,
        iommu_hwpt_get_dirty_bitmap,
        data: u64,
        hwpt::get_dirty_bitmap
    ),
    operation!(
        IOMMUFD_CMD_HWPT_INVALIDATE,
        iommu_hwpt_invalidate,
        __reserved: u32,
        hwpt::invalidate
    ),
    operation!(
        IOMMUFD_CMD_FAULT_QUEUE_ALLOC,
        iommu_fault_alloc,
        out_fault_fd: u32,
        viommu::fault_queue
    ),
    operation!(IOMMUFD_CMD_IOAS_MAP_FILE, iommu_ioas_map_file, iova: u64, ioas::map_file),
    operation!(IOMMUFD_CMD_VIOMMU_ALLOC, iommu_viommu_alloc, out_viommu_id: u32, viommu::alloc),
    operation!(IOMMUFD_CMD_VDEVICE_ALLOC, iommu_vdevice_alloc, virt_id: u64, viommu::vdevice),
    operation!(
        IOMMUFD_CMD_IOAS_CHANGE_PROCESS,
        iommu_ioas_change_process,
        __reserved: u32,
        ioas::change_process
    ),
    operation!(
        IOMMUFD_CMD_VEVENTQ_ALLOC,
        iommu_veventq_alloc,
        out_veventq_fd: u32,
        viommu::event_queue
    ),
    operation!(IOMMUFD_CMD_HW_QUEUE_ALLOC, iommu_hw_queue_alloc, length: u64, viommu::hw_queue),
];

/// The operation with `number`.
fn operation(number: u32) -> Option<&'static Operation> {
    let command = TEST_OPERATIONS.map(|tests| &tests.command);
    command
        .filter(|command| command.number == number)
        .or_else(|| OPERATIONS.get(number.checked_sub(IOMMUFD_CMD_BASE)? as usize))
}

/// The number of an ioctl of `linux/iommufd.h`: `_IO(IOMMUFD_TYPE, number)`.
pub const fn iommufd_request(number: u32) -> u32 {
    (IOMMUFD_TYPE as u32) << 8 | number
}

impl EmulatedHost {
    /// `ioctl(2)` on `/dev/iommu`; returns its result.
    ///
    /// `argument` is the memory that the third parameter points to, as far as the process may
    /// access it; pointers in it are addresses of `process`, which must not call the host except to
    /// drop a file.
    ///
    /// # Errors
    /// Linux's.
    pub fn ioctl(
        &self,
        request: u32,
        argument: &mut [u8],
        process: &dyn Process,
    ) -> Result<i32, Errno> {
        let Some(operation) = operation(request & 0xff) else {
            return Err(Errno::ENOTTY);
        };
        let size = Argument::declared_size(argument)?;
        if request != iommufd_request(operation.number) {
            return Err(Errno::ENOTTY);
        }
        let mut copy = Argument::copy_in(argument, size, operation.size, operation.min_size)?;
        if let Some(tests) = TEST_OPERATIONS {
            (tests.convert)(self, operation.number, &mut copy);
        }
        let outcome = (operation.run)(self, &mut copy, process);
        if outcome.is_ok() || copy.is_answer() {
            copy.copy_out(argument, size);
        }
        outcome.map(|()| copy.result()).map_err(|refusal| {
            log::debug!("ioctl {request:#x}: {}: {}", refusal.errno, refusal.detail);
            refusal.errno
        })
    }
}

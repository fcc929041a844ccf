// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An iommufd as a VFIO container: its ioctls of `linux/vfio.h`, and `IOMMU_VFIO_IOAS`.

mod dma;
mod info;

use std::mem::offset_of;

use iommufd_bindings::*;
use vfio_bindings::bindings::vfio::{
    VFIO_TYPE1v2_IOMMU as VFIO_TYPE1V2_IOMMU, VFIO_API_VERSION, VFIO_DMA_CC_IOMMU,
    VFIO_NOIOMMU_IOMMU, VFIO_TYPE1_IOMMU, VFIO_UNMAP_ALL,
};

use super::argument::Argument;
use super::vfio_request;
use super::UserSpace;
use crate::host::refusal::{refuse, Outcome};
use crate::EmulatedHost;
use twostage::iommufd::Errno;

const GET_API_VERSION: u32 = vfio_request(0);
const CHECK_EXTENSION: u32 = vfio_request(1);
const SET_IOMMU: u32 = vfio_request(2);
const IOMMU_GET_INFO: u32 = vfio_request(12);
const IOMMU_MAP_DMA: u32 = vfio_request(13);
const IOMMU_UNMAP_DMA: u32 = vfio_request(14);

const GET: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_GET;
const SET: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET;
const CLEAR: u32 = iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_CLEAR;

impl EmulatedHost {
    /// `ioctl(2)` of a VFIO container on the iommufd: for ioctls that are not in [`Self::ioctl`].
    ///
    /// `argument` is the third parameter, a number or an address of `user`; returns the call's
    /// result. `user` must not call the host.
    ///
    /// # Errors
    /// Linux's; `ENOTTY` for what Linux's iommufd does not support, including
    /// `VFIO_IOMMU_DIRTY_PAGES`.
    pub fn vfio_ioctl(
        &self,
        request: u32,
        argument: u64,
        user: &dyn UserSpace,
    ) -> Result<i32, Errno> {
        let outcome = match request {
            GET_API_VERSION => Ok(VFIO_API_VERSION as i32),
            CHECK_EXTENSION => check_extension(self, argument),
            SET_IOMMU => set_iommu(self, argument, user).map(|()| 0),
            IOMMU_GET_INFO => info::get_info(self, argument, user).map(|()| 0),
            IOMMU_MAP_DMA => dma::map(self, argument, user).map(|()| 0),
            IOMMU_UNMAP_DMA => dma::unmap(self, argument, user).map(|()| 0),
            _ => refuse(Errno::ENOTTY, "no ioctl of an iommufd"),
        };
        outcome.map_err(|refusal| {
            log::debug!("VFIO ioctl {request:#x}: {}: {}", refusal.errno, refusal.detail);
            refusal.errno
        })
    }

    /// A VFIO group whose device has an IOMMU is added to the container
    /// (`VFIO_GROUP_SET_CONTAINER`): VFIO's ioctls get an IOAS if they have none.
    ///
    /// # Errors
    /// `EINVAL` the container has a device without an IOMMU; `ENOMEM` no object ID is left.
    pub fn vfio_add_group(&self) -> Result<(), Errno> {
        self.objects().create_vfio_ioas().map_err(|refusal| refusal.errno)
    }

    /// A VFIO group whose device has no IOMMU is added to the container: VFIO's ioctls refuse
    /// everything but `VFIO_NOIOMMU_IOMMU` from now on.
    ///
    /// # Errors
    /// `EINVAL` VFIO's ioctls have an IOAS.
    pub fn vfio_add_group_without_iommu(&self) -> Result<(), Errno> {
        self.objects().set_vfio_no_iommu().map_err(|refusal| refusal.errno)
    }
}

/// `IOMMU_VFIO_IOAS`.
pub(super) fn vfio_ioas(
    host: &EmulatedHost,
    argument: &mut Argument,
    _: &dyn UserSpace,
) -> Outcome<()> {
    let reserved = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_vfio_ioas, __reserved)));
    if reserved != 0 {
        return refuse(Errno::EOPNOTSUPP, format!("the reserved field is {reserved:#x}"));
    }
    let ioas = argument.id(offset_of!(iommu_vfio_ioas, ioas_id));
    let operation = u16::from_ne_bytes(argument.bytes(offset_of!(iommu_vfio_ioas, op)));
    match u32::from(operation) {
        GET => {
            let ioas = host.objects().vfio_ioas()?;
            argument.set_u32(offset_of!(iommu_vfio_ioas, ioas_id), ioas.0);
            Ok(())
        }
        SET => host.objects().set_vfio_ioas(Some(ioas)),
        CLEAR => host.objects().set_vfio_ioas(None),
        _ => refuse(Errno::EOPNOTSUPP, format!("there is no operation {operation}")),
    }
}

fn check_extension(host: &EmulatedHost, extension: u64) -> Outcome<i32> {
    let objects = host.objects();
    let has = match u32::try_from(extension) {
        Ok(VFIO_TYPE1_IOMMU | VFIO_TYPE1V2_IOMMU | VFIO_UNMAP_ALL) => !objects.vfio_no_iommu(),
        Ok(VFIO_NOIOMMU_IOMMU) => true,
        Ok(VFIO_DMA_CC_IOMMU) => objects.enforces_coherency(objects.vfio_ioas()?)?,
        _ => false,
    };
    Ok(has.into())
}

/// The first version can unmap parts of a mapping, so pages must not be larger than the host's.
fn set_iommu(host: &EmulatedHost, kind: u64, user: &dyn UserSpace) -> Outcome<()> {
    let mut objects = host.objects();
    match (u32::try_from(kind), objects.vfio_no_iommu()) {
        (Ok(VFIO_NOIOMMU_IOMMU), true) if user.credentials().sys_rawio => Ok(()),
        (Ok(VFIO_NOIOMMU_IOMMU), true) => refuse(Errno::EPERM, "the process lacks CAP_SYS_RAWIO"),
        (Ok(VFIO_TYPE1_IOMMU), false) => {
            let ioas = objects.vfio_ioas()?;
            objects.set_huge_pages(ioas, false)
        }
        (Ok(VFIO_TYPE1V2_IOMMU), false) => objects.vfio_ioas().map(drop),
        (_, no_iommu) => {
            let without = if no_iommu { "without" } else { "with" };
            refuse(Errno::EINVAL, format!("IOMMU {kind} for a device {without} an IOMMU"))
        }
    }
}

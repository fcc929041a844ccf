// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The IOAS that VFIO's ioctls implicitly work on.

use super::Objects;
use crate::host::refusal::{refuse, Outcome};
use crate::ioas::PAGE_SIZE;
use twostage::iommufd::{Errno, ObjectId};

/// The iommufd's state as a VFIO container.
#[derive(Debug, Default)]
pub(crate) struct VfioCompat {
    /// The IOAS of VFIO's ioctls.
    pub ioas: Option<ObjectId>,
    /// A device without an IOMMU was added.
    pub no_iommu: bool,
}

impl Objects {
    /// `IOMMU_VFIO_IOAS_GET`: the IOAS of VFIO's ioctls.
    ///
    /// # Errors
    /// `ENODEV` there is none.
    pub fn vfio_ioas(&self) -> Outcome<ObjectId> {
        match self.vfio.ioas {
            Some(ioas) => Ok(ioas),
            None => refuse(Errno::ENODEV, "VFIO's ioctls have no IOAS"),
        }
    }

    /// `IOMMU_VFIO_IOAS_SET`, `IOMMU_VFIO_IOAS_CLEAR`.
    pub fn set_vfio_ioas(&mut self, ioas: Option<ObjectId>) -> Outcome<()> {
        if let Some(ioas) = ioas {
            self.table.ioas(ioas)?;
        }
        self.vfio.ioas = ioas;
        Ok(())
    }

    /// Creates an IOAS for VFIO's ioctls unless they have one: a group was added to the container.
    ///
    /// # Errors
    /// `EINVAL` it has a device without an IOMMU.
    pub fn create_vfio_ioas(&mut self) -> Outcome<()> {
        if self.vfio.no_iommu {
            return refuse(Errno::EINVAL, "the container has a device without an IOMMU");
        }
        if self.vfio.ioas.is_none() {
            self.vfio.ioas = Some(self.ioas_alloc()?);
        }
        Ok(())
    }

    /// A device without an IOMMU was added to the container.
    ///
    /// # Errors
    /// `EINVAL` VFIO's ioctls have an IOAS.
    pub fn set_vfio_no_iommu(&mut self) -> Outcome<()> {
        if self.vfio.ioas.is_some() {
            return refuse(Errno::EINVAL, "the container has a device with an IOMMU");
        }
        self.vfio.no_iommu = true;
        Ok(())
    }

    /// Whether a device without an IOMMU was added to the container.
    pub fn vfio_no_iommu(&self) -> bool {
        self.vfio.no_iommu
    }

    /// Whether every HWPT of the IOAS makes DMA coherent with caches, whatever a device requests.
    pub fn enforces_coherency(&self, ioas: ObjectId) -> Outcome<bool> {
        let enforces = |hwpt: &ObjectId| {
            self.table.hwpt_paging(*hwpt).is_ok_and(|hwpt| hwpt.domain.enforces_coherency())
        };
        Ok(self.table.ioas(ioas)?.hwpts.iter().all(enforces))
    }

    /// The page sizes that VFIO reports for the IOAS: a bit for each.
    pub fn vfio_page_sizes(&self, ioas: ObjectId) -> Outcome<u64> {
        let ioas = self.table.ioas(ioas)?;
        let mut sizes = u64::MAX;
        for hwpt in &ioas.hwpts {
            sizes &= self.table.hwpt_paging(*hwpt)?.domain.page_sizes();
        }
        if sizes & (PAGE_SIZE - 1) != 0 {
            // What supports smaller pages supports the host's.
            sizes = sizes & !(PAGE_SIZE - 1) | PAGE_SIZE;
        }
        Ok(sizes.max(ioas.alignment))
    }

    /// Splits the area that contains `last` after it, so that a part can be unmapped. Does nothing
    /// if nothing is mapped there, or at the last IOVA of an area.
    ///
    /// # Errors
    /// As [`crate::ioas::IovaSpace::split`]; also `EINVAL` if a HWPT may have a huge page there.
    pub fn cut(&mut self, ioas: ObjectId, last: u64) -> Outcome<()> {
        let object = self.table.ioas_mut(ioas)?;
        let huge_pages = object.huge_pages && !object.hwpts.is_empty();
        if object.space.split(last, object.alignment, huge_pages)? {
            object.stage2.split(last);
        }
        Ok(())
    }

    /// The IOAS `id` was destroyed.
    pub(super) fn forget_vfio_ioas(&mut self, id: ObjectId) {
        self.vfio.ioas = self.vfio.ioas.filter(|ioas| *ioas != id);
    }
}

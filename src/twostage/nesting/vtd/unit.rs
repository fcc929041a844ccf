// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The physical IOMMUs in front of the devices of a virtual one, as host objects.

use super::counters::VtdNestingCounters;
use crate::iommufd::{Errno, HostError, HwInfo, ObjectId};
use crate::nesting::error::{NestingError, Result};
use crate::nesting::objects::Objects;
use crate::spec::pci::Bdf;

/// A nesting parent: the `HWPT_PAGING` whose tables are stage 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    /// The HWPT.
    pub hwpt: ObjectId,
    /// Allocated with `IOMMU_HWPT_ALLOC_PASID`. All attachments of a device (the RID's and each
    /// PASID's) must then have that flag, and so must the nested HWPTs on this one.
    pub pasid: bool,
}

/// The nesting parents of all of them.
#[derive(Debug, Default)]
pub(super) struct Parents(Vec<Parent>);

impl Parents {
    /// Attaches `dev` to the nesting parent of its physical IOMMU. The uAPI does not say which
    /// IOMMU that is, but refuses the parent of another one with `EINVAL`. So each is tried, and if
    /// none fits, this is the first device behind its IOMMU.
    pub fn attach(
        &mut self,
        objects: &mut Objects,
        counters: &mut VtdNestingCounters,
        (rid, dev): (Bdf, ObjectId),
        info: &HwInfo,
    ) -> Result<Parent> {
        // After the first attach of a device failed, it stays blocked.
        let mut refuse = |objects: &mut Objects, source: HostError| {
            counters.refused_attaches += 1;
            if let Err(error) = objects.detach(dev, None) {
                log::error!("{rid} could not be blocked: {error}");
            }
            let what = format!("attaching {rid} to its nesting parent");
            Err(NestingError::Host { what, source })
        };
        let pasid = info.max_pasid_log2 > 0;
        for parent in self.0.iter().filter(|parent| parent.pasid || !pasid) {
            match objects.host().device_attach(dev, None, parent.hwpt) {
                Ok(_) => return Ok(*parent),
                Err(error) if error.errno == Errno::EINVAL => {}
                Err(error) => return refuse(objects, error),
            }
        }
        let hwpt = objects.alloc_parent(rid, dev, pasid)?;
        if let Err(error) = objects.host().device_attach(dev, None, hwpt) {
            let refused = refuse(objects, error);
            objects.destroy(hwpt);
            return refused;
        }
        let parent = Parent { hwpt, pasid };
        self.0.push(parent);
        Ok(parent)
    }

    /// Destroys a nesting parent that nothing uses any more.
    pub fn end(&mut self, parent: Parent, objects: &mut Objects) {
        self.0.retain(|other| *other != parent);
        objects.destroy(parent.hwpt);
    }
}

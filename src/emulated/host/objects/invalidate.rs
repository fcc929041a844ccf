// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `IOMMU_HWPT_INVALIDATE`.

use super::{Object, Objects};
use crate::drivers::{Partial, UserArray};
use crate::host::fault_injection::allocate;
use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{Errno, ObjectId};

/// Linux's maximum number of entries per call.
pub(crate) const MAX_INVALIDATE_ENTRIES: usize = 1 << 19;

impl Objects {
    /// `IOMMU_HWPT_INVALIDATE`. Errors have the number of completed entries.
    pub fn hwpt_invalidate(&self, hwpt: ObjectId, entries: &dyn UserArray) -> Result<(), Partial> {
        let out_of_memory = allocate("the entries");
        let refused: Outcome<()> = match self.table.get(hwpt) {
            _ if entries.count() > MAX_INVALIDATE_ENTRIES => {
                refuse(Errno::EINVAL, format!("{} entries", entries.count()))
            }
            _ if out_of_memory.is_err() => out_of_memory,
            Some(Object::HwptNested(nested)) => return nested.domain.invalidate(entries),
            Some(Object::Viommu(viommu)) => return viommu.driver.invalidate(entries),
            Some(other) => {
                let kind = other.kind();
                refuse(Errno::EINVAL, format!("{kind} {hwpt} has no user-owned tables"))
            }
            None => refuse(Errno::ENOENT, format!("there is no object {hwpt}")),
        };
        refused.map_err(Partial::from)
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host side of a virtual IOMMU that is yet to be built.

use super::unit::failed;
use super::Surroundings;
use crate::config::IommuModel;
use crate::Result;
use twostage::iommufd::{Protection, UserMemory};
use twostage::nesting::smmuv3::{SmmuNesting, DEFAULT_EVENT_DEPTH};
use twostage::nesting::vtd::VtdNesting;
use twostage::nesting::NestingError;

/// The host side, by the model that it is for.
pub(super) enum Nesting {
    Vtd(VtdNesting),
    SmmuV3(SmmuNesting),
}

impl Nesting {
    /// That of the first virtual IOMMU of a machine, with the machine's memory.
    pub fn first(model: &IommuModel, around: &Surroundings<'_>) -> Result<Self> {
        let host = around.host.verbs.clone();
        let nesting = match model {
            IommuModel::Vtd(_) => VtdNesting::new(host).map(Self::Vtd),
            IommuModel::SmmuV3(_) => SmmuNesting::new(host, DEFAULT_EVENT_DEPTH).map(Self::SmmuV3),
        };
        let nesting = nesting.map_err(failed("nesting"))?;
        for region in around.memory.regions() {
            let memory = UserMemory::whole(region.clone());
            nesting
                .map_memory(around.memory.start_of(region), &memory)
                .map_err(failed("mapping guest memory"))?;
        }
        Ok(nesting)
    }

    fn map_memory(&self, gpa: u64, memory: &UserMemory) -> std::result::Result<(), NestingError> {
        match self {
            Self::Vtd(nesting) => nesting.map_memory(gpa, memory, Protection::READ_WRITE),
            Self::SmmuV3(nesting) => nesting.map_memory(gpa, memory, Protection::READ_WRITE),
        }
    }
}

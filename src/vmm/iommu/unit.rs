// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One virtual IOMMU of a machine, whatever its model, and the devices behind it.

use std::fmt;
use std::sync::Arc;

use super::plan::{not_of_this_machine, unbind, BoundDevice, Plan, VirtualIommu};
use super::smmuv3::SmmuV3;
use super::vtd::Vtd;
use super::Surroundings;
use crate::config::IommuModel;
use crate::devices::DmaMaster;
use crate::report::IommuReport;
use crate::Result;
use twostage::iommufd::HostIommu;
use twostage::spec::pci::Bdf;
use twostage::viommu::InterruptSink;
use twostage_emulated::DmaPort;

/// One virtual IOMMU.
pub(crate) struct Iommu {
    /// The name by which devices refer to it.
    pub id: String,
    pub model: Box<dyn VirtualIommu>,
    host: Arc<dyn HostIommu>,
    /// The devices behind it.
    pub devices: Vec<BoundDevice>,
}

impl Iommu {
    /// The virtual IOMMU of `plan`.
    pub(super) fn new(plan: Plan<'_>, around: &Surroundings<'_>) -> Result<Self> {
        let (model, devices): (Box<dyn VirtualIommu>, _) = match &plan.config.model {
            IommuModel::Vtd(options) => {
                let (vtd, devices) = Vtd::new(&plan, options, around)?;
                (Box::new(vtd), devices)
            }
            IommuModel::SmmuV3(options) => {
                let (smmu, devices) = SmmuV3::new(&plan, options, around)?;
                (Box::new(smmu), devices)
            }
        };
        Ok(Self { id: plan.id, model, host: around.host.verbs.clone(), devices })
    }

    /// How the function at `bdf`, which is in this process, makes its memory requests, including
    /// interrupt messages, which go to `messages`.
    ///
    /// # Errors
    /// The host is the kernel, which knows only physical devices.
    pub fn dma_master(
        &self,
        bdf: Bdf,
        messages: Arc<dyn InterruptSink>,
    ) -> Result<Box<dyn DmaMaster>> {
        let dma = self.model.dma_master(bdf, messages);
        dma.ok_or_else(|| not_of_this_machine(&self.id, bdf))
    }

    /// Where memory requests of the function at `bdf` enter the IOMMU.
    ///
    /// # Errors
    /// As [`Iommu::dma_master`].
    pub fn dma_port(&self, bdf: Bdf) -> Result<DmaPort> {
        self.model.dma_port(bdf).ok_or_else(|| not_of_this_machine(&self.id, bdf))
    }

    /// What was done so far.
    pub(super) fn report(&self) -> IommuReport {
        IommuReport { id: self.id.clone(), of: self.model.report() }
    }
}

impl Drop for Iommu {
    /// Gives every host object back, in order.
    fn drop(&mut self) {
        if let Err(error) = self.model.shutdown() {
            log::error!("{}: host objects are left behind: {error}", self.id);
        }
        unbind(&*self.host, self.devices.drain(..));
    }
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommu")
            .field("id", &self.id)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

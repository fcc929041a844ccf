// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Physical devices that the guest has without a virtual IOMMU: each reaches all of the guest's
//! memory, by guest-physical addresses, and nothing else.

use std::fmt;
use std::path::PathBuf;

use super::host::Host;
use super::plan::{bind, unbind, BoundDevice};
use crate::report::HostReport;
use crate::vfio::{VfioError, VfioProblem};
use crate::Result;
use twostage::spec::pci::Bdf;

/// The devices. Dropping it detaches and unbinds them.
pub(crate) struct DirectDevices {
    host: Host,
    pub devices: Vec<BoundDevice>,
}

impl DirectDevices {
    /// Binds `devices`, named by their paths, and attaches them to the guest's memory in `host`.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(host: Host, devices: &[(Bdf, PathBuf)]) -> Result<Self> {
        let mut direct = Self { host, devices: Vec::new() };
        for (bdf, path) in devices {
            let verbs = direct.host.verbs.clone();
            let dev = bind(&*verbs, path)?;
            direct.devices.push((*bdf, dev));
            let name = path.display().to_string();
            let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
            verbs.device_attach(dev, None, direct.host.ioas.id()).map_err(refused)?;
        }
        Ok(direct)
    }

    /// The calls of the host so far, and its objects.
    pub fn host_report(&self) -> HostReport {
        self.host.report()
    }
}

impl Drop for DirectDevices {
    fn drop(&mut self) {
        unbind(&*self.host.verbs, self.devices.drain(..));
    }
}

impl fmt::Debug for DirectDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.devices).finish()
    }
}

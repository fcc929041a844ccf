// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices of this machine that the guest has without a virtual IOMMU: each reaches all of the
//! guest's memory, by its guest-physical address, and nothing else.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::unit::failed;
use crate::memory::MachineMemory;
use crate::vfio::{VfioError, VfioProblem};
use crate::Result;
use twostage::iommufd::{HostIommu, KernelHost, MapTarget, ObjectId, Protection, UserMemory};
use twostage::spec::pci::Bdf;

/// The devices, and the IOAS that they share. Dropping it detaches and unbinds them.
pub(crate) struct DirectDevices {
    host: Arc<KernelHost>,
    ioas: ObjectId,
    devices: Vec<(Bdf, ObjectId)>,
}

impl DirectDevices {
    /// `devices`, as `host` knows them, with `memory`.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(
        host: Arc<KernelHost>,
        memory: &MachineMemory,
        devices: &[(Bdf, PathBuf)],
    ) -> Result<Self> {
        let ioas = host.ioas_alloc().map_err(failed("making an IOAS"))?;
        let mut direct = Self { host, ioas, devices: Vec::new() };
        for region in memory.regions() {
            let (start, whole) = (memory.start_of(region), UserMemory::whole(region.clone()));
            direct
                .host
                .ioas_map(ioas, &whole, MapTarget::Fixed(start), Protection::READ_WRITE)
                .map_err(failed("mapping guest memory"))?;
        }
        for (bdf, path) in devices {
            let name = path.display().to_string();
            let refused = |error| VfioError::new(&name, VfioProblem::Bind(error));
            let dev = direct.host.device_bind(&name).map_err(refused)?;
            direct.devices.push((*bdf, dev));
            direct.host.device_attach(dev, None, ioas).map_err(refused)?;
        }
        Ok(direct)
    }

    /// The devices: as the guest and as the host knows them.
    pub fn devices(&self) -> &[(Bdf, ObjectId)] {
        &self.devices
    }
}

impl Drop for DirectDevices {
    fn drop(&mut self) {
        for (bdf, dev) in self.devices.drain(..) {
            if let Err(error) = self.host.device_unbind(dev) {
                log::error!("{bdf} stays bound: {error}");
            }
        }
        if let Err(error) = self.host.destroy(self.ioas) {
            log::error!("guest memory stays mapped: {error}");
        }
    }
}

impl fmt::Debug for DirectDevices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.devices).finish()
    }
}

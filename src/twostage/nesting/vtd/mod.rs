// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual VT-d decides, as host objects.
//!
//! [`VtdNesting`] implements its [`HostSide`] as [`super`] says, and:
//!
//! * the nesting parent of a device that has PASIDs must be made for PASIDs, so that a physical
//!   IOMMU has a second one if a device without came first;
//! * *blocked* is detached, *bypass* is attached to the parent;
//! * a batch of invalidations becomes one call per `HWPT_NESTED` that it names.
//!
//! What the host refuses is blocked and reported; the next configuration tries again.

mod attachments;
mod counters;
mod faults;
mod invalidate;
mod merge;
mod nested;
mod slot;
mod state;
#[cfg(test)]
mod tests;
mod unit;

use crate::sync::Mutex;
use std::sync::{Arc, MutexGuard, Weak};

use crate::iommufd::ObjectId;
use crate::nesting::objects::Objects;
use crate::nesting::{DeviceInfo, GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::viommu::vtd::{FaultTarget, HostSide, Invalidation, Progress, RequesterConfig};
use crate::viommu::{HostSideError, Requester};
pub use counters::VtdNestingCounters;
use faults::FaultRouter;
use invalidate::Refused;
pub use merge::FlushSet;
use state::{Start, State};

/// The host side of one virtual IOMMU. See the [module](self).
///
/// Its lock is taken after the virtual IOMMU's and held across host calls, which may wait for DMA;
/// the way of faults back to the guest takes none of it.
#[derive(Debug)]
pub struct VtdNesting {
    state: Mutex<State>,
    faults: Arc<FaultRouter>,
}

impl VtdNesting {
    /// Without devices, for a guest whose memory is `ioas`.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        let faults = Arc::new(FaultRouter::default());
        let state = Mutex::new(State::new(Objects::new(ioas), faults.clone()));
        Self { state, faults }
    }

    /// The guest's memory, for another virtual IOMMU of the same guest.
    ///
    /// # Errors
    /// This one is shut down.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>, NestingError> {
        self.state().objects.ioas()
    }

    /// `dev`, a device bound to the host, is the guest's `rid`. It is blocked until the virtual
    /// IOMMU configures it, also when that is enabled already.
    ///
    /// # Errors
    /// The host refuses; the Requester ID or the device is in use; or its IOMMU has erratum 772415
    /// and guest memory is mapped read-only. The device is not added.
    pub fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<(), NestingError> {
        self.state().add_device(rid, dev, Start::Blocked)
    }

    /// As [`VtdNesting::add_device`], but the device passes until the virtual IOMMU configures it:
    /// for a device of a virtual IOMMU that is off, as it is when a machine starts. Saves a detach,
    /// and an attach.
    ///
    /// # Errors
    /// As those.
    pub fn add_passing_device(&self, rid: Bdf, dev: ObjectId) -> Result<(), NestingError> {
        self.state().add_device(rid, dev, Start::Passing)
    }

    /// The guest's `rid` is gone: it and its PASIDs are blocked, and its host objects destroyed if
    /// nobody shares them. The device object itself stays its owner's.
    ///
    /// # Errors
    /// There is no such device; or the host did not detach it, and it is still there.
    pub fn remove_device(&self, rid: Bdf) -> Result<(), NestingError> {
        self.state().remove_device(rid)
    }

    /// What the host says of each device.
    pub fn hw_infos(&self) -> Vec<DeviceInfo> {
        let state = self.state();
        let info = |(rid, device): (&Bdf, &state::Device)| DeviceInfo {
            rid: *rid,
            dev: device.dev,
            info: device.info,
        };
        state.devices.iter().map(info).collect()
    }

    /// From now on DMA faults go to `target`, while that lives.
    pub fn set_fault_target(&self, target: Weak<dyn FaultTarget>) {
        self.faults.set_target(target);
    }

    /// What was done so far.
    pub fn counters(&self) -> VtdNestingCounters {
        self.state().counters()
    }

    /// Detaches every device and destroys every object made here; the IOAS goes with the last that
    /// shares it. Also done on drop; here the outcome is told. May be called again, to try again.
    ///
    /// # Errors
    /// The host did not let go of something.
    pub fn shutdown(&self) -> Result<(), NestingError> {
        self.state().shutdown()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl HostSide for VtdNesting {
    fn configure(
        &self,
        requester: Requester,
        config: &RequesterConfig,
    ) -> Result<(), HostSideError> {
        let mut state = self.state();
        state.configure(requester, config).map_err(|error| {
            error.for_viommu(format!("configuring {requester}"), state.is_reachable(requester))
        })
    }

    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError> {
        self.state().invalidate(batch).map_err(for_viommu)
    }

    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        let mut refused = None;
        self.state().invalidate_some(batch, progress, &mut refused);
        refused.map_or(Ok(()), |refused| Err(for_viommu(refused)))
    }
}

fn for_viommu(refused: Refused) -> HostSideError {
    refused.error.for_viommu("invalidating".into(), refused.still_reachable)
}

impl Drop for VtdNesting {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            log::error!("host objects are left behind: {error}");
        }
    }
}

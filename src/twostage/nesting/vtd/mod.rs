// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Turns the decisions of a virtual VT-d into host objects.
//!
//! [`VtdNesting`] implements its [`VtdHostSide`] as described in [`super`], and:
//!
//! * the nesting parent of a device with PASIDs must be allocated for PASIDs, so a physical IOMMU
//!   has a second parent if a device without PASIDs came first;
//! * a device is attached for the first time when it is to pass or to follow tables. Which nesting
//!   parent it needs is known then: the one to which the host lets it be attached;
//! * *blocked* is detached, *bypass* is attached to the parent;
//! * a batch of invalidations becomes one call per `HWPT_NESTED` that it names;
//! * where the virtual IOMMU offers page requests, a `HWPT_NESTED` of devices that make them has
//!   the fault queue of the host, and one of devices that do not has none. Which they are shows
//!   when the first of their tables is attached.
//!
//! What the host refuses is blocked and reported; the next configuration retries.

mod attachments;
mod faults;
mod flush_set;
mod invalidate;
mod nested;
mod page_requests;
mod shadow;
mod sides;
mod state;
#[cfg(test)]
mod tests;

use crate::sync::Mutex;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;

use crate::iommufd::ObjectId;
use crate::nesting::guest_ioas::Mirrors;
use crate::nesting::objects::Objects;
use crate::nesting::reader::QueueThread;
use crate::nesting::{DeviceInfo, GuestIoas, NestingError};
use crate::spec::pci::Bdf;
use crate::spec::vtd::page_request::PageResponse;
use crate::spec::vtd::PageRange;
use crate::threads::ThreadStart;
use crate::viommu::vtd::{
    FaultTarget, HostVtd, Invalidation, PageTicket, Progress, RequesterConfig, VtdConfig,
    VtdHostSide,
};
use crate::viommu::{HostSideError, Requester};
use faults::FaultRouter;
pub use flush_set::FlushSet;
use invalidate::Refused;
pub use shadow::serving::{Nesting, Serving};
use shadow::Shadow;
use state::State;

/// The host side of one virtual IOMMU. See the [module](self).
///
/// Its lock is taken after the virtual IOMMU's and held across host calls, which may wait for DMA;
/// faults on their way back to the guest do not take it.
#[derive(Debug)]
pub struct VtdNesting(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    faults: Arc<FaultRouter>,
}

impl VtdNesting {
    /// Without devices, for a guest whose memory is `ioas`. The host nests the guest's tables.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        Self::with(ioas, None)
    }

    /// The same for a host that nests the guest's tables or has them mirrored, as `serving` says.
    pub fn serving(ioas: Arc<GuestIoas>, serving: Serving) -> Self {
        Self::with(ioas, Some(serving))
    }

    fn with(ioas: Arc<GuestIoas>, serving: Option<Serving>) -> Self {
        let faults = Arc::new(FaultRouter::default());
        Self(Arc::new_cyclic(|inner: &Weak<Inner>| {
            let state = State::new(Objects::new(ioas), faults.clone(), serving, inner.clone() as _);
            Inner { state: Mutex::new(state), faults }
        }))
    }

    /// The same, with `threads` to start the thread that delivers page requests; without this call,
    /// that is [`StdThreads`](crate::threads::StdThreads).
    #[must_use]
    pub fn with_threads(self, threads: Arc<dyn ThreadStart>) -> Self {
        self.state().threads = threads;
        self
    }

    /// Why the guest's tables are mirrored, if they are: the bit and the device that do not nest
    /// them, or that it was requested. Known while there are devices.
    pub fn mirrors_because(&self) -> Option<String> {
        self.state().mirrors_because().map(str::to_owned)
    }

    /// The unit in front of the guest's `rid`, for [`VtdConfig::intersect`]; errors call the device
    /// `name`. `None`: there is no such device, or it is not behind a VT-d where tables are nested.
    ///
    /// [`VtdConfig::intersect`]: crate::viommu::vtd::VtdConfig::intersect
    pub fn host_unit(&self, rid: Bdf, name: String) -> Option<HostVtd> {
        self.state().host_unit(rid, name)
    }

    /// The guest's memory, for another virtual IOMMU of the same guest.
    ///
    /// # Errors
    /// It is shut down.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>, NestingError> {
        self.state().objects.ioas()
    }

    /// Adds `dev`, a device bound to the host, as the guest's `rid`. It is blocked until the
    /// virtual IOMMU configures it, even if that is enabled already: it is attached to nothing
    /// before.
    ///
    /// # Errors
    /// The host refuses; the Requester ID or the device is in use; the device is not behind a VT-d;
    /// or its IOMMU has erratum 772415 and guest memory is mapped read-only. It is not added.
    pub fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<(), NestingError> {
        self.state().add_device(rid, dev)
    }

    /// Removes the guest's `rid`: it and its PASIDs are blocked, and its host objects are destroyed
    /// unless shared. The device object itself stays with its owner.
    ///
    /// # Errors
    /// There is no such device; or the host did not detach it, and it was not removed.
    pub fn remove_device(&self, rid: Bdf) -> Result<(), NestingError> {
        self.state().remove_device(rid)
    }

    /// The host's description of each device.
    pub fn hw_infos(&self) -> Vec<DeviceInfo> {
        let state = self.state();
        let info = |(rid, device): (&Bdf, &state::Device)| DeviceInfo {
            rid: *rid,
            dev: device.dev,
            info: device.info,
        };
        state.devices.iter().map(info).collect()
    }

    /// From now on DMA faults go to `target`, while it lives.
    pub fn set_fault_target(&self, target: Weak<dyn FaultTarget>) {
        self.0.faults.set_target(target);
    }

    /// Statistics.
    pub fn counters(&self) -> VtdNestingCounters {
        self.state().counters()
    }

    /// Detaches every device and destroys every object created here; the IOAS goes with its last
    /// user. Also done on drop; here errors are returned. May be called again to retry.
    ///
    /// # Errors
    /// The host refused to release something.
    pub fn shutdown(&self) -> Result<(), NestingError> {
        // The thread is waited for without the lock.
        let pages = self.state().pages.take();
        let queue = pages.map(QueueThread::stop);
        self.0.faults.pages.close();
        self.state().shutdown(queue)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }
}

impl Inner {
    /// Runs `work`, and then delivers the faults that it has found.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let result = work(&mut state);
        let faults = state.shadow.as_mut().map(Shadow::take_faults).unwrap_or_default();
        drop(state);
        if let Some(target) = self.faults.target().filter(|_| !faults.is_empty()) {
            faults.iter().for_each(|fault| target.dma_fault(fault));
        }
        result
    }
}

impl Mirrors for Inner {
    fn memory_changed(&self) -> Result<(), NestingError> {
        self.with(State::follow_memory)
    }
}

impl VtdHostSide for VtdNesting {
    fn offers(&self, config: &VtdConfig) {
        self.state().set_offered(config);
    }

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

    fn prepare(&self, requester: Requester, config: &RequesterConfig) -> bool {
        self.0.with(|state| state.prepare(requester, config))
    }

    fn configured(&self) {
        self.0.with(|_| ());
    }

    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError> {
        self.0.with(|state| state.invalidate(batch)).map_err(for_viommu)
    }

    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        let mut refused = None;
        self.0.with(|state| state.invalidate_some(batch, progress, &mut refused));
        refused.map_or(Ok(()), |refused| Err(for_viommu(refused)))
    }

    fn respond(&self, _: Bdf, ticket: PageTicket, response: PageResponse) {
        self.0.faults.pages.respond(ticket, response);
    }

    fn drain_page_requests(&self, progress: &mut Progress, time: Duration) {
        page_requests::drain(&self.0.faults.pages, progress, time);
    }

    fn invalidate_device_tlb(&self, rid: Bdf, pasid: Option<u32>, range: PageRange) -> bool {
        self.state().invalidate_device_tlb(rid, pasid, range)
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

crate::counters! {
    /// Counters of a [`VtdNesting`]: a snapshot.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[non_exhaustive]
    pub struct VtdNestingCounters {
        /// `HWPT_NESTED` objects allocated.
        nested_allocs,
        /// Those in whose second stage, the guest's, accessed and dirty flags are set (SSADE).
        ssade_allocs,
        /// Requesters attached to a `HWPT_NESTED` that others used already.
        nested_shares,
        /// Configurations without a change, and so without a host call.
        unchanged,
        /// Attachments that replaced another one.
        replaces,
        /// Attachments refused by the host.
        refused_attaches,
        /// Invalidations received from the virtual IOMMU.
        invalidations_in,
        /// Invalidation entries completed by the host.
        entries_out,
        /// Ranges that needed no entry of their own, because another one covers them.
        merged,
        /// Mirrors made of guest tables, where the host does not nest them.
        mirrors,
        /// Mirrors replaced because a mapping had to change while it was in use.
        mirror_rebuilds,
        /// Mappings of all mirrors now.
        mirror_pieces,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

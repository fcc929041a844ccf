// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A virtual VT-d in front of devices of several hosts. See [`crate::nesting::sides`].

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::VtdNesting;
use crate::iommufd::ObjectId;
use crate::nesting::sides::{both, Side, Sides};
use crate::nesting::{DeviceInfo, GuestIoas, Result};
use crate::spec::pci::Bdf;
use crate::spec::vtd::page_request::PageResponse;
use crate::spec::vtd::PageRange;
use crate::viommu::vtd::{
    FaultTarget, Invalidation, PageTicket, Progress, RequesterConfig, VtdConfig, VtdHostSide,
};
use crate::viommu::{HostSideError, Requester};

impl Side for VtdNesting {
    type Target = dyn FaultTarget;

    fn beside(&self, ioas: Arc<GuestIoas>) -> Self {
        let (serving, threads) = {
            let state = self.state();
            (state.serving.clone(), state.threads.clone())
        };
        match serving {
            Some(serving) => Self::serving(ioas, serving).with_threads(threads),
            None => Self::new(ioas).with_threads(threads),
        }
    }

    fn ioas(&self) -> Result<Arc<GuestIoas>> {
        VtdNesting::ioas(self)
    }

    fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<()> {
        VtdNesting::add_device(self, rid, dev)
    }

    fn remove_device(&self, rid: Bdf) -> Result<()> {
        VtdNesting::remove_device(self, rid)
    }

    fn hw_infos(&self) -> Vec<DeviceInfo> {
        VtdNesting::hw_infos(self)
    }

    fn set_fault_target(&self, target: Weak<dyn FaultTarget>) {
        VtdNesting::set_fault_target(self, target);
    }

    fn shutdown(&self) -> Result<()> {
        VtdNesting::shutdown(self)
    }
}

impl VtdHostSide for Sides<VtdNesting> {
    /// One that comes later has it from the first.
    fn offers(&self, config: &VtdConfig) {
        self.iter().for_each(|side| side.offers(config));
    }

    fn configure(
        &self,
        requester: Requester,
        config: &RequesterConfig,
    ) -> Result<(), HostSideError> {
        self.of(requester.rid).configure(requester, config)
    }

    fn prepare(&self, requester: Requester, config: &RequesterConfig) -> bool {
        self.of(requester.rid).prepare(requester, config)
    }

    fn configured(&self) {
        self.iter().for_each(|side| side.configured());
    }

    fn invalidate(&self, batch: &[Invalidation]) -> Result<(), HostSideError> {
        let mut result = Ok(());
        for side in self.iter() {
            result = both(result, side.invalidate(batch));
        }
        result
    }

    /// At most a part on each side: those after one that has more to do wait for it.
    fn invalidate_some(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        let mut result = Ok(());
        while let Some(side) = self.get(progress.side()) {
            result = both(result, side.invalidate_some(batch, progress));
            let next = progress.side() + 1;
            if !progress.is_done() || self.get(next).is_none() {
                break;
            }
            progress.go_on_with(next);
        }
        result
    }

    fn respond(&self, rid: Bdf, ticket: PageTicket, response: PageResponse) {
        self.of(rid).respond(rid, ticket, response);
    }

    /// One side after the other: what came to a later one meanwhile is drained, too.
    fn drain_page_requests(&self, progress: &mut Progress, time: Duration) {
        while let Some(side) = self.get(progress.side()) {
            side.drain_page_requests(progress, time);
            let next = progress.side() + 1;
            if !progress.is_done() || self.get(next).is_none() {
                break;
            }
            progress.go_on_with(next);
        }
    }

    fn invalidate_device_tlb(&self, rid: Bdf, pasid: Option<u32>, range: PageRange) -> bool {
        self.of(rid).invalidate_device_tlb(rid, pasid, range)
    }
}

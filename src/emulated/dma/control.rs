// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a device has besides its ports: a TLB of its own (ATS), and page requests (PRI).

use std::sync::Arc;

use super::PageTries;
use crate::dma::error::DmaError;
use crate::units::engine::{Engine, Fault, Request};
use crate::units::gate::Gate;
use crate::units::page_requests::{PageRequests, Waits};
use twostage::iommufd::PageResponseCode;

/// What a port does about pages that are not present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DmaServices {
    /// It requests them (PCI PRI), if somebody serves that; otherwise the DMA fails.
    pub page_requests: bool,
    /// [`DmaPort::read`](super::DmaPort::read) and [`DmaPort::write`](super::DmaPort::write) wait
    /// for the responses; otherwise they end with
    /// [`DmaError::PageRequested`](crate::DmaError::PageRequested).
    pub wait_for_pages: bool,
}

impl Default for DmaServices {
    fn default() -> Self {
        Self { page_requests: true, wait_for_pages: true }
    }
}

/// What becomes of a request that cannot be translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stopped {
    /// It waits for the response to a group of page requests.
    Waits(u16),
    /// It would stall, and there is nobody to resume it: it ends with an abort and without a
    /// report, as Linux ends it, and as those end whose attachment ends while they are stalled.
    Aborts,
    /// It faults.
    Faults,
}

/// One device, for whoever controls it and does no DMA.
#[derive(Debug, Clone)]
pub struct DeviceControl {
    rid: u16,
    page_requests: Arc<PageRequests>,
    gate: Arc<Gate<Engine>>,
}

impl DeviceControl {
    pub(super) fn new(rid: u16, page_requests: Arc<PageRequests>, gate: Arc<Gate<Engine>>) -> Self {
        Self { rid, page_requests, gate }
    }

    pub(super) fn page_requests(&self) -> &PageRequests {
        &self.page_requests
    }

    /// Requests the page of `request`, or stalls it, as [`PageRequests::ask`], if it waits after
    /// `fault` and, to request it, `services` allow that. The gate must have been left.
    pub(super) fn request_page(
        &self,
        services: DmaServices,
        request: &Request,
        fault: &Fault,
    ) -> Stopped {
        let Some(waits) = self.page_requests.served(self.rid) else { return Stopped::Faults };
        if !waits.after(fault) || waits == Waits::ForPages && !services.page_requests {
            return Stopped::Faults;
        }
        // Before whoever serves it changes the tables.
        self.gate.write(|Engine { common, own }| own.page_requested(&mut common.caches, request));
        match (self.page_requests.ask(request), waits) {
            (Some(group), _) => Stopped::Waits(group),
            (None, Waits::InStalls) => Stopped::Aborts,
            (None, Waits::ForPages) => Stopped::Faults,
        }
    }

    /// Enables the device TLB, which is empty then, or disables it: from now on its DMA uses the
    /// translations that it has until it is told to forget them. Of a unit without device TLBs no
    /// device has one. Waits for DMA under way.
    pub fn set_device_tlb(&self, enabled: bool) {
        self.gate.write(|engine| engine.common.caches.device_tlbs.set(self.rid, enabled));
    }

    /// It answers no invalidation of its TLB any more, or each again: as if it were broken.
    pub fn set_silent(&self, silent: bool) {
        self.gate.write(|engine| engine.common.caches.device_tlbs.set_silent(self.rid, silent));
    }

    /// Waits for the response to the page requests of `group`
    /// ([`DmaError::PageRequested`](crate::DmaError::PageRequested)), and takes it.
    pub fn wait_for_page(&self, group: u16) -> PageResponseCode {
        self.page_requests.wait_for_answer(self.rid, group)
    }

    /// The same, for a transfer that is to be retried from `address` then, if it may be. A stalled
    /// transaction may be as often as software says.
    ///
    /// # Errors
    /// [`DmaError::PageRefused`]: it may not.
    pub fn wait_to_retry(
        &self,
        group: u16,
        address: u64,
        tries: &mut PageTries,
    ) -> Result<(), DmaError> {
        let response = self.wait_for_page(group);
        match self.page_requests.waits(self.rid) {
            Waits::InStalls if response == PageResponseCode::Success => Ok(()),
            _ => tries.answered(address, response),
        }
    }

    /// How many groups of page requests the device has not taken a response to.
    pub fn outstanding_page_requests(&self) -> usize {
        self.page_requests.outstanding(self.rid)
    }

    /// Forgets the page requests so far: who waits is told that the page was refused; responses
    /// that come later are ignored.
    pub fn reset_page_requests(&self) {
        self.page_requests.reset(self.rid);
    }
}

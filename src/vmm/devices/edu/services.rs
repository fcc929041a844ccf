// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What requests need: the right to be made, and the services that software has enabled.

use std::result::Result;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use twostage::sync::Mutex;

use crate::config::EduConfig;
use crate::devices::{
    DmaError, DmaMaster, NotNow, OfferedServices, Permit, RequestGate, ServiceControl, Services,
};
use crate::pci::{AtsCapabilities, PasidCapabilities};
use twostage::spec::pci::Pasid;
use twostage_emulated::edu::Requests;
use twostage_emulated::PageTries;

/// Page requests that the device has without a response: its DMA waits for each.
const PAGE_REQUESTS: u32 = 1;

/// What a device of `config` offers: a device TLB that takes 32 invalidations at a time; no execute
/// or privileged requests.
pub(super) fn offered(config: &EduConfig) -> OfferedServices {
    let with_pasid = config.pasid_bits > 0;
    let tlb = AtsCapabilities::new().with_page_aligned(true).with_global_invalidate(true);
    OfferedServices {
        pasid: with_pasid.then(|| PasidCapabilities::new().with_max_width(config.pasid_bits)),
        ats: config.ats.then_some(tlb),
        pri: config.pri.then_some((PAGE_REQUESTS, with_pasid)),
    }
}

/// The right to make requests.
#[derive(Debug, Default)]
pub(super) struct Rights {
    pub gate: RequestGate,
    services: Mutex<Services>,
    /// How many function-level resets there were. What began in an earlier life is over.
    life: AtomicU64,
}

impl Rights {
    /// Permission for a request of `life` with or without a PASID, and what it may use.
    pub fn enter(&self, life: u64, pasid: bool) -> Result<(Permit<'_>, Services), NotNow> {
        let permit = self.gate.enter()?;
        // Looked at with the permit in hand: who changes them waits for it.
        let services = self.services();
        let allowed = self.life() == life && (!pasid || services.pasid);
        allowed.then_some((permit, services)).ok_or(NotNow)
    }

    pub fn life(&self) -> u64 {
        self.life.load(Ordering::SeqCst)
    }

    pub fn services(&self) -> Services {
        *self.services.lock()
    }

    /// Software allows these requests. When this returns, none that it does not allow is being
    /// made. Returns whether the services are others than before.
    pub fn set(&self, bus_master: bool, services: Services) -> bool {
        let before = std::mem::replace(&mut *self.services.lock(), services);
        let lost = |had: bool, has: bool| had && !has;
        if lost(before.pasid, services.pasid)
            || lost(before.ats, services.ats)
            || lost(before.pri, services.pri)
        {
            self.gate.wait_for_request();
        }
        self.gate.set_bus_master(bus_master);
        before != services
    }

    /// Ends the life: when this returns, none of its requests is being made.
    pub fn reset(&self) {
        self.life.fetch_add(1, Ordering::SeqCst);
        self.set(false, Services::default());
    }
}

/// Memory behind a gate: each request of a transfer needs the right to it. While one waits for its
/// page, it is not being made: it needs the right once more afterwards.
pub(super) struct GatedMemory {
    pub memory: Box<dyn DmaMaster>,
    pub rights: Arc<Rights>,
    /// Those of the memory.
    pub control: Option<Arc<dyn ServiceControl>>,
    /// The transfer's.
    pub life: u64,
}

impl GatedMemory {
    /// Makes a request for `length` bytes.
    fn request(
        &mut self,
        pasid: Option<Pasid>,
        length: usize,
        mut make: impl FnMut(&mut dyn DmaMaster) -> Result<(), DmaError>,
    ) -> Result<usize, Stop> {
        let mut tries = PageTries::default();
        loop {
            let (permit, services) = self.rights.enter(self.life, pasid.is_some())?;
            self.memory.set_services(services);
            let Err(error) = make(&mut *self.memory) else { return Ok(length) };
            drop(permit);
            let (Some(control), Some(group)) = (&self.control, error.group) else {
                return Err(error.into());
            };
            control.wait(group, error.address, &mut tries)?;
        }
    }
}

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stop {
    /// The function may not make requests.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// The IOMMU blocked it, or there is no memory.
    #[error(transparent)]
    Refused(#[from] DmaError),
}

impl Requests for GatedMemory {
    type Stop = Stop;

    fn read(&mut self, pasid: Option<Pasid>, iova: u64, data: &mut [u8]) -> Result<usize, Stop> {
        self.request(pasid, data.len(), |memory| memory.read(pasid, iova, data))
    }

    fn write(&mut self, pasid: Option<Pasid>, iova: u64, data: &[u8]) -> Result<usize, Stop> {
        self.request(pasid, data.len(), |memory| memory.write(pasid, iova, data))
    }
}

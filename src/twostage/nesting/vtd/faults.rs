// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The way back: maps a fault, or a page request, of a host device to a guest requester.

use crate::sync::RwLock;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use super::page_requests::requests;
use crate::iommufd::{FaultSink, HostFault, ObjectId};
use crate::nesting::page_route::PageRoute;
use crate::spec::pci::{Bdf, Pasid};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::page_request::PageResponse;
use crate::viommu::vtd::{DmaFault, FaultTarget};
use crate::viommu::Requester;

/// Finds the guest requester of each host fault and passes the fault to the virtual IOMMU.
///
/// Faults come from DMA threads, while another thread may hold the lock of [`super::VtdNesting`] in
/// an invalidation that waits for that very DMA. So this part has its own locks, held during a
/// look-up only: never across a call.
#[derive(Default)]
pub(super) struct FaultRouter {
    /// What the host walks are no tables of the guest, whose reasons are found by the virtual
    /// IOMMU.
    mirrored: AtomicBool,
    rids: RwLock<HashMap<ObjectId, Bdf>>,
    target: RwLock<Option<Weak<dyn FaultTarget>>>,
    /// Where page requests come from, and responses go.
    pub pages: PageRoute,
}

impl FaultRouter {
    /// Whether the host walks mirrors of the guest's tables, and never these.
    pub fn set_mirrored(&self, mirrored: bool) {
        self.mirrored.store(mirrored, Ordering::Relaxed);
    }

    /// From now on faults go to `target`, while it lives.
    pub fn set_target(&self, target: Weak<dyn FaultTarget>) {
        *self.target.write() = Some(target);
    }

    /// Faults of `dev` belong to the guest's `rid`.
    pub fn add(&self, dev: ObjectId, rid: Bdf) {
        self.rids.write().insert(dev, rid);
    }

    /// Faults of `dev` are dropped from now on.
    pub fn remove(&self, dev: ObjectId) {
        self.rids.write().remove(&dev);
    }

    /// The guest's identity of `dev`.
    pub fn rid(&self, dev: ObjectId) -> Option<Bdf> {
        self.rids.read().get(&dev).copied()
    }

    fn requester(&self, dev: ObjectId, pasid: Option<u32>) -> Option<Requester> {
        let rid = self.rid(dev)?;
        match pasid {
            None => Some(Requester::rid(rid)),
            Some(pasid) => Some(Requester { rid, pasid: Some(Pasid::new(pasid)?) }),
        }
    }

    /// Delivers all groups of page requests that are in the queue. Returns whether there was any.
    pub fn bring_pages(&self) -> crate::iommufd::Result<bool> {
        self.pages.bring(|ticket, group| {
            let requests = self.rid(group.dev).and_then(|rid| requests(rid, &group));
            let answer = match (requests, self.target()) {
                (Some(requests), Some(target)) => target.page_requests(&requests, ticket),
                _ => Some(PageResponse::InvalidRequest),
            };
            if let Some(answer) = answer {
                self.pages.respond(ticket, answer);
            }
        })
    }

    /// Where faults go.
    pub fn target(&self) -> Option<Arc<dyn FaultTarget>> {
        self.target.read().as_ref()?.upgrade()
    }
}

impl FaultSink for FaultRouter {
    fn dma_fault(&self, fault: &HostFault) {
        let Some(requester) = self.requester(fault.dev, fault.pasid) else {
            log::debug!("a fault of {:?} belongs to no requester of the guest", fault.dev);
            return;
        };
        let Some(target) = self.target() else { return };
        let of_guest = !self.mirrored.load(Ordering::Relaxed);
        target.dma_fault(&DmaFault {
            requester,
            address: fault.address,
            write: fault.write,
            execute: fault.execute,
            privileged: fault.privileged,
            reason: FaultReason::from_code(fault.reason).filter(|_| of_guest),
            stage2: fault.stage2 && of_guest,
        });
    }

    fn attached_late(&self, dev: ObjectId, pasid: Option<u32>) -> bool {
        let requester = self.requester(dev, pasid);
        requester.zip(self.target()).is_some_and(|(who, target)| target.served_late(who))
    }
}

impl fmt::Debug for FaultRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rids, pages, .. } = self;
        let mut shown = f.debug_struct("FaultRouter");
        shown.field("rids", rids).field("pages", pages).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crate::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Target(Mutex<Vec<DmaFault>>);

    impl FaultTarget for Target {
        fn dma_fault(&self, fault: &DmaFault) {
            self.0.lock().push(*fault);
        }
    }

    const FAULT: HostFault = HostFault {
        dev: ObjectId(7),
        pasid: Some(5),
        address: 0x1234,
        write: true,
        execute: false,
        privileged: false,
        reason: 0x71,
        stage2: false,
    };

    #[test]
    fn a_fault_finds_its_requester() {
        let router = FaultRouter::default();
        let target = Arc::new(Target::default());
        router.dma_fault(&FAULT); // No target and no device yet: nothing happens.
        router.set_target(Arc::downgrade(&target) as Weak<dyn FaultTarget>);
        router.dma_fault(&FAULT);
        assert!(target.0.lock().is_empty());

        let rid = Bdf::new(0, 4, 0).unwrap();
        router.add(FAULT.dev, rid);
        router.dma_fault(&FAULT);
        router.dma_fault(&HostFault { pasid: None, ..FAULT });
        router.dma_fault(&HostFault { pasid: Some(1 << 20), ..FAULT }); // No PASID of PCIe.
        router.remove(FAULT.dev);
        router.dma_fault(&FAULT);

        let seen = target.0.lock();
        let requesters: Vec<_> = seen.iter().map(|fault| fault.requester).collect();
        let with_pasid = Requester { rid, pasid: Pasid::new(5) };
        assert_eq!(requesters, [with_pasid, Requester::rid(rid)]);
        let reason = Some(FaultReason::FirstStageNotPresent);
        assert_eq!((seen[0].address, seen[0].reason, seen[0].write), (0x1234, reason, true));
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The physical SMMU in front of all streams of a virtual one, as host objects.

use std::sync::Arc;

use super::faults::{EventRoute, EventThread};
use crate::iommufd::{HwInfo, ObjectId, ViommuKind, VEVENTQ_ARM_SMMUV3};
use crate::nesting::error::{Context, NestingError, Result};
use crate::nesting::hw_flags;
use crate::nesting::objects::Objects;
use crate::spec::pci::Bdf;

/// A nesting parent, the vIOMMU on it, and the vIOMMU's event queue.
#[derive(Debug)]
pub(super) struct Unit {
    parent: ObjectId,
    viommu: ObjectId,
    events: Option<EventThread>,
    misses_invalidations: bool,
}

impl Unit {
    /// Creates the objects for the SMMU of `dev`, the guest's `rid`, which the host describes by
    /// `info`.
    pub fn new(
        objects: &mut Objects,
        rid: Bdf,
        dev: ObjectId,
        info: &HwInfo,
        event_depth: u32,
        route: &Arc<EventRoute>,
    ) -> Result<Self> {
        let parent = objects.alloc_parent(rid, dev, false)?;
        let viommu = objects
            .host()
            .viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)
            .context(|| format!("allocating a vIOMMU for the SMMU of {rid}"))
            .inspect_err(|_| objects.destroy(parent))?;
        let misses_invalidations = hw_flags::misses_invalidations(info);
        let unit = Self { parent, viommu, events: None, misses_invalidations };
        let queue = objects
            .host()
            .veventq_alloc(viommu, VEVENTQ_ARM_SMMUV3, event_depth)
            .context(|| format!("allocating an event queue for the SMMU of {rid}"));
        let (object, started) = match queue {
            Ok(queue) => (queue.object(), EventThread::start(queue, route.clone())),
            Err(error) => {
                unit.end(None, objects);
                return Err(error);
            }
        };
        match started {
            Ok(events) => Ok(Self { events: Some(events), ..unit }),
            Err(error) => {
                unit.end(Some(object), objects);
                Err(NestingError::NoThread(error.to_string()))
            }
        }
    }

    /// The nesting parent.
    pub fn parent(&self) -> ObjectId {
        self.parent
    }

    /// The vIOMMU.
    pub fn viommu(&self) -> ObjectId {
        self.viommu
    }

    /// Whether its SMMU may miss a CMD_TLBI_* or CMD_CFGI_* that is issued only once.
    pub fn misses_invalidations(&self) -> bool {
        self.misses_invalidations
    }

    /// The vEVENTQ, while events are delivered.
    pub fn event_queue(&self) -> Option<ObjectId> {
        self.events.as_ref().map(EventThread::object)
    }

    /// The event thread, to be stopped.
    pub fn take_events(&mut self) -> Option<EventThread> {
        self.events.take()
    }

    /// Destroys the objects, which nothing but the closed `queue` uses any more.
    pub fn end(self, queue: Option<ObjectId>, objects: &mut Objects) {
        for object in queue.into_iter().chain([self.viommu, self.parent]) {
            objects.destroy(object);
        }
    }
}

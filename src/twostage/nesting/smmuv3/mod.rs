// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a virtual SMMUv3 decides, as host objects.
//!
//! [`SmmuNesting`] implements its [`SmmuHostSide`] as [`super`] says, and:
//!
//! * all devices of one virtual SMMU are behind one physical SMMU: one nesting parent, one vIOMMU
//!   on it, one vEVENTQ, and a vDEVICE for every StreamID, made before the device is first
//!   attached;
//! * a `HWPT_NESTED` is of words 0 and 1 of a stream table entry. Two are of no table: the one that
//!   aborts and the one that bypasses stage 1. They are made when first needed, and stay. While
//!   translation is off, what GBPA lets pass is attached to the nesting parent, which is stage 2
//!   alone: no events are owed of it then, and it needs no object of its own;
//! * a device is detached until it is first configured; from then on entries are replaced. Only
//!   what the host refuses to abort is detached;
//! * a batch of invalidations is one call on the vIOMMU, of the guest's own commands. What cannot
//!   be cached is not forwarded. An SMMU that may miss invalidations, as its host says, is given
//!   each twice, but for those of what devices keep. After a refusal everything is flushed, the
//!   command to blame is looked for, and the virtual SMMU is told, even where all of them are taken
//!   the second time;
//! * a thread reads the vEVENTQ, and hands the events to the virtual SMMU.

mod attachments;
mod counters;
mod faults;
mod invalidate;
mod merge;
mod nested;
mod objects;
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
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::StreamId;
use crate::viommu::smmuv3::{EventTarget, SmmuHostSide, SmmuInvalidateError, StreamPolicy};
use crate::viommu::HostSideError;
pub use counters::SmmuNestingCounters;
use faults::{EventRoute, EventThread};
use invalidate::Refused;
pub use objects::{DeviceObjects, NestedObject, SmmuObjects, UnitObjects};
use state::State;
use unit::Unit;

/// How many events the host keeps for the guest, unless it is told otherwise.
pub const DEFAULT_EVENT_DEPTH: u32 = 256;

/// The host side of one virtual SMMUv3. See the [module](self).
///
/// Its lock is taken after the virtual SMMU's and held across host calls; the way of events back to
/// the guest takes none of it.
#[derive(Debug)]
pub struct SmmuNesting {
    state: Mutex<State>,
    route: Arc<EventRoute>,
}

impl SmmuNesting {
    /// Without devices, for a guest whose memory is `ioas`. The host keeps up to `event_depth`
    /// events that were not read yet.
    pub fn new(ioas: Arc<GuestIoas>, event_depth: u32) -> Self {
        let route = Arc::new(EventRoute::default());
        let state = State::new(Objects::new(ioas), route.clone(), event_depth);
        Self { state: Mutex::new(state), route }
    }

    /// The guest's memory, for another virtual SMMU of the same guest.
    ///
    /// # Errors
    /// This one is shut down.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>, NestingError> {
        self.state().objects.ioas()
    }

    /// `dev`, a device bound to the host, is the guest's `rid`, which is its StreamID. It is
    /// blocked until the virtual SMMU configures it.
    ///
    /// # Errors
    /// The host refuses; the Requester ID or the device is in use; the device is behind no SMMUv3,
    /// behind one that cannot nest, or behind another one than those that were added before. The
    /// device is not added.
    pub fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<(), NestingError> {
        let result = self.state().add_device(rid, dev);
        self.end_idle_unit();
        result
    }

    /// The guest's `rid` is gone: it is blocked, and its host objects destroyed if nobody shares
    /// them. The device object itself stays its owner's.
    ///
    /// # Errors
    /// There is no such device; or the host did not detach it, and it is still there.
    pub fn remove_device(&self, rid: Bdf) -> Result<(), NestingError> {
        let result = self.state().remove_device(rid);
        self.end_idle_unit();
        result
    }

    /// What the host says of each device.
    pub fn hw_infos(&self) -> Vec<DeviceInfo> {
        let state = self.state();
        let info = |device: &state::Device| DeviceInfo {
            rid: device.rid,
            dev: device.dev,
            info: device.info,
        };
        state.devices.values().map(info).collect()
    }

    /// From now on events go to `target`, while that lives.
    pub fn set_event_target(&self, target: Weak<dyn EventTarget>) {
        self.route.set_target(target);
    }

    /// What was done so far.
    pub fn counters(&self) -> SmmuNestingCounters {
        self.state().counters()
    }

    /// The host objects there are.
    pub fn objects(&self) -> SmmuObjects {
        self.state().list()
    }

    /// Brings no more events, detaches every device and destroys every object made here; the IOAS
    /// goes with the last that shares it. Also done on drop; here the outcome is told. May be
    /// called again, to try again. As [`SmmuNesting::remove_device`], not to be called while the
    /// virtual SMMU is locked: an event may be on its way to it, and is waited for.
    ///
    /// # Errors
    /// The host did not let go of something.
    pub fn shutdown(&self) -> Result<(), NestingError> {
        let events = self.state().unit.as_mut().and_then(Unit::take_events);
        let queue = events.map(EventThread::stop);
        self.state().shutdown(queue)
    }

    /// Gives up the objects of the physical SMMU after the last device. The thread that brings
    /// events is waited for without the lock, for it may wait for one who waits for the lock.
    fn end_idle_unit(&self) {
        let unit = self.state().take_idle_unit();
        if let Some(mut unit) = unit {
            let queue = unit.take_events().map(EventThread::stop);
            unit.end(queue, &mut self.state().objects);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl SmmuHostSide for SmmuNesting {
    fn configure(&self, stream: StreamId, policy: &StreamPolicy) -> Result<(), HostSideError> {
        let mut state = self.state();
        state.configure(stream, policy).map_err(|error| {
            let what = format!("configuring stream {stream}");
            error.for_viommu(what, state.is_reachable(stream))
        })
    }

    fn invalidate(&self, commands: &[Command]) -> Result<(), SmmuInvalidateError> {
        let refused = match self.state().invalidate(commands) {
            Ok(()) => return Ok(()),
            Err(refused) => refused,
        };
        let Refused { number, error, flushed, still_reachable } = refused;
        let error = error.for_viommu("invalidating".into(), still_reachable);
        Err(SmmuInvalidateError { refused: number, flushed, error })
    }
}

impl Drop for SmmuNesting {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            log::error!("host objects are left behind: {error}");
        }
    }
}

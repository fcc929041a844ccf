// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Turns the decisions of a virtual SMMUv3 into host objects.
//!
//! [`SmmuNesting`] implements its [`SmmuHostSide`] as described in [`super`], and:
//!
//! * all devices of one virtual SMMU are behind one physical SMMU: one nesting parent, one vIOMMU
//!   on it, one vEVENTQ, and a vDEVICE for every StreamID, created before the device is first
//!   attached;
//! * a `HWPT_NESTED` stands for words 0 and 1 of a stream table entry. Two of them have no table:
//!   the aborting one and the one that bypasses stage 1. They are created on first use, and stay.
//!   While translation is off, streams that GBPA lets pass are attached to the nesting parent,
//!   which is stage 2 alone: no events are due then, so that no other object is needed;
//! * a device is detached until it is first configured; from then on entries are replaced. It is
//!   detached again only if the host refuses an aborting entry;
//! * a batch of invalidations is one call on the vIOMMU, with the guest's own commands. What cannot
//!   be cached is not forwarded. If the host reports that its SMMU may miss invalidations, each is
//!   issued twice, except those of device-TLBs. After a refusal everything is flushed, the command
//!   to blame is searched for, and the virtual SMMU is told even if all commands are accepted the
//!   second time;
//! * a thread reads the vEVENTQ, and passes the events to the virtual SMMU;
//! * where page requests or stalls may be offered, and the host has them
//!   ([`crate::iommufd::Extensions::smmu_faults`]), each `HWPT_NESTED` with stage 1 has the fault
//!   queue of the host, and another thread reads that.

mod attachments;
mod faults;
mod flush_set;
mod invalidate;
mod page_requests;
mod sides;
mod state;
#[cfg(test)]
mod tests;

use crate::sync::Mutex;
use std::sync::{Arc, MutexGuard, Weak};
use std::time::Duration;

use crate::iommufd::ObjectId;
use crate::nesting::objects::Objects;
use crate::nesting::reader::QueueThread;
use crate::nesting::{DeviceInfo, GuestIoas, NestingError};
use crate::spec::pci::{Bdf, PageResponse};
use crate::spec::smmuv3::command::Command;
use crate::spec::smmuv3::StreamId;
use crate::threads::ThreadStart;
use crate::viommu::smmuv3::{
    EventTarget, SmmuConfig, SmmuHostSide, SmmuInvalidateError, StalledTransaction, StreamPolicy,
};
use crate::viommu::{HostSideError, PageTicket};
use faults::EventRoute;
use invalidate::Refused;
use page_requests::PageRouter;
use state::{Entry, State, Unit};

/// How many events the host keeps for the guest by default.
pub const DEFAULT_EVENT_DEPTH: u32 = 256;

/// How long [`SmmuNesting::quiesce`] waits.
const DELIVERY_TIME: Duration = Duration::from_secs(5);

/// The host side of one virtual SMMUv3. See the [module](self).
///
/// Its lock is taken after the virtual SMMU's and held across host calls; events on their way back
/// to the guest do not take it.
#[derive(Debug)]
pub struct SmmuNesting {
    state: Mutex<State>,
    route: Arc<EventRoute>,
    pages: Arc<PageRouter>,
}

impl SmmuNesting {
    /// Without devices, for a guest whose memory is `ioas`. The host keeps up to
    /// [`DEFAULT_EVENT_DEPTH`] unread events.
    pub fn new(ioas: Arc<GuestIoas>) -> Self {
        Self::with_event_depth(ioas, DEFAULT_EVENT_DEPTH)
    }

    /// The same, for up to `event_depth` unread events.
    pub fn with_event_depth(ioas: Arc<GuestIoas>, event_depth: u32) -> Self {
        let route = Arc::new(EventRoute::default());
        let pages = Arc::new(PageRouter::new(route.clone()));
        let state = State::new(Objects::new(ioas), route.clone(), pages.clone(), event_depth);
        Self { state: Mutex::new(state), route, pages }
    }

    /// The same, for a guest that is offered no more than `config`: without this call, neither page
    /// requests nor stalls. To be called before devices are added.
    #[must_use]
    pub fn serving(mut self, config: &SmmuConfig) -> Self {
        self.state.get_mut().serves_faults = config.page_requests || config.stalls;
        self
    }

    /// The same, with `threads` to start the threads that deliver events and page requests; without
    /// this call, that is [`StdThreads`](crate::threads::StdThreads).
    pub fn with_threads(mut self, threads: Arc<dyn ThreadStart>) -> Self {
        self.state.get_mut().threads = threads;
        self
    }

    /// The guest's memory, for another virtual SMMU of the same guest.
    ///
    /// # Errors
    /// It is shut down.
    pub fn ioas(&self) -> Result<Arc<GuestIoas>, NestingError> {
        self.state().objects.ioas()
    }

    /// Adds `dev`, a device bound to the host, as the guest's `rid`, which is its StreamID. It is
    /// blocked until the virtual SMMU configures it.
    ///
    /// # Errors
    /// The host refuses; the Requester ID or the device is in use; or the device is behind no
    /// SMMUv3, behind one that cannot nest, or behind another one than the devices added earlier.
    /// The device is not added.
    pub fn add_device(&self, rid: Bdf, dev: ObjectId) -> Result<(), NestingError> {
        let result = self.state().add_device(rid, dev);
        self.end_idle_unit();
        result
    }

    /// Removes the guest's `rid`: it is blocked, and its host objects are destroyed unless shared.
    /// The device object itself stays with its owner.
    ///
    /// # Errors
    /// There is no such device; or the host did not detach it, and it was not removed.
    pub fn remove_device(&self, rid: Bdf) -> Result<(), NestingError> {
        let result = self.state().remove_device(rid);
        self.end_idle_unit();
        result
    }

    /// The host's description of each device.
    pub fn hw_infos(&self) -> Vec<DeviceInfo> {
        let state = self.state();
        let info = |device: &state::Device| DeviceInfo {
            rid: device.rid,
            dev: device.dev,
            info: device.info,
        };
        state.devices.values().map(info).collect()
    }

    /// From now on events go to `target`, while it lives.
    pub fn set_fault_target(&self, target: Weak<dyn EventTarget>) {
        self.route.set_target(target);
    }

    /// Waits until all events have been delivered that the host has for the guest now. For a
    /// snapshot, once devices do no more DMA: events that nobody has read are not part of it. Not
    /// to be called by the target of events.
    ///
    /// # Errors
    /// That took longer than 5 s.
    pub fn quiesce(&self) -> Result<(), NestingError> {
        // Not with the lock: what an event sets off may wait for that.
        let signal = self.state().unit.as_ref().and_then(Unit::signal);
        match signal {
            Some(signal) if !signal.quiesce(DELIVERY_TIME) => Err(NestingError::EventsPending),
            _ => Ok(()),
        }
    }

    /// Statistics.
    pub fn counters(&self) -> SmmuNestingCounters {
        self.state().counters()
    }

    /// The existing host objects.
    pub fn objects(&self) -> SmmuObjects {
        let state = self.state();
        let unit = state.unit.as_ref().map(|unit| UnitObjects {
            parent: unit.parent(),
            viommu: unit.viommu(),
            event_queue: unit.event_queue(),
        });
        let devices = state.devices.iter().map(|(stream, device)| DeviceObjects {
            stream: *stream,
            device: device.dev,
            vdevice: device.vdevice,
            attached: device.attached,
        });
        let users = |hwpt| {
            let on_it = state.devices.iter().filter(move |(_, it)| it.attached == Some(hwpt));
            on_it.map(|(stream, _)| *stream).collect()
        };
        let nested = state.nested.iter();
        let nested = nested.map(|(hwpt, ste)| NestedObject { hwpt, ste, streams: users(hwpt) });
        SmmuObjects {
            ioas: state.objects.ioas().ok().map(|ioas| ioas.id()),
            unit,
            devices: devices.collect(),
            nested: nested.collect(),
        }
    }

    /// Stops delivering events, detaches every device and destroys every object created here; the
    /// IOAS goes with its last user. Also done on drop; here errors are returned. May be called
    /// again to retry. Like [`SmmuNesting::remove_device`], not to be called with the virtual SMMU
    /// locked: it waits for an event that may be on its way there.
    ///
    /// # Errors
    /// The host refused to release something.
    pub fn shutdown(&self) -> Result<(), NestingError> {
        let events = self.state().unit.as_mut().and_then(Unit::take_events);
        let queue = events.map(QueueThread::stop);
        let pages = self.state().pages.take();
        let pages = pages.map(QueueThread::stop);
        self.pages.route.close();
        self.state().shutdown(queue, pages)
    }

    /// Releases the objects of the physical SMMU after the last device. The event thread is waited
    /// for without the lock, as it may itself wait for a thread that waits for the lock.
    fn end_idle_unit(&self) {
        let unit = self.state().take_idle_unit();
        if let Some(mut unit) = unit {
            let queue = unit.take_events().map(QueueThread::stop);
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
        let Refused { number, error, flushed, unanswered, done, still_reachable } = refused;
        let error = error.for_viommu("invalidating".into(), still_reachable);
        Err(SmmuInvalidateError { refused: number, flushed, unanswered, done, error })
    }

    fn respond(&self, _: StreamId, ticket: PageTicket, response: PageResponse) {
        self.pages.route.respond(ticket, response);
    }

    fn take_unread(&self) -> Vec<(StalledTransaction, PageTicket)> {
        self.pages.take_unread()
    }
}

impl Drop for SmmuNesting {
    fn drop(&mut self) {
        if let Err(error) = self.shutdown() {
            log::error!("host objects are left behind: {error}");
        }
    }
}

/// The host objects of one virtual SMMUv3.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct SmmuObjects {
    /// The IOAS, until shutdown.
    pub ioas: Option<ObjectId>,
    /// The objects on it, while there are devices.
    pub unit: Option<UnitObjects>,
    /// The devices, by StreamID.
    pub devices: Vec<DeviceObjects>,
    /// What they are or were attached to.
    pub nested: Vec<NestedObject>,
}

/// The part of the physical SMMU that a virtual SMMUv3 has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct UnitObjects {
    /// The nesting parent, on the IOAS.
    pub parent: ObjectId,
    /// The vIOMMU, on the parent.
    pub viommu: ObjectId,
    /// The vEVENTQ, on the vIOMMU.
    pub event_queue: Option<ObjectId>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DeviceObjects {
    /// Its identity for the guest.
    pub stream: StreamId,
    /// The device object.
    pub device: ObjectId,
    /// Its vDEVICE, on the vIOMMU.
    pub vdevice: ObjectId,
    /// The `HWPT_NESTED` that it is attached to, or the nesting parent while translation is off;
    /// `None` while it is detached.
    pub attached: Option<ObjectId>,
}

/// A `HWPT_NESTED`, on the vIOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct NestedObject {
    /// The object.
    pub hwpt: ObjectId,
    /// Words 0 and 1 of its stream table entry.
    pub ste: Entry,
    /// The streams attached to it.
    pub streams: Vec<StreamId>,
}

crate::counters! {
    /// Counters of a [`SmmuNesting`]. Those of events may change while they are read; the
    /// others are a snapshot.
    #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
    #[non_exhaustive]
    pub struct SmmuNestingCounters {
        /// `HWPT_NESTED` objects allocated.
        nested_allocs,
        /// Streams attached to an existing `HWPT_NESTED`.
        nested_shares,
        /// Configurations without a change, and so without a host call.
        unchanged,
        /// Attachments that replaced another one.
        replaces,
        /// Attachments refused by the host.
        refused_attaches,
        /// Commands received from the virtual SMMU.
        commands_in,
        /// Commands completed by the host; one that is issued twice counts twice.
        commands_out,
        /// Commands that needed no host call, because another one of their batch has the same
        /// effect.
        merged,
        /// Commands that needed no host call, because nothing they name can be cached.
        not_cached,
        /// Flushes of everything: after a refused batch, or for invalidations withheld while no
        /// stream used stage 1.
        full_flushes,
        /// Events delivered to the virtual SMMU.
        events,
        /// Times that events were found to be lost.
        events_lost,
        /// Calls to the host, of any verb.
        host_calls,
    }
}

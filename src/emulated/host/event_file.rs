// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The descriptors of fault queues and vEVENTQs.

use std::sync::Arc;

use crate::host::context::Context;
use crate::host::events::{FaultQueue, VeventQueue};
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::UserSpace;
use twostage::iommufd::{
    self, Errno, ObjectId, PageRequestGroup, PageResponseCode, Readiness, Verb, Vevent,
};

/// An object that cannot be destroyed until this is dropped; it also keeps the iommufd open.
#[derive(Debug)]
struct Opened {
    id: ObjectId,
    /// The epoch of the iommufd that the ID belongs to.
    epoch: u64,
    context: Arc<Context>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.context.objects().close_file(self.epoch, self.id);
    }
}

/// An open fault queue.
#[derive(Debug)]
pub(crate) struct OpenFaultQueue {
    queue: Arc<FaultQueue>,
    object: Opened,
}

impl OpenFaultQueue {
    /// Creates and opens a fault queue.
    pub fn new(context: &Arc<Context>) -> Outcome<Self> {
        let mut objects = context.objects();
        let (id, queue) = objects.fault_queue_alloc()?;
        let object = Opened { id, epoch: objects.epoch(), context: context.clone() };
        Ok(Self { queue, object })
    }
}

/// An open vEVENTQ.
#[derive(Debug)]
pub(crate) struct OpenVeventq {
    queue: Arc<VeventQueue>,
    object: Opened,
}

impl OpenVeventq {
    /// Creates and opens a vEVENTQ of `viommu`.
    pub fn new(context: &Arc<Context>, viommu: ObjectId, kind: u32, depth: u32) -> Outcome<Self> {
        let mut objects = context.objects();
        let (id, queue) = objects.veventq_alloc(viommu, kind, depth)?;
        let object = Opened { id, epoch: objects.epoch(), context: context.clone() };
        Ok(Self { queue, object })
    }
}

impl iommufd::FaultQueue for OpenFaultQueue {
    fn object(&self) -> ObjectId {
        self.object.id
    }

    fn next_group(&self) -> iommufd::Result<Option<PageRequestGroup>> {
        Ok(self.queue.next())
    }

    fn respond(&self, cookie: u32, code: PageResponseCode) -> iommufd::Result<()> {
        let outcome = self.queue.respond(cookie, code);
        outcome.map_err(|refusal| refusal.of(Verb::PageResponse, self.object.id))
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> iommufd::Result<()> {
        self.queue.watch(watcher);
        Ok(())
    }
}

impl iommufd::EventQueue for OpenVeventq {
    fn object(&self) -> ObjectId {
        self.object.id
    }

    fn next_event(&self) -> iommufd::Result<Option<Vevent>> {
        Ok(self.queue.next())
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) -> iommufd::Result<()> {
        self.queue.watch(watcher);
        Ok(())
    }
}

/// An open fault queue or vEVENTQ, as read and written by a process.
#[derive(Debug)]
pub struct EventFile(Kind);

#[derive(Debug)]
enum Kind {
    Faults(OpenFaultQueue),
    Events(OpenVeventq),
}

impl From<OpenFaultQueue> for EventFile {
    fn from(queue: OpenFaultQueue) -> Self {
        Self(Kind::Faults(queue))
    }
}

impl From<OpenVeventq> for EventFile {
    fn from(queue: OpenVeventq) -> Self {
        Self(Kind::Events(queue))
    }
}

impl EventFile {
    /// Its object.
    pub fn object(&self) -> ObjectId {
        match &self.0 {
            Kind::Faults(open) => open.object.id,
            Kind::Events(open) => open.object.id,
        }
    }

    /// `read(2)` of `count` bytes to `address` of `user`. Never blocks: 0 if there is nothing.
    ///
    /// # Errors
    /// `EINVAL` the buffer is too small; `ESPIPE` not a whole number of page requests; `EFAULT`.
    pub fn read(&self, user: &dyn UserSpace, address: u64, count: usize) -> Result<usize, Errno> {
        let mut output = |offset: usize, bytes: &[u8]| {
            // If the address wraps, the access fails.
            Ok(user.write(address.wrapping_add(offset as u64), bytes)?)
        };
        let outcome = match &self.0 {
            Kind::Faults(open) => open.queue.read(count, &mut output),
            Kind::Events(open) => open.queue.read(count, &mut output),
        };
        outcome.map_err(|refusal| refusal.errno)
    }

    /// `write(2)` of `count` bytes at `address` of `user`: page responses.
    ///
    /// # Errors
    /// `EINVAL` an invalid response, an unknown cookie, or not a fault queue; `ESPIPE` not a whole
    /// number of responses; `EFAULT`.
    pub fn write(&self, user: &dyn UserSpace, address: u64, count: usize) -> Result<usize, Errno> {
        let mut input = |offset: usize, bytes: &mut [u8]| {
            Ok(user.read(address.wrapping_add(offset as u64), bytes)?)
        };
        let outcome = match &self.0 {
            Kind::Faults(open) => open.queue.write(count, &mut input),
            Kind::Events(_) => refuse(Errno::EINVAL, "a vEVENTQ is not written to"),
        };
        outcome.map_err(|refusal| refusal.errno)
    }

    /// Whether there is something to read (`POLLIN`).
    pub fn readable(&self) -> bool {
        match &self.0 {
            Kind::Faults(open) => open.queue.readable(),
            Kind::Events(open) => open.queue.readable(),
        }
    }

    /// Whether it can be written to (`POLLOUT`): a fault queue always.
    pub fn writable(&self) -> bool {
        matches!(self.0, Kind::Faults(_))
    }

    /// Notifies `watcher`, which replaces an earlier one, of the current state and of changes.
    pub fn watch(&self, watcher: Arc<dyn Readiness>) {
        match &self.0 {
            Kind::Faults(open) => open.queue.watch(watcher),
            Kind::Events(open) => open.queue.watch(watcher),
        }
    }
}

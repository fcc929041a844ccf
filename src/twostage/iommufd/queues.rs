// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues that a host fills and its user reads: page requests, and events of vIOMMUs.

use std::fmt::Debug;
use std::sync::Arc;

use super::{ObjectId, PageRequest, PageResponseCode, Result, Vevent};

/// Told when a queue gets something to read, and when it has nothing left.
pub trait Readiness: Send + Sync {
    /// `readable` says which. The queue, and its whole iommufd, may be locked: make no call of them
    /// here, only wake whoever will.
    fn changed(&self, readable: bool);
}

/// Page requests that are answered together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequestGroup {
    /// What the answer names them by. Never 0.
    pub cookie: u32,
    /// The device that asks.
    pub dev: ObjectId,
    /// Oldest first; the last one closes the group.
    pub requests: Vec<PageRequest>,
}

/// An open fault queue (`IOMMU_FAULT_QUEUE_ALLOC`). Its object cannot be destroyed until this is
/// dropped.
pub trait FaultQueue: Debug + Send + Sync {
    /// Its object, to be named in [`super::HwptAlloc::fault`].
    fn object(&self) -> ObjectId;

    /// The next group; none when there is none. Never waits.
    ///
    /// # Errors
    /// As [`EventQueue::next_event`].
    fn next_group(&self) -> Result<Option<PageRequestGroup>>;

    /// Answers a group.
    ///
    /// # Errors
    /// `EINVAL` the group was answered already: its attachment has ended.
    fn respond(&self, cookie: u32, code: PageResponseCode) -> Result<()>;

    /// Tells `watcher`, in place of an earlier one, of what there is to read, now and from now on.
    fn watch(&self, watcher: Arc<dyn Readiness>);
}

/// An open vEVENTQ (`IOMMU_VEVENTQ_ALLOC`). Its object cannot be destroyed until this is dropped.
pub trait EventQueue: Debug + Send + Sync {
    /// Its object.
    fn object(&self) -> ObjectId;

    /// The next event; none when there is none. Never waits.
    ///
    /// # Errors
    /// `ENOMEM` the host has no memory for it now: the event stays, and can be read later. Anything
    /// else, such as `EIO`: the queue cannot be read, now or ever.
    fn next_event(&self) -> Result<Option<Vevent>>;

    /// Tells `watcher`, in place of an earlier one, of what there is to read, now and from now on.
    fn watch(&self, watcher: Arc<dyn Readiness>);
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues that a host fills and its user reads: page requests, and events of vIOMMUs.

use std::fmt::Debug;
use std::sync::Arc;

use super::{ObjectId, PageRequest, PageResponseCode, Result, Vevent};

/// Is notified when a queue becomes readable or empty.
pub trait Readiness: Send + Sync {
    /// `readable` is the new state. The queue and its iommufd may be locked: do not call them here,
    /// only wake another thread.
    fn changed(&self, readable: bool);
}

/// Page requests that are answered together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequestGroup {
    /// Identifies the group for the response. Never 0.
    pub cookie: u32,
    /// The requesting device.
    pub dev: ObjectId,
    /// Oldest first; the last one closes the group.
    pub requests: Vec<PageRequest>,
}

/// An open fault queue (`IOMMU_FAULT_QUEUE_ALLOC`). Its object cannot be destroyed until this is
/// dropped.
pub trait FaultQueue: Debug + Send + Sync {
    /// Its object, for [`super::HwptAlloc::fault`].
    fn object(&self) -> ObjectId;

    /// The next group, if there is one. Never blocks.
    ///
    /// # Errors
    /// As [`EventQueue::next_event`].
    fn next_group(&self) -> Result<Option<PageRequestGroup>>;

    /// Responds to a group.
    ///
    /// # Errors
    /// `EINVAL` the group was answered already, as its attachment has ended.
    fn respond(&self, cookie: u32, code: PageResponseCode) -> Result<()>;

    /// Notifies `watcher`, which replaces an earlier one, of the current state and of changes.
    fn watch(&self, watcher: Arc<dyn Readiness>);
}

/// An open vEVENTQ (`IOMMU_VEVENTQ_ALLOC`). Its object cannot be destroyed until this is dropped.
pub trait EventQueue: Debug + Send + Sync {
    /// Its object.
    fn object(&self) -> ObjectId;

    /// The next event, if there is one. Never blocks.
    ///
    /// # Errors
    /// `ENOMEM` the host has no memory for it now: the event stays, and can be read later. Other
    /// errors, such as `EIO`: the queue can never be read again.
    fn next_event(&self) -> Result<Option<Vevent>>;

    /// Notifies `watcher`, which replaces an earlier one, of the current state and of changes.
    fn watch(&self, watcher: Arc<dyn Readiness>);
}

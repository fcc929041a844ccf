// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Queues of the recording host: an empty one, and one that a test fills.

use crate::sync::Mutex;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, MutexGuard};

use super::super::{
    Errno, EventQueue, FaultQueue, HostError, ObjectId, PageRequestGroup, PageResponseCode,
    Readiness, Result, Verb, Vevent,
};

/// A fault queue of devices without page requests.
#[derive(Debug)]
pub(super) struct SilentQueue(pub ObjectId);

impl FaultQueue for SilentQueue {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_group(&self) -> Result<Option<PageRequestGroup>> {
        Ok(None)
    }

    fn respond(&self, cookie: u32, _: PageResponseCode) -> Result<()> {
        let detail = format!("no page request has the cookie {cookie}");
        Err(HostError::new(Verb::PageResponse, self.0, Errno::EINVAL, detail))
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        watcher.changed(false);
    }
}

/// The contents of a vEVENTQ, and its watcher.
#[derive(Default)]
pub(super) struct Events(Mutex<Held>);

#[derive(Default)]
struct Held {
    events: VecDeque<Vevent>,
    watcher: Option<Arc<dyn Readiness>>,
}

impl Events {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock()
    }

    /// Adds an event asynchronously, like a host.
    pub fn push(&self, event: Vevent) {
        let mut held = self.held();
        held.events.push_back(event);
        if let Some(watcher) = &held.watcher {
            watcher.changed(true);
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Events").field(&self.held().events).finish()
    }
}

/// An open vEVENTQ.
#[derive(Debug)]
pub(super) struct OpenEvents(pub ObjectId, pub Arc<Events>);

impl EventQueue for OpenEvents {
    fn object(&self) -> ObjectId {
        self.0
    }

    fn next_event(&self) -> Result<Option<Vevent>> {
        let mut held = self.1.held();
        let event = held.events.pop_front();
        if let (true, Some(watcher)) = (held.events.is_empty(), &held.watcher) {
            watcher.changed(false);
        }
        Ok(event)
    }

    fn watch(&self, watcher: Arc<dyn Readiness>) {
        let mut held = self.1.held();
        watcher.changed(!held.events.is_empty());
        held.watcher = Some(watcher);
    }
}

// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Eventfds of blocked routes, which somebody else writes: here they are read, each time, so that
//! the interrupt is sent the long way and the guest is told that it is blocked.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use twostage::warn_limited;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// How many eventfds are looked at each time; the others wait for the next.
const BATCH: usize = 16;

/// A route that may be blocked.
pub(super) trait BlockedRoute: Send + Sync {
    /// Its eventfd was written.
    fn serve(&self);
}

/// The blocked routes of a machine.
#[derive(Default)]
pub(super) struct Unrouted(Mutex<Blocked>);

#[derive(Default)]
struct Blocked {
    /// Waits for them all. Made with the first.
    epoll: Option<Arc<Epoll>>,
    routes: BTreeMap<u32, Weak<dyn BlockedRoute>>,
}

impl Unrouted {
    /// From now on `event`, of the route of `gsi`, is read here.
    pub fn add(&self, gsi: u32, event: &EventFd, route: Weak<dyn BlockedRoute>) {
        let mut blocked = self.blocked();
        if blocked.routes.insert(gsi, route).is_some() {
            return;
        }
        let Some(epoll) = &blocked.epoll else { return };
        let watched = EpollEvent::new(EventSet::IN, gsi.into());
        if let Err(error) = epoll.ctl(ControlOperation::Add, event.as_raw_fd(), watched) {
            warn_limited!("interrupt route {gsi}: {error}; it is lost while it is blocked");
        }
    }

    /// Ends that.
    pub fn remove(&self, gsi: u32, event: &EventFd) {
        let mut blocked = self.blocked();
        if blocked.routes.remove(&gsi).is_some() {
            if let Some(epoll) = &blocked.epoll {
                let nothing = EpollEvent::default();
                // It was there, or could not be added.
                let _ = epoll.ctl(ControlOperation::Delete, event.as_raw_fd(), nothing);
            }
        }
    }

    /// What becomes readable when one of them was written.
    pub fn epoll(&self) -> io::Result<Arc<Epoll>> {
        let mut blocked = self.blocked();
        if let Some(epoll) = &blocked.epoll {
            return Ok(epoll.clone());
        }
        let epoll = Arc::new(Epoll::new()?);
        blocked.epoll = Some(epoll.clone());
        Ok(epoll)
    }

    /// Sends what was written.
    pub fn serve(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); BATCH];
        let count = epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let gsi = event.data() as u32;
            // Not locked while the route is: it locks this when it changes.
            let route = self.blocked().routes.get(&gsi).and_then(Weak::upgrade);
            if let Some(route) = route {
                route.serve();
            }
        }
    }

    fn blocked(&self) -> MutexGuard<'_, Blocked> {
        self.0.lock()
    }
}

impl fmt::Debug for Unrouted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.blocked().routes.keys()).finish()
    }
}

/// Serves the blocked routes of a machine in its event loop.
pub(crate) struct UnroutedInterrupts {
    unrouted: Arc<Unrouted>,
    epoll: Arc<Epoll>,
}

impl UnroutedInterrupts {
    /// Those of `unrouted`, before there are any.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub(super) fn new(unrouted: Arc<Unrouted>) -> io::Result<Self> {
        let epoll = unrouted.epoll()?;
        Ok(Self { unrouted, epoll })
    }
}

impl MutEventSubscriber for UnroutedInterrupts {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&*self.epoll, EventSet::IN)) {
            log::error!("blocked interrupts of assigned devices are lost: {error:?}");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.unrouted.serve(&self.epoll);
    }
}

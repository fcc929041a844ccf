// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Routes of MSIs: each an eventfd that KVM turns into the remapped message within the kernel.
//!
//! The eventfd is written here, or by somebody who knows nothing of routes: an assigned device's
//! driver in the host. In the latter case KVM has the eventfd only while it has a route. While the
//! vector is masked nobody reads the eventfd, so that a pending write is sent with the next
//! message; while the message is blocked it is read here ([`Unrouted`]), so that the fault is
//! reported to the guest.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, Weak};
use twostage::sync::Mutex;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::gsi::{GsiTable, SentMessage};
use super::InterruptSource;
use crate::pci::{EventVector, InterruptVector};
use crate::{Error, Result};
use twostage::viommu::{InterruptListener, InterruptSink, MsiMessage};
use twostage::warn_limited;

/// How many eventfds are looked at each time; the others wait for the next.
const BATCH: usize = 16;

/// Connects eventfds to GSIs.
pub(super) trait Irqfds: Send + Sync {
    /// From now on writing `event` triggers `gsi`.
    fn tie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error>;

    /// Disconnects them.
    fn untie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error>;
}

impl Irqfds for kvm_ioctls::VmFd {
    fn tie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        self.register_irqfd(event, gsi)
    }

    fn untie(&self, event: &EventFd, gsi: u32) -> std::result::Result<(), errno::Error> {
        self.unregister_irqfd(event, gsi)
    }
}

/// Every route of a machine.
///
/// Lock order: the list of routes, a route, the remapper, KVM's table.
pub struct MsiRoutes {
    table: Arc<GsiTable>,
    irqfds: Arc<dyn Irqfds>,
    routes: Mutex<Vec<Weak<VectorRoute>>>,
    unrouted: Arc<Unrouted>,
    triggered: AtomicU64,
}

impl MsiRoutes {
    /// No routes yet.
    pub(super) fn new(table: Arc<GsiTable>, irqfds: Arc<dyn Irqfds>) -> Arc<Self> {
        let (routes, triggered) = (Mutex::default(), AtomicU64::new(0));
        Arc::new(Self { table, irqfds, routes, unrouted: Arc::default(), triggered })
    }

    /// The event loop's subscriber for routes whose eventfd is read here.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub(super) fn unrouted(&self) -> Result<UnroutedInterrupts> {
        UnroutedInterrupts::new(self.unrouted.clone()).map_err(Error::os("epoll"))
    }

    /// How often a route was triggered with KVM doing the rest.
    pub fn triggered(&self) -> u64 {
        self.triggered.load(Ordering::Relaxed)
    }

    /// A route for a vector of `source`, without a message, whose eventfd `writer` writes. Messages
    /// that cannot be routed are sent to `messages` directly.
    ///
    /// # Errors
    /// KVM has no more GSIs, or the process no more file descriptors.
    pub fn allocate(
        self: &Arc<Self>,
        source: InterruptSource,
        messages: Arc<dyn InterruptSink>,
        writer: Writer,
    ) -> Result<Arc<VectorRoute>> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        let gsi = self.table.allocate()?;
        let tied = writer == Writer::Here;
        if tied {
            if let Err(error) = self.irqfds.tie(&event, gsi) {
                self.table.release(gsi);
                return Err(Error::kvm("making an interrupt route")(error));
            }
        }
        let state = Mutex::new(State { message: None, routed: None, tied });
        let routes = self.clone();
        let route = Arc::new_cyclic(|this| {
            let this = this.clone();
            VectorRoute { this, routes, source, messages, gsi, event, writer, state }
        });
        let mut routes = self.list();
        routes.retain(|route| route.strong_count() > 0);
        routes.push(Arc::downgrade(&route));
        Ok(route)
    }

    fn list(&self) -> MutexGuard<'_, Vec<Weak<VectorRoute>>> {
        self.routes.lock()
    }
}

impl InterruptListener for MsiRoutes {
    fn interrupts_changed(&self) {
        let routes: Vec<_> = self.list().iter().filter_map(Weak::upgrade).collect();
        // All are locked until KVM has the new table: nobody triggers by the old one meanwhile.
        let mut states: Vec<_> = routes.iter().map(|route| route.state()).collect();
        let changes: Vec<_> = routes
            .iter()
            .zip(&states)
            .map(|(route, state)| (route.gsi, route.translate(state.message)))
            .collect();
        for ((route, state), (_, sent)) in routes.iter().zip(&mut states).zip(&changes) {
            route.prepare(state, *sent);
        }
        let left_out = self.table.update(changes.iter().copied()).map_err(|error| {
            warn_limited!("interrupt routes: {error}; messages are sent one by one");
        });
        for ((route, state), (gsi, sent)) in routes.iter().zip(&mut states).zip(&changes) {
            let routed = left_out.as_ref().is_ok_and(|left_out| !left_out.contains(gsi));
            state.routed = sent.filter(|_| routed).map(|sent| sent.message);
            route.settle(state);
        }
    }
}

impl fmt::Debug for MsiRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MsiRoutes").field(&self.table).finish()
    }
}

/// Who writes the eventfd of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// [`VectorRoute::trigger`], which knows whether the vector is routed.
    Here,
    /// A device, at any time.
    Device,
}

/// The route of one vector. Dropping it frees it.
pub struct VectorRoute {
    this: Weak<Self>,
    routes: Arc<MsiRoutes>,
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
    gsi: u32,
    event: EventFd,
    writer: Writer,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The message as set up by software, unless masked.
    message: Option<MsiMessage>,
    /// The remapped message in KVM's routing: writing the eventfd sends it.
    routed: Option<MsiMessage>,
    /// The eventfd is connected to KVM, which reads it.
    tied: bool,
}

impl InterruptVector for VectorRoute {
    /// When this returns, the old message is no longer sent.
    fn update(&self, message: Option<MsiMessage>) {
        self.install(&mut self.state(), message);
    }

    /// Nothing is sent without a message.
    fn trigger(&self) {
        let mut state = self.state();
        let Some(message) = state.message else { return };
        if let Some(routed) = state.routed {
            self.routes.triggered.fetch_add(1, Ordering::Relaxed);
            self.source.trace_route(self.gsi, routed);
            if let Err(error) = self.event.write(1) {
                log::debug!("interrupt route {}: {error}", self.gsi);
            }
        } else {
            self.send_one(&mut state, message);
        }
    }

    fn is_pending(&self) -> bool {
        let state = self.state();
        if self.writer == Writer::Here || state.message.is_some() {
            return false;
        }
        // Masked: nobody else reads it.
        match self.event.read() {
            Ok(count) => self.event.write(count).is_ok(),
            Err(_) => false,
        }
    }
}

impl EventVector for VectorRoute {
    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl VectorRoute {
    /// The eventfd of this route, which may be blocked, was written.
    fn serve_blocked(&self) {
        let mut state = self.state();
        // It may have been routed or masked since: then KVM reads it, or nobody.
        let (Some(message), None) = (state.message, state.routed) else { return };
        if self.event.read().is_ok() {
            self.send_one(&mut state, message);
        }
    }

    /// Sends `message` directly, without KVM's routing.
    fn send_one(&self, state: &mut State, message: MsiMessage) {
        if self.source.send(message, &*self.messages) {
            // It was blocked and no longer is, without a notification; or it is always sent like
            // this, and this changes nothing.
            self.install(state, Some(message));
        }
    }

    /// Before KVM's routing becomes `sent`: without a route, the eventfd is disconnected from KVM,
    /// which would discard writes.
    fn prepare(&self, state: &mut State, sent: Option<SentMessage>) {
        if self.writer == Writer::Device && sent.is_none() && std::mem::take(&mut state.tied) {
            self.untie();
        }
    }

    /// After a change: connects the eventfd to its new reader.
    fn settle(&self, state: &mut State) {
        if self.writer == Writer::Here {
            return;
        }
        if state.routed.is_some() && !state.tied {
            self.routes.unrouted.remove(self.gsi, &self.event);
            match self.routes.irqfds.tie(&self.event, self.gsi) {
                Ok(()) => state.tied = true,
                Err(error) => {
                    self.complain(&error, "; sent one by one");
                    state.routed = None;
                }
            }
        } else if state.routed.is_none() && std::mem::take(&mut state.tied) {
            self.untie();
        }
        match (state.message, state.routed) {
            (Some(_), None) => self.routes.unrouted.add(self.gsi, &self.event, self.this.clone()),
            (None, _) => self.routes.unrouted.remove(self.gsi, &self.event),
            (Some(_), Some(_)) => {}
        }
    }

    fn untie(&self) {
        if let Err(error) = self.routes.irqfds.untie(&self.event, self.gsi) {
            self.complain(&error, "");
        }
    }

    fn complain(&self, error: &errno::Error, so: &str) {
        warn_limited!("interrupt route {}: {error}{so}", self.gsi);
    }

    fn install(&self, state: &mut State, message: Option<MsiMessage>) {
        let translated = self.translate(message);
        self.prepare(state, translated);
        let routed = match self.routes.table.update([(self.gsi, translated)]) {
            Ok(left_out) => translated.filter(|_| left_out.is_empty()),
            Err(error) => {
                self.complain(&error, "; messages are sent one by one");
                None
            }
        };
        (state.message, state.routed) = (message, routed.map(|sent| sent.message));
        self.settle(state);
    }

    fn translate(&self, message: Option<MsiMessage>) -> Option<SentMessage> {
        message.and_then(|message| self.source.sent(message))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Drop for VectorRoute {
    fn drop(&mut self) {
        if self.state().tied {
            self.untie();
        }
        self.routes.unrouted.remove(self.gsi, &self.event);
        self.routes.table.release(self.gsi);
    }
}

impl fmt::Debug for VectorRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VectorRoute")
            .field("source", &self.source)
            .field("gsi", &self.gsi)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// The blocked routes of a machine, whose eventfds somebody else writes: here they are read, each
/// time, so that the interrupt is sent the long way and the guest is told that it is blocked.
#[derive(Default)]
struct Unrouted(Mutex<Blocked>);

#[derive(Default)]
struct Blocked {
    /// Waits for them all. Made with the first.
    epoll: Option<Arc<Epoll>>,
    routes: BTreeMap<u32, Weak<VectorRoute>>,
}

impl Unrouted {
    /// From now on `event`, of the route of `gsi`, is read here.
    fn add(&self, gsi: u32, event: &EventFd, route: Weak<VectorRoute>) {
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
    fn remove(&self, gsi: u32, event: &EventFd) {
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
    fn epoll(&self) -> io::Result<Arc<Epoll>> {
        let mut blocked = self.blocked();
        if let Some(epoll) = &blocked.epoll {
            return Ok(epoll.clone());
        }
        let epoll = Arc::new(Epoll::new()?);
        blocked.epoll = Some(epoll.clone());
        Ok(epoll)
    }

    /// Sends what was written.
    fn serve(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); BATCH];
        let count = epoll.wait(0, &mut events).unwrap_or(0);
        for event in events.iter().take(count) {
            let gsi = event.data() as u32;
            // Not locked while the route is: it locks this when it changes.
            let route = self.blocked().routes.get(&gsi).and_then(Weak::upgrade);
            if let Some(route) = route {
                route.serve_blocked();
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
    fn new(unrouted: Arc<Unrouted>) -> io::Result<Self> {
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
